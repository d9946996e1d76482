"""`megatron-tst plan`: its arithmetic against hand computations, Megatron's own functions and
benchmarks; what speaks against a run.
"""

import csv
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.plans import EXPERTS, ROOT, SMALL, accepted, planned, screen_of

from megatron_tst import model_size
from megatron_tst.cli import plan_screen
from megatron_tst.ops import chunks
from megatron_tst.planning import arithmetic, evidence, paper, recipes
from megatron_tst.planning import flags as plan_flags
from megatron_tst.schedule import Schedule

# ---- the paper's runs


def test_the_papers_10b_run():
    found = planned("--preset", "moe-10b-a1b")
    superposition, recovery = found["phases"]
    assert (superposition["steps"], recovery["steps"], superposition["bag_size"]) == (
        12483,
        37500,
        16,
    )
    assert superposition["raw_tokens"] == 2**23 * 16 * 12483 and found["text"][
        "raw_tokens"
    ] == 2**23 * (16 * 12483 + 37500)
    assert (
        plan_screen.tokens(superposition["raw_tokens"]) == "1.68T"
        and round(found["text"]["raw_tokens"] / 1e12) == 2
    )
    assert found["cost"]["gpu_hours"] == pytest.approx(4768) and found["run"]["gpu"] == "b200"
    equal = found["equal_loss"]
    assert equal["measured"] and (equal["baseline_steps"], equal["baseline_gpu_hours"]) == (
        125000,
        12311,
    )
    assert round(equal["speed_up"], 1) == 2.5 and round(equal["baseline_tokens"] / 1e12, 2) == 1.05


def test_the_papers_10b_run_on_the_screen(capsys):
    code, text = screen_of(capsys, "--preset", "moe-10b-a1b")
    assert code == 0 and max(map(len, text.splitlines())) <= plan_screen.WIDTH
    flat = " ".join(text.split())
    for figure in (
        "12,483",
        "49,983",
        "1.68T",
        "1.99T",
        "2.5x",
        "4,768 against 12,311 GPU-hours",
        "Measured by the paper",
    ):
        assert figure in flat


@pytest.mark.parametrize(
    "preset, steps, hours, loss, baseline, speed_up",
    [
        ("270m", 20000, 34, 3.142, 3.212, None),
        ("270m", 100000, 170, 3.048, 3.092, None),
        ("600m", 20000, 61, 2.943, 3.019, None),
        ("3b", 20000, 247, 2.676, 2.808, 1.8),
    ],
)
def test_the_papers_dense_runs(preset, steps, hours, loss, baseline, speed_up):
    found = planned("--preset", preset, "--train-iters", str(steps))
    assert (
        found["text"]["ratio"] == pytest.approx(6 * 0.3 + 0.7)
        and found["text"]["raw_tokens"] == 2**21 * steps * 5 // 2
    )
    assert found["cost"]["gpu_hours"] == pytest.approx(hours)
    assert found["paper"]["run"] == {"loss": loss, "baseline_loss": baseline, "b200_hours": hours}
    equal = found["equal_loss"]
    assert equal["measured"] == (speed_up is not None) and equal["speed_up"] == pytest.approx(1.8)


def test_a_recipe_is_the_run_of_the_papers_table():
    """Steps, bags and positions of each recipe against table 1; one name a model."""
    assert list(recipes.RECIPES) == list(paper.PARAMETERS) == list(paper.GPUS)
    for name, recipe in recipes.RECIPES.items():
        settings = (
            recipe.steps,
            recipe.tst_steps(recipe.steps),
            recipe.bag_size,
            recipe.batch_tokens,
        )
        runs = [run for run in paper.runs() if run.model == name]
        assert settings in [(run.steps, run.tst_steps, run.s, run.batch) for run in runs]


def test_what_is_not_the_papers_run_is_not_called_measured():
    changed = (
        ["--tst-bag-size", "8"],
        ["--train-iters", "30000"],
        ["--tst-target-weighting", "power-law"],
        ["--global-batch-size", "1024"],
    )
    for flags in changed:
        found = planned("--preset", "3b", *flags)
        assert (
            not found["paper"]["run"]
            and not (found["equal_loss"] or {"measured": False})["measured"]
        ), flags
    assert (
        planned("--preset", "3b", "--tst-bag-size", "2")["equal_loss"] is None
    )  # far from every run that has a speed-up
    other = planned("--preset", "3b", "--num-layers", "40")  # another model
    assert (
        not other["paper"]["run"]
        and not other["equal_loss"]["measured"]
        and "assumed: MFU" in other["cost"]["source"]
    )
    given = planned("--preset", "3b", "--mfu", "0.5")
    assert (
        given["cost"]["gpu_hours"] == pytest.approx(given["cost"]["flops"] / (0.5 * 2250e12 * 3600))
        and "given" in given["cost"]["source"]
    )
    on_h100 = planned("--preset", "3b", "--gpu", "h100")["cost"]
    assert "assumed" in on_h100["source"] and on_h100["mfu"] == pytest.approx(
        planned("--preset", "3b")["cost"]["mfu"]
    )
    assert "assumed" in planned(*SMALL)["cost"]["source"]


# ---- arithmetic


@settings(max_examples=60)
@given(
    s=st.integers(2, 40),
    steps=st.integers(2, 5000),
    batch=st.integers(1, 64),
    length=st.integers(1, 300),
    share=st.floats(0.01, 0.99),
    tokens=st.integers(1, 10**9),
    output=st.booleans(),
)
def test_text_is_what_the_schedule_reads(s, steps, batch, length, share, tokens, output):
    assume(length >= s or not output)
    superposed = max(1, min(steps - 1, round(share * steps)))
    sizes = [
        "--seq-length",
        length,
        "--train-iters",
        steps,
        "--global-batch-size",
        batch,
        "--tst-bag-size",
        s,
        "--tst-iters",
        superposed,
    ]
    argv = [*SMALL, *map(str, sizes), "--gpus", "1", "--tokens", str(tokens)] + [
        "--tst-superpose",
        "output",
    ] * output
    found = planned(*argv)
    schedule = Schedule.of(s, superposed, steps * batch, length, batch, single_tokens_in=output)
    text, wide = found["text"], 1 if output else s
    assert (
        text["raw_tokens"]
        == schedule.raw_tokens(schedule.train_samples)
        == batch * length * (wide * superposed + steps - superposed)
    )
    assert (
        sum(phase["raw_tokens"] for phase in found["phases"])
        == text["raw_tokens"]
        <= text["needed"]
    )
    assert text["needed"] - text["raw_tokens"] < 2 * wide * length * batch and text["suffices"] == (
        tokens >= text["needed"]
    )
    assert text["missing"] == max(0, text["needed"] - tokens) and found["loader"][
        "times_baseline"
    ] == pytest.approx(wide)
    for name, flag in (("bag_size", "--tst-bag-size"), ("superposed_steps", "--tst-iters")):
        if value := text.get("fits", {}).get(name):
            after = planned(*argv, flag, str(value))["text"]
            assert (
                after["suffices"] and value < {"bag_size": s, "superposed_steps": superposed}[name]
            )
            assert not planned(*argv, flag, str(value + 1))["text"]["suffices"]


def test_the_last_token_counts():
    needed = planned(*SMALL)["text"]["needed"]
    assert planned(*SMALL, "--tokens", str(needed))["text"]["suffices"]
    short = planned(*SMALL, "--tokens", str(needed - 1))["text"]
    assert not short["suffices"] and short["missing"] == 1 and short["baseline_suffices"]


def test_steps_that_fit():
    argv = [*SMALL, "--tokens", "100M", "--tst-step-ratio", "0.3"]
    steps = planned(*argv)["text"]["fits"]["steps"]
    assert planned(*argv, "--train-iters", str(steps))["text"]["suffices"]
    assert not planned(*argv, "--train-iters", str(steps + 2))["text"]["suffices"]
    assert steps == pytest.approx(100e6 / (64 * 1024 * 2.5), rel=0.01)


def test_parameters_are_those_of_a_real_model(megatron):
    from support.models import gpt

    shape = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "vocab_size": 96,
    }
    for changes, flags in (
        ({}, ["--untie-embeddings-and-output-weights"]),
        ({"tied": True}, []),
        (
            {"num_query_groups": 2},
            [
                "--group-query-attention",
                "--num-query-groups",
                "2",
                "--untie-embeddings-and-output-weights",
            ],
        ),
        (
            {"experts": 4},
            [
                "--num-experts",
                "4",
                "--moe-ffn-hidden-size",
                "32",
                "--untie-embeddings-and-output-weights",
            ],
        ),
    ):
        argv = [
            *SMALL,
            *(
                str(x)
                for name, value in shape.items()
                for x in (f"--{name.replace('_', '-')}", value)
            ),
            *flags,
        ]
        got = planned(*argv, "--make-vocab-size-divisible-by", "1")["model"]
        count = sum(p.numel() for p in gpt(**changes).parameters())
        assert got["parameters"] == count, changes
        if "experts" in changes:  # two of four experts of 3 x 32 x 32 in each of 2 layers are idle
            assert got["active_parameters"] == count - 2 * 2 * 3 * 32 * 32


@pytest.mark.parametrize(
    "argv",
    [
        SMALL,
        [x for x in SMALL if x != "--swiglu"],
        EXPERTS,
        ["--preset", "3b"],
        ["--preset", "moe-10b-a1b"],
        [*SMALL, "--group-query-attention", "--num-query-groups", "2", "--kv-channels", "96"],
    ],
    ids=["mha", "gelu", "experts", "3b", "moe-10b-a1b", "gqa"],
)
def test_flops_are_megatrons(argv):
    from megatron.training.training import num_floating_point_operations

    args, found = accepted(list(argv))
    assert found["cost"]["flops_of_step"] == pytest.approx(
        num_floating_point_operations(args, args.global_batch_size), rel=1e-12
    )


def test_flops_by_the_rule_of_thumb_by_hand():
    tied, _ = plan_flags.read([*SMALL])
    layers = 4 * (4 * 512**2 + 2 * 512 + 3 * 512 * 1344)
    every, table = layers + 512 + 512 * 50048, 512 * 50048
    assert model_size.parameters(tied) == (every, every)
    assert model_size.flops_6nd(every, tied) == 6 * every * 64 * 1024
    untied, _ = plan_flags.read([*EXPERTS, "--untie-embeddings-and-output-weights"])
    untied.mtp_num_layers = 2
    every, active = model_size.parameters(untied)
    assert every - active == 4 * 6 * 3 * 512 * 256 == model_size.idle_parameters(untied)
    assert model_size.flops_6nd(every, untied) == 6 * (active + table) * 64 * 1024  # - 1 + 2 tables


def test_cost_by_hand():
    cost = planned(*SMALL, "--mfu", "0.4", "--gpus", "16", "--tst-bag-size", "4")["cost"]
    ffn = 1344  # 4 * 512 * 2 / 3, to the multiple of 64 below
    position = 6 * (4 * (4 * 512**2 + 512 * 1024 + 3 * 512 * ffn) + 512 * 50048)
    assert cost["flops_of_step"] == position * 64 * 1024
    assert cost["step_seconds"] == pytest.approx(position * 64 * 1024 / (16 * 0.4 * 989.4e12))
    assert cost["gpu_hours"] == pytest.approx(1000 * cost["step_seconds"] * 16 / 3600)
    loader = planned(*SMALL, "--tflops", "400", "--gpus", "16", "--tst-bag-size", "4")["loader"]
    seconds = position * 64 * 1024 / (16 * 400e12)
    assert loader["tokens_a_second"] == pytest.approx(4 * 64 * 1024 / seconds)
    assert (
        loader["mb_a_second"] == pytest.approx(loader["tokens_a_second"] * 2 / 1e6)
        and loader["readers"] == 16
    )  # 2 bytes: 50000 ids
    assert planned(*SMALL, "--vocab-size", "65500")["loader"]["bytes_a_token"] == 4


def test_loss_memory_is_what_was_measured():
    """Peak beyond the logits over their size, in the benchmark's rows: those of the plan are
    the same numbers.
    """
    with open(ROOT / "benchmarks/data/multi_hot_ce.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["dtype"] == "bf16"]
    seen = set()
    for row in rows:
        memory = arithmetic.loss_memory(plan_flags.read([*SMALL])[0], int(row["s"]))
        ours = {
            "ours, in place": memory["superposition"]["extension"],
            "megatron, single": memory["recovery"]["megatron"],
            "paper's loop": memory["superposition"]["paper_loop"],
        }
        if row["variant"] in ours:
            seen.add((row["variant"], row["s"]))
            expected = 1 + float(row["extra_mb"]) / float(row["logits_mb"])
            assert ours[row["variant"]] / memory["logits"] == pytest.approx(expected, abs=0.05), row
    assert len(seen) >= 9
    large = planned(*SMALL, "--micro-batch-size", "64", "--gpus", "1")["loss_memory"]
    assert large["logits"] > 512 << 20 and large["superposition"]["fused"] == 512 << 20
    assert large["superposition"]["torch"] - large["logits"] == 2 * (256 << 20)
    assert (chunks.LINEAR_LOSS["cuda"], chunks.TORCH_KERNEL["cuda"]) == (512 << 20, 256 << 20)
    memory = planned(
        *SMALL,
        "--micro-batch-size",
        "8",
        "--tensor-model-parallel-size",
        "2",
        "--context-parallel-size",
        "2",
    )["loss_memory"]
    assert (
        memory["logits"] == 8 * 512 * (50176 // 2) * 2
    )  # 50000 ids, padded to a multiple of 2 x 128


# ---- the paper's tables


def test_a_cell_of_a_table_is_that_cell():
    for grid in paper.grids():
        for (r, s), loss in grid.losses.items():
            if r == 1.0:
                assert grid.cell(r, s) is None
            elif r:
                assert grid.cell(r, s) == paper.Cell(loss, loss - grid.baseline, None)
        assert (
            grid.cell(0.0, 5).difference == 0
            and grid.cell(0.3, 17) is None
            and grid.cell(0.95, 4) is None
        )
    assert [len(grid.losses) for grid in paper.grids()] == [151, 121, 120, 110]


@given(r=st.floats(0, 0.9), s=st.integers(2, 13))
def test_between_cells_lies_what_is_marked_as_interpolated(r, s):
    grid = paper.grids()[0]
    cell = grid.cell(r, s)
    if cell.between:
        low, high = (grid.cell(x, s).loss for x in cell.between)
        assert cell.between[0] < r < cell.between[1] and min(low, high) <= cell.loss <= max(
            low, high
        )
    else:
        assert min(abs(r - x / 10) for x in range(10)) <= 0.0005


def test_interpolation_by_hand_and_its_mark(capsys):
    cell = paper.grids()[2].cell(0.62, 6)
    assert cell.loss == pytest.approx(2.9598 + 0.2 * (2.9726 - 2.9598)) and cell.between == (
        0.6,
        0.7,
    )
    assert paper.grids()[2].cell(0.025, 6).loss == pytest.approx(3.0186 + 0.25 * (2.9522 - 3.0186))
    assert "INTERPOLATED between r = 0.2 and 0.3" in screen_of(
        capsys, "--preset", "600m", "--tst-step-ratio", "0.25"
    )[1].replace("\n              ", " ")
    found = planned("--preset", "600m")["paper"]["cell"]
    assert found["interpolated_between_r"] is None and found["difference"] == pytest.approx(
        2.9439 - 3.0186
    )


def test_the_nearest_table():
    def of(*argv):
        return planned(*argv)["paper"]["cell"]

    assert (
        of("--preset", "270m")["table"],
        of("--preset", "270m", "--train-iters", "90000")["table"],
        of("--preset", "3b")["table"],
    ) == (4, 5, 6)
    assert of("--preset", "600m", "--tst-target-weighting", "power-law")["table"] == 7
    assert of("--preset", "600m", "--tst-bag-size", "16")["table"] == 4  # the only one that has 16
    assert of("--preset", "600m", "--tst-bag-size", "17") is None
    assert (
        of("--preset", "600m", "--tst-superpose", "input") is None
        and of("--preset", "600m", "--tst-loss", "mce-alt") is None
    )


def test_the_table_in_the_docs_is_the_papers():
    rows = re.findall(
        r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| (.*) \|$",
        (ROOT / "docs/choosing.md").read_text(),
        re.MULTILINE,
    )
    for s, r, text, losses in rows:
        cells = [grid.cell(float(r), int(s)) for grid in paper.grids()[:3]]
        assert losses.split(" | ") == [
            "not run" if cell is None else f"{cell.difference:+.3f}" for cell in cells
        ], (s, r)
        assert float(text) == pytest.approx(int(s) * float(r) + 1 - float(r))
    assert len(rows) == 12


def test_sweep(capsys):
    found = planned("--preset", "3b", "--tokens", "80B", "--sweep")
    cells = {(cell["s"], cell["r"]): cell for cell in found["sweep"]["cells"]}
    assert (
        len(cells) == len(evidence.SWEEP_S) * len(evidence.SWEEP_R) and found["sweep"]["table"] == 6
    )
    assert (
        cells[6, 0.3]["raw_tokens"] == found["text"]["raw_tokens"]
        and not cells[6, 0.3]["fits"]
        and cells[4, 0.3]["fits"]
    )
    assert (
        cells[6, 0.3]["difference"] == pytest.approx(2.9439 - 3.0186)
        and cells[16, 0.3]["difference"] is None
    )
    code, text = screen_of(capsys, "--preset", "3b", "--tokens", "80B", "--sweep")
    assert (
        code == 0
        and "! 105B (-0.075)" in text
        and max(map(len, text.splitlines())) <= plan_screen.WIDTH
    )


# ---- what speaks against it


def test_a_data_bound_run(capsys):
    code, text = screen_of(capsys, "--preset", "3b", "--tokens", "80B")
    flat = " ".join(text.split())
    assert (
        code == 0
        and "they do NOT suffice, 24.9B are missing; each token would be read 1.31 times" in flat
    )
    assert (
        "At equal text the paper's baseline was better: 3B, 105B tokens, plain 2.640 (50,000 "
        "steps, 622 B200-hours), TST 2.676 (20,000 steps, 247)" in flat
    )
    assert (
        "What fits: --tst-bag-size 4, or --tst-iters 3629, or --train-iters 15258 at the same r"
        in flat
    )
    code, text = screen_of(capsys, "--preset", "3b", "--tokens", "110B")
    assert "they SUFFICE without repetition" in " ".join(text.split()) and "Data-bound" not in text
    assert (
        "They do not suffice for plain training either"
        in screen_of(capsys, "--preset", "3b", "--tokens", "40B")[1]
    )


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (
            ["--tst-step-ratio", "0.7"],
            "cells worse than their baseline: 0 of 51 at r = 0.7, 9 of 51 at r = 0.8, 46 of 51 at "
            "r = 0.9",
        ),
        (["--tst-bag-size", "17"], "the paper tried 2 to 16"),
        (["--tst-bag-size", "9"], "lowest loss beyond 8"),
        (["--train-iters", "5000"], "the paper's shortest runs have 20,000"),
        (["--tst-superpose", "output"], "no figure"),
    ],
)
def test_what_speaks_against(flags, sentence):
    assert sentence in " ".join(planned("--preset", "600m", *flags)["against"])
    assert planned("--preset", "600m")["against"] == []


def test_the_counts_in_that_sentence_by_hand():
    worse = {0.7: 0, 0.8: 0, 0.9: 0}
    for file in paper.TABLES.glob("*00*.csv"), paper.TABLES.glob("270m_20k.csv"):
        for table in file:
            with open(table, newline="") as text:
                rows = [(float(row["r"]), float(row["loss"])) for row in csv.DictReader(text)]
            for r in worse:
                worse[r] += sum(loss > rows[0][1] for ratio, loss in rows if ratio == r)
    assert worse == {0.7: 0, 0.8: 9, 0.9: 46}


def test_tsts_own_warnings_are_shown(capsys):
    assert any(
        "bag size 16: the paper found 4 to 8 robust" in text
        for text in planned("--preset", "moe-10b-a1b")["warnings"]
    )
    assert "Warnings at start-up" in screen_of(capsys, "--preset", "moe-10b-a1b")[1]


# ---- whole answers: every figure, by hand


def _moe():
    """The paper's largest run, with half of the text that it read: table 1, and its shape."""
    layer = 2 * 2048 * 128 * (16 + 4) + 2 * 2048 + 2 * 128 + 64 * 2048 + 64 * 3 * 2048 * 1024
    parameters, idle = 24 * layer + 2048 + 2 * 128256 * 2048, 24 * 60 * 3 * 2048 * 1024
    products = 24 * (2 * 2048 * 128 * (16 + 4) + 16 * 128 * 4096 + 4 * 3 * 2048 * 1024)
    flops, batch, hours = 6.0 * (products + 128256 * 2048) * 2**23, 2**23, 4768 / 49983
    raw, logits, r = batch * (16 * 12483 + 37500), 2 * 2 * 4096 * 128256, 12483 / 49983
    loss = 3.1455 + (r - 0.2) / 0.1 * (3.1484 - 3.1455)  # table 4, s = 16, r = 0.2 and 0.3
    return {
        "model.parameters": parameters,
        "model.active_parameters": parameters - idle,
        "model.vocabulary": 128256,
        "model.preset": "moe-10b-a1b",
        "run.steps": 49983,
        "run.superposed_steps": 12483,
        "run.step_ratio": r,
        "run.bag_size.0": 16,
        "run.positions_a_step": batch,
        "run.gpus": 64,
        "run.gpu": "b200",
        "phases.0.name": "superposition",
        "phases.0.bag_size": 16,
        "phases.0.steps": 12483,
        "phases.0.raw_tokens": 16 * batch * 12483,
        "phases.0.raw_tokens_a_step": 16 * batch,
        "phases.1.name": "recovery",
        "phases.1.bag_size": 1,
        "phases.1.steps": 37500,
        "phases.1.raw_tokens": batch * 37500,
        "phases.1.raw_tokens_a_step": batch,
        "text.raw_tokens": raw,
        "text.baseline_tokens": batch * 49983,
        "text.ratio": raw / (batch * 49983),
        "text.needed": raw,
        "text.available": 10**12,
        "text.suffices": False,
        "text.missing": raw - 10**12,
        "text.times": raw / 10**12,
        "text.baseline_suffices": True,
        # 10^12 tokens are 119,209 positions' batches: 12483 s + 37500, 49983 + 15 x, and 16 of the
        # 6272 steps that are superposed of 25115, 6273 of 25116
        "text.fits.bag_size": (119209 - 37500) // 12483,
        "text.fits.superposed_steps": (119209 - 49983) // 15,
        "text.fits.steps": 25115,
        "cost.flops_of_step": flops,
        "cost.flops": flops * 49983,
        "cost.tflops_a_gpu": flops / (hours * 3600) / 1e12,
        "cost.mfu": flops / (hours * 3600) / 2250e12,
        "cost.source": "paper: 4,768 B200-hours for 49,983 steps",
        "cost.gpu_hours_of_step": hours,
        "cost.gpu_hours": 4768.0,
        "cost.days": 4768 / 64 / 24,
        "cost.step_seconds": hours * 3600 / 64,
        "cost.of_the_paper": True,
        "equal_loss.measured": True,
        "equal_loss.speed_up": 125000 / 49983,
        "equal_loss.baseline_steps": 125000,
        "equal_loss.baseline_tokens": 125000 * batch,
        "equal_loss.baseline_gpu_hours": 12311.0,
        "equal_loss.paper_run.model": "moe-10b-a1b",
        "equal_loss.paper_run.s": 16,
        "equal_loss.paper_run.r": r,
        "equal_loss.paper_run.loss": 2.236,
        "equal_loss.paper_run.baseline_loss": 2.252,
        "loss_memory.logits": logits,
        "loss_memory.superposition.extension": logits,
        "loss_memory.superposition.torch": logits + (512 << 20),
        "loss_memory.superposition.fused": 512 << 20,
        "loss_memory.superposition.paper_loop": 37 * logits,
        "loss_memory.recovery.megatron": 4 * logits,
        "loss_memory.recovery.kernel_in_recovery": logits,
        "loss_memory.recovery.fused": 512 << 20,
        "loader.tokens_a_second": 16 * batch / (hours * 3600 / 64),
        "loader.mb_a_second": 4 * 16 * batch / (hours * 3600 / 64) / 1e6,
        "loader.baseline_tokens_a_second": batch / (hours * 3600 / 64),
        "loader.times_baseline": 16.0,
        "loader.readers": 64,
        "loader.tokens_a_second_of_a_reader": 16 * batch / (hours * 3600),
        "loader.bytes_a_token": 4,
        "loader.measured": None,
        "paper.cell.model": "270m",
        "paper.cell.steps": 20000,
        "paper.cell.weighting": "uniform",
        "paper.cell.table": 4,
        "paper.cell.loss": loss,
        "paper.cell.difference": loss - 3.2124,
        "paper.cell.interpolated_between_r.0": 0.2,
        "paper.cell.interpolated_between_r.1": 0.3,
        "paper.run.loss": 2.236,
        "paper.run.baseline_loss": None,
        "paper.run.b200_hours": 4768,
    }


def _experts():
    """Bags of 20, TP x PP x CP = 1 x 2 x 2, a given MFU, a token of four bytes."""
    layer, batch = 4 * 512**2 + 2 * 512 + 8 * 512 + 8 * 3 * 512 * 256, 64 * 1024
    parameters, vocabulary = 4 * layer + 512 + 2 * 512 * 70016, 547 * 128
    products = 4 * (4 * 512**2 + 512 * 1024 + 2 * 3 * 512 * 256) + 512 * vocabulary
    flops, raw, logits = 6.0 * products * batch, batch * (20 * 700 + 300), 2 * 1024 * 70016
    seconds = flops / (16 * 0.4 * 989.4e12)
    return {
        "model.parameters": parameters,
        "model.active_parameters": parameters - 4 * 6 * 3 * 512 * 256,
        "model.vocabulary": vocabulary,
        "model.preset": None,
        "run.steps": 1000,
        "run.superposed_steps": 700,
        "run.step_ratio": 0.7,
        "run.bag_size.0": 20,
        "run.positions_a_step": batch,
        "run.gpus": 16,
        "run.gpu": "h100",
        "phases.0.name": "superposition",
        "phases.0.bag_size": 20,
        "phases.0.steps": 700,
        "phases.0.raw_tokens": 20 * batch * 700,
        "phases.0.raw_tokens_a_step": 20 * batch,
        "phases.1.name": "recovery",
        "phases.1.bag_size": 1,
        "phases.1.steps": 300,
        "phases.1.raw_tokens": batch * 300,
        "phases.1.raw_tokens_a_step": batch,
        "text.raw_tokens": raw,
        "text.baseline_tokens": batch * 1000,
        "text.ratio": 14.3,
        "text.needed": raw,  # 300 x 64 samples of recovery are cut from 960 long samples
        "text.available": 10**8,
        "text.suffices": False,
        "text.missing": raw - 10**8,
        "text.times": raw / 10**8,
        "text.baseline_suffices": True,
        # 10^8 tokens are 4882 long samples. Bags of 2 need 54,400 of a tenth of the length. 27
        # steps: 27 x 64 + 3114, 28: 4903. Of 106 steps 74 are superposed: 74 x 64 + 103, of 107
        # 75: 4903
        "text.fits.bag_size": None,
        "text.fits.superposed_steps": 27,
        "text.fits.steps": 106,
        "cost.flops_of_step": flops,
        "cost.flops": flops * 1000,
        "cost.tflops_a_gpu": 0.4 * 989.4,
        "cost.mfu": 0.4,
        "cost.source": "--mfu 0.4, given",
        "cost.gpu_hours_of_step": seconds * 16 / 3600,
        "cost.gpu_hours": seconds * 1000 * 16 / 3600,
        "cost.days": seconds * 1000 / 86400,
        "cost.step_seconds": seconds,
        "cost.of_the_paper": False,
        "equal_loss": None,
        "loss_memory.logits": logits,
        "loss_memory.superposition.extension": logits,
        "loss_memory.superposition.torch": logits + (512 << 20),
        "loss_memory.superposition.fused": logits,
        "loss_memory.superposition.paper_loop": 45 * logits,
        "loss_memory.recovery.megatron": 4 * logits,
        "loss_memory.recovery.kernel_in_recovery": logits,
        "loss_memory.recovery.fused": logits,
        "loader.tokens_a_second": 20 * batch / seconds,
        "loader.mb_a_second": 4 * 20 * batch / seconds / 1e6,
        "loader.baseline_tokens_a_second": batch / seconds,
        "loader.times_baseline": 20.0,
        "loader.readers": 4,
        "loader.tokens_a_second_of_a_reader": 5 * batch / seconds,
        "loader.bytes_a_token": 4,
        "loader.measured": None,
        "paper.cell": None,
        "paper.run": None,
    }


def _output():
    """The 600M model on H200, the output alone in bags of 4: no more text than plain training."""
    batch, logits = 2**21, 2 * 4 * 4096 * 128256
    parameters = 32 * (4 * 960**2 + 2 * 960 + 3 * 960 * 2560) + 960 + 2 * 128256 * 960
    products = 32 * (4 * 960**2 + 960 * 4096 + 3 * 960 * 2560) + 128256 * 960
    flops, hours = 6.0 * products * batch, 61 * 2250 / 989.4  # table 1: 61 B200-hours
    seconds = hours / 20000 / 16 * 3600
    return {
        "model.parameters": parameters,
        "model.active_parameters": parameters,
        "model.vocabulary": 128256,
        "model.preset": "600m",
        "run.steps": 20000,
        "run.superposed_steps": 5000,
        "run.step_ratio": 0.25,
        "run.bag_size.0": 4,
        "run.positions_a_step": batch,
        "run.gpus": 16,
        "run.gpu": "h200",
        "phases.0.name": "superposition",
        "phases.0.bag_size": 4,
        "phases.0.steps": 5000,
        "phases.0.raw_tokens": batch * 5000,
        "phases.0.raw_tokens_a_step": batch,
        "phases.1.name": "recovery",
        "phases.1.bag_size": 1,
        "phases.1.steps": 15000,
        "phases.1.raw_tokens": batch * 15000,
        "phases.1.raw_tokens_a_step": batch,
        "text.raw_tokens": batch * 20000,
        "text.baseline_tokens": batch * 20000,
        "text.ratio": 1.0,
        "text.needed": batch * 20000,
        "text.available": 10**12,
        "text.suffices": True,
        "text.missing": 0,
        "text.times": batch * 20000 / 10**12,
        "text.baseline_suffices": True,
        "cost.flops_of_step": flops,
        "cost.flops": flops * 20000,
        "cost.tflops_a_gpu": flops * 20000 / (hours * 3600) / 1e12,
        "cost.mfu": flops * 20000 / (61 * 3600) / 2250e12,
        "cost.source": "assumed: the MFU that the paper's B200-hours come to",
        "cost.gpu_hours_of_step": hours / 20000,
        "cost.gpu_hours": hours,
        "cost.days": hours / 16 / 24,
        "cost.step_seconds": seconds,
        "cost.of_the_paper": False,
        "equal_loss": None,
        "loss_memory.logits": logits,
        "loss_memory.superposition.extension": logits,
        "loss_memory.superposition.torch": logits + (512 << 20),
        "loss_memory.superposition.fused": 512 << 20,
        "loss_memory.superposition.paper_loop": 13 * logits,
        "loss_memory.recovery.megatron": 4 * logits,
        "loss_memory.recovery.kernel_in_recovery": logits,
        "loss_memory.recovery.fused": 512 << 20,
        "loader.tokens_a_second": batch / seconds,
        "loader.mb_a_second": 4 * batch / seconds / 1e6,
        "loader.baseline_tokens_a_second": batch / seconds,
        "loader.times_baseline": 1.0,
        "loader.readers": 16,
        "loader.tokens_a_second_of_a_reader": batch / seconds / 16,
        "loader.bytes_a_token": 4,
        "loader.measured": None,
        "paper.cell": None,
        "paper.run": None,
    }


WHOLE = {
    "a run of the paper's": ("--preset moe-10b-a1b --tokens 1T".split(), _moe),
    "experts, little text": (
        [
            *[*EXPERTS, "--untie-embeddings-and-output-weights", "--vocab-size", "70000"],
            *"--gpus 16 --gpu h100 --mfu 0.4 --tokens 100M --micro-batch-size 2".split(),
            *"--pipeline-model-parallel-size 2 --context-parallel-size 2".split(),
            *"--tst-iters 700 --tst-bag-size 20".split(),
        ],
        _experts,
    ),
    "output alone": (
        "--preset 600m --tst-superpose output --tst-bag-size 4 --tst-step-ratio 0.25 --gpu h200 "
        "--gpus 16 --tokens 1T".split(),
        _output,
    ),
}


def _leaves(value, name=""):
    """{"a.b.0": value} of dicts and sequences in each other."""
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: value}
    parts = (_leaves(part, f"{name}.{key}".lstrip(".")) for key, part in value.items())
    return {key: leaf for part in parts for key, leaf in part.items()}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_plan(name):
    """Every figure, worked out from the shape, the paper's table 1 and the data sheets' peaks."""
    argv, expected = WHOLE[name]
    plan, expected = planned(*argv), expected()
    for apart in ("flags", "checks", "against", "warnings"):
        plan.pop(apart)
    assert plan.pop("not_used") == plan["text"]["readings"] == []
    found = _leaves(plan)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert type(found[key]) is type(value), key
        about = pytest.approx(value, rel=1e-12) if isinstance(value, float) else value
        assert found[key] == about, key


@pytest.mark.parametrize(
    "tokens, bag_size, superposed_steps, steps",
    [
        # 65,536 positions a step, 1000 steps, 300 of them with bags of 6
        (65536 * (2 * 300 + 700), 2, 59, 519),
        (65536 * (2 * 300 + 700) - 1, None, 59, 519),
        (65536 * (6 * 1 + 999), None, 1, 401),
        (65536 * (6 * 1 + 999) - 1, None, None, 401),
        # 2 steps, one superposed: 64 long samples of 6 x 1024, and 11 that recovery's 64 are cut of
        ((64 + 11) * 6 * 1024, None, None, 2),
        # one step alone would have nothing to superpose
        ((64 + 11) * 6 * 1024 - 1, None, None, None),
        (65536, None, None, None),
    ],
)
def test_what_fits_to_the_token(tokens, bag_size, superposed_steps, steps):
    fits = {"bag_size": bag_size, "superposed_steps": superposed_steps, "steps": steps}
    assert planned(*SMALL, "--tokens", str(tokens))["text"]["fits"] == fits


def test_text_for_plain_training_to_the_token():
    for tokens in (65536 * 1000 - 1, 65536 * 1000):
        text = planned(*SMALL, "--tokens", str(tokens))["text"]
        assert text["baseline_suffices"] == (tokens == 65536 * 1000)


@pytest.mark.parametrize(
    "flags", ["--tst-bag-size 4,2 --tst-step-ratio 0.2,0.1", "--tst-superpose output"]
)
def test_what_would_fit_is_said_of_one_bag_size_in_wide_samples_alone(flags):
    text = planned(*SMALL, "--tokens", "1M", *flags.split())["text"]
    assert not text["suffices"] and "fits" not in text


@pytest.mark.parametrize(
    "hidden, flags, width",
    [
        (512, ["--swiglu"], 1344),  # 4 x 512 x 2 / 3 = 1365.3 = 21.3 x 64
        (768, ["--swiglu"], 2048),  # 32 x 64
        (760, ["--swiglu"], 1984),  # 31.7 x 64
        (24, ["--swiglu"], 64),
        (512, [], 2048),
        (512, ["--ffn-hidden-size", "8"], 8),
    ],
)
def test_the_width_that_megatron_derives(hidden, flags, width):
    sizes = [word for word in SMALL if word != "--swiglu"]
    args, _ = plan_flags.read([*sizes, "--hidden-size", str(hidden), *flags])
    assert args.ffn_hidden_size == width and args.kv_channels == hidden // 8
    assert args.moe_ffn_hidden_size == width and args.expert_tensor_parallel_size == 1


def test_where_the_cost_is_from():
    assumed = planned(*SMALL)["cost"]
    assert assumed["mfu"] == pytest.approx(0.35) and assumed["tflops_a_gpu"] == 0.35 * 989.4
    assert assumed["source"] == (
        "assumed: MFU 0.35. Give --mfu, or --tflops as Megatron's --log-throughput prints it"
    )
    given = planned("--preset", "3b", "--tflops", "450.5")["cost"]
    assert given["source"] == "--tflops 450.5, given" and not given["of_the_paper"]
    assert given["mfu"] == pytest.approx(450.5 / 2250)
    # half of the positions a step: half of the paper's hours, 247 for 20,000 steps
    half = planned("--preset", "3b", "--global-batch-size", "256")["cost"]
    assert half["gpu_hours"] == pytest.approx(247 / 2) and half["of_the_paper"]


def test_the_whole_sweep():
    found = planned(*SMALL, "--tokens", "500M", "--sweep")["sweep"]
    about = {"model": "270m", "steps": 20000, "weighting": "uniform", "table": 4}
    assert {key: value for key, value in found.items() if key != "cells"} == about
    cells, ratios = iter(found["cells"]), (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
    for s in (2, 3, 4, 5, 6, 7, 8, 10, 12, 16):
        for r in ratios:
            raw, cell = 64 * 1024 * round(1000 * (s * r + 1 - r)), paper.grids()[0].cell(r, s)
            assert next(cells) == {
                "s": s,
                "r": r,
                "superposed_steps": round(1000 * r),
                "raw_tokens": raw,
                "fits": raw <= 500e6,
                "difference": cell and cell.difference,
            }
    assert next(cells, None) is None
