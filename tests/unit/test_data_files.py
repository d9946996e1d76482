"""Data files and output folders: wrong ones are named before training, in one sentence."""

import os
import shutil
import types

import pytest

from megatron_tst import cli
from megatron_tst.checks.files import check_data_files, check_output_folder
from megatron_tst.config import TSTConfig
from megatron_tst.data import corpus as corpora
from megatron_tst.data.dataset import phased_provider
from megatron_tst.errors import TSTError
from megatron_tst.schedule import Schedule


@pytest.fixture
def copied(corpus, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus}{suffix}", tmp_path / f"text{suffix}")
    return str(tmp_path / "text")


def test_a_good_dataset_passes(copied):
    check_data_files([copied], 512)
    check_data_files([copied, "msc://bucket/elsewhere"], None)


def test_missing(tmp_path):
    with pytest.raises(
        TSTError,
        match=r"--data-path: expected .*no.bin and .*no.idx, got no file .*no.idx\. Give the "
        r"prefix without",
    ):
        check_data_files([str(tmp_path / "no")], 512)


def test_one_of_the_pair_missing(copied):
    os.unlink(copied + ".bin")
    with pytest.raises(TSTError, match="got no file .*text.bin"):
        check_data_files([copied], 512)


@pytest.mark.parametrize("left", [0, 5, 40, 1000])
def test_truncated_index(copied, left):
    os.truncate(copied + ".idx", left)
    with pytest.raises(
        TSTError, match="text.idx: expected a whole Megatron index, got one that cannot be read"
    ):
        check_data_files([copied], 512)


def test_truncated_tokens(copied):
    size = os.path.getsize(copied + ".bin")
    os.truncate(copied + ".bin", size - 1000)
    with pytest.raises(
        TSTError, match=rf"text.bin: expected {size} bytes as its index says, got {size - 1000}"
    ):
        check_data_files([copied], 512)


def test_vocabulary_mismatch(copied):
    with pytest.raises(
        TSTError,
        match="vocabulary of .*: expected token ids below the tokenizer's 500, got 511 in document",
    ):
        check_data_files([copied], 500)


def test_output_folders(tmp_path):
    check_output_folder("--save", str(tmp_path / "new" / "folder"))
    assert (tmp_path / "new" / "folder").is_dir() and not os.listdir(tmp_path / "new" / "folder")
    check_output_folder("--save", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        TSTError,
        match="--save: expected a folder that can be written to, got .*file/below: Not a directory",
    ):
        check_output_folder("--save", str(tmp_path / "file" / "below"))
    with pytest.raises(
        TSTError, match="--save: expected a folder that can be written to, got /proc/nowhere"
    ):
        check_output_folder("--save", "/proc/nowhere")


def test_prepare_corpus_round_trip(corpus):
    """Megatron reads back what was written: the tokenizer decodes the documents, each ended by the
    end-of-document id.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from tokenizers import Tokenizer

    dataset, tokenizer = (
        IndexedDataset(str(corpus)),
        Tokenizer.from_file(f"{corpus}.tokenizer.json"),
    )
    texts = [tokenizer.decode(dataset[i].tolist()) for i in range(len(dataset))]
    assert all(dataset[i][-1] == 511 and 511 not in dataset[i][:-1] for i in range(len(dataset)))
    import json

    source = open(json.__file__).read()
    assert source in texts


def test_installed_packages_are_left_out_unless_they_are_asked_for(tmp_path):
    (tmp_path / "site-packages").mkdir()
    for name in ("a.py", "site-packages/b.py", "c.bin"):
        (tmp_path / name).write_text("x")
    assert [path.name for path in corpora.find_files([tmp_path])] == ["a.py"]
    assert [path.name for path in corpora.find_files([tmp_path / "site-packages"])] == ["b.py"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--output", "{new}", "--vocab-size", "10"], "expected at least 300"),
        (["--output", "{corpus}"], "expected a target that is not there yet, got an existing one"),
        (["--output", "{new}", "--input", "{empty}"], "expected text files .* got none"),
        (
            ["--output", "/proc/no/place", "--input", "{source}"],
            "expected a place that can be written to",
        ),
    ],
)
def test_prepare_corpus_refuses(corpus, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    places = dict(
        new=tmp_path / "new",
        corpus=corpus,
        empty=tmp_path / "empty",
        source=corpora.__file__,
    )
    assert cli.main(["corpus", *(a.format(**places) for a in arguments)]) == 2
    captured = capsys.readouterr()
    import re

    assert re.search(message, captured.err) and captured.err.count("\n") == 1
    assert not list(tmp_path.glob("new*")) and not list(tmp_path.glob(".*"))


def test_provider_is_asked_for_long_training_samples_and_stock_validation():
    """Sizes and sequence length of both calls; what they return is tested in the training loop."""
    args = types.SimpleNamespace(seq_length=32, create_attention_mask_in_dataloader=True)
    schedule = Schedule.of(4, 6, 40, 32, 4)
    asked = []

    def provider(sizes, vp_stage=None):
        asked.append(
            (list(sizes), args.seq_length, args.create_attention_mask_in_dataloader, vp_stage)
        )
        return None, "valid", "test"

    provider.is_distributed = True
    wrapped = phased_provider(
        provider, args, TSTConfig(bag_size=4, iters=6), lambda: schedule, None
    )
    assert wrapped.is_distributed and wrapped([40, 17, None], vp_stage=1) == (None, "valid", "test")
    assert asked == [
        ([schedule.long_samples, 1, None], schedule.long_sample_length, False, 1),
        ([1, 17, None], 32, True, 1),
    ]
    assert (args.seq_length, args.create_attention_mask_in_dataloader) == (32, True)
