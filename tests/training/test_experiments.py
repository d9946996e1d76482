"""The experiments' driver as a user runs it: interrupted, resumed, its rows against the logs, its
arms in pairs.
"""

import csv
import re
import signal
import subprocess
import sys
import time

import pytest
import questions
from support.runs import ROOT

from megatron_tst import demo
from megatron_tst.checks import dry_run
from megatron_tst.model_size import parameters
from megatron_tst.planning import curves

pytestmark = pytest.mark.timeout(
    1800
)  # on a machine that others load: about a minute on an idle one

DRIVER = [sys.executable, str(ROOT / "examples" / "experiments" / "run.py")]
SMALL = (
    "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64 "
    "--seq-length 32 --log-interval 1 --eval-interval 6 --eval-iters 1"
)
TST = "--tst-bag-size 2 --tst-step-ratio 0.25"
CONFIG = f"""
question = "Does it work?"
iterations = 12
seeds = [1]
flags = "{SMALL}"
[[arm]]
name = "baseline"
[[arm]]
name = "s=2 / r=0.25"
tst = "{TST}"
[[arm]]
name = "unchanged"
tst = "{TST}"
convert = ""
"""


def rows(folder):
    path = folder / "results.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


def drive(folder, corpus, *arguments):
    command = [*DRIVER, *map(str, arguments), "--out", str(folder), "--corpus", str(corpus)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.fixture(scope="module")
def ran(corpus, tmp_path_factory):
    """A driver that was ended after its first row, and one that went on. -> (folder, rows of the
    first, rows of both, second's output)
    """
    folder = tmp_path_factory.mktemp("experiments")
    (folder / "small.toml").write_text(CONFIG)
    command = [
        *DRIVER,
        str(folder / "small.toml"),
        "--out",
        str(folder),
        "--corpus",
        str(corpus),
        "--parallel",
        "1",
    ]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    second_arm, end = folder / "small" / "s2___r0.25" / "seed1" / "train.log", time.time() + 900
    while not (rows(folder) and second_arm.exists()) and first.poll() is None and time.time() < end:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=300)
    assert first.returncode == 130 and "the same command goes on with what is missing" in errors, (
        errors
    )
    before = rows(folder)
    done = drive(folder, corpus, folder / "small.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, before, rows(folder), done.stdout


@pytest.mark.slow
def test_a_finished_row_is_kept_and_the_missing_ones_are_made(ran):
    _, before, after, said = ran
    assert [row["arm"] for row in before] == ["baseline"] and after[0] == before[0]
    assert (
        sorted(row["arm"] for row in after) == ["baseline", "s=2 / r=0.25", "unchanged"]
        and "3 runs, 1 of them in" in said
    )


@pytest.mark.slow
def test_rows_say_what_was_run(ran):
    folder, _, after, _ = ran
    table = {row["arm"]: row for row in after}
    parameters = (
        4 * 32 * 32 + 2 * 32 * 64 + 3 * 2 * 32 + 512 * 32
    )  # attention, MLP, norms, head; vocabulary 512
    for arm, row in table.items():
        log = curves.read_log(
            folder / "small" / re.sub(r"[ /]", "_", arm.replace("=", "")) / "seed1" / "train.log"
        )
        assert (
            float(row["validation_loss"]) == log.validation[12]
            and row["iterations"] == row["base_iterations"] == "12"
        )
        assert float(row["flops"]) == pytest.approx(6 * parameters * 16 * 32 * 12, rel=1e-5)
        assert (row["question"], row["seed"]) == ("small", "1") and 0 < float(
            row["seconds"]
        ) < float(row["wall_seconds"])
        assert (
            "megatron-core 0.1" in row["versions"]
            and row["commit"]
            and row["device"].startswith("CPU")
        )
        assert int(row["raw_tokens"]) == 16 * 32 * (12 if arm == "baseline" else 15) and row[
            "boundary"
        ] == ("" if arm == "baseline" else "3")
    # exit, conversion and stock Megatron on the same text: the run itself, to the last digit
    assert (
        table["unchanged"]["validation_loss"]
        == table["s=2 / r=0.25"]["validation_loss"]
        != table["baseline"]["validation_loss"]
    )


@pytest.mark.slow
def test_arms_start_from_the_same_weights_and_a_failure_is_named(ran, corpus):
    """With a learning rate that changes nothing the last validation loss is the initial model's on
    the validation text: the seed's, whatever the arm.
    """
    folder = ran[0]
    still = (
        CONFIG.replace(SMALL, f"{SMALL} --lr 1e-30")
        .replace('convert = ""', "")
        .replace(
            f'"unchanged"\ntst = "{TST}', '"wrong"\ntst = "--tst-bag-size 2 --tst-step-ratio 2'
        )
    )
    (folder / "still.toml").write_text(still)
    done = drive(folder, corpus, folder / "still.toml", "--iterations", 8)
    assert done.returncode == 1 and "FAILED still | wrong | seed 1 | exit code" in done.stdout, (
        done.stdout + done.stderr
    )
    assert "--tst-step-ratio: expected a number in [0, 1), got 2" in done.stdout
    assert (
        drive(
            folder,
            corpus,
            folder / "still.toml",
            "--iterations",
            8,
            "--seeds",
            2,
            "--arms",
            "baseline",
        ).returncode
        == 0
    )
    found = {
        (row["arm"], row["seed"]): row["validation_loss"]
        for row in rows(folder)
        if row["question"] == "still"
    }
    assert (
        len(found) == 3
        and found["baseline", "1"] == found["s=2 / r=0.25", "1"] != found["baseline", "2"]
    )


@pytest.mark.slow
def test_a_run_that_another_question_has_made_is_not_made_again(ran, corpus):
    folder, _, before, _ = ran
    (folder / "other.toml").write_text(
        CONFIG.replace('name = "s=2 / r=0.25"', 'name = "TST"').replace("Does it", "Does it still")
    )
    done = drive(folder, corpus, folder / "other.toml")
    assert done.returncode == 0 and not (folder / "other").exists(), done.stdout + done.stderr
    new = {row["arm"]: row for row in rows(folder) if row["question"] == "other"}
    assert new["TST"]["validation_loss"] == before[1]["validation_loss"] and len(new) == 3


@pytest.mark.slow
def test_a_config_that_is_not_there(ran, corpus):
    done = drive(ran[0], corpus, "absent.toml")
    assert (
        done.returncode == 2
        and done.stderr.startswith("experiments: error:")
        and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples" / "experiments").glob("*.toml")), ids=lambda path: path.stem
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_arm_asks_for_what_megatron_and_tst_take(path, device, corpus):
    question = questions.load(path)
    for arm in question.arms:
        flags = demo.flags(corpus, 512, question.iterations, 1, question.architecture, device)
        args = dry_run.validate(
            [*flags, *question.flags.split(), *arm.flags.split(), *arm.tst.split()], 1, "h100"
        )
        assert args.train_iters == question.iterations and (args.tst_bag_size == 1) == (
            "--tst-bag-size" not in arm.tst
        )
    if path.stem == "at_100m":
        assert parameters(args)[0] > 100e6
