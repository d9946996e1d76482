"""`megatron-tst plan` with the line that starts a run, and with numbers and files that make no
sense.
"""

import dataclasses
import json
import os
import shlex

import pytest
from support.plans import HF, SMALL, planned, screen_of

from megatron_tst.cli import main
from megatron_tst.errors import TSTError
from megatron_tst.planning import flags as plan_flags
from megatron_tst.planning import launch_line, recipes

OTHERS = "--bf16 --lr 1e-3 --recompute-granularity full --log-interval 10 --data-cache-path /c"
NAMES = ["--bf16", "--lr", "--recompute-granularity", "--log-interval", "--data-cache-path"]


def line(text):
    return launch_line.read(shlex.split(text), plan_flags.parser())


@pytest.mark.parametrize(
    "launcher, gpus",
    [
        ("torchrun --nproc-per-node 8 pretrain_gpt.py", 8),
        ("torchrun --nproc_per_node=4 --nnodes=16 --node_rank 0 examples/pretrain_gpt.py", 64),
        ("torchrun --nproc-per-node gpu pretrain_gpt.py", None),
        ("torchrun --nnodes 1:4 --nproc-per-node 8 pretrain_gpt.py", 8),
        ("CUDA_DEVICE_MAX_CONNECTIONS=1 torchrun --nproc-per-node 8 pretrain_gpt.py", 8),
        ("python -m torch.distributed.run --nproc-per-node 2 -m megatron_tst.pretrain_gpt", 2),
        ("python3 -m megatron_tst.launch pretrain_gpt.py", None),
        ("/usr/bin/python3.12 pretrain_gpt.py", None),
        ("srun -N 4 --ntasks-per-node 8 python -u pretrain_gpt.py", 32),
        ("mpirun -np 16 python pretrain_gpt.py", 16),
        ("srun -n32 python pretrain_gpt.py", 32),
        ("srun -N2 --ntasks-per-node=4 singularity exec --nv x.sif python pretrain_gpt.py", 8),
        ("deepspeed --num_gpus 4 --num_nodes 1 pretrain_gpt.py", 4),
        ("accelerate launch --num_processes 16 pretrain_gpt.py", 16),
        ("export A=1 && torchrun --nproc-per-node 2 pretrain_gpt.py", 2),
        ("uv run torchrun --nproc-per-node 2 pretrain_gpt.py", 2),
        ("timeout 1h docker run --gpus all -it image torchrun --nproc-per-node 2 a.py", 2),
        ("torchrun --nproc-per-node 2 --node_rank $RANK pretrain_gpt.py", 2),
        ("pretrain_gpt.py", None),
    ],
)
def test_what_stands_before_the_script_is_the_launchers(launcher, gpus):
    found = line(f"{launcher} {shlex.join(SMALL)}")
    assert found == launch_line.Line(SMALL, [], {}, gpus)
    assert line(f"--sweep --tokens 5B {launcher} {shlex.join(SMALL)}").argv == [
        *("--sweep", "--tokens", "5B"),
        *SMALL,
    ]
    assert planned(*shlex.split(launcher), *SMALL)["run"]["gpus"] == (gpus or 8)
    assert planned("--gpus", "32", *shlex.split(launcher), *SMALL)["run"]["gpus"] == 32


@pytest.mark.parametrize(
    "text",
    [
        "--data-path corpus/python --tokens 5B",
        "--data-path 1 corpus/python 2 runs/torchrun",
        "--hf-config python",
    ],
)
def test_a_value_is_no_launcher(text):
    assert line(text) == launch_line.Line(shlex.split(text), [], {}, None)


def test_a_single_word_is_taken_as_it_is():
    """A shell has taken its quotes off; only words in one pair of them are read once more."""
    word = "--hf-config=it's"
    found = launch_line.read([word], plan_flags.parser())
    assert found == launch_line.Line([word], [], {}, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.gpus = 8


@pytest.mark.parametrize("behind", [True, False])
def test_what_a_plan_does_not_use_is_named(capsys, behind):
    words = [*SMALL, *OTHERS.split()] if behind else [*OTHERS.split(), *SMALL]
    found = planned("torchrun", "--nproc-per-node", "8", "pretrain_gpt.py", *words)
    assert found["not_used"] == NAMES
    assert {key: found[key] for key in ("cost", "text")} == {
        key: planned(*SMALL)[key] for key in ("cost", "text")
    }
    code, text = screen_of(capsys, *words)
    assert code == 0 and f"\nNot used by a plan: {' '.join(NAMES)}\n" in text
    assert planned(*SMALL)["not_used"] == []


def test_a_line_in_quotes(capsys):
    whole = shlex.join(["torchrun", "--nproc-per-node", "16", "x.py", *SMALL, *OTHERS.split()])
    code, text = screen_of(capsys, whole)
    assert code == 0 and "16 x h100" in text and "Not used by a plan: --bf16" in text


@pytest.mark.parametrize(
    "end", ["", " 2>&1 | tee log", " > log", " &> log", " >> log 2>&1 &", " &", "; echo done"]
)
def test_a_command_of_a_script_in_quotes(end):
    words = shlex.join(SMALL).replace(" --", " \\\n    --")
    text = f"# run 7\ntorchrun --nproc-per-node 16 \\\r\n x.py \\ \n  {words}{end}"
    found = launch_line.read([text], plan_flags.parser())
    assert found == launch_line.Line(SMALL, [], {}, 16)


@pytest.mark.parametrize(
    "launcher, variable",
    [
        ("torchrun $DISTRIBUTED_ARGS x.py", r"\$DISTRIBUTED_ARGS"),
        ("torchrun --nproc-per-node 8 x.py ${GPT_ARGS[@]}", r"\${GPT_ARGS\[@\]}"),
        ("torchrun --nnodes $NNODES --nproc-per-node 8 x.py", r"\$NNODES"),
        ("torchrun --nproc-per-node=$GPUS x.py", r"\$GPUS"),
    ],
)
def test_a_variable_that_no_shell_has_replaced(launcher, variable):
    message = f"the launch line: expected words without a shell's variables, got {variable}. Put"
    with pytest.raises(TSTError, match=message):
        line(f"{launcher} {shlex.join(SMALL)}")


def test_flags_that_change_the_run_are_said_to(capsys):
    found = planned(*SMALL, "--spec", "a", "b", "--mtp-hybrid-override-pattern", "M", "--bf16")
    assert found["warnings"][-1] == (
        "--spec, --mtp-hybrid-override-pattern change the run: the figures are those of the run "
        "without"
    )


def test_a_negative_value_belongs_to_its_flag():
    assert line(f"{shlex.join(SMALL)} --adlr-autoresume --exit-duration-in-mins -5").not_used == [
        "--adlr-autoresume",
        "--exit-duration-in-mins",
    ]


@pytest.mark.parametrize(
    "words, message",
    [
        ("--num-layer 4", "got --num-layer. Did you mean --num-layers?"),
        ("--num_layers 4", "got --num_layers. Did you mean --num-layers?"),
        ("--bfl6", "got --bfl6. Did you mean --bf16?"),
        ("--recompute-granularty full", "Did you mean --recompute-granularity?"),
        ("--tst-bagsize 4", "got --tst-bagsize. Did you mean --tst-bag-size?"),
        ("--token 5B", "got --token. Did you mean --tokens?"),
        ("--wholly-unheard-of 1", "expected a flag of plan or of Megatron's, got --wholly"),
        ("--lr abc", "argument --lr: invalid float value: 'abc'. Correct it."),
        ("--lr", "argument --lr: expected one argument. Correct it."),
        ("--bf16 yes", "expected flags and their values, got yes."),
        ("--recompute-granularity most", "invalid choice: 'most'"),
        ("torchrun --nproc-per-node 8", "expected a script (x.py or -m MODULE), got torchrun"),
    ],
)
def test_a_line_that_nobody_takes(capsys, words, message):
    code, text = screen_of(capsys, *shlex.split(words), *SMALL)
    assert code == 2 and message in text and len(text.splitlines()) == 1, text


def test_quotes_that_do_not_end(capsys):
    code, text = screen_of(capsys, 'torchrun x.py --num-layers "4')
    assert code == 2 and "expected words as a shell reads them" in text


def test_without_megatron_a_mistake_beside_a_known_name_is_found(monkeypatch, capsys):
    monkeypatch.setattr(launch_line, "_megatrons", lambda: None)
    assert planned(*SMALL, "--bf16", "--log-interval", "1")["not_used"] == [
        "--bf16",
        "--log-interval",
    ]
    code, text = screen_of(capsys, *SMALL, "--num-layer", "4")
    assert code == 2 and "Did you mean --num-layers?" in text


def test_samples_in_place_of_iterations(capsys):
    assert SMALL[-4:] == ["--train-iters", "1000", "--global-batch-size", "64"]
    run = [*SMALL[:-4], *SMALL[-2:]]
    assert planned(*run, "--train-samples", "64000")["run"] == planned(*SMALL)["run"]
    for words, message in (
        ([*SMALL, "--train-samples", "64000"], "--train-iters and --train-samples: expected one"),
        ([*run, "--train-samples", "63"], "--train-samples: expected at least a step of"),
    ):
        code, text = screen_of(capsys, *words)
        assert code == 2 and message in text


# ---- numbers


@pytest.mark.parametrize("flag", ["--tokens", "--mfu", "--tflops"])
@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "-1",
        "-0.0",
        "0",
        "infB",
        "nanT",
        "B",
        "80b tokens",
        "1e18B",
        "0x10",
        "eighty",
        "80BB",
        "1,5",
        "9" * 5000,
    ],
)
def test_a_number_that_is_none(capsys, flag, value):
    code, text = screen_of(capsys, *SMALL, f"{flag}={value}")
    assert code == 2 and flag in text and "expected a number above 0" in text
    assert len(text.splitlines()) == 1 and len(text) < 6000


@pytest.mark.parametrize(
    "text, count",
    [
        ("80B", 80 * 10**9),
        ("80 B", 80 * 10**9),
        ("80b", 80 * 10**9),
        ("1.5t", 15 * 10**11),
        ("1e12", 10**12),
        ("1_000", 1000),
        ("105K", 105000),
    ],
)
def test_units_of_tokens(text, count):
    assert planned(*SMALL, "--tokens", text)["text"]["available"] == count


@pytest.mark.parametrize(
    "flag",
    [
        "--num-layers",
        "--num-attention-heads",
        "--gpus",
        "--vocab-size",
        "--micro-batch-size",
        "--train-samples",
        "--tensor-model-parallel-size",
        "--make-vocab-size-divisible-by",
    ],
)
@pytest.mark.parametrize(
    "value", ["0", "-1", "", "1e6", "1.0", "nan", "inf", "٣٣x", "9" * 30, "9" * 5000, "8,4"]
)
def test_a_count_that_is_none(capsys, flag, value):
    code, text = screen_of(capsys, *SMALL, f"{flag}={value}")
    assert code == 2 and f"argument {flag}: expected a whole number from 1 to 10^12" in text


@pytest.mark.parametrize(
    "words",
    [
        ["--tst-bag-size", str(10**23)],
        ["--tst-bag-size", "9" * 4000],
        ["--tst-bag-size", "100003,100019,100043"],
        ["--mfu", "1e-300"],
        ["--mfu", "0.4B"],
        ["--tflops", "1e300"],
        ["--tflops", "1e-300"],
        ["--hidden-size", "8"],
        ["--hf-config", ""],
        ["--data-path", ""],
        ["--preset", ""],
        ["--gpu", ""],
        ["--tst-step-ratio", "1e400"],
        ["--tst-iters", str(10**30)],
        ["--tst-bag-size", ""],
        ["--tst-bag-size", "nan"],
        ["--tst-bag-size", "4,,2", "--tst-step-ratio", "0.1,0.1,0.1"],
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_a_run_that_is_none(capsys, words):
    code, text = screen_of(capsys, *SMALL, *words)
    assert code == 2 and "Traceback" not in text and "mistake is foreseen" not in text
    assert len(text.splitlines()) == 1 or "FAULT" in text


def test_sizes_beyond_all_machines_are_numbers(capsys):
    huge = str(10**12)
    words = ["--num-layers", huge, "--seq-length", "1024", "--train-iters", huge, "--sweep"]
    code, text = screen_of(capsys, *SMALL, *words, "--global-batch-size", "64", "--json")
    assert code == 0
    json.loads(text, parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"num_hidden_layers": -1},
        {"hidden_size": 10**30},
        {"hidden_size": None},
        {"hidden_size": "256"},
        {"hidden_size": True},
        {"vocab_size": 0},
        {"vocab_size": 32000.5},
        {"num_experts": 0},
        {"num_experts_per_tok": 99},
        {"rope_theta": 10**400},
    ],
    ids=str,
)
def test_a_config_with_a_value_that_is_none(tmp_path, capsys, change):
    run = "--seq-length 1024 --train-iters 1000 --global-batch-size 64".split()
    (tmp_path / "config.json").write_text(json.dumps(HF | change))
    code, text = screen_of(capsys, "--hf-config", str(tmp_path / "config.json"), *run)
    assert code == 2 and len(text.splitlines()) == 1 and "foreseen" not in text, text


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[" * 100000,
        '{"a":' * 50000,
        '{"vocab_size": ' + "9" * 5000 + "}",
        "null",
        "{}",
        '{"hidden_size": NaN}',
        "\ufeff{}",
        "{",
        '{"model_type": ["llama"]}',
        "\x00",
    ],
    ids=lambda content: content[:12],
)
def test_a_config_that_is_none(tmp_path, capsys, content):
    (tmp_path / "config.json").write_text(content)
    code, text = screen_of(capsys, "--hf-config", str(tmp_path / "config.json"))
    assert code == 2 and len(text.splitlines()) == 1 and "foreseen" not in text, text


def test_a_config_that_is_no_file(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none", "/dev/zero"):
        code, text = screen_of(capsys, "--hf-config", str(path))
        assert code == 2 and len(text.splitlines()) == 1 and "expected a JSON file" in text, text


@pytest.mark.parametrize("value", ["", "0", "-1", "1e3", "x", "²", "9" * 40, "9" * 5000])
@pytest.mark.parametrize("name", ["STEPS", "SEQ", "BATCH_TOKENS", "MICRO_BATCH", "TP"])
def test_variables_of_a_recipe(name, value):
    with pytest.raises(TSTError, match=f"{name}: expected a whole number above 0"):
        recipes.groups("3b", {name: value})


@pytest.mark.parametrize(
    "name, value",
    [("LR", value) for value in ("", "0", "-1", "nan", "inf", "1e400", "2e-4 --x", "1.2.3")]
    + [(name, value) for name in ("BAG_SIZE", "TST_STEPS") for value in ("", "x", "8,", "1 --x")],
)
def test_values_of_a_recipe(name, value):
    with pytest.raises(TSTError, match=f"{name}: expected a"):
        recipes.groups("3b", {name: value})


def test_the_verb_takes_its_own_command_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["megatron-tst", "plan", "torchrun", "x.py", *SMALL])
    assert main() == 0 and "8 x h100" in capsys.readouterr().out
