"""Megatron's logs and TensorBoard's files as they are found: cut off, glued, packed, of several
starts, with a loss that is NaN. What the reader does not take is said, and nothing becomes 0.
"""

import bz2
import gzip
import json
import lzma
import os
import re

import pytest

from megatron_tst.cli import plot
from megatron_tst.errors import TSTError
from megatron_tst.planning import curves, logs, plots

ARGUMENTS = {
    "global_batch_size": 4,
    "seq_length": 8,
    "hidden_size": 16,
    "vocab_size": 100,
    "untie_embeddings_and_output_weights": True,
    "make_vocab_size_divisible_by": 64,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "num_layers": 4,
    "ffn_hidden_size": 64,
    "num_experts": None,
    "swiglu": True,
    "lr": 0.001,
    "seed": 1,
    "eval_interval": 5,
    "tst_bag_size": 1,
    "log_interval": 1,
}
TABLE = 128 * 16  # 100 ids padded to 128


def arguments(**changes):
    found = ARGUMENTS | changes
    lines = [f"  {name} {'.' * (48 - len(name))} {found[name]}" for name in sorted(found)]
    rule = "-" * 24
    return [f"{rule} arguments {rule}", *lines, f"{'-' * 20} end of arguments {'-' * 21}"]


def parameters(count=10000, rank=(0, 0, 0)):
    axes = "(tensor, gtp_remat, pipeline)"
    return [f" > number of parameters on {axes} model parallel rank {rank}: {count}"]


def step(i, loss=None, total=30, skipped=0, nan=0, date=None, batch=4):
    """A line of training_log; Megatron leaves out a loss that is NaN."""
    seen = "" if loss is None else f" lm loss: {loss:.6E} |"
    return (
        f" [2026-01-01 10:{date or i:02d}:00.5] iteration {i:8d}/{total:8d} | consumed samples: "
        f"{4 * i:12d} | elapsed time per iteration (ms): 500.0 | learning rate: 1.000000E-03 | "
        f"global batch size: {batch:5d} |{seen} loss scale: 1.0 | grad norm: 0.500 | number of "
        f"skipped iterations: {skipped:3d} | number of nan iterations: {nan:3d} |"
    )


def steps(first, last, **more):
    return [step(i, 6 - 0.1 * i, **more) for i in range(first, last + 1)]


def valid(i, loss, where="", name=""):
    value = loss if isinstance(loss, str) else f"{loss:.6E}"
    return (
        f" validation{name} loss at iteration {i}{where} | lm loss value: {value} | lm loss PPL: "
        f"1.0E+00 | "
    )


def loaded(i):
    return (
        f"  successfully loaded checkpoint from ck [ t 1/1, gtp_remat 1/1, p 1/1 ] at iteration {i}"
    )


HEAD = [*arguments(), *parameters()]
WHOLE = [*HEAD, *steps(1, 5), valid(5, 5.6), *steps(6, 10), valid(10, 5.1)]


@pytest.fixture
def read(tmp_path):
    def of(lines, name="log", encoding="utf-8"):
        file = tmp_path / name
        text = lines if isinstance(lines, str) else "\n".join(lines) + "\n"
        file.write_bytes(text.encode(encoding))
        return curves.read(file)

    return of


@pytest.fixture
def no_picture(monkeypatch):
    """What is drawn: test_plots.py."""
    for name in ("plot", "plot_axes"):
        monkeypatch.setattr(plots, name, lambda *_: None)


def same(run, other):
    fields = ("train", "validation", "raw_tokens", "seconds", "arguments", "parameters", "total")
    assert {f: getattr(run, f) for f in fields} == {f: getattr(other, f) for f in fields}


def test_a_whole_log(read):
    run = read(WHOLE)
    assert run.train == pytest.approx({i: 6 - 0.1 * i for i in range(1, 11)})
    assert run.validation == {5: 5.6, 10: 5.1} and run.total == 30 and not run.notes
    assert run.raw_tokens[10] == 320 and run.seconds[10] == 5.0
    assert run.flops == 6 * (10000 - TABLE) * 32


# ---- the test set, several validation sets


@pytest.mark.parametrize("where", ["", " on validation set"])
def test_the_last_evaluation_of_an_iteration_counts(read, where):
    again = [valid(5, "NAN", where), valid(5, 5.5, where), valid(10, "NAN", where)]
    run = read([*WHOLE, *again])
    assert run.validation == {5: 5.5} and run.nan_validation == {10} and run.nan_from == 10
    run = read([*WHOLE, *again, valid(11, 4.0)])
    assert run.notes == ["NaN at 1 evaluation that is left out, the first 10"]
    run = read([*WHOLE, valid(10, 4.0, " on test set"), valid(10, "NAN", " on test set")])
    assert run.test == {} and run.nan_from is None and run.notes == []


def test_the_test_set_is_no_validation_set(read):
    after = [valid(10, 5.0, " on validation set"), valid(10, 4.0, " on test set")]
    run = read([*WHOLE, *after])
    assert run.validation == {5: 5.6, 10: 5.0} and run.test == {10: 4.0}
    assert curves.summary(run)["test_loss"] == 4.0
    assert read([*WHOLE, after[1]]).validation == {5: 5.6, 10: 5.1}
    assert not read([*HEAD, *steps(1, 3), after[1]]).validation


@pytest.mark.parametrize("names", [("0", "1"), ("pile", "c4"), ("my set", "other-set")])
def test_several_validation_sets_are_apart(tmp_path, names):
    lines = [*HEAD, *steps(1, 10)]
    for name, loss in zip(names, (3.0, 2.0)):
        lines += [valid(10, loss, name=f"-{name}"), valid(10, 1.0, " on test set", f"-{name}")]
    (tmp_path / "log").write_text("\n".join(lines))
    assert curves.read(tmp_path / "log", names[0]).validation == {10: 3.0}
    run = curves.read(tmp_path / "log", names[1])
    assert run.validation == {10: 2.0} and not run.test
    expected = f"--validation-set: expected one of {names[0]}, {names[1]}, which .*, got none."
    with pytest.raises(TSTError, match=expected):
        curves.read(tmp_path / "log")
    (tmp_path / "first").write_text("\n".join([*HEAD, *steps(1, 10), valid(10, 3.0, name="-x")]))
    assert curves.read(tmp_path / "first").validation == {10: 3.0}  # the only one
    (tmp_path / "one").write_text("\n".join(WHOLE))
    with pytest.raises(TSTError, match="expected a run with several sets"):
        curves.read(tmp_path / "one", names[0])


def test_nan_of_one_validation_set_says_nothing_of_another(tmp_path):
    lines = [*HEAD, *steps(1, 10)]
    for i, one, two in ((5, 3.0, 2.0), (10, "NAN", 1.0)):
        lines += [valid(i, one, name="-a"), valid(i, two, name="-b")]
    (tmp_path / "log").write_text("\n".join(lines))
    one, two = (curves.read(tmp_path / "log", name) for name in "ab")
    assert one.nan_from == 10 and one.notes == ["NaN from iteration 10 on"]
    assert one.validation == {5: 3.0} and one.final_validation is None
    assert two.final_validation == 1.0 and two.nan_from is None and two.notes == []


# ---- NaN


@pytest.mark.parametrize(
    "rest, since",
    [
        ([step(8), step(9), valid(10, "NAN")], 8),
        ([step(8), step(9), step(10)], 8),
        ([step(8, float("inf")), step(9)], 8),
        ([*steps(8, 10), valid(10, "NAN")], 10),
        ([*steps(8, 10), valid(10, "INF")], 10),
        ([step(8, skipped=1, nan=1), step(9), step(10)], 9),
        ([step(8, 1e400), step(9, float("nan"))], 8),
    ],
)
def test_a_run_that_ends_in_nan(read, rest, since):
    run, good = read([*HEAD, *steps(1, 5), valid(5, 5.6), *steps(6, 7), *rest]), read(WHOLE, "good")
    assert run.nan_from == since and run.notes[0] == f"NaN from iteration {since} on"
    assert run.final_validation is None and curves.summary(run)["validation_loss"] is None
    assert all(curves.speed_up(*pair, "steps") is None for pair in ((good, run), (run, good)))
    json.dumps(curves.summary(run), allow_nan=False)


def test_nan_in_between_is_left_out_and_said(read):
    run = read([*HEAD, *steps(1, 3), step(4), *steps(5, 10), valid(10, 5.0)])
    assert run.nan_from is None and 4 not in run.train and run.final_validation == 5.0
    assert run.notes == ["NaN at 1 iteration that is left out, the first 4"]


@pytest.mark.parametrize(
    "line",
    [step(4, 0.0, skipped=1), step(4, None, skipped=1, nan=1), step(4, 0.0, skipped=1, nan=1)],
)
def test_a_skipped_iteration_has_no_loss(read, line):
    """Megatron prints a mean over no iteration as 0."""
    run = read([*HEAD, *steps(1, 3), line, *steps(5, 6)])
    assert sorted(run.train) == [1, 2, 3, 5, 6] and run.nan_from is None
    assert run.notes == ["1 iteration skipped by Megatron (loss scale)"]
    assert curves.summary(run)["skipped_iterations"] == 1 and run.raw_tokens[6] == 6 * 32


def test_a_mean_that_is_nan_though_some_iterations_were_skipped(read):
    run = read([*HEAD, step(10, 5.0), step(20, None, skipped=3), step(30, None, skipped=10)])
    assert run.nan == {20} and run.skipped == {20: 3, 30: 10}
    assert "13 iterations skipped by Megatron (loss scale)" in run.notes


def test_a_mean_over_what_was_not_skipped_counts(read):
    run = read([*arguments(log_interval=10), step(10, 5.0), step(20, 4.0, skipped=2)])
    assert run.train == {10: 5.0, 20: 4.0} and run.skipped == {20: 2}
    assert run.notes == ["2 iterations skipped by Megatron (loss scale)"]


def test_a_loss_of_zero_is_one_where_nothing_was_skipped(read):
    assert read([*HEAD, *steps(1, 3), step(4, 0.0)]).train[4] == 0.0


def test_no_speed_up_is_said_of_nan(tmp_path, capsys, no_picture):
    bad = [*HEAD, *steps(1, 5), valid(5, 5.6), *steps(6, 7), step(8), valid(10, "NAN")]
    for name, lines in (("good", WHOLE), ("bad", bad)):
        (tmp_path / name).write_text("\n".join(lines))
    call = ["--output", str(tmp_path / "x.png")]
    call += [f"{name}={tmp_path / name}" for name in ("good", "bad")]
    assert plot.main([*call, "--axes"]) == 0
    said = capsys.readouterr().out
    assert "NaN from iteration 8 on" in said and "speed-up in" not in said
    assert "no speed-up from 1 of 1 pairs" in said
    assert plot.main([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["speed_ups"] == [] and found["runs"]["bad"][0]["nan_from"] == 8


# ---- restarts in one log


@pytest.mark.parametrize(
    "second",
    [
        [*arguments(log_interval=5), *parameters(), loaded(10), *steps(11, 15)],
        [loaded(10), *steps(11, 15)],
        [*arguments(), *parameters(), *steps(11, 15)],
        steps(11, 15, date=40),
    ],
    ids=["all lines", "the last rank's", "nothing of the load", "the iterations alone"],
)
def test_what_a_restart_did_again_counts_once(read, second):
    lost = [step(11, 9.0), step(12, 9.0), step(13, 9.0), valid(13, 9.0)]
    run = read([*WHOLE, *lost, *second, valid(15, 4.0)])
    want = read([*WHOLE, *steps(11, 15), valid(15, 4.0)], "straight")
    assert (run.train, run.validation, run.raw_tokens) == (
        want.train,
        want.validation,
        want.raw_tokens,
    )
    assert run.flops == want.flops and run.seconds == pytest.approx(want.seconds)
    assert run.notes == [
        "iterations 11 to 13 were done again from iteration 10: what came first is left out"
    ]


def test_steps_behind_the_last_checkpoint_are_gone_though_nothing_replaced_them(read):
    """A log that ends soon after its restart: the evaluation at 10 was of the abandoned steps."""
    run = read([*WHOLE, loaded(6), *steps(7, 8)])
    assert run.last == 8 and run.validation == {5: 5.6}
    assert read([*WHOLE, loaded(6)]).last == 6


def test_a_run_that_began_again_from_scratch(read):
    run = read([*WHOLE, *HEAD, *steps(1, 3)])
    assert run.last == 3 and not run.validation and run.seconds[3] == 1.5
    assert run.parameters == 10000 and run.flops == 6 * (10000 - TABLE) * 32


def test_a_boundary_that_was_abandoned(read):
    def tst(i, raw):
        return f" [tst] iteration {i:8d} | phase: x | bag size: 2 | raw tokens: {raw} |"

    def boundary(i, load):
        return [
            f" [tst] boundary after iteration {i}: superposition is done ({64 * i} raw tokens), x",
            f" [tst]   expert load    {load}",
        ]

    head = [*arguments(tst_bag_size=2), *parameters(), *steps(1, 6), tst(6, 384)]
    run = read([*head, *boundary(6, "old"), *steps(7, 8), loaded(4), *steps(5, 5), tst(5, 320)])
    assert run.boundary is None and not run.experts and run.raw_tokens == {5: 320}
    run = read([*head, *boundary(6, "old"), loaded(4), *steps(5, 7), *boundary(7, "new")])
    assert run.boundary == 7 and run.experts == ["expert load: new"] and run.raw_tokens == {7: 448}


def test_a_loss_that_was_nan_before_the_restart(read):
    run = read([*WHOLE, step(11), step(12), loaded(10), *steps(11, 12)])
    assert run.nan_from is None and sorted(run.train) == list(range(1, 13))


def test_nan_of_what_was_not_done_again_stays(read):
    lost = [line for i in (3, 6, 8) for line in (step(i), valid(i, "NAN"))]
    run = read([*HEAD, *steps(1, 2), *lost, step(9, 5.0), valid(9, 5.0), loaded(6), *steps(7, 9)])
    assert run.nan == run.nan_validation == {3, 6} and sorted(run.train) == [1, 2, 7, 8, 9]


def test_the_ranks_of_a_second_file_are_counted_anew(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    wide = [*arguments(tensor_model_parallel_size=2), *parameters(6), *parameters(4, (1, 0, 0))]
    first.write_text("\n".join([*wide, *steps(1, 10)]))
    second.write_text("\n".join([*parameters(7), loaded(10), *steps(11, 12)]))
    assert logs.read_log(first).parameters == 10
    run = logs.read_log(first, second)
    assert run.parameters is None and run.last == 12
    # and those of a start whose arguments have no title
    again = [*wide[1:-3], *parameters(7), loaded(10), *steps(11, 12)]
    first.write_text("\n".join([*wide, *steps(1, 10), *again]))
    assert logs.read_log(first).parameters is None


def test_a_second_file_is_a_start_of_its_own(tmp_path):
    """Whatever its dates are."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("\n".join(WHOLE))
    second.write_text("\n".join(steps(6, 8)))
    run = logs.read_log(first, second)
    assert run.last == 8 and run.validation == {5: 5.6}
    assert run.notes == [
        "iterations 6 to 10 were done again from iteration 5: what came first is left out"
    ]


def test_a_start_without_a_step_says_its_arguments(tmp_path):
    (tmp_path / "log").write_text("\n".join(HEAD))
    run = logs.read_log(tmp_path / "log")
    assert run.arguments["seed"] == "1" and run.parameters == 10000 and run.last == 0


@pytest.mark.parametrize("before, after", [("1", "2"), ("2", "1")])
def test_arguments_without_a_title_that_change_are_of_a_new_start(read, before, after):
    given = [("only_then", "1"), ("seed", before), ("seed", after)]
    run = read([*(f"  {name} {'.' * 9} {value}" for name, value in given), *steps(1, 2)])
    assert run.arguments == {"seed": after}


@pytest.mark.parametrize("date", [9, 10, 40])
def test_an_iteration_that_stands_there_again_with_another_loss(read, date):
    run = read([*WHOLE, step(10, 4.0, date=date)])
    assert run.train[10] == 4.0 and run.validation == {5: 5.6} and run.seconds[10] == 5.0
    assert run.notes == [
        "iteration 10 was done again from iteration 9: what came first is left out"
    ]


def test_a_start_that_goes_on_where_the_last_one_ended(read):
    assert read([*WHOLE, loaded(10), *steps(11, 12)]).notes == []


def test_a_start_that_begins_before_the_checkpoint_that_it_loaded(read):
    run = read([*WHOLE, loaded(10), *steps(6, 7)])
    assert run.last == 7 and run.validation == {5: 5.6} and run.seconds[7] == 3.5
    assert run.notes == [
        "iterations 6 to 10 were done again from iteration 5: what came first is left out"
    ]


@pytest.mark.parametrize(
    "seconds, first, interval, late",
    [
        ((8, 16, 24), 8, "", False),
        ((8, 9, 10), 8, "", True),
        ((8, 15), 8, "", True),
        ((8,), 8, "", False),
        ((4, 8, 16), 8, "", False),  # what lies before the first line says nothing
        ((8, 9), 8, "8", False),
        ((8, 16), 8, "7", True),
        ((1, 2), 1, "1", False),
    ],
)
def test_whether_a_log_begins_late(seconds, first, interval, late):
    assert logs.begins_late(seconds, first, interval) == late


def test_a_restart_with_another_layout(read):
    """Parameters are those of the last start's ranks."""
    wide = [*arguments(tensor_model_parallel_size=2)]
    wide += [*parameters(6000), *parameters(5000, (1, 0, 0)), *steps(1, 10)]
    run = read([*wide, *HEAD, loaded(10), *steps(11, 12)])
    assert run.parameters == 10000 and run.flops == 6 * (10000 - TABLE) * 32
    assert read([*WHOLE, loaded(10), *wide[-12:-10], *steps(11, 12)]).parameters is None


def test_abandoned_evaluations_of_several_sets(tmp_path):
    lines = [*HEAD, *steps(1, 10), valid(5, 3.0, name="-a"), valid(10, 2.0, name="-a"), loaded(5)]
    (tmp_path / "log").write_text("\n".join([*lines, *steps(6, 7)]))
    assert curves.read(tmp_path / "log", "a").validation == {5: 3.0}


def test_a_log_that_begins_at_a_checkpoint(read):
    run = read([*HEAD, loaded(20), *steps(21, 23)])
    assert run.seconds == {} and run.raw_tokens[23] == 23 * 32
    assert run.notes == ["it goes on from iteration 20: the seconds before are not known"]


def test_a_checkpoint_from_before_the_first_line(read):
    """Every eighth iteration has a line, and the checkpoint is of the fifth."""
    head, lines = arguments(log_interval=8), [step(i, 5.0) for i in (8, 16)]
    run = read([*head, *lines, loaded(5), *lines])
    assert run.seconds == {8: 4.0, 16: 8.0}


@pytest.mark.parametrize("skipped, nan", [(3, {25}), (5, set())])
def test_the_first_mean_behind_a_checkpoint_is_of_the_iterations_since(read, skipped, nan):
    run = read([*arguments(log_interval=5), loaded(20), step(25, skipped=skipped)])
    assert run.nan == nan and run.skipped == {25: skipped}


def test_a_loss_that_is_no_number_is_said(read):
    for skipped in (0, 1):
        line = step(11, 5.0, skipped=skipped).replace("5.000000E+00", "5.0[rank1]:E")
        run = read([*WHOLE, line, step(12, 4.8)])
        assert 11 not in run.train and run.nan == set() and run.seconds[12] == 6.0
        assert any(note.startswith("1 line not understood, the first: ") for note in run.notes)


@pytest.mark.parametrize("head", [arguments(log_interval=1), []], ids=["arguments", "none"])
def test_the_seconds_of_lines_that_are_missing_are_not_made_up(read, head):
    run = read([*head, *steps(8, 10)])
    assert run.seconds == {} and run.curve("seconds") is None
    assert "it begins at iteration 8: the seconds before are not known" in run.notes
    sparse = [step(i, 5.0) for i in (8, 16, 24)]
    assert read([*arguments(log_interval=8), *sparse]).seconds[24] == 12.0
    assert read(sparse).seconds[8] == 4.0


@pytest.mark.parametrize(
    "second, differs",
    [
        ([*arguments(seq_length=16), *steps(1, 3)], "seq_length 8, then 16"),
        ([*arguments(hidden_size=32), loaded(10), *steps(11, 12)], "hidden_size 16, then 32"),
        ([*arguments(lr=0.01), *steps(1, 3)], "lr 0.001, then 0.01"),
        ([*arguments(tst_bag_size=4), *steps(1, 3)], "tst_bag_size 1, then 4"),
        ([*arguments(seed=2), *steps(1, 3)], "seed 1, then 2"),
        (steps(1, 3, total=40), "iterations in all 30, then 40"),
        (steps(1, 3, total=40, date=40), "iterations in all 30, then 40"),
        (steps(1, 3, total=20), "iterations in all 30, then 20"),
        (steps(1, 3, total=20, date=40), "iterations in all 30, then 20"),
    ],
)
def test_two_runs_in_one_log(read, second, differs):
    with pytest.raises(TSTError, match=f"expected the log of one run, got two: {differs}. Give"):
        read([*WHOLE, *second])


@pytest.mark.parametrize(
    "changes", [{"lr": 0.01}, {"log_interval": 10}, {"seed": 2}], ids=lambda c: next(iter(c))
)
def test_a_restart_may_change_what_makes_no_other_run(read, changes):
    assert read([*WHOLE, *arguments(**changes), loaded(10), *steps(11, 12)]).last == 12


def test_a_start_that_ended_before_its_first_step_counts_for_nothing(read):
    assert read([*arguments(seq_length=99), *parameters(7), *WHOLE]).flops == 6 * 7952 * 32


# ---- launchers, terminals, files


@pytest.mark.parametrize(
    "prefix",
    [
        *("[rank3]:", "0: ", "[default7]:", "node-01: ", "2026-01-01T10:00:00.123Z "),
        *("[1,0]<stdout>:", "(worker pid=12, ip=10.0.0.1) ", "\x1b[36m(main pid=3)\x1b[0m "),
        "\x1b[2K\x1b[32m",
    ],
)
def test_a_launchers_prefix(read, prefix):
    same(read([prefix + line for line in WHOLE]), read(WHOLE, "plain"))


@pytest.mark.parametrize("key", ["log", "message", "msg"])
def test_lines_that_a_containers_log_driver_wrote(read, key):
    lines = [json.dumps({"time": "x", key: line + "\n", "stream": "stdout"}) for line in WHOLE]
    same(read(["{", '{"log": 3}', "[" * 9999, *lines]), read(WHOLE, "plain"))


@pytest.mark.parametrize("ending", ["\r\n", "\r", "\n\n"])
def test_line_ends(read, ending):
    same(read(ending.join(WHOLE)), read(WHOLE, "plain"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "utf-32"])
def test_encodings(read, encoding):
    same(read(WHOLE, encoding=encoding), read(WHOLE, "plain"))


@pytest.mark.parametrize(
    "head, encoding",
    [
        ("abcd".encode("utf-16-le"), "utf-16-le"),
        ("abcd".encode("utf-16-be"), "utf-16-be"),
        # what follows the first four letters may be of any alphabet
        ("abcd\u4e2d\u4e00".encode("utf-16-le"), "utf-16-le"),
        ("abcd\u4e00\u4e2d".encode("utf-16-le"), "utf-16-le"),
        ("abcd\u4e2d\u4e00".encode("utf-16-be"), "utf-16-be"),
        ("abcd\u4e00\u4e2d".encode("utf-16-be"), "utf-16-be"),
        # less than four letters with a NUL each are no proof
        ("abcd".encode("utf-16-le")[:7], "utf-8-sig"),
        ("abcd".encode("utf-16-be")[:7], "utf-8-sig"),
        (b"a\0b\0c\0de", "utf-8-sig"),
        (b"a\0b\0c\0\0\0", "utf-8-sig"),
        (b"a\0b\0cde\0", "utf-8-sig"),
        (b"\0a\0b\0cde", "utf-8-sig"),
        (b"\0a\0b\0c\0\0", "utf-8-sig"),
        (b"\0\0\0b\0c\0d", "utf-8-sig"),
        (b"\0" * 64, "utf-8-sig"),
        (b"", "utf-8-sig"),
        (b"abcdefgh", "utf-8-sig"),
        (b"\xff\xfe\0\0a", "utf-32"),
        (b"\xff\xfea\0", "utf-16"),
        (b"\xfe\xff\0a", "utf-16"),
    ],
)
def test_the_encoding_that_the_first_bytes_show(head, encoding):
    assert logs._encoding(head) == encoding


def test_bytes_that_are_no_text_do_no_harm(tmp_path, read):
    lines = [line.encode() for line in WHOLE]
    (tmp_path / "bytes").write_bytes(b"\n".join([*lines[:20], b"\xff\xc3\x28 \x80", *lines[20:]]))
    same(curves.read(tmp_path / "bytes"), read(WHOLE, "plain"))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_packed_logs(tmp_path, read, pack):
    packed = pack("\n".join(WHOLE).encode())
    (tmp_path / "log.z").write_bytes(packed)
    same(curves.read(tmp_path / "log.z"), read(WHOLE, "plain"))
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0xFF
    for wrong in (packed[:-9], bytes(damaged)):
        (tmp_path / "cut").write_bytes(wrong)
        assert any("ends too early" in note for note in curves.read(tmp_path / "cut").notes)


def test_two_ranks_on_one_line(read):
    glued = [*HEAD[:-1], HEAD[-1] + step(1, 5.9), *steps(2, 4), step(5, 5.5) + valid(5, 5.6)]
    glued += [f"[rank0]: saving a checkpoint{line}" for line in steps(6, 10)]
    same(read([*glued, valid(10, 5.1)]), read(WHOLE, "plain"))


def test_lines_twice_and_out_of_order(read):
    twice = read([line for line in WHOLE for _ in range(2)])
    same(twice, read(WHOLE, "plain"))
    assert twice.notes == []
    run = read([*HEAD, *steps(1, 2), step(4, 5.6), step(3, 5.7), step(5, 5.5)])
    assert sorted(run.train) == [1, 2, 3, 4, 5]
    assert run.notes == ["lines that do not stand in the order of their dates"]


def test_of_two_lines_of_an_iteration_the_later_one_counts(read):
    """Though it stands behind lines with a later date."""

    def excess(line):
        return line.replace("| loss scale", "| mce minus bag entropy: 1.5 | loss scale")

    def third(*lines):
        run = read([*HEAD, *steps(1, 2), excess(step(3, 5.7)), *steps(4, 5), *lines])
        assert sorted({*run.train, *run.nan, *run.skipped}) == [1, 2, 3, 4, 5]
        assert "lines that do not stand in the order of their dates" in run.notes
        return run.train.get(3), run.excess, run.nan, run.skipped

    skipped, nan = step(3, 0.0, skipped=1), step(3)
    assert third(step(3, 2.0)) == (2.0, {}, set(), {})
    assert third(excess(step(3, 2.0))) == (2.0, {3: 1.5}, set(), {})
    assert third(nan) == (None, {}, {3}, {})
    assert third(skipped) == (None, {}, set(), {3: 1})
    assert third(nan, skipped) == (None, {}, set(), {3: 1})
    for count in (1, 2):
        whole = step(3, None, skipped=count, nan=1)
        assert third(whole) == (None, {}, set(), {3: count})
    assert third(skipped, nan) == (None, {}, {3}, {})
    assert third(skipped, nan, step(3, 2.0)) == (2.0, {}, set(), {})


def test_a_date_of_a_whole_second_may_have_no_fraction(read):
    earlier = step(3, 5.7, date=4).replace(":00.5]", ":00]")
    run = read([*HEAD, *steps(1, 2), step(4, 5.6), earlier, step(5, 5.5)])
    assert sorted(run.train) == [1, 2, 3, 4, 5]
    assert run.notes == ["lines that do not stand in the order of their dates"]


def test_of_two_iterations_with_one_date_the_order_of_the_lines_counts(read):
    run = read([*WHOLE, step(9, 4.0, date=10)])
    assert run.last == 9 and "iterations 9 to 10 were done again" in run.notes[0]


def test_a_clock_that_was_put_back_is_no_restart(read):
    run = read([*HEAD, *(step(i, 5.0, date=20 + i) for i in (1, 2)), *steps(3, 5)])
    assert sorted(run.train) == [1, 2, 3, 4, 5] and run.notes == []
    assert run.seconds == {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0, 5: 2.5}


@pytest.mark.parametrize("left", [-150, -100, -20, 3, 9, 13, 21])
def test_a_last_line_that_is_cut_off(read, left):
    """Whatever is left of it, also of the digits of its loss."""
    line = step(11, 1234.5)
    run = read("\n".join([*WHOLE, line[: line.index("lm loss") + left]]))
    assert run.last == 10 and run.nan_from is None and 11 not in run.raw_tokens
    assert left < -100 or run.notes[0].startswith("1 line not understood, the first: '[2026-01-01")


@pytest.mark.parametrize("left", [-8, -25, -40])
def test_an_evaluation_that_is_cut_off(read, left):
    line = valid(10, 4.0).removesuffix("| lm loss PPL: 1.0E+00 | ")
    run = read("\n".join([*HEAD, *steps(1, 10), line[:left]]))
    assert not run.validation and "1 line not understood" in run.notes[0]


@pytest.mark.parametrize(
    "line",
    [
        "iteration 12: loss = 4.25, lr 1e-3",
        "step 100 loss: 2.5",
        " iteration       11/      30 - something else",
        "Iter 5/10 train loss 3.2",
    ],
)
def test_what_looks_like_an_iteration_and_is_none_is_said(read, line):
    run = read([*WHOLE, line, line])
    assert run.last == 10
    assert run.notes == [f"2 lines not understood, the first: {' '.join(line.split())!r}"]


@pytest.mark.parametrize("length, shown", [(99, 99), (100, 100), (101, 100), (500, 100)])
def test_of_a_line_that_is_not_understood_the_beginning_is_shown(read, length, shown):
    line = "step 100 loss: 2.5 ".ljust(length, "x")
    said = line[:shown] + "..." * (shown < length)
    assert read([*WHOLE, line]).notes == [f"1 line not understood, the first: '{said}'"]
    two = [f"2 lines not understood, the first: '{said}'"]
    assert read([*WHOLE, line, "step 101 loss: 2.5"]).notes == two


@pytest.mark.parametrize(
    "line",
    [
        " [tst] --tst-switch auto at iteration 12: the loss falls by 0.001 nats in a hundredth",
        " [tst]   losses since   6.2E+00 | last validation loss: 6.2E+00 (next-token, iteration 5)",
        "    evaluate .......................................: (9.86, 9.86)",
        "saving checkpoint at iteration      10 to ck in torch_dist format",
        "Evaluating iter 1/2",
        "  building dataset ... done",
    ],
)
def test_lines_that_say_nothing_of_a_loss_are_no_matter(read, line):
    same(read([*WHOLE, line]), read(WHOLE, "plain"))
    assert not read([*WHOLE, line]).notes


def test_what_is_no_log_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TSTError, match="pipe: expected a log file, got something else"):
        curves.read(tmp_path / "pipe")
    (tmp_path / "log.zst").write_bytes(b"\x28\xb5\x2f\xfd rest")
    with pytest.raises(TSTError, match="got a zstd file. Unpack it"):
        curves.read(tmp_path / "log.zst")
    (tmp_path / "folder/inner").mkdir(parents=True)
    with pytest.raises(TSTError, match="expected TensorBoard's event files, got none. Give"):
        curves.read(tmp_path / "folder")


# ---- arguments, FLOPs


def moe(**changes):
    more = {"num_experts": 4, "moe_router_topk": 1, "moe_ffn_hidden_size": 8, **changes}
    return [*arguments(**more), *parameters(20000), *steps(1, 3)]


EXPERT = 3 * 16 * 8


@pytest.mark.parametrize(
    "changes, layers",
    [
        ({"moe_layer_freq": 1}, 4),
        ({"moe_layer_freq": 2}, 2),
        ({"moe_layer_freq": [0, 1, 1, 1]}, 3),
        ({"moe_layer_freq": "[0,0,0,1]"}, 1),
        ({"moe_layer_freq": [0, 1, 1, 1], "mtp_num_layers": 1}, 4),
        ({"moe_layer_freq": [1, 1, 1, 0], "mtp_num_layers": 1}, 3),
        ({"moe_ffn_hidden_size": None, "ffn_hidden_size": 8}, 4),
    ],
)
def test_experts_rest_in_the_layers_that_have_them(read, changes, layers):
    used = 20000 - TABLE - 3 * layers * EXPERT + changes.get("mtp_num_layers", 0) * TABLE
    assert read(moe(**changes)).flops == 6 * used * 32


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_layer_freq": "([0]+[1]*3)"},
        {"moe_layer_freq": [0, 1]},
        {"num_experts": "4 or so"},
        {"hybrid_layer_pattern": "M-ME"},
        {"hybrid_override_pattern": "XE"},
        {"moe_router_topk": "many"},
        {"moe_ffn_hidden_size": None, "ffn_hidden_size": None},
        {"rampup_batch_size": "2 2 100"},
        {"hidden_size": None},
        {"vocab_size": None},
        {"seq_length": "[8, 16]"},
        {"global_batch_size": "None"},
        {"rampup_batch_size": ["2", "2", "100"]},
        {"num_layers": "1" * 400},
    ],
    ids=str,
)
def test_flops_that_do_not_follow_are_missing(read, changes):
    run = read(moe(**changes))
    assert run.flops is None and run.curve("FLOPs") is None
    assert curves.summary(run)["flops"] is None


def test_a_batch_that_grows(read):
    run = read([*HEAD, *steps(1, 3, batch=2), *steps(4, 6)])
    assert run.flops is None and not run.raw_tokens
    said = ["the global batch size is not the same at all steps: FLOPs are not known"]
    assert run.notes == said
    for ramp in ("2 2 100", "['2', '2', '100']"):
        assert read([*arguments(rampup_batch_size=ramp), *steps(1, 3)]).notes == said
    assert read([*arguments(rampup_batch_size=None), *steps(1, 3)]).notes == []


def test_rows_of_the_embedding_are_those_that_megatron_says(read):
    said = "INFO:x: > padded vocab (size: 100) with 156 dummy tokens (new size: 256)"
    assert read([said, *WHOLE]).flops == 6 * (10000 - 256 * 16) * 32
    tokenizer = [*arguments(vocab_size=None), *parameters(), *steps(1, 2)]
    assert read([said, *tokenizer]).flops == 6 * (10000 - 256 * 16) * 32
    assert read(tokenizer).flops is None


@pytest.mark.parametrize(
    "changes, ranks, whole",
    [
        ({"tensor_model_parallel_size": 2}, {(0, 0, 0): 6, (1, 0, 0): 4}, 10),
        ({"tensor_model_parallel_size": 2}, {(0, 0, 0): 6}, None),
        ({"tensor_model_parallel_size": 2}, {(1, 0, 0): 6}, None),
        ({"pipeline_model_parallel_size": 2}, {(0, 0, 1): 9}, None),
        ({"pipeline_model_parallel_size": 2}, {(0, 0, 0): 6, (0, 0, 1): 4}, 10),
        ({}, {(1, 0, 0): 6}, None),
        (
            {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
            {(0, 0, 0): 6, (1, 0, 1): 4},
            None,
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "untie_embeddings_and_output_weights": False,
                "vocab_size": None,
            },
            {(0, 0, 0): 6000, (0, 0, 1): 4000},
            None,
        ),
        ({"expert_model_parallel_size": 2, "hidden_size": None}, {(0, 0, 0): 9000}, 9000),
        (
            {
                "num_experts": 4,
                "tensor_model_parallel_size": 2,
                "expert_tensor_parallel_size": 1,
                "moe_ffn_hidden_size": 8,
            },
            {(0, 0, 0): 9000, (1, 0, 0): 9000},  # each holds all experts
            18000 - 4 * 4 * EXPERT,
        ),
        (
            {"pipeline_model_parallel_size": 2, "untie_embeddings_and_output_weights": False},
            {(0, 0, 0): 6000, (0, 0, 1): 4000},
            10000 - TABLE,
        ),
        (
            {"num_experts": 4, "expert_model_parallel_size": 2, "moe_ffn_hidden_size": 8},
            {(0, 0, 0): 9000},
            9000 + 2 * 4 * EXPERT,
        ),
    ],
)
def test_parameters_are_those_of_the_whole_model(read, changes, ranks, whole):
    lines = [line for rank, count in ranks.items() for line in parameters(count, rank)]
    run = read([*arguments(**changes), *lines, *steps(1, 2)])
    assert run.parameters == whole and type(run.parameters) is type(whole)
    assert ("the number of parameters is not known" in str(run.notes)) == (whole is None)


def test_raw_tokens_of_a_superposed_run_are_not_guessed(read):
    """The [tst] lines are not there: a position is not a token."""
    assert read([*arguments(tst_bag_size=4), *steps(1, 3)]).raw_tokens == {}


# ---- TensorBoard


@pytest.fixture
def writer(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    def start(number, first, last, losses=lambda i: 6 - 0.1 * i, evaluations=(), texts=ARGUMENTS):
        with SummaryWriter(tmp_path / "tb", filename_suffix=f".{number}") as out:
            for name, value in texts.items():
                out.add_text(name, str(value), 0, walltime=1000 * number)
            for i in range(first, last + 1):
                out.add_scalar("lm loss", losses(i), i, walltime=1000 * number + i)
            for i, loss, *name in evaluations:
                out.add_scalar("lm loss validation" + "".join(name), loss, i, 1000 * number + i)
        return tmp_path / "tb"

    return start


@pytest.mark.parametrize(
    "evaluations, texts, validation, test",
    [
        ([(5, 5.5), (10, 5.25), (10, 5.0), (10, 4.0)], ARGUMENTS, {5: 5.5, 10: 5.0}, {10: 4.0}),
        ([(5, 5.5), (10, 5.25), (10, 5.0)], ARGUMENTS, {5: 5.5, 10: 5.0}, {}),
        ([(5, 5.5), (10, 5.25)], ARGUMENTS, {5: 5.5, 10: 5.25}, {}),
        ([(7, 5.5), (10, 5.0), (10, 4.0)], {"eval_interval": 7}, {7: 5.5, 10: 5.0}, {10: 4.0}),
        (
            [(10, 5.0), (10, 4.0)],
            {"eval_interval": 5, "start_eval_at_iter": 11},
            {10: 5.0},
            {10: 4.0},
        ),
        (
            [(5, 5.5), (10, 5.0), (10, 4.5), (10, 4.0)],
            {"eval_interval": 5, "start_eval_at_iter": 5},
            {5: 5.5, 10: 4.5},
            {10: 4.0},
        ),
        (
            [(10, 5.0), (10, 4.5), (10, 4.0)],
            {"eval_interval": 5, "start_eval_at_iter": 10},
            {10: 4.5},
            {10: 4.0},
        ),
        ([(10, 5.0), (10, 4.0)], {"eval_interval": 5}, {10: 4.0}, {}),
        (
            [(10, 5.0), (10, 4.0)],
            {"eval_interval": 5, "start_eval_at_iter": 10},
            {10: 4.0},
            {},
        ),
        ([(10, 5.0), (10, 4.0)], {"eval_interval": 5, "start_eval_at_iter": 6}, {10: 4.0}, {}),
        ([(10, 5.0), (10, 4.0)], {"eval_interval": 0}, {10: 5.0}, {}),
        ([(10, 4.0)], {"eval_interval": 50, "split": "90,0,10"}, {}, {10: 4.0}),
        ([(10, 4.0)], {"eval_interval": 5, "split": "90, 0.0 ,10"}, {}, {10: 4.0}),
        ([(10, 4.0)], {"split": "90,0,10"}, {}, {10: 4.0}),
        ([(10, 4.0)], {"split": "100,0"}, {10: 4.0}, {}),
        ([(10, 4.0)], {"split": "0,90,10"}, {10: 4.0}, {}),
        ([(10, 4.0)], {"eval_interval": 50, "split": "90,10,0"}, {10: 4.0}, {}),
        ([(5, 5.5), (10, 5.25), (10, 5.0), (10, 4.0)], {}, {5: 5.5, 10: 5.0}, {10: 4.0}),
        ([(5, 5.5), (10, 5.0), (10, 4.0)], {}, {5: 5.5, 10: 5.0}, {}),
    ],
)
def test_tensorboard_gives_the_test_set_the_same_tag(writer, evaluations, texts, validation, test):
    run = curves.read(writer(1, 1, 10, evaluations=evaluations, texts=texts))
    assert (run.validation, run.test) == (validation, test)


def test_tensorboard_files_of_restarts(writer):
    writer(1, 1, 13, lambda i: 9.0, evaluations=[(10, 9.0), (13, 9.0)])
    writer(2, 11, 12, evaluations=[(12, 4.0)])
    run = curves.read(writer(3, 11, 14, lambda i: 2.0, evaluations=[(14, 3.0)]))
    assert run.train == {i: 9.0 if i < 11 else 2.0 for i in range(1, 15)}
    assert run.validation == {10: 9.0, 14: 3.0}
    assert [note.split(":")[0] for note in run.notes] == [
        "iterations 11 to 13 were done again from iteration 10",
        "iterations 11 to 12 were done again from iteration 10",
    ]


@pytest.mark.parametrize("name", ["", "-a"])
def test_tensorboard_what_a_restart_did_again_counts_once(tmp_path, name):
    """Losses that were NaN, boundaries, excess and several sets of what was abandoned, at the step
    that was done again and beside it.
    """
    from torch.utils.tensorboard import SummaryWriter

    def start(number, scalars):
        with SummaryWriter(tmp_path, filename_suffix=f".{number}") as out:
            for tag, values in scalars.items():
                for i, value in values.items():
                    out.add_scalar(tag, value, i, walltime=1000 * number + i)
        return curves.read(tmp_path, name[1:] or None)

    nan, valid = float("nan"), f"lm loss validation{name}"
    lost = {
        "lm loss": {**dict.fromkeys(range(1, 4), 5.0), 4: nan, **dict.fromkeys(range(5, 9), nan)},
        "mce minus bag entropy": {3: 4.0, 6: 4.0},
        "tst bag size": {1: 2, 6: 2, 7: 1},
        "tst raw tokens": {4: 8, 7: 14},
        valid: {2: nan, 4: 6.0, 6: nan, 7: nan, 8: 7.0},
        f"{valid} vs samples": {2: 9.0},
        f"{valid} ppl": {2: 9.0},
    }
    run = start(1, lost)
    assert (run.boundary, run.nan, run.nan_validation) == (6, {4, 5, 6, 7, 8}, {2, 6, 7})
    assert run.validation == {4: 6.0, 8: 7.0} and run.raw_tokens == {4: 8, 7: 14}
    assert run.test == {} and list(run.sets) == ["a"] * bool(name)
    run = start(2, {"lm loss": {6: 4.0, 7: 3.0}})
    assert run.train == {1: 5.0, 2: 5.0, 3: 5.0, 6: 4.0, 7: 3.0} and run.nan == {4, 5}
    assert run.boundary is None and run.excess == {3: 4.0} and run.raw_tokens == {4: 8}
    assert run.validation == {4: 6.0} and run.nan_validation == {2} and run.last == 7
    assert run.notes == [
        "iterations 6 to 8 were done again from iteration 5: what came first is left out",
        "NaN at 2 iterations that are left out, the first 4",
        "NaN at 1 evaluation that is left out, the first 2",
    ]


@pytest.mark.parametrize("began, boundary", [(5, None), (6, None), (7, 6), (8, 6)])
def test_tensorboard_a_boundary_is_abandoned_with_its_step(tmp_path, began, boundary):
    from torch.utils.tensorboard import SummaryWriter

    for number, first, bags in ((1, 1, {6: 2, 8: 1}), (2, began, {})):
        with SummaryWriter(tmp_path, filename_suffix=f".{number}") as out:
            for i in range(first, 9):
                out.add_scalar("lm loss", 5.0, i, walltime=1000 * number + i)
            for i, size in bags.items():
                out.add_scalar("tst bag size", size, i, walltime=1000 * number + i)
    run = curves.read(tmp_path)
    which = "iteration 8 was" if began == 8 else f"iterations {began} to 8 were"
    assert run.boundary == boundary and run.notes == [
        f"{which} done again from iteration {began - 1}: what came first is left out"
    ]


@pytest.mark.parametrize("interval, known", [("", True), ("8", True), ("7", False)])
def test_tensorboard_of_a_run_that_writes_seldom(tmp_path, interval, known):
    """Every 8th iteration, so that the first is no late beginning. Its own seconds are not known,
    and a start without losses changes nothing.
    """
    from torch.utils.tensorboard import SummaryWriter

    for number, tag, steps in ((1, "lm loss", (8, 16, 24)), (2, "learning-rate", (30,))):
        with SummaryWriter(tmp_path, filename_suffix=f".{number}") as out:
            out.add_text("tensorboard_log_interval", interval, 0)
            for i in steps:
                out.add_scalar(tag, 5.0, i, walltime=1000 * number + i)
    run = curves.read(tmp_path)
    assert run.seconds == ({16: 8.0, 24: 16.0} if known else {})
    assert run.last == run.total == 24 and not run.validation
    assert run.notes == ["it begins at iteration 8: the seconds before are not known"] * (not known)


def test_tensorboard_seconds_over_a_gap(tmp_path):
    """Two seconds a step, then five, and three steps of which nothing is said in between."""
    from torch.utils.tensorboard import SummaryWriter

    starts = ((1, 2, (1, 2, 3)), (2, 5, (6, 8)), (3, 9, (10,)), (4, 3, (20, 21)))
    for number, each, steps in starts:
        with SummaryWriter(tmp_path, filename_suffix=f".{number}") as out:
            for i in steps:
                out.add_scalar("lm loss", 5.0, i, walltime=1000 * number + each * i)
    # the third start has one step: as long as the mean before, 29 seconds from step 1 to 8
    seconds, third = curves.read(tmp_path).seconds, 29 + 2 * 29 / 7
    assert seconds == pytest.approx(
        {2: 2, 3: 4, 6: 19, 8: 29, 10: third, 20: third + 30, 21: third + 33}
    )


def test_tensorboard_evaluations_again(tmp_path):
    """A later start that only evaluates: its losses count, be they NaN or no more."""
    from torch.utils.tensorboard import SummaryWriter

    nan, tag = float("nan"), "lm loss validation"
    for number, losses in ((1, {5: nan, 10: 4.0, 15: 4.5}), (2, {5: 3.0, 10: nan})):
        with SummaryWriter(tmp_path, filename_suffix=f".{number}") as out:
            for i, loss in losses.items():
                out.add_scalar(tag, loss, i, walltime=1000 * number + i)
    run = curves.read(tmp_path)
    assert run.validation == {5: 3.0, 15: 4.5} and run.nan_validation == {10}
    assert run.total is None and run.seconds == {}
    assert run.notes == ["NaN at 1 evaluation that is left out, the first 10"]


def test_tensorboard_keeps_every_step_of_a_long_run(tmp_path):
    """More than the 10000 that TensorBoard shows."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    with (tmp_path / "events.out.tfevents.1").open("wb") as file:
        out = RecordWriter(file)
        for i in range(1, 10003):
            loss = Summary(value=[Summary.Value(tag="lm loss", simple_value=i)])
            out.write(Event(step=i, wall_time=i, summary=loss).SerializeToString())
    assert curves.read(tmp_path).train == {i: i for i in range(1, 10003)}


def test_tensorboard_file_that_is_cut_off(writer, caplog):
    """What came before counts, and TensorBoard's own complaint is not shown."""
    (file,) = writer(1, 1, 10).iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    assert sorted(curves.read(file).train) == list(range(1, 10))
    assert not caplog.records


def test_tensorboard_warns_of_nothing_that_is_not_read(tmp_path, caplog):
    """Of a second graph in a file, as another program may write it."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    with (tmp_path / "events.out.tfevents.1").open("wb") as file:
        loss = Summary(value=[Summary.Value(tag="lm loss", simple_value=5.0)])
        graph = {"graph_def": b"g"}
        for content in (graph, graph, {"summary": loss}):
            RecordWriter(file).write(Event(step=1, wall_time=1, **content).SerializeToString())
    assert curves.read(tmp_path).train == {1: 5.0} and not caplog.records


def test_tensorboard_folders_of_runs_are_named(tmp_path):
    for name in "abcd":
        (tmp_path / name).mkdir()
        (tmp_path / name / "events.out.tfevents.1").touch()
    three = ", ".join(str(tmp_path / name) for name in "abc")
    with pytest.raises(TSTError) as error:
        curves.read(tmp_path)
    assert f"got none there, but in {three}. Give the folder of one run." in str(error.value)


def test_tensorboard_one_step_says_no_seconds(writer):
    run = curves.read(writer(1, 1, 1))
    assert run.seconds == {} and run.raw_tokens == {1: 32} and run.notes == []


def test_tensorboard_counts_no_time_between_two_starts(writer):
    writer(1, 1, 13)
    assert curves.read(writer(2, 11, 14)).seconds == {i: i - 1 for i in range(2, 15)}
    assert curves.read(writer(3, 15, 15)).seconds[15] == 14


def test_tensorboard_does_not_make_up_the_seconds_before_its_first_file(writer):
    run = curves.read(writer(1, 11, 14))
    assert run.seconds == {} and len(run.train) == 4
    assert run.notes == ["it begins at iteration 11: the seconds before are not known"]


@pytest.mark.parametrize(
    "first, changes, differs",
    [
        (1, {"lr": 0.01}, "lr 0.001, then 0.01"),
        (1, {"seed": 2}, "seed 1, then 2"),
        (11, {"hidden_size": 32}, "hidden_size 16, then 32"),
        (11, {"lr": 0.01}, None),
    ],
)
def test_two_runs_in_one_folder_of_tensorboard(writer, first, changes, differs):
    writer(1, 1, 10)
    path = writer(2, first, 12, texts=ARGUMENTS | changes)
    if differs is None:
        assert curves.read(path).last == 12
        return
    with pytest.raises(TSTError, match=f"expected the log of one run, got two: {differs}. Give"):
        curves.read(path)


@pytest.mark.parametrize("sizes, varying", [((), False), ((4, 4), False), ((4, 8), True)])
def test_tensorboard_batches(tmp_path, sizes, varying):
    """Without arguments; and TensorBoard's logger is as it was."""
    import logging

    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as out:
        for i, size in enumerate(sizes, 1):
            out.add_scalar("batch-size", size, i)
        out.add_scalar("lm loss", 5.0, 1)
        for loss in (4.0, 3.0):
            out.add_scalar("lm loss validation", loss, 1)
    log = logging.getLogger("tensorboard")
    before = log.level
    run = curves.read(tmp_path)
    assert run.varying_batch == varying and log.level == before != logging.CRITICAL
    assert (run.validation, run.test) == ({1: 4.0}, {})


def test_tensorboard_nan_sets_and_what_is_missing(writer, tmp_path):
    path = writer(1, 1, 10, lambda i: float("nan") if i > 7 else 5.0, [(10, 5.0, "-a")], texts={})
    run = curves.read(path, "a")
    assert run.nan_from == 8 and run.validation == {10: 5.0} and run.final_validation is None
    assert run.raw_tokens == {} and run.flops is None and run.positions is None
    assert curves.read(path).validation == {10: 5.0}  # the only one
    with pytest.raises(TSTError, match="expected one of a, which .*, got b. Name one."):
        curves.read(path, "b")
    with pytest.raises(TSTError, match="got none there, but in .*tb. Give the folder of one run"):
        curves.read(tmp_path)


def test_an_event_file_that_is_damaged_or_cut_off(writer):
    """TensorBoard's reader stops there and says nothing."""
    path = writer(1, 1, 100)
    (file,) = path.iterdir()
    whole, notes = file.read_bytes(), curves.read(path).notes
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    run = curves.read(path)
    assert 1 < run.last < 100
    (note,) = set(run.notes) - set(notes)
    told = re.fullmatch(
        re.escape(file.name)
        + r": a record is damaged or cut off, and (\d+) bytes from it on are not read",
        note,
    )
    assert len(whole) - middle <= int(told[1]) < len(whole) - middle + 100
    file.write_bytes(whole[:-3])
    cut = curves.read(path)
    assert cut.last == 99 and "damaged or cut off" in str(cut.notes)


def test_an_event_file_that_tensorboard_fails_on(tmp_path):
    """A record is whole, and what it holds is no event."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    file = tmp_path / "events.out.tfevents.1"
    with file.open("wb") as out:
        RecordWriter(out).write(b"no event")
    expected = r"tfevents.1: expected an event file of TensorBoard, got one that cannot be read"
    with pytest.raises(TSTError, match=rf"{expected} \(DecodeError\)\. Give a log of the run\."):
        curves.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no events", b"\0" * 100])
def test_an_event_file_that_is_none(tmp_path, content):
    (tmp_path / "events.out.tfevents.1").write_bytes(content)
    with pytest.raises(TSTError, match="expected (scalars of Megatron|an event file)"):
        curves.read(tmp_path / "events.out.tfevents.1")


# ---- the verb


@pytest.mark.parametrize(
    "runs, message",
    [
        (["a={log}", "a={log}"], "a run: expected a name of its own, got 'a' twice."),
        (["a={log},{log}"], "the runs of a: expected a log each, got the same one twice."),
        (["a={log}", "--parameters", "0"], "--parameters: expected a whole number from 1 to 10^15"),
        (["a={empty}"], "expected training lines of Megatron with `lm loss`, got none."),
        (["a={nan}"], "got none with a loss (NaN from iteration 1 on). Give"),
        (["a={log},{early}"], "validation losses at the same iterations in every run of a"),
        (["a={log}", "--output", "{log}/x.png"], "expected a place that can be written to"),
        (["a={log}", "--validation-set", "b"], "--validation-set: expected a run with several"),
    ],
)
def test_the_verb_refuses(tmp_path, capsys, runs, message):
    logs = {"log": WHOLE, "empty": [], "nan": [*HEAD, step(1)]}
    logs["early"] = [*HEAD, *steps(1, 4), valid(3, 5.0)]
    for name, lines in logs.items():
        (tmp_path / name).write_text("\n".join(lines))
    places = {name: tmp_path / name for name in logs}
    call = ["--output", str(tmp_path / "x.png"), *(item.format(**places) for item in runs)]
    assert plot.main(call) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not list(tmp_path.glob("*.part*"))


def test_runs_that_are_no_pairs_are_said(tmp_path, capsys, no_picture):
    for name in "abc":
        (tmp_path / name).write_text("\n".join(WHOLE))
    a, b, c = (tmp_path / name for name in "abc")
    assert plot.main(["--output", str(tmp_path / "x.png"), f"one={a}", f"two={b},{c}"]) == 0
    assert (
        "two against one: 2 and 1 runs, of which the first 1 are pairs" in capsys.readouterr().out
    )
