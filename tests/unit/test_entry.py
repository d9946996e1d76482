"""What is looked at before a run starts, and what is put back after it (loop/entry.py), a piece at
a time; tests/training starts runs.
"""

import argparse
import os
import sys

import pytest

from megatron_tst.config import TSTConfig
from megatron_tst.errors import TSTError
from megatron_tst.loop import entered, entry

OUTPUTS = ("save", "tensorboard_dir", "data_cache_path", "tst_stock_index")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """As in a process that has had no run yet."""
    monkeypatch.setattr(entered, "here", entered.Entered())


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output_folder_is_tried_on_rank_0(monkeypatch, tmp_path, name):
    """With and without TST: a file stands where the folder is to be."""
    monkeypatch.setattr(entry, "check_arguments", lambda config, args: None)
    (tmp_path / "file").write_text("")
    args = argparse.Namespace(rank=1, **{name: str(tmp_path / "file" / "below")})
    assert entry.check(args) == TSTConfig.from_args(args)
    args = argparse.Namespace(**vars(args) | dict(rank=0))
    flag = "--" + name.replace("_", "-")
    with pytest.raises(TSTError, match=f"^{flag}: expected"):
        entry.check(args)


def test_the_same_arguments_are_checked_once(monkeypatch):
    seen = []
    monkeypatch.setattr(entry, "check_arguments", lambda config, args: seen.append(args))
    one, other = argparse.Namespace(rank=1), argparse.Namespace(rank=1)
    for args in (one, one, other, other):
        entry.check(args)
    assert seen == [one, other] and seen[0] is one and seen[1] is other


def test_nccl_is_refused_on_cpu(monkeypatch):
    monkeypatch.setenv("MEGATRON_TST_CPU", "1")
    args = argparse.Namespace(rank=0, distributed_backend="nccl")
    with pytest.raises(TSTError, match="--distributed-backend with MEGATRON_TST_CPU: expected gl"):
        entry.check(args)


def test_helpers_that_are_built_are_left_alone():
    made = []
    entry.build_dataset_helpers(lambda: made.append(1))()
    assert made == []


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("makeflags", [None, "-j2"])
def test_helpers_are_built_for_this_python_and_the_environment_comes_back(
    monkeypatch, makeflags, fails
):
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
    monkeypatch.setenv("PATH", "/before")
    if makeflags is None:
        monkeypatch.delenv("MAKEFLAGS", raising=False)
    else:
        monkeypatch.setenv("MAKEFLAGS", makeflags)
    seen = {}

    def stock():
        seen.update({name: os.environ[name] for name in ("PATH", "MAKEFLAGS")})
        if fails:
            raise SystemExit(1)

    make = entry.build_dataset_helpers(stock)
    if fails:
        with pytest.raises(SystemExit):
            make()
    else:
        make()
    assert seen["PATH"] == f"{os.path.dirname(sys.executable)}:/before"
    assert seen["MAKEFLAGS"].startswith("LIBEXT=.cpython-3")
    assert os.environ["PATH"] == "/before" and os.environ.get("MAKEFLAGS") == makeflags


@pytest.mark.parametrize(
    "rank, load, bag_size, mended",
    [(0, "ck", 4, True), (1, "ck", 4, False), (0, "ck", 1, False), (0, None, 4, False)],
)
def test_who_mends_an_emptied_tracker(monkeypatch, capsys, rank, load, bag_size, mended):
    asked = []
    monkeypatch.setattr(entry, "mend_tracker", lambda folder: asked.append(folder) or 6)
    args = argparse.Namespace(rank=rank, load=load, tst_bag_size=bag_size, tst_iters=3)
    entry.mend(args)
    assert asked == ["ck"] * mended
    assert (" [tst] " in capsys.readouterr().out) == mended


def script_of(asks):
    names = {"get_blend_and_blend_per_split": None} if asks else {}
    exec("def provider(sizes): pass", names)
    return names["provider"]


def data(**changes):
    fine = dict(
        mock_data=False,
        data_path=None,
        train_data_path=None,
        valid_data_path=None,
        test_data_path=None,
        per_split_data_args_path=None,
        data_args_path=None,
        tokenizer_type="NullTokenizer",
        vocab_size=300,
        padded_vocab_size=512,
    )
    return argparse.Namespace(**fine | changes)


@pytest.mark.parametrize(
    "changes, exact",
    [
        ({}, 300),  # every id above is foreign, though the embedding has 512 rows
        (dict(tokenizer_type="HuggingFaceTokenizer"), 512),
        (dict(vocab_size=None), 512),
    ],
)
def test_ids_are_held_against_the_vocabulary(monkeypatch, changes, exact):
    seen = []
    monkeypatch.setattr(entry, "check_data_files", lambda *given: seen.append(given))
    monkeypatch.setattr(entry, "read_blends", lambda args: ((["a"], None), [(["b"], None), None]))
    assert entry._check_data(data(**changes), TSTConfig(), script_of(True)) == []
    assert seen == [(["a", "b"], exact)]


def test_who_needs_no_corpus(monkeypatch):
    monkeypatch.setattr(entry, "read_blends", lambda args: (None, None))
    assert entry._check_data(data(mock_data=True), TSTConfig(), script_of(True)) == []
    assert entry._check_data(data(), TSTConfig(), script_of(False)) == []  # has data of its own
    with pytest.raises(TSTError, match="--data-path: expected a corpus, .* got none"):
        entry._check_data(data(), TSTConfig(), script_of(True))


@pytest.mark.parametrize(
    "checked, came, refused",
    [(False, False, False), (True, False, True), (True, True, False)],
)
def test_a_run_that_did_not_come_through_our_pretrain(checked, came, refused):
    args = argparse.Namespace(tst_bag_size=4, tst_iters=3)
    way = entered.Entered(args if checked else None, came)
    if not refused:
        way.require_pretrain()
        return
    with pytest.raises(TSTError, match="the --tst flags: expected a script that calls the pretrai"):
        way.require_pretrain()
    entered.Entered(argparse.Namespace()).require_pretrain()  # nothing of TST is asked for
