"""Data files and output folders: wrong ones are named before training, in one sentence."""

import os
import shutil
import struct
import types

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_tst import cli
from megatron_tst.checks import files
from megatron_tst.checks.files import (
    check_data_files,
    check_load_folder,
    check_output_folder,
    check_tokenizer,
)
from megatron_tst.config import TSTConfig
from megatron_tst.data import corpus as corpora
from megatron_tst.data import dataset
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
    with pytest.raises(TSTError, match="got no file missing.idx"):
        check_data_files(["msc://bucket/elsewhere", "missing"], None)


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


def changed(prefix, part, at, value):
    """Write a number into an index: into its lengths, pointers or documents, or a code."""
    with open(prefix + ".idx", "r+b") as file:
        code, sequences, _ = struct.unpack_from("<BQQ", file.read(34), 17)
        place, kind = {
            "code": (17, "<B"),
            "lengths": (34 + 4 * at, "<i"),
            "pointers": (34 + 4 * sequences + 8 * at, "<q"),
            "documents": (34 + 12 * sequences + 8 * at, "<q"),
        }[part]
        file.seek(place)
        file.write(struct.pack(kind, value))
    assert code == 8  # unsigned 16 bit


@pytest.mark.parametrize(
    "part, at, value, message",
    [
        ("code", 0, 3, None),  # signed: all ids are small
        ("code", 0, 4, r"text.bin: expected \d+ bytes|sequence 1 at byte"),
        ("code", 0, 7, "expected token ids, which are whole numbers, got float32"),
        (
            "lengths",
            3,
            10,
            r"expected sequence 4 at byte \d+, where the one before it ends, got at",
        ),
        ("lengths", 3, -10, "expected lengths of 0 and more, got -10 of sequence 3"),
        ("lengths", 5, -1, "expected lengths of 0 and more, got -1 of sequence 5"),
        ("pointers", 0, 2, r"expected sequence 0 at byte 0, got at 2\."),
        ("pointers", 0, -2, r"expected sequence 0 at byte 0, got at -2\."),
        (
            "pointers",
            3,
            2,
            r"expected sequence 3 at byte \d+, where the one before it ends, got at 2",
        ),
        ("lengths", 0, -10, "expected lengths of 0 and more, got -10 of sequence 0"),
        ("lengths", 70, -10, "expected lengths of 0 and more, got -10 of sequence 70"),
        ("pointers", 1, 2, r"expected sequence 1 at byte \d+, where .* got at 2"),
        ("pointers", 70, 2, r"expected sequence 70 at byte \d+, where .* got at 2"),
        ("documents", 0, 1, "expected documents from sequence 0, got from 1"),
        ("documents", 0, -1, "expected documents from sequence 0, got from -1"),
        ("documents", 1, -1, "expected document 1 at sequence 0 or behind it, got at -1"),
        ("documents", 4, 3, None),  # document 3 has no sequence
        ("documents", 71, 99, "expected document 72 at sequence 99 or behind it, got at 72"),
        ("pointers", 4, 2, r"expected sequence 4 at byte \d+, where .* got at 2"),
        ("documents", 4, 2, "expected document 4 at sequence 3 or behind it, got at 2"),
        ("documents", 5, 3, "expected document 5 at sequence 4 or behind it, got at 3"),
        ("documents", 72, 71, "an index|cannot be read .AssertionError."),
    ],
)
@pytest.mark.parametrize("block", [files._BLOCK, 4, 71])
def test_an_index_that_does_not_fit_together(copied, monkeypatch, part, at, value, message, block):
    monkeypatch.setattr(files, "_BLOCK", block)
    changed(copied, part, at, value)
    if message is None:
        check_data_files([copied], 512)
        return
    with pytest.raises(TSTError, match=message):
        check_data_files([copied], 512)


@pytest.mark.parametrize(
    "documents, content, message",
    [
        (0, b"", "text.bin: expected at least one token, got none"),
        (1, b"", "text.bin: expected at least one token, got none"),
        (0, b"ab", "text.idx: expected at least one document, got none"),
        (1, b"ab", "text.bin: expected 0 bytes as its index says, got 2"),
    ],
)
def test_an_index_of_nothing(tmp_path, documents, content, message):
    prefix = str(tmp_path / "text")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32)
    for _ in range(documents):
        builder.add_document(np.array([], dtype=np.int32), [0])
    builder.finalize(prefix + ".idx")
    (tmp_path / "text.bin").write_bytes(content)
    with pytest.raises(TSTError, match=message):
        check_data_files([prefix], 512)


def test_longer_files(copied):
    for suffix, message in (
        (".idx", r"text.idx: expected \d+ bytes for its numbers"),
        (".bin", ""),
    ):
        with open(copied + suffix, "ab") as file:
            file.write(bytes(6))
        with pytest.raises(TSTError, match=message or "bytes as its index says"):
            check_data_files([copied], 512)
        os.truncate(copied + suffix, os.path.getsize(copied + suffix) - 6)
    check_data_files([copied], 512)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_id_outside_the_vocabulary(copied, monkeypatch, whole, where):
    """Wherever it is; a file too large to be read whole is looked at from its first block to its
    last.
    """
    if not whole:
        monkeypatch.setattr(files, "_WHOLE", 0)
        monkeypatch.setattr(files, "_SAMPLE", 4096)
        monkeypatch.setattr(files, "_SAMPLES", 251)
    size = os.path.getsize(copied + ".bin")
    check_data_files([copied], 512)
    with open(copied + ".bin", "r+b") as file:
        file.seek({"first": 0, "middle": size // 4 * 2, "last": size - 2}[where])
        file.write(struct.pack("<H", 40000))
    document = {"first": "0", "middle": r"\d\d", "last": "71"}[where]
    with pytest.raises(
        TSTError, match=f"below the tokenizer's 512, got 40000 in document {document}"
    ):
        check_data_files([copied], 512)
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first of the node looks for all
    check_data_files([copied], 512)


def test_the_first_of_several_faults_is_named(copied):
    for part, value, message in (
        ("lengths", -10, "got -10 of sequence 3"),
        ("documents", 2, "expected document 3 at sequence 9 or behind it, got at 2"),
    ):
        with open(copied + ".idx", "rb") as file:
            before = file.read()
        if part == "documents":
            changed(copied, part, 2, 9)
        changed(copied, part, 3, value)
        changed(copied, part, 7, value)
        with pytest.raises(TSTError, match=message):
            check_data_files([copied], 512)
        with open(copied + ".idx", "wb") as file:
            file.write(before)
    with open(copied + ".bin", "r+b") as file:
        for place in (0, os.path.getsize(copied + ".bin") - 2):
            file.seek(place)
            file.write(struct.pack("<H", 40000))
    with pytest.raises(TSTError, match="got 40000 in document 0"):
        check_data_files([copied], 512)


def test_sequences_without_tokens_and_modes_of_sequences(tmp_path):
    """Both are written by Megatron's own builder."""
    for multimodal in (False, True):
        prefix = str(tmp_path / f"text{multimodal}")
        builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32, multimodal=multimodal)
        for tokens in ([1, 2], [], [3]):
            modes = [1] if multimodal else None
            builder.add_document(np.array(tokens, dtype=np.int32), [len(tokens)], modes)
        builder.finalize(prefix + ".idx")
        check_data_files([prefix], 4)


def test_a_file_of_as_much_as_is_read_whole(copied, monkeypatch):
    """One byte more is looked at in samples, here at its first and last token alone."""
    size = os.path.getsize(copied + ".bin")
    monkeypatch.setattr(files, "_WHOLE", size)
    monkeypatch.setattr(files, "_SAMPLE", 2)
    monkeypatch.setattr(files, "_SAMPLES", 2)
    with open(copied + ".bin", "r+b") as file:
        file.seek(2)
        file.write(struct.pack("<H", 40000))
    with pytest.raises(TSTError, match="got 40000 in document 0"):
        check_data_files([copied], 512)
    monkeypatch.setattr(files, "_WHOLE", size - 1)
    check_data_files([copied], 512)


def test_the_first_of_a_node_reads_the_index_and_the_others_its_sizes(copied, monkeypatch):
    changed(copied, "pointers", 3, 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_data_files([copied], 512)
    for rank in ("0", None):
        monkeypatch.delenv("LOCAL_RANK") if rank is None else monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(TSTError, match="expected sequence 3 at byte"):
            check_data_files([copied], 512)
    monkeypatch.setenv("LOCAL_RANK", "1")
    os.truncate(copied + ".bin", 1000)
    with pytest.raises(TSTError, match="bytes as its index says, got 1000"):
        check_data_files([copied], 512)


def test_how_much_is_read():
    """As check_data_files' docstring says."""
    assert files._WHOLE == 256 * 2**20
    assert (files._SAMPLES, files._SAMPLE * files._SAMPLES) == (1024, 64 * 2**20)


def test_negative_ids(tmp_path):
    prefix = str(tmp_path / "text")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32)
    builder.add_document(np.array([0, -1, 3], dtype=np.int32), [2, 1])
    builder.finalize(prefix + ".idx")
    check_data_files([prefix], None)
    with pytest.raises(TSTError, match="got -1 in document 0"):
        check_data_files([prefix], 512)


@pytest.mark.parametrize("looked_at", ["all of it", "samples of it"])
def test_the_vocabulary_of_documents_far_behind(tmp_path, monkeypatch, looked_at):
    """One token of the last document outside the vocabulary, far behind the first block of tokens
    that is looked at. A large file is looked at here and there, its end too.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_tst.checks import files

    prefix, count = str(tmp_path / "many"), 600
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    for i in range(count):
        builder.add_document(np.array([0, 2, 700 if i == count - 1 else 3]), [3])
    builder.finalize(prefix + ".idx")
    monkeypatch.setattr(files, "_BLOCK", 64)
    if looked_at == "samples of it":
        monkeypatch.setattr(files, "_WHOLE", 100)
        monkeypatch.setattr(files, "_SAMPLE", 20)
        monkeypatch.setattr(files, "_SAMPLES", 5)
    check_data_files([prefix], 701)
    check_data_files([prefix], None)
    with pytest.raises(TSTError, match=f"got 700 in document {count - 1}"):
        check_data_files([prefix], 700)


def test_a_tokenizer_that_is_not_there(tmp_path):
    (tmp_path / "tokenizer.model").write_text("x")
    for fine in (None, "", "meta-llama/Llama-3.1-8B", "s3://bucket/t.json", "gpt2"):
        check_tokenizer(fine)
    check_tokenizer(str(tmp_path))
    check_tokenizer(str(tmp_path / "tokenizer.model"))
    for path in (str(tmp_path / "nope"), "./nope", "~/nope", "a/tokenizer.json", "x.model"):
        with pytest.raises(TSTError, match="--tokenizer-model: expected .* got nothing at"):
            check_tokenizer(path)


def test_output_folders(tmp_path):
    check_output_folder("--save", str(tmp_path / "new" / "folder"))
    assert (tmp_path / "new" / "folder").is_dir() and not os.listdir(tmp_path / "new" / "folder")
    check_output_folder("--save", str(tmp_path / "new" / "folder"))  # again
    for elsewhere in (None, "", "s3://bucket/folder"):
        check_output_folder("--save", elsewhere)
    assert not os.path.exists("s3:")
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


def test_load_folders(tmp_path):
    for name in ("iter_0000004", "iter_0000012"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metadata.json").write_text("{}")
    (tmp_path / "iter_a0000003").mkdir()  # somebody's own
    for step in (None, 4, 12):
        check_load_folder(str(tmp_path), step)
    check_load_folder(None, 3)
    check_load_folder("s3://a/iter_0000004", None)
    check_load_folder(str(tmp_path / "new"), None)
    check_load_folder(str(tmp_path / "new"), 3)
    for end in ("", "/", "/."):
        with pytest.raises(TSTError, match=f"--load: expected the folder that .* Give {tmp_path},"):
            check_load_folder(f"{tmp_path}/iter_0000004{end}", None)
    with pytest.raises(TSTError, match="--ckpt-step: expected one of 4, 12 in .*, got 5"):
        check_load_folder(str(tmp_path), 5)


@pytest.mark.parametrize("name", ["iter_0000004", "iter_123456789", "release"])
def test_an_iterations_own_folder(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    check_load_folder(str(folder), None)  # somebody's name for what has no checkpoint's files
    (folder / "metadata.json").write_text("{}")
    for other in ("iter_000004", "released", "iter_0000004.old"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "metadata.json").write_text("{}")
        check_load_folder(str(tmp_path / other), None)
    with pytest.raises(TSTError) as caught:
        check_load_folder(str(folder), None)
    assert str(caught.value) == (
        f"--load: expected the folder that --save named, got {folder}, a checkpoint in it. "
        f"Give {tmp_path}, and --ckpt-step for another iteration than the last."
    )


def test_a_step_that_is_not_there(tmp_path):
    """The last nine of those that are; folders of other names are none."""
    for name in ("iter_0000003.old", "iter_", "other"):
        (tmp_path / name).mkdir()
    with pytest.raises(TSTError) as caught:
        check_load_folder(str(tmp_path), 5)
    assert str(caught.value) == (
        f"--ckpt-step: expected an iteration in {tmp_path}, got 5. Correct it."
    )
    for step in (1_000_000, *range(20, 120, 10)):
        (tmp_path / f"iter_{step:07d}").mkdir()
        check_load_folder(str(tmp_path), step)
    with pytest.raises(TSTError) as caught:
        check_load_folder(str(tmp_path), 5)
    assert str(caught.value) == (
        "--ckpt-step: expected one of 40, 50, 60, 70, 80, 90, 100, 110, 1000000 in "
        f"{tmp_path}, got 5. Correct it."
    )


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
    for root, name in (tmp_path, "a.py"), (tmp_path / "site-packages", "b.py"):
        found = corpora.find_files([root], tmp_path / "out", corpora.LeftOut())
        assert [path.name for path in found] == [name]


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
    args = types.SimpleNamespace(
        seq_length=32, create_attention_mask_in_dataloader=True, consumed_train_samples=0
    )
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
    wrapped([33, 0, 0])  # fewer are asked for near the end of a run
    assert [sizes for sizes, *_ in asked[2:]] == [[schedule.long_samples, 0, 0], [1, 0, 0]]
    with pytest.raises(AssertionError):
        wrapped([41, 0, 0])


class Longs(list):
    """Stands for a dataset of long samples: as many, and the indices of one or of a blend."""

    def __init__(self, count, **indices):
        super().__init__(range(count))
        self.config = types.SimpleNamespace(sequence_length=128)
        same = dict.fromkeys(("document_index", "sample_index", "shuffle_index"), np.arange(3))
        vars(self).update(same | indices)


def asking(args, config, schedule, train):
    """A provider that is asked for [40, 0, None] -> (calls, what is kept, the training data)"""
    calls, kept = [], []

    def provider(sizes):
        calls.append((list(sizes), args.seq_length, getattr(args, "data_cache_path", None)))
        return train(sizes[0]), "valid", "test"

    wrapped = phased_provider(
        provider, args, config, lambda: schedule, lambda *pair: kept.append(pair)
    )
    found, *others = wrapped([40, 0, None])
    assert others == ["valid", "test"]
    return calls, kept, found


@pytest.mark.parametrize("rank", [0, 1])
def test_the_stock_index_is_written_by_the_first_rank(monkeypatch, rank):
    args = types.SimpleNamespace(
        seq_length=32,
        create_attention_mask_in_dataloader=True,
        data_cache_path="cache",
        rank=rank,
        padded_vocab_size=99,
        consumed_train_samples=0,
    )
    schedule, written = Schedule.of(4, 6, 40, 32, 4), []
    monkeypatch.setattr(dataset.stock_index, "write", lambda *given: written.append(given))
    config = TSTConfig(bag_size=4, iters=6, stock_index="index")
    calls, ((train, stock),), found = asking(args, config, schedule, Longs)
    long, count = schedule.long_sample_length, schedule.long_samples
    assert calls == [
        ([count, 0, None], long, "cache"),
        ([1, 0, None], 32, "cache"),
        ([40, 0, None], 32, "index"),
    ]
    assert args.data_cache_path == "cache" and len(stock) == 40
    assert written == ([(train.long_samples, stock, schedule)] if rank == 0 else [])
    assert found is train and args.tst_long_samples == count
    assert (train.vocab_size, len(train), "attention_mask" in train.mask) == (99, 40, True)
    assert asking(args, config, schedule, lambda size: None)[1:] == ([], None)


def test_a_dataset_that_has_been_read():
    """Each sample of it, and beyond them the last."""
    more = dataset._OneMore([10, 11, 12], 5)
    assert len(more) == 5 and [more[i] for i in range(5)] == [10, 11, 12, 12, 12]


def blend(**changes):
    """Of two corpora, the first has two thirds of the samples."""
    parts = {"datasets": [Longs(99), Longs(99)]}
    indices = dict(dataset_index=np.arange(99) % 3 // 2, dataset_sample_index=np.arange(99))
    return lambda size: Longs(size, **parts | indices | changes)


OTHER = np.array([0, 2, 1])


@pytest.mark.parametrize(
    "before, later",
    [
        (Longs, lambda size: Longs(size, document_index=OTHER)),
        (Longs, lambda size: Longs(size, sample_index=OTHER)),
        (Longs, lambda size: Longs(size, shuffle_index=OTHER)),
        (blend(), blend(dataset_index=np.arange(99) % 2)),
        (blend(), blend(dataset_sample_index=np.arange(1, 100))),
        (blend(), blend(datasets=[Longs(99), Longs(99, shuffle_index=OTHER)])),
        (blend(), blend(datasets=[Longs(99, sample_index=OTHER), Longs(99)])),
    ],
)
def test_a_longer_run_reads_its_data_in_the_order_of_the_first(before, later):
    args = types.SimpleNamespace(
        seq_length=32,
        create_attention_mask_in_dataloader=False,
        padded_vocab_size=None,
        consumed_train_samples=0,
    )
    schedule, config = Schedule.of(4, 6, 40, 32, 4), TSTConfig(bag_size=4, iters=6)

    def asked(first, second, began):
        args.tst_long_samples = began
        return asking(args, config, schedule, lambda n: (first if n == began else second)(n))[0]

    count = schedule.long_samples
    for began in (None, 0, count, count + 5):  # nothing to compare
        calls = asked(before, later, began)
        assert [sizes for sizes, *_ in calls] == [[max(count, began or 0), 0, None], [1, 0, None]]
        assert args.tst_long_samples == max(count, began or 0)
    assert len(asked(before, before, count - 1)) == len(asked(later, later, count - 1)) == 3
    message = f"--tst-override: expected at most the {count - 1} long samples of 128 tokens .* "
    with pytest.raises(TSTError, match=f"{message}the run began with, got {count}"):
        asked(before, later, count - 1)


def test_a_corpus_of_which_nothing_was_read_may_come_in_any_order():
    """Of a blend; and what lies behind the samples that were read does not count."""
    only = dict(dataset_index=np.repeat([0, 1], [50, 49]))
    first = blend(**only)(9)
    other = blend(**only, datasets=[Longs(99), Longs(99, shuffle_index=OTHER)])(99)
    other.dataset_sample_index = np.concatenate([np.arange(50), np.zeros(49)])
    dataset._check_same_order(first, other, 50)
    with pytest.raises(TSTError):
        dataset._check_same_order(first, other, 51)
