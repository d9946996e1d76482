"""`megatron-tst plan`: answers to impossible layouts and senseless values, the flags that it
prints, a dataset of the user's, keys.
"""

import json
import math
import shutil
import subprocess
import sys
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import environment
from support.plans import BESIDE, EXPERTS, HF, ROOT, SMALL, accepted, planned, screen_of
from support.published import CONFIGS

from megatron_tst import compat
from megatron_tst.checks import dry_run
from megatron_tst.cli import plan_screen
from megatron_tst.config import TSTConfig
from megatron_tst.errors import TSTError
from megatron_tst.planning import flags as plan_flags
from megatron_tst.planning import plan, recipes

# ---- layouts


GROUPS = [*SMALL, "--group-query-attention", "--num-query-groups", "2"]
LATER = (  # what Megatron finds out when it starts, builds its layers, or trains
    "--sequence-parallel: expected it beside experts",
    "--moe-ffn-hidden-size",
    "--ffn-hidden-size",
)


@pytest.mark.parametrize(
    "model, layouts",
    [
        (
            SMALL,
            [
                "1 1 1 1",
                "2 1 1 1",
                "3 1 1 1",
                "1 3 1 1",
                "1 4 1 1",
                "2 2 3 1",
                "1 1 5 1",
                "1 1 1 2",
            ],
        ),
        (GROUPS, ["4 1 1 1", "2 1 1 1", "3 1 1 1"]),
        (EXPERTS, ["1 1 1 4", "1 1 1 3", "2 1 1 2", "1 2 2 1", "1 3 1 2", "4 1 1 8"]),
    ],
    ids=["dense", "groups", "experts"],
)
def test_a_layout_is_possible_where_megatron_says_so(model, layouts):
    """Megatron's validation and the plan's rules agree on 12 GPUs, but for LATER."""
    names, verdicts = ("tensor-model", "pipeline-model", "context", "expert-model"), []
    for sizes in layouts:
        layout_ = [
            word
            for name, size in zip(names, sizes.split())
            for word in (f"--{name}-parallel-size", size)
        ]
        run = [
            *model,
            *layout_,
            "--sequence-parallel",
            "--global-batch-size",
            "72",
            "--num-layers",
            "6",
        ]
        faults = [
            fault
            for fault in planned(*run, "--gpus", "12").get("faults", [])
            if not fault.startswith(LATER)
        ]
        beside = (
            "--micro-batch-size 1 --max-position-embeddings 1024 --tst-bag-size 6 --tst-iters 300"
        ).split()
        try:
            dry_run.validate([*run, *BESIDE, *beside], 12, "h100")
        except dry_run.Refused as refused:
            assert faults, (sizes, refused)
        else:
            assert not faults, (sizes, faults)
        verdicts.append(not faults)
    assert any(verdicts) and not all(verdicts)


@pytest.mark.parametrize(
    "argv, fault",
    [
        (
            [*SMALL, "--gpus", "6", "--tensor-model-parallel-size", "4"],
            "--gpus: expected a multiple of TP x PP x CP = 4 x 1 x 1 = 4, got 6. Change one of "
            "them.",
        ),
        (
            [*SMALL, "--tensor-model-parallel-size", "3", "--gpus", "6"],
            "--num-attention-heads: expected a multiple of TP = 3, got 8.",
        ),
        (
            [*SMALL, "--pipeline-model-parallel-size", "8"],
            "--num-layers: expected a multiple of PP = 8, got 4.",
        ),
        (
            [*SMALL, "--micro-batch-size", "3"],
            "--global-batch-size: expected a multiple of micro-batch x DP = 3 x 8 = 24, got 64.",
        ),
        (
            [*SMALL, "--seq-length", "1022", "--context-parallel-size", "2"],
            "--seq-length with --context-parallel-size 2: expected a multiple of 4, got 1022.",
        ),
        (
            [*SMALL, "--expert-model-parallel-size", "2"],
            "--expert-model-parallel-size: expected 1 without --num-experts, got 2.",
        ),
        (
            [*SMALL, "--group-query-attention", "--num-query-groups", "3"],
            "--num-attention-heads: expected a multiple of query groups = 3, got 8.",
        ),
        (
            [
                *SMALL,
                "--group-query-attention",
                "--num-query-groups",
                "4",
                "--num-attention-heads",
                "24",
                "--hidden-size",
                "768",
                "--tensor-model-parallel-size",
                "6",
                "--gpus",
                "6",
            ],
            "--num-query-groups: expected a multiple or a divisor of TP = 6, got 4.",
        ),
        (
            [*SMALL, "--ffn-hidden-size", "1001", "--tensor-model-parallel-size", "2"],
            "--ffn-hidden-size: expected a multiple of TP = 2, got 1001.",
        ),
        (
            [*EXPERTS, "--expert-model-parallel-size", "3", "--gpus", "24"],
            "--num-experts: expected a multiple of EP = 3, got 8.",
        ),
        (
            [
                *EXPERTS,
                "--expert-model-parallel-size",
                "8",
                "--tensor-model-parallel-size",
                "2",
                "--sequence-parallel",
            ],
            "--gpus: expected a multiple of EP x expert TP x PP = 8 x 2 x 1 = 16, got 8.",
        ),
        (
            [*EXPERTS, "--tensor-model-parallel-size", "2"],
            "--sequence-parallel: expected it beside experts and TP",
        ),
        (
            [*EXPERTS, "--expert-tensor-parallel-size", "3", "--gpus", "24"],
            "--moe-ffn-hidden-size: expected a multiple of expert TP = 3, got 256.",
        ),
        (
            ["--preset", "600m", "--fp8-recipe", "blockwise"],
            "--fp8-recipe blockwise: --hidden-size: expected a multiple of 128, got 960.",
        ),
        (
            [*SMALL, "--fp8-format", "e4m3", "--fp8-recipe", "mxfp8"],
            "--fp8-recipe mxfp8: expected sm_100 or newer",
        ),
        (
            [*SMALL, "--tst-iters", "1000"],
            "--tst-iters: expected fewer than the 1000 training iterations, got 1000.",
        ),
        (
            [*SMALL, "--tst-bag-size", "8,4", "--tst-step-ratio", "0.6,0.5"],
            "--tst-iters: expected fewer than the 1000 training iterations, got 1100.",
        ),
        (
            [*SMALL, "--train-iters", "1"],
            "--tst-step-ratio: expected at least half an iteration of 1, got 0.3.",
        ),
    ],
)
def test_an_impossible_run(capsys, argv, fault):
    assert any(text.startswith(fault) for text in planned(*argv)["faults"]), planned(*argv)[
        "faults"
    ]
    code, text = screen_of(capsys, *argv)
    assert (
        code == 2
        and fault in " ".join(text.split())
        and "the run is impossible" in text
        and len(text.splitlines()) < 30
    )
    assert text.splitlines()[-1].startswith("megatron-tst plan: error: ")
    code, text = screen_of(capsys, *argv, "--json")
    found, end = json.JSONDecoder().raw_decode(text)  # stdout, then the line on stderr
    assert code == 2 and found["faults"] == planned(*argv)["faults"]
    assert text[end:].count("\n") == 2 and found["faults"][0] in text[end:]


def test_all_faults_at_once():
    faults = planned(
        *SMALL,
        "--tensor-model-parallel-size",
        "3",
        "--pipeline-model-parallel-size",
        "5",
        "--gpus",
        "15",
        "--micro-batch-size",
        "7",
    )["faults"]
    assert len(faults) >= 3


# ---- senseless values


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tst-step-ratio", "1.5"], "--tst-step-ratio: expected a number in [0, 1), got 1.5."),
        (["--tst-step-ratio", "-0.2"], "--tst-step-ratio: expected a number in [0, 1), got -0.2."),
        (["--tst-step-ratio", "nan"], "--tst-step-ratio: expected a number in [0, 1), got nan."),
        (["--tst-step-ratio", "1"], "--tst-step-ratio: expected a number in [0, 1), got 1."),
        (["--tst-step-ratio", "0"], "this run is stock megatron"),
        (["--tst-bag-size", "1"], "this run is stock megatron"),
        (["--tst-bag-size", "0"], "--tst-bag-size: expected a whole number >= 1, got 0."),
        (["--tst-bag-size", "2.5"], "--tst-bag-size: expected a whole number >= 1, got 2.5."),
        (["--tst-bag-size", "8,4", "--tst-step-ratio", "0.2"], "one for each of the bag sizes 8,4"),
        (["--tst-step-ratio", "0.2", "--tst-iters", "10"], "expected one of the two"),
        (["--train-iters", "0"], "--train-iters: expected a whole number from 1 to 10^12, got '0'"),
        (["--train-iters", "1e4"], "--train-iters: expected a whole number"),
        (["--global-batch-size", "-3"], "--global-batch-size: expected a whole number"),
        (["--seq-length", "10000000000000000000000000"], "--seq-length: expected a whole number"),
        (["--mfu", "40"], "--mfu: expected a share in (0, 1], got 40. Give 0.4 for 40 %."),
        (["--mfu", "0"], "--mfu: expected a number above 0"),
        (["--mfu", "0.4", "--tflops", "300"], "--mfu and --tflops: expected one of the two"),
        (["--tokens", "lots"], "--tokens: expected a number above 0, as 0.4 or 105b, got 'lots'"),
        (["--tokens", "0.1"], "--tokens: expected a token at least"),
        (["--gpu", "a100"], "invalid choice: 'a100'"),
        (["--preset", "7b"], "invalid choice: '7b'"),
        (
            ["--preset", "3b", "--hf-config", "c.json"],
            "--preset and --hf-config: expected one of the two",
        ),
        (
            ["--hf-config", "/nowhere/config.json"],
            "/nowhere/config.json: expected a JSON file, got no such file. Give the config.json",
        ),
        (["--data-path", "/nowhere/text"], "--data-path: expected /nowhere/text.bin"),
        (
            ["--data-path", "s3://bucket/text"],
            "--data-path: expected local files, to be counted and read, got s3://bucket/text.",
        ),
        (
            ["--data-path", "1", "a", "b", "c"],
            "--data-path: expected a weight before each prefix, or before none, got 1 a b c.",
        ),
        (["--data-path", "-1", "a", "2", "b"], "--data-path: expected weights above 0"),
        (["--no-such-flag", "3"], "expected a flag of plan or of Megatron's, got --no-such"),
        (
            ["--hidden-size", "100"],
            "--hidden-size: expected a multiple of --num-attention-heads = 8, got 100.",
        ),
        (
            ["--num-experts", "4", "--moe-router-topk", "5"],
            "--moe-router-topk: expected at most --num-experts = 4, got 5.",
        ),
        (
            ["--max-position-embeddings", "512"],
            "--seq-length: expected at most --max-position-embeddings = 512, got 1024.",
        ),
    ],
)
def test_a_senseless_value(capsys, flags, message):
    code, text = screen_of(capsys, *SMALL, *flags)
    assert (
        code == 2
        and text.startswith("megatron-tst plan: error: ")
        and message.lower() in text.lower()
        and len(text.splitlines()) == 1
    )


def test_a_missing_value(capsys):
    code, text = screen_of(capsys)
    assert (
        code == 2
        and "--num-layers: expected a value, got none. Give it, or a shape by --preset or "
        "--hf-config."
        in text
    )


@settings(max_examples=150)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "--tst-bag-size",
                "--tst-step-ratio",
                "--tst-iters",
                "--train-iters",
                "--global-batch-size",
                "--seq-length",
                "--tokens",
                "--mfu",
                "--gpus",
                "--tensor-model-parallel-size",
                "--pipeline-model-parallel-size",
                "--context-parallel-size",
                "--expert-model-parallel-size",
                "--micro-batch-size",
                "--num-experts",
                "--num-query-groups",
                "--vocab-size",
                "--num-layers",
                "--num-attention-heads",
                "--hidden-size",
            ]
        ),
        st.one_of(
            st.integers(-2, 70).map(str),
            st.floats(-1, 2).map(str),
            st.sampled_from(
                ["", "nan", "inf", "x", "8,4", "0.2,0.1", "1e9", "10" * 6, "1T", "9" * 30]
            ),
        ),
    )
)
def test_never_a_traceback(flags):
    words = [word for pair in flags.items() for word in pair]
    try:
        found = planned(*SMALL, "--sweep", *(f"{a}={b}" for a, b in zip(words[::2], words[1::2])))
    except TSTError as error:
        assert "\n" not in str(error)
    else:
        plan_screen.show(found)
        json.dumps(found)


# ---- the flags


@pytest.mark.parametrize(
    "flags, names",
    [
        # Megatron's defaults, and this package's
        ("", dict(gpu="h100", gpus=8, micro_batch_size=1, moe_router_topk=2, tokens=None)),
        (
            "",
            dict(tst_bag_size=6, tst_step_ratio=0.3, tst_iters=None, max_position_embeddings=1024),
        ),
        ("", dict(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)),
        ("", dict(context_parallel_size=1, expert_model_parallel_size=1, lr_decay_iters=None)),
        ("", dict(make_vocab_size_divisible_by=128, fp8=None, fp4=None, fp8_recipe="delayed")),
        ("", dict(swiglu=True, group_query_attention=False, sequence_parallel=False)),
        ("", dict(qk_layernorm=False, untie_embeddings_and_output_weights=False, split=None)),
        ("", dict(train_samples=None, lr_wsd_decay_iters=None, padded_vocab_size=50048)),
        # as they are given
        ("--num-experts 8 --moe-router-topk 3", dict(num_experts=8, moe_router_topk=3)),
        ("--num-experts 8 --moe-router-topk 8", dict(num_experts=8, moe_router_topk=8)),
        ("--num-experts 2", dict(num_experts=2, moe_router_topk=2)),
        ("--max-position-embeddings 1025", dict(max_position_embeddings=1025)),
        ("--max-position-embeddings 1024", dict(max_position_embeddings=1024)),
        ("--hidden-size 100 --kv-channels 16", dict(hidden_size=100, kv_channels=16)),
        ("--tst-iters 7", dict(tst_iters=7, tst_step_ratio=None, tst_bag_size=6)),
        ("--tst-bag-size 4 --tst-step-ratio 0.5", dict(tst_bag_size=4, tst_step_ratio=0.5)),
        ("--tokens 1.9", dict(tokens=1)),
        ("--tokens 1e18", dict(tokens=10**18)),
        ("--mfu 1", dict(mfu=1.0)),
        ("--mfu 1e-6", dict(mfu=1e-6)),
        ("--tflops 7915.2", dict(tflops=8 * 989.4)),  # four bits: up to eight times bf16's peak
        ("--gpu b200 --tflops 0.00225", dict(tflops=2250 / 10**6)),
        ("--tflops 0.00099", dict(tflops=0.00099)),
        ("--recompute-granularity full", dict(recompute_granularity="full")),
        ("--gpus 1_000", dict(gpus=1000)),
        ("--micro-batch-size 1000000000000", dict(micro_batch_size=10**12)),
        ("--vocab-size 1", dict(vocab_size=1, padded_vocab_size=128)),
        ("--fp8-format e4m3 --fp8-recipe blockwise", dict(fp8="e4m3", fp8_recipe="blockwise")),
        ("--fp4-format e2m1", dict(fp4="e2m1")),
        ("--tensor-model-parallel-size 2", dict(expert_tensor_parallel_size=2)),
        ("--expert-tensor-parallel-size 4", dict(expert_tensor_parallel_size=4)),
        ("--ffn-hidden-size 96", dict(ffn_hidden_size=96, moe_ffn_hidden_size=96)),
        ("--num-query-groups 2", dict(num_query_groups=8)),  # without --group-query-attention
        ("--group-query-attention --num-query-groups 2", dict(num_query_groups=2)),
    ],
)
def test_a_run_from_its_flags(flags, names):
    args, base = plan_flags.read([*SMALL, *flags.split()])
    assert {name: getattr(args, name) for name in names} == names and base == []


def test_samples_are_whole_steps():
    run = [*SMALL[:-4], *SMALL[-2:]]
    for samples, steps in ((64, 1), (64 * 7 + 63, 7)):
        args, _ = plan_flags.read([*run, "--train-samples", str(samples)])
        assert args.train_iters == steps and args.train_samples is None


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (
            "--gpus 1000000000001",
            "a whole number from 1 to 10^12, got '1000000000001'. Correct it.",
        ),
        ("--gpus 0", "argument --gpus: expected a whole number from 1 to 10^12, got '0'. Correct"),
        ("--tokens 1.001e18", "a number above 0, as 0.4 or 105B, got '1.001e18'. Correct it."),
        ("--tokens 0.9", "--tokens: expected a token at least, got 0.9. Give what you have, as 1"),
        ("--mfu 1.01", "--mfu: expected a share in (0, 1], got 1.01. Give 0.4 for 40 %."),
        ("--mfu 9e-7", "--mfu: expected a share in (0, 1], got 9e-07. Give 0.4 for 40 %."),
        (
            "--tflops 7916",
            "--tflops: expected what h100 reaches, whose bf16 peak is 989.4 TFLOP/s, got 7916. "
            "Give what Megatron prints.",
        ),
        ("--tflops 0.00098", "--tflops: expected what h100 reaches, whose bf16 peak is 989.4 "),
        (
            "--mfu 0.4 --tflops 300",
            "--mfu and --tflops: expected one of the two, got both. Leave one out.",
        ),
        (
            "--preset 3b --hf-config c.json",
            "--preset and --hf-config: expected one of the two, got both. Leave one out.",
        ),
        (
            "--hidden-size 100",
            "--hidden-size: expected a multiple of --num-attention-heads = 8, got 100. Or give "
            "--kv-channels.",
        ),
        (
            "--num-experts 1",
            "--moe-router-topk: expected at most --num-experts = 1, got 2. Lower it.",
        ),
        (
            "--num-experts 4 --moe-router-topk 5",
            "--moe-router-topk: expected at most --num-experts = 4, got 5. Lower it.",
        ),
        (
            "--max-position-embeddings 1023",
            "--seq-length: expected at most --max-position-embeddings = 1023, got 1024. Change one "
            "of them.",
        ),
        (
            "--hidden-size 16",
            "--hidden-size: expected a model with an MLP, got 16 with --swiglu. Give "
            "--ffn-hidden-size, or a larger --hidden-size.",
        ),
        (
            "--train-samples 64000",
            "--train-iters and --train-samples: expected one of the two, got both. Leave one out.",
        ),
        ("--fp8-format e5m2", "argument --fp8-format: invalid choice: 'e5m2'"),
        ("--fp8-recipe none", "argument --fp8-recipe: invalid choice: 'none'"),
        ("--fp4-format e4m3", "argument --fp4-format: invalid choice: 'e4m3'"),
    ],
)
def test_what_is_said_of_a_value(flags, sentence):
    with pytest.raises(TSTError) as caught:
        plan_flags.read([*SMALL, *flags.split()])
    assert sentence in str(caught.value)


def test_what_is_said_of_too_few_samples_and_of_a_missing_batch():
    run = SMALL[:-4]
    for flags, sentence in (
        (
            "--global-batch-size 64 --train-samples 63",
            "--train-samples: expected at least a step of --global-batch-size 64, got 63. Raise "
            "it.",
        ),
        (
            "--train-samples 63",
            "--train-iters: expected a value, got none. Give it, or a shape by --preset or "
            "--hf-config.",
        ),
        (
            "--train-iters 63",
            "--global-batch-size: expected a value, got none. Give it, or a shape by --preset or "
            "--hf-config.",
        ),
    ):
        with pytest.raises(TSTError) as caught:
            plan_flags.read([*run, *flags.split()])
        assert str(caught.value) == sentence


def test_a_missing_value_beside_a_config_json(tmp_path):
    """It does not say how long sequences and training are."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["Qwen3-30B-A3B"]))
    with pytest.raises(TSTError) as caught:
        plan_flags.read(["--hf-config", str(tmp_path / "config.json"), "--train-iters", "63"])
    assert str(caught.value) == (
        "--seq-length: expected a value, got none. Give it: a config.json does not say it."
    )


@pytest.mark.parametrize("positions, batch", [(40960, 512), (2048, 1024)])
def test_a_config_json_alone(tmp_path, positions, batch):
    """A run is assumed, and said. A folder is its config.json."""
    config = CONFIGS["Qwen3-30B-A3B"] | {"max_position_embeddings": positions}
    (tmp_path / "config.json").write_text(json.dumps(config))
    args, _ = plan_flags.read(["--hf-config", str(tmp_path)])
    got = args.seq_length, args.train_iters, args.global_batch_size
    assert got == (min(4096, positions), 20000, batch)
    assert args.notes[-1] == (
        f"--seq-length {got[0]} --train-iters 20000 --global-batch-size {batch} assumed: "
        "config.json says nothing of a run"
    )


@pytest.mark.parametrize("text, number", [("1M", 1e6), ("2k", 2e3), ("3B", 3e9), ("0.5T", 5e11)])
def test_a_number_with_its_unit(text, number):
    assert plan_flags.positive(text) == number


@pytest.mark.parametrize(
    "flags, expected",
    [
        (
            [],
            dict(preset="3b", gpu="b200", gpus=64, train_iters=20000, tst_bag_size=6),
        ),
        ([], dict(tst_step_ratio=0.3, tst_iters=None, micro_batch_size=4, fp8="e4m3")),
        ([], dict(lr_decay_iters=20000, lr_wsd_decay_iters=2000, max_position_embeddings=4096)),
        ([], dict(vocab_size=128256, padded_vocab_size=128256, make_vocab_size_divisible_by=128)),
        (["--gpu", "h100"], dict(gpu="h100", micro_batch_size=1, fp8=None, gpus=64)),
        (["--gpus", "8"], dict(gpus=8)),
        (["--tst-iters", "700"], dict(tst_iters=700, tst_step_ratio=None)),
        (["--tst-step-ratio", "0.4"], dict(tst_step_ratio=0.4, tst_iters=None)),
        (["--train-iters", "500"], dict(lr_decay_iters=500, lr_wsd_decay_iters=50)),
        (["--train-iters", "9"], dict(lr_decay_iters=9, lr_wsd_decay_iters=1)),
        (["--lr-decay-iters", "77"], dict(lr_decay_iters=77, lr_wsd_decay_iters=2000)),
        (["--lr-wsd-decay-iters", "77"], dict(lr_decay_iters=20000, lr_wsd_decay_iters=77)),
        (["--seq-length", "8192"], dict(seq_length=8192, max_position_embeddings=8192)),
        # another model is none of the paper's
        *(
            ([f"--{name}", value], dict(preset=None))
            for name, value in {
                "num-layers": "35",
                "hidden-size": "4096",
                "ffn-hidden-size": "1024",
                "num-attention-heads": "32",
                "kv-channels": "64",
                "num-query-groups": "8",
                "num-experts": "8",
                "moe-router-topk": "1",
                "moe-ffn-hidden-size": "64",
                "vocab-size": "50000",
            }.items()
        ),
        (["--qk-layernorm"], dict(preset=None)),
        (["--num-layers", "36", "--swiglu"], dict(preset="3b")),  # the same one
    ],
)
def test_a_preset(flags, expected):
    args, base = plan_flags.read(["--preset", "3b", *flags])
    assert {name: getattr(args, name) for name in expected} == expected
    assert base[:2] == ["--num-layers", "36"] and "--bf16" in base and "--tst-iters" not in base


def test_the_help_says_what_each_flag_is():
    text = " ".join(plan_flags.parser().format_help().split())
    for said in (
        "what to plan:",
        "--preset NAME a run of the paper: 270m, 600m, 3b, moe-10b-a1b; or a larger one: "
        "moe-16b-a3b, moe-671b-a37b --hf-config",
        "--hf-config FILE or the shape of a Hugging Face config.json: Llama, Qwen3, and mixtures "
        "of experts as DeepSeek-V3, Qwen3-MoE, GLM-4.5, gpt-oss, Mixtral",
        "--tokens N raw tokens that you have, as 105B or 1.5T",
        "--data-path PREFIX [... ...] or count them in Megatron's dataset, say how often each",
        "--gpus N GPUs (default: the paper's, else 8)",
        "--gpu KIND their kind: h100, h200, b200 (default: b200 with --preset, else h100)",
        "--mfu X share of the dense bf16 peak that your steps reach, in (0, 1]",
        "--tflops X or TFLOP/s a GPU, as Megatron's --log-throughput prints it",
        "--sweep text and the paper's loss for a grid over s and r",
        "--json one JSON object in place of the screen",
    ):
        assert said in text
    options = text[text.index("what to plan:") :]
    assert (
        "--num-layers" not in options and "--tst-" not in options and "Megatron's:" not in options
    )


@pytest.mark.parametrize(
    "flags, more, absent",
    [
        ("", "--tst-bag-size 6 --tst-iters 300", "--num-experts --fp8-recipe --split --gpus"),
        ("", "--num-layers 4", "--expert-tensor-parallel-size --moe-router-topk --vocab-size"),
        ("", "--swiglu --tst-bag-size", "--num-query-groups --tst-step-ratio --max-epochs"),
        ("--gpus 8 --gpu h200 --mfu 0.5 --tokens 1B --split 1", "", "--gpu --mfu --tokens --split"),
        ("--tflops 50 --sweep --json", "", "--tflops --sweep --json"),
        (
            "--num-experts 8 --moe-ffn-hidden-size 256",
            "--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 256",
            "--num-query-groups",
        ),
        ("--fp8-format hybrid --fp8-recipe tensorwise", "--fp8-recipe tensorwise", "--fp4-format"),
        ("--group-query-attention --num-query-groups 4", "--num-query-groups 4", "--fp8-format"),
        ("--tst-fused-linear-loss", "--tst-fused-linear-loss", "True"),
        ("--tst-bag-size 8,4 --tst-iters 200,100", "--tst-bag-size 8,4 --tst-iters 200,100", ""),
        ("--tst-target-weighting power-law", "--tst-target-weighting power-law", "None False"),
    ],
)
def test_the_flags_to_paste(flags, more, absent):
    found = planned(*SMALL, *flags.split())["flags"]
    assert f" {more}" in f" {' '.join(found)}"
    assert not set(absent.split()) & set(found)
    assert len([word for word in found if word.startswith("--")]) == len(
        {word for word in found if word.startswith("--")}
    )


# ---- the flags that it prints


@pytest.mark.parametrize(
    "argv",
    [
        *(["--preset", name] for name in recipes.NAMES),
        *(["--preset", name, "--gpu", "h100"] for name in recipes.NAMES),
        [
            "--preset",
            "3b",
            "--tensor-model-parallel-size",
            "2",
            "--sequence-parallel",
            "--context-parallel-size",
            "2",
            "--seq-length",
            "8192",
            "--gpus",
            "32",
        ],
        [
            "--preset",
            "600m",
            "--tst-bag-size",
            "8,4",
            "--tst-step-ratio",
            "0.2,0.1",
            "--train-iters",
            "5000",
        ],
        [
            "--preset",
            "600m",
            "--tst-target-weighting",
            "power-law",
            "--tst-fused-linear-loss",
            "--gpu",
            "h200",
        ],
        SMALL,
        EXPERTS,
        [
            *SMALL,
            "--group-query-attention",
            "--num-query-groups",
            "2",
            "--tensor-model-parallel-size",
            "2",
            "--fp8-format",
            "hybrid",
            "--fp8-recipe",
            "tensorwise",
        ],
    ],
    ids=lambda argv: " ".join(argv)[:60],
)
def test_megatron_accepts_every_flag_that_is_printed(argv):
    args, found = accepted(list(argv))
    given = plan_flags.read(list(argv))[0]
    names = (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "kv_channels",
        "seq_length",
        "train_iters",
        "global_batch_size",
        "micro_batch_size",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "num_experts",
        "padded_vocab_size",
        "fp8",
        "swiglu",
        "untie_embeddings_and_output_weights",
    )
    assert {name: getattr(args, name) for name in names} == {
        name: getattr(given, name) for name in names
    }
    config = TSTConfig.from_args(args)
    schedule = config.schedule(args)
    assert schedule.raw_tokens(schedule.train_samples) == found["text"]["raw_tokens"]
    assert (
        args.lr_decay_iters in (None, args.train_iters) and args.world_size == found["run"]["gpus"]
    )
    assert (
        config.target_weighting == given.tst_target_weighting
        and config.fused_linear_loss == given.tst_fused_linear_loss
    )


def test_the_shell_reads_what_is_printed(capsys):
    _, text = screen_of(
        capsys, "--preset", "3b", "--tst-bag-size", "8,4", "--tst-step-ratio", "0.2,0.1"
    )
    lines = text[text.index("Flags to paste") :].split("\n", 1)[1]
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {lines}"], capture_output=True, text=True, check=True
    )
    assert (
        done.stdout.split("\n")[:-1]
        == planned("--preset", "3b", "--tst-bag-size", "8,4", "--tst-step-ratio", "0.2,0.1")[
            "flags"
        ]
    )


def test_a_hugging_face_config(tmp_path, capsys):
    file = tmp_path / "config.json"
    run = [
        "--hf-config",
        str(file),
        *"--seq-length 1024 --train-iters 1000 --global-batch-size 64 "
        "--expert-model-parallel-size 4".split(),
    ]
    file.write_text(json.dumps(HF))
    args, found = accepted(run)
    assert (args.num_experts, args.moe_router_topk, args.num_query_groups, args.qk_layernorm) == (
        16,
        4,
        2,
        True,
    )
    assert (
        found["model"]["parameters"] > 2 * found["model"]["active_parameters"] - 2 * 256 * 32000 * 2
    )
    for content, message in (
        ("[1]", "expected a JSON object in it, got [1]"),
        ("{", "config.json: expected JSON, got "),
        (json.dumps(HF | {"model_type": "mamba"}), "model_type: expected one of bailing_moe, "),
        (
            json.dumps({k: v for k, v in HF.items() if k != "hidden_size"}),
            "hidden_size: expected a whole number of at least 1 and at most",
        ),
    ):
        file.write_text(content)
        code, text = screen_of(capsys, *run)
        assert code == 2 and message in text and len(text.splitlines()) == 1, text


# ---- a dataset of the user's, the keys, the start


def test_a_dataset_is_counted_and_read(corpus, capsys):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = [len(document) for document in IndexedDataset(str(corpus))]
    count = sum(documents)
    prefix, all_of_it = str(corpus), (0.0, 1.0)
    measured, (one,) = plan.measure(([prefix], None), all_of_it, 64, seconds=0.05)
    assert measured["tokens"] == measured["counted"] == count == one.tokens
    assert measured["tokens_a_second"] > 1e4
    assert measured["mb_a_second"] == pytest.approx(
        measured["tokens_a_second"] * 2 / 1e6
    )  # 512 ids: two bytes each
    blend = [prefix, prefix], [3.0, 1.0]
    assert plan.measure(blend, all_of_it, 64, seconds=0.01)[0]["tokens"] == int(
        count * 4 / 3
    )  # until the first is used up
    run = [*SMALL, "--data-path", prefix]
    code, text = screen_of(capsys, *run)
    assert code == 0 and "measured here" in text and "do NOT suffice" in " ".join(text.split())
    # Megatron's default split is 969, 30, 1, and it cuts between documents
    found = planned(*run)["text"]
    train = sum(documents[: round(0.969 * len(documents))])
    assert found["available"] == train < count
    assert planned(*run, "--split", "1,1,0")["text"]["available"] == sum(
        documents[: round(0.5 * len(documents))]
    )
    assert planned(*run, "--tokens", "1T")["text"]["available"] == 10**12


def dataset_of(prefix, *documents, ids=512):
    """Megatron's dataset of documents of so many tokens: two bytes a token, four from 65,500 ids
    on. -> prefix
    """
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(ids))
    for count in documents:
        builder.add_document(torch.arange(count), [count])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


class Clock:
    """A 64th of a second passes each time that it is asked: 47 looks until 0.75 s are over."""

    now = 0.0

    def perf_counter(self):
        self.now += 1 / 64
        return self.now


ALL = (0.0, 1.0)


@pytest.mark.parametrize(
    "names, weights, length, tokens, read, size",
    [
        (["one"], None, 8, 12, 8, 2),  # tokens; of a look; bytes each
        (["one"], None, 100, 12, 12, 2),
        (["two"], None, 12, 24, 12, 4),
        (["few", "many"], None, 12, 100001, 12, 2),  # drawn in proportion to the text
        (["one", "two"], [1.0, 1e-12], 12, 12, 12, 2),  # drawn as the weights say
        (["one", "two"], [1e-12, 1.0], 12, 24, 12, 4),
        # until the first one is used up
        (["one", "two"], [4.0, 1.0], 12, 12 * 5 // 4, 12, None),
        (["one", "two"], [1.0, 4.0], 12, 24 * 5 // 4, 12, None),
    ],
)
def test_a_dataset_by_hand(tmp_path, monkeypatch, names, weights, length, tokens, read, size):
    monkeypatch.setattr(plan, "time", Clock())
    dataset_of(tmp_path / "one", 12)
    dataset_of(tmp_path / "two", 12, 12, ids=70000)
    dataset_of(tmp_path / "few", 1)
    dataset_of(tmp_path / "many", 100000)
    there = {"one": 12, "two": 24, "few": 1, "many": 100000}
    prefixes = [str(tmp_path / name) for name in names]
    found, corpora = plan.measure((prefixes, weights), ALL, length, seconds=0.74)
    assert [corpus.tokens for corpus in corpora] == [there[name] for name in names]
    assert (found["tokens"], found["counted"]) == (tokens, sum(there[name] for name in names))
    assert isinstance(found["tokens"], int)
    assert (found["seconds"], found["tokens_a_second"]) == (0.74, 47 * read / 0.75)
    if size:
        assert found["mb_a_second"] == pytest.approx(47 * read * size / 0.75 / 1e6)


def test_a_dataset_that_is_not_there(tmp_path, monkeypatch):
    calls = []

    def hide():
        calls.append("hidden")
        warnings.warn("Apex is not installed", stacklevel=1)

    monkeypatch.setattr(compat, "hide_broken_transformer_engine", hide)
    one = dataset_of(tmp_path / "one", 12)
    for names, share, message in (
        (
            [one, "s3://a/b", "s3://c/d"],
            ALL,
            "--data-path: expected local files, to be counted and read, got s3://a/b. Give --tokens"
            " in place of it.",
        ),
        (
            [one],
            (0.0, 0.4),  # no whole document
            "--data-path: expected text in the training share, got none. Raise it in --split.",
        ),
    ):
        with pytest.raises(TSTError) as caught, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            plan.measure((names, None), share, 8)
        assert str(caught.value) == message
        assert not [warning for warning in warned if "Apex" in str(warning.message)]
    assert calls == ["hidden"] * 2  # before Megatron is imported


def test_what_training_would_say_of_the_text(tmp_path, monkeypatch):
    """4,096 x (6 x 300 + 700) tokens are read, of 4,096 x 250."""
    monkeypatch.setattr(plan, "time", Clock())
    one = dataset_of(tmp_path / "one", 4096 * 250)
    run = [*SMALL, "--seq-length", "64", "--data-path", one, "--split", "1"]
    found = planned(*run)
    reading = {"corpus": one, "tokens": 4096 * 250, "read": 4096 * 2500, "times": 10.0}
    assert found["text"]["readings"] == [reading] and isinstance(
        found["text"]["readings"][0]["read"], int
    )
    assert found["text"]["available"] == 4096 * 250
    measured = found["loader"]["measured"]
    assert (measured["counted"], measured["seconds"]) == (4096 * 250, 1.0)
    assert found["warnings"] == [
        "training refuses this run: --tst-max-epochs: expected no corpus to be read more than 4 "
        f"times, got what {one} is read 10.00 times (10,240,000 tokens of 1,024,000). Give more "
        "text, lower --tst-bag-size or the iterations, or allow it with --tst-max-epochs 10."
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the process that asks, not of the plan
        assert planned(*run, "--tst-max-epochs", "10")["warnings"] == [
            f"{one} is read 10.00 times (10,240,000 tokens of 1,024,000): Megatron repeats it. "
            "More text, smaller bags or fewer iterations change that"
        ]
    ample = planned(*run, "--train-iters", "10", "--tst-iters", "3", "--spec", "a", "b")
    assert ample["warnings"] == ["--spec changes the run: the figures are those of the run without"]
    several = planned(*SMALL, "--spec", "a", "b", "--bf16", "--mtp-hybrid-override-pattern", "M")
    assert several["warnings"] == [
        "--spec, --mtp-hybrid-override-pattern change the run: the figures are those of the run "
        "without"
    ]
    with pytest.raises(TSTError, match="--tst-bag-size: expected at most 4, with --seq-length 250"):
        planned(*SMALL, "--seq-length", "250000", "--data-path", one, "--split", "1")


@pytest.mark.parametrize(
    "flags, got",
    [
        ("--tst-bag-size 1", "--tst-bag-size 1 and --tst-step-ratio 0.3"),
        ("--tst-step-ratio 0", "--tst-bag-size 6 and --tst-step-ratio 0"),
        ("--tst-bag-size 1 --tst-iters 7", "--tst-bag-size 1 and --tst-iters 7"),
    ],
)
def test_a_run_without_superposition(flags, got):
    with pytest.raises(TSTError) as caught:
        planned(*SMALL, *flags.split())
    assert str(caught.value) == (
        f"TST: expected bags of 2 or more and a length above 0, got {got}. This run is stock "
        "Megatron: there is nothing to plan."
    )


def test_all_that_is_said_of_an_impossible_run():
    found = planned(*SMALL, "--gpus", "6", "--tensor-model-parallel-size", "4", "--bf16")
    fault = (
        "--gpus: expected a multiple of TP x PP x CP = 4 x 1 x 1 = 4, got 6. Change one of them."
    )
    assert found.keys() == {"faults", "checks", "not_used"}
    assert found["not_used"] == ["--bf16"] and fault in found["faults"]
    assert found["checks"][0] == {
        "what": "--gpus 6",
        "rule": "a multiple of TP x PP x CP = 4 x 1 x 1 = 4",
        "fault": fault,
    }
    assert [check["fault"] for check in found["checks"] if check["fault"]] == found["faults"]


def test_how_often_each_corpus_is_read(corpus, tmp_path, capsys):
    run, other = [*SMALL, "--data-path", "3", str(corpus), "1"], str(tmp_path / "other")
    for ending in (".bin", ".idx"):
        shutil.copy(f"{corpus}{ending}", other + ending)
    found = planned(*run, other, "--split", "1")
    one, two = found["text"]["readings"]
    assert one["times"] == pytest.approx(3 * two["times"]) and one["corpus"] == str(corpus)
    assert one["read"] + two["read"] == pytest.approx(found["text"]["raw_tokens"])
    assert one["times"] == pytest.approx(one["read"] / one["tokens"]) and one["times"] > 4
    (refusal,) = [said for said in found["warnings"] if "training refuses" in said]
    assert "--tst-max-epochs: expected no corpus to be read more than 4 times" in refusal
    allowed = planned(*run, other, "--tst-max-epochs", "1e9")["warnings"]
    assert any("Megatron repeats it" in said for said in allowed)
    _, text = screen_of(capsys, *run, other)
    assert f"{one['corpus']}: " in text and "to train on, read " in text


@pytest.mark.parametrize(
    "more, message",
    [
        (["--tst-bag-size", "100000"], "--tst-bag-size: expected at most "),
        (["--split", "0,1,0"], "--split: expected up to three numbers, the first above 0"),
        (["--split", ""], "--split: expected up to three numbers"),
    ],
)
def test_a_dataset_that_does_not_do(corpus, capsys, more, message):
    code, text = screen_of(capsys, *SMALL, "--data-path", str(corpus), *more)
    assert code == 2 and message in text and len(text.splitlines()) == 1


def test_a_reader_that_is_too_slow_is_said(capsys):
    found = planned(*SMALL)
    found["loader"]["measured"] = {
        "tokens_a_second": found["loader"]["tokens_a_second_of_a_reader"] / 3,
        "mb_a_second": 1.0,
        "seconds": 1.0,
    }
    plan_screen.show(found)
    assert "a reader needs 3.0 processes: raise --num-workers" in " ".join(
        capsys.readouterr().out.split()
    )


def test_the_keys():
    found = planned("--preset", "3b", "--tokens", "1T", "--sweep")
    assert set(found) == {
        "model",
        "run",
        "phases",
        "text",
        "cost",
        "equal_loss",
        "loss_memory",
        "loader",
        "paper",
        "against",
        "warnings",
        "notes",
        "checks",
        "flags",
        "sweep",
        "not_used",
    }
    assert set(found["text"]) >= {
        "raw_tokens",
        "needed",
        "available",
        "suffices",
        "missing",
        "times",
        "ratio",
        "baseline_tokens",
    }
    assert set(found["cost"]) >= {"flops", "gpu_hours", "step_seconds", "mfu", "source"}
    assert all(
        set(check) == {"what", "rule", "fault"} and not check["fault"] for check in found["checks"]
    )
    assert all(math.isfinite(x) for x in found["cost"].values() if isinstance(x, float))


def test_no_torch_and_the_json_of_the_verb():
    code = (
        "import sys; from megatron_tst.cli import main; main(['plan', *sys.argv[1:]]); "
        "sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    )
    asked = [["--preset", "3b", "--json"], ["--preset", "3b", "--print", "STEPS=100"]]
    plan_, printed = (
        subprocess.run(
            [sys.executable, "-c", code, *argv], capture_output=True, text=True, env=environment()
        )
        for argv in asked
    )
    assert plan_.returncode == printed.returncode == 0 and not plan_.stderr + printed.stderr
    assert json.loads(plan_.stdout)["run"]["steps"] == 20000
    assert "--train-iters 100 " in printed.stdout and "--tst-iters 30" in printed.stdout


def test_the_door_in_tools_and_a_reader_that_leaves():
    script = subprocess.run(
        [sys.executable, ROOT / "tools/plan.py", "--preset", "3b", "--gpus", "7"],
        capture_output=True,
        text=True,
    )
    piped = subprocess.run(
        ["bash", "-c", '"$0" -m megatron_tst plan --preset 3b | head -1', sys.executable],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "3b: 3.34B parameters" in piped.stdout and not piped.stderr
    assert script.returncode == 2 and "FAULT" in script.stdout and "Traceback" not in script.stderr


def test_help_is_one_screen(capsys):
    with pytest.raises(SystemExit):
        screen_of(capsys, "--help")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--print"], "--print: expected --preset, and nothing else, beside it, got none."),
        (
            ["--preset", "3b", "--gpu", "h100", "--print"],
            "--print: expected --preset, and nothing else, beside it, got --gpu.",
        ),
        (["--preset", "3b", "--print", "STEPS"], "--print: expected variables as STEPS=100"),
        (["--preset", "3b", "--print", "SPEED=1"], "PRECISION, TP, PP, CP, EP, LAYOUT, got"),
        (["--preset", "3b", "--print", "STEPS=1e4"], "STEPS: expected a whole number above 0"),
        (["--preset", "3b", "--print", "TP=0"], "TP: expected a whole number above 0, got '0'."),
        (["--preset", "3b", "--print", "GPU=a100"], "GPU: expected h100 or h200 or b200, got a100"),
    ],
)
def test_a_recipe_that_cannot_be_printed(capsys, argv, message):
    code, text = screen_of(capsys, *argv)
    assert code == 2 and message in text and len(text.splitlines()) == 1


def test_the_gpu_that_a_recipe_was_checked_for():
    flags = [*SMALL, *"--fp8-format hybrid --fp8-recipe tensorwise --gpu h100".split()]
    (rule,) = [c["rule"] for c in planned(*flags)["checks"] if c["what"] == "tensorwise"]
    assert rule.startswith("sm_90, CUDA 13.0 (assumed) and the shapes of a rank")
