"""What is read off training curves: on curves whose answer is known, on Megatron's log lines, and
on real TensorBoard files.
"""

import json
import math

import pytest

from megatron_tst.cli import plot
from megatron_tst.planning import curves, plots
from megatron_tst.planning.curves import reached, speed_up, spread
from megatron_tst.planning.runs import AXES, Run, interpolated

ARGUMENTS = {
    "global_batch_size": "4",
    "seq_length": "8",
    "hidden_size": "16",
    "vocab_size": "100",
    "untie_embeddings_and_output_weights": "True",
    "make_vocab_size_divisible_by": "64",
    "tensor_model_parallel_size": "1",
    "num_layers": "2",
}

MODEL = {"arguments": ARGUMENTS, "parameters": 10000}


def line(slope, steps=10, **more):
    """A run whose validation loss falls on a straight line from 10."""
    validation = {100 * i: 10 - slope * i for i in range(1, steps + 1)}
    return Run(
        train=validation, validation=validation, arguments=ARGUMENTS, parameters=10000, **more
    )


def test_reached_lies_between_two_points():
    assert reached([1, 2, 4], [5.0, 4.0, 2.0], 3.0) == 3.0
    assert (
        reached([1, 2, 4], [5.0, 4.0, 2.0], 4.0) == 2.0
        and reached([1, 2, 4], [5.0, 4.0, 2.0], 6.0) == 1
    )
    assert reached([1, 2], [5.0, 4.0], 3.9) is None
    assert reached([1, 2, 3], [5.0, 3.0, 4.0], 4.0) == 1.5  # the first time


def test_speed_up_has_the_known_answer():
    """Twice the slope: the loss at which the slow one ends is reached in half the steps; the other
    way round it is the reciprocal.
    """
    slow, fast = line(0.5), line(1.0)
    assert speed_up(slow, fast, "steps") == pytest.approx(2) and speed_up(
        fast, slow, "steps"
    ) == pytest.approx(0.5)
    assert speed_up(slow, slow, "FLOPs") == 1
    # the fast one read twice the text until step 200: 600 of its tokens a position by step 500,
    # where it has the slow one's last loss
    fast.raw_tokens, slow.raw_tokens = {100: 6400, 200: 12800, 1000: 38400}, {1000: 32000}
    assert speed_up(slow, fast, "raw tokens") == pytest.approx(32000 / (12800 + 300 * 32))
    slow.seconds, fast.seconds = {100: 10.0, 1000: 100.0}, {100: 20.0, 1000: 200.0}
    assert speed_up(slow, fast, "seconds") == pytest.approx(1.0)
    assert speed_up(slow, Run(validation={}), "steps") is None
    # an evaluation before the first step has cost nothing: no number of times less than that
    at_once = Run(validation={0: 1.0, 100: 1.0})
    assert speed_up(slow, at_once, "steps") is speed_up(at_once, slow, "steps") is None


def test_speed_up_over_seeds(tmp_path, capsys):
    groups = {"a": [line(0.5), line(0.5)], "b": [line(1.0), line(0.5)]}
    text = [plot.said(found) for found in curves.speed_ups(groups)]
    assert (
        text[0]
        == "b against a, equal validation loss: speed-up in steps 1.500 (1.000 to 2.000, standard "
        "error 0.500, n = 2)"
    )
    assert [t.split("speed-up in ")[1].split(" ")[0] for t in text] == [
        "steps",
        "FLOPs",
    ]  # no raw tokens, no times there
    (one, *_) = curves.speed_ups({"a": [line(0.5)], "b": [line(1.0)]})
    assert plot.said(one).endswith("speed-up in steps 2.000 (one pair)")
    assert (one.mean, one.standard_error, one.pairs) == (2.0, None, 1)


def test_where_iterations_lie():
    """On straight lines from the start through what is known, and on the last line beyond."""
    run = Run(seconds={10: 20.0, 20: 60.0}, raw_tokens={10: 640, 20: 960}, **MODEL)
    assert run.along("seconds", [5, 10, 15, 20, 25]) == [10.0, 20.0, 40.0, 60.0, 80.0]
    assert run.along("raw tokens", [5, 30]) == [320.0, 1280.0]
    assert run.along("steps", [3, 7]) == [3, 7]
    assert run.along("FLOPs", [3]) == [3 * 6 * (10000 - 128 * 16) * 32]
    assert [Run().along(axis, [3]) for axis in AXES] == [[3], None, None, None]
    assert interpolated({4: 7.0}, [1, 4, 9]) == [7.0] * 3


@pytest.mark.parametrize(
    "changes, rows",
    [({"vocab_size": "130"}, 192), ({"make_vocab_size_divisible_by": "None"}, 100)],
)
def test_rows_of_the_embedding_without_a_word_of_tensor_parallelism(changes, rows):
    arguments = ARGUMENTS | {"tensor_model_parallel_size": "None"} | changes
    assert Run(arguments=arguments, parameters=10000).flops == 6 * (10000 - rows * 16) * 32


def test_spread():
    mean, low, high, error = spread([1.0, 2.0, 6.0])
    assert (mean, low, high) == (3.0, 1.0, 6.0) and error == pytest.approx(math.sqrt(7.0 / 3))
    assert spread([1.0]) == (1.0, 1.0, 1.0, None)


def test_flops_are_6nd_of_what_a_position_is_multiplied_with():
    table = 128 * 16  # 100 ids padded to 128
    assert line(1).flops == 6 * (10000 - table) * 32
    tied = Run(
        parameters=10000, arguments=ARGUMENTS | {"untie_embeddings_and_output_weights": "False"}
    )
    assert tied.flops == 6 * 10000 * 32
    mtp = Run(parameters=10000, arguments=ARGUMENTS | {"mtp_num_layers": "1"})
    assert mtp.flops == 6 * 10000 * 32  # less the input table, the output table once more
    experts = ARGUMENTS | {
        "num_experts": "4",
        "moe_router_topk": "1",
        "moe_ffn_hidden_size": "8",
        "swiglu": "False",
    }
    assert (
        Run(parameters=10000, arguments=experts).flops
        == 6 * (10000 - table - 3 * 2 * 2 * 16 * 8) * 32
    )  # 3 of 4 experts rest
    assert Run(parameters=10000, arguments={}).flops is None


LOG = """\
  global_batch_size ............................... 4
  seq_length ...................................... 8
 > number of parameters on (tensor, gtp_remat, pipeline) model parallel rank (0, 0, 0): 600
 > number of parameters on (tensor, gtp_remat, pipeline) model parallel rank (0, 0, 1): 400
 [2026-01-01] iteration        1/      30 | consumed samples: 4 | elapsed time \
per iteration (ms): 500.0 | lm loss: 5.0E+00 | mce minus bag entropy: 4.0E+00 | x
 [tst] iteration        1 | phase: superposition | bag size: 2 | raw tokens: 64 |
 [2026-01-01] iteration       10/      30 | consumed samples: 40 | elapsed time \
per iteration (ms): 100.0 | lm loss: 4.5E+00 | x
 [tst] iteration       10 | phase: recovery | bag size: 1 | raw tokens: 480 |
 [tst] boundary after iteration 5: superposition is done (320 raw tokens), recovery begins
 [tst]   expert load    busiest 1.2 before, 1.1 since
 validation loss at iteration 10 | lm loss value: 4.0E+00 | x
"""
REST = """\
  global_batch_size ............................... 4
  seq_length ...................................... 8
 [2026-01-01] iteration       20/      30 | consumed samples: 80 | elapsed time \
per iteration (ms): 200.0 | lm loss: 3.5E+00 | x
 validation loss at iteration 20 | lm loss value: 3.0E+00 | x
"""


def test_a_log_and_its_continuation_by_stock_megatron(tmp_path):
    for name, text in (("one", LOG), ("two", REST)):
        (tmp_path / name).write_text(text)
    run = curves.read_log(tmp_path / "one", tmp_path / "two")
    assert (
        run.boundary == 5
        and run.parameters == 1000
        and run.excess == {1: 4.0}
        and run.experts == ["expert load: busiest 1.2 before, 1.1 since"]
    )
    assert run.raw_tokens == {1: 64, 5: 320, 10: 480, 20: 480 + 10 * 32}
    assert run.seconds == pytest.approx({1: 0.5, 10: 1.4, 20: 3.4})
    assert run.curve("raw tokens") == ([480, 800], [4.0, 3.0]) and run.curve("seconds")[
        0
    ] == pytest.approx([1.4, 3.4])
    baseline = curves.read_log(tmp_path / "two")
    assert baseline.raw_tokens == {20: 640} and baseline.curve("FLOPs") is None


def test_tensorboard_files(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path / "tb") as writer:  # as Megatron and run.py write them
        for name in ("global_batch_size", "seq_length", "hidden_size", "vocab_size"):
            writer.add_text(name, ARGUMENTS[name], global_step=0)
        for step in range(1, 11):
            writer.add_scalar("lm loss", 6 - 0.1 * step, step, walltime=1000 + 2 * step)
            writer.add_scalar("tst bag size", 3 if step <= 4 else 1, step)
            writer.add_scalar("tst raw tokens", 32 * (step + 2 * min(step, 4)), step)
        writer.add_scalar("lm loss validation", 5.25, 10)
    run = curves.read(tmp_path / "tb")
    assert (
        run.boundary == 4
        and run.total == run.last == 10
        and run.final_validation == 5.25
        and run.positions == 32
    )
    assert (
        run.train[10] == pytest.approx(5.0)
        and run.curve("raw tokens") == ([32 * 18], [5.25])
        and run.curve("seconds")[0] == [18.0]
    )
    assert run.flops is None
    run.parameters = 5000
    assert run.flops == 6 * 5000 * 32


def test_plot_says_in_json_what_it_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plots, "plot", lambda *_: None)  # see test_plots.py
    for name, text in (("tst", LOG + REST), ("base", REST)):
        (tmp_path / name).write_text(text)
    out, logs = str(tmp_path / "x.png"), {n: str(tmp_path / n) for n in ("base", "tst")}
    call = ["--output", out, "--json", *(f"{name}={log}" for name, log in logs.items())]
    assert plot.main(call) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == out and list(found["runs"]) == ["base", "tst"]
    (base,), (tst,) = found["runs"].values()
    assert tst == {
        "log": logs["tst"],
        "iterations": 20,
        "planned": 30,
        "boundary": 5,
        "training_loss": 3.5,
        "validation_loss": 3.0,
        "raw_tokens": 800,
        "flops": None,  # this log does not say the model's width
        "seconds": pytest.approx(3.4),
        "parameters": 1000,
        "test_loss": None,
        "nan_from": None,
        "skipped_iterations": 0,
        "notes": [],
    }
    assert found["notes"] == []
    assert (base["boundary"], base["raw_tokens"], base["parameters"]) == (None, 640, None)
    # the loss that both reach is 3.0, at iteration 20 of either
    (steps, tokens, seconds) = found["speed_ups"]
    assert steps == {
        "name": "tst",
        "against": "base",
        "axis": "steps",
        "mean": 1.0,
        "lowest": 1.0,
        "highest": 1.0,
        "standard_error": None,
        "pairs": 1,
    }
    assert (tokens["axis"], tokens["mean"]) == ("raw tokens", 640 / 800)
    assert seconds["axis"] == "seconds"


def test_what_is_known_of_a_run(tmp_path):
    found = curves.summary(line(1))
    assert found["flops"] == line(1).flops * 1000 and found["raw_tokens"] is None
    assert curves.summary(Run())["validation_loss"] is None and curves.speed_ups({}) == []
