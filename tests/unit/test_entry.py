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


# ---- the way of a run


def of_a_run(**changes):
    return argparse.Namespace(
        **dict(rank=0, load="ck", ckpt_step=3, tokenizer_model="words", tst_bag_size=4, tst_iters=3)
        | changes
    )


@pytest.mark.parametrize(
    "changes, looked_at",
    [
        ({}, ["load ck 3", "restorable", "tokenizer words"]),
        (dict(tst_verify_load=True), ["load ck 3", "restorable", "tokenizer words", "verify"]),
        (dict(tst_iters=None), []),  # a stock run: Megatron says what it makes of it
        (dict(tst_iters=None, tst_verify_load=True), ["verify"]),
    ],
)
def test_what_is_looked_at_of_a_checkpoint(monkeypatch, changes, looked_at):
    seen = []
    monkeypatch.setattr(entry, "check_arguments", lambda config, args: None)
    for name, said in {
        "check_load_folder": "load {} {}",
        "check_restorable": "restorable",
        "check_tokenizer": "tokenizer {}",
        "verify_load": "verify",
    }.items():
        monkeypatch.setattr(entry, name, lambda *given, said=said: seen.append(said.format(*given)))
    entry.check(of_a_run(**changes))
    assert seen == looked_at


@pytest.fixture
def loop(monkeypatch, megatron):
    """Megatron's pretrain in a recorder's place: -> what it was called with, what stood in the
    seams then. The checks before are left out, which have tests of their own.
    """
    import megatron.training
    import megatron.training.training as module

    from megatron_tst.loop import patch, seams

    def pretrain(config, train_valid_test_dataset_provider, model_type, forward_step_func):
        found = dict(
            provider=train_valid_test_dataset_provider,
            patched=patch.status().seams,
            in_scripts=patch.status().in_scripts,
            check=seams.CHECK_CHECKPOINT.function(),
            batches=seams.SKIPPED_BATCH.function(),
        )
        calls.append(found)
        return "what Megatron returns"

    calls = []
    monkeypatch.setattr(module, "pretrain", pretrain)
    monkeypatch.setattr(entry, "_check_data", lambda *given: [])
    for name in ("check_space", "check_arguments", "check_load_folder", "check_restorable"):
        checked = calls.append if name == "check_space" else lambda *given: None
        monkeypatch.setattr(entry, name, checked)
    monkeypatch.setattr(entry, "check_tokenizer", lambda path: None)

    def run(provider=None, forward=None, **changes):
        fine = dict(
            train_iters=10,
            train_samples=None,
            global_batch_size=4,
            seq_length=32,
            num_experts=None,
            tensor_model_parallel_size=1,
            load=None,
            consumed_train_samples=0,
            log_interval=1,
        )
        args = of_a_run(**fine | changes)
        monkeypatch.setattr(megatron.training, "get_args", lambda: args)
        provider, forward = provider or (lambda sizes: None), forward or script_of(False)
        answer = entry.pretrain("config", provider, model_type="gpt", forward_step_func=forward)
        assert answer == "what Megatron returns"
        return args, calls[-1]

    run.calls = calls
    yield run
    patch.remove()


LOOP = [
    "checkpoint_and_decide_exit",
    "evaluate",
    "save_checkpoint_and_time",
    "training_log",
    "get_batch_on_this_tp_rank",
]


def names(seams):
    return [name.rpartition(".")[2] for name in seams]


def test_a_stock_run_has_stock_functions(loop):
    """But for the question whether the checkpoint is of a run with TST."""
    provider = lambda sizes: None  # noqa: E731
    args, found = loop(provider, tst_iters=None)
    assert found["provider"] is provider and not hasattr(args, "tst_plan")
    assert sorted(names(found["patched"])) == ["check_checkpoint_args", "compile_helpers"]
    with pytest.raises(TSTError, match="resuming without TST"):
        found["check"](of_a_run(**checkpoint()))


def checkpoint(**changes):
    """Arguments of a run with TST, as its checkpoint has them."""
    from megatron_tst.checkpoint.phases import store
    from megatron_tst.schedule import Schedule

    args = argparse.Namespace(
        global_batch_size=4, seq_length=32, tst_bag_size=4, tst_iters=3, consumed_train_samples=8
    )
    plan = Schedule.of(4, 3, 40, 32, 4)
    store(args, plan, planned=plan)
    return vars(args) | changes


def test_a_run_with_tst(loop):
    from megatron_tst.checkpoint.phases import stored

    args, found = loop()
    assert stored(args).samples == stored(args, "tst_planned").samples == (12, 28)
    assert set(LOOP) <= set(names(found["patched"]))
    assert loop.calls[0] is args  # room on the disk, on rank 0
    args, _ = loop(rank=1)
    assert args not in [call for call in loop.calls if isinstance(call, argparse.Namespace)]


def test_batches_of_skipped_iterations_are_known_as_such(loop, monkeypatch):
    """Megatron's loop fetches them itself; the script's own function fetches what is trained."""
    import megatron.core.utils as utils

    from megatron_tst.loop.run import Run

    seen = []

    def made(self, stock, trained=True):
        seen.append(trained)
        return lambda batch, **named: stock(batch, **named)

    monkeypatch.setattr(Run, "get_batch_on_this_tp_rank", made)
    script = {"get_batch_on_this_tp_rank": utils.get_batch_on_this_tp_rank, "__name__": "users"}
    exec("def forward(data_iterator, model): pass", script)
    _, found = loop(forward=script["forward"])
    assert sorted(seen) == [False, True]
    assert found["in_scripts"] == ("users.get_batch_on_this_tp_rank",)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_script_that_brings_batches_in_another_way(loop, capsys, ranks):
    if ranks == 1:
        loop(tensor_model_parallel_size=1)
        return
    with pytest.raises(SystemExit) as ended:
        loop(tensor_model_parallel_size=2)
    assert ended.value.code == 2
    assert "tensor parallelism with this script: expected a forward_step" in capsys.readouterr().err


def test_the_next_run_of_a_process_has_hooks_of_its_own(loop):
    """The first run's hold its phases."""
    _, one = loop()
    _, other = loop(tst_bag_size=2)
    assert one["batches"] is not other["batches"]
    _, stock = loop(tst_iters=None)
    assert not set(LOOP) & set(names(stock["patched"]))
