"""The launch scripts in examples/: their commands go through Megatron's and TST's validation, with
the paper's numbers in them. Nothing trains.
"""

import contextlib
import gzip
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.runs import CHECKOUTS, NO_CHECKOUT, ROOT

from megatron_tst import model_size
from megatron_tst.checks import dry_run
from megatron_tst.config import TSTConfig
from megatron_tst.export.architectures import architecture_of
from megatron_tst.model_size import parameters
from megatron_tst.planning import recipes

EXAMPLES = ROOT / "examples"
# The paper's tables: steps, superposed steps, bag size, positions a step, learning rate; raw tokens
# and millions of parameters follow from it.
PAPER = {
    "270m": (20000, 6000, 6, 2**21, 2e-3, 104.86e9, 267.2),
    "600m": (20000, 6000, 6, 2**21, 1e-3, 104.86e9, 600.2),
    "3b": (20000, 6000, 6, 2**21, 2e-4, 104.86e9, 3340),
    "moe_10b_a1b": (49983, 12483, 16, 2**23, 3e-4, 1.990e12, 10440),
}
SETTINGS = {
    "bf16": {},
    "fp8": {"PRECISION": "fp8"},
    "mxfp8": {"GPU": "b200"},
}
SCRIPTS = sorted(p.name for p in EXAMPLES.glob("*.sh")) + [
    f"slurm/{p.name}" for p in (EXAMPLES / "slurm").glob("*.sbatch")
]


def recipe(name, *flags, **variables):
    """What a recipe prints and its exit code; variables as in its environment, DRY_RUN=print unless
    given.
    """
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "PYTHONPATH": str(ROOT),
        "DRY_RUN": "print",
        **variables,
    }
    environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), environment["PATH"]])
    command = ["bash", str(EXAMPLES / f"{name}.sh"), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def flags_of(name, *flags, **variables):
    """(the launcher's words, the training script's flags) of the command that a recipe prints."""
    done = recipe(name, *flags, **variables)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.replace("\\\n", ""))
    start = next(i for i, word in enumerate(words) if word.endswith("pretrain_gpt_tst.py"))
    return words[:start], words[start + 1 :]


def validated(name, *flags, **variables):
    _, got = flags_of(name, *flags, **variables)
    world = int(variables.get("NNODES", 1)) * int(variables.get("GPUS_PER_NODE", 8))
    vocabulary = recipes.of(name.replace("_", "-")).vocabulary
    return dry_run.validate(got, world, variables.get("GPU", "h100"), vocabulary)


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_reads_it(script):
    done = subprocess.run(["bash", "-n", str(EXAMPLES / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("baseline", [False, True], ids=["tst", "baseline"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", PAPER)
def test_megatron_and_tst_accept_every_recipe(name, setting, baseline):
    variables = SETTINGS[setting] | ({"BASELINE": "1"} if baseline else {})
    args = validated(name, **variables)
    steps, superposed, bag, batch, lr, text, size = PAPER[name]
    assert (args.train_iters, args.lr, args.global_batch_size * args.seq_length) == (
        steps,
        lr,
        batch,
    )
    assert (args.lr_decay_style, args.lr_warmup_iters, args.lr_decay_iters) == ("WSD", 2000, steps)
    assert args.lr_wsd_decay_iters == steps // 10 and (args.adam_beta1, args.adam_beta2) == (
        0.9,
        0.95,
    )
    assert (
        parameters(args)[0] / 1e6 == pytest.approx(size, rel=1e-3)
        and args.padded_vocab_size == 128256
    )
    assert (
        args.untie_embeddings_and_output_weights
        and args.save == args.load
        and args.exit_signal_handler
    )
    assert (args.fp8, args.fp8_recipe if args.fp8 else None) == {
        "bf16": (None, None),
        "fp8": ("hybrid", "tensorwise"),
        "mxfp8": ("e4m3", "mxfp8"),
    }[setting]
    assert (args.fp8_param_gather, args.reuse_grad_buf_for_mxfp8_param_ag) == (
        setting == "mxfp8",
    ) * 2
    config = TSTConfig.from_args(args)
    assert config.enabled is not baseline and args.bf16
    if not baseline:
        schedule = config.schedule(args)
        assert (config.bag_size, schedule.superposition_samples) == (
            bag,
            superposed * args.global_batch_size,
        )
        assert schedule.raw_tokens(schedule.train_samples) == pytest.approx(text, rel=1e-3)
        assert schedule.raw_tokens(schedule.train_samples) == batch * (
            bag * superposed + steps - superposed
        )


# Larger models: steps, superposed steps, bag size, positions a step, learning rate, raw tokens and
# the size that their makers state; nodes of eight GPUs, and TP, PP, VPP, EP, by kind of GPU.
LARGE = {
    "moe_16b_a3b": (272000, 81600, 6, 2**23, 4.2e-4, 5.7e12, 15.96e9, 163840),
    "moe_671b_a37b": (88200, 26460, 6, 2**26, 2.2e-4, 14.8e12, 671.03e9, 129280),
}
MACHINES = {
    ("moe_16b_a3b", "h100"): (2, (2, 1, None, 8)),
    ("moe_16b_a3b", "b200"): (2, (1, 1, None, 8)),
    ("moe_671b_a37b", "h100"): (128, (2, 8, 4, 64)),
    ("moe_671b_a37b", "b200"): (32, (1, 8, 2, 8)),
}


@pytest.mark.parametrize("precision", ["", "fp8", "fp8-blockwise"])
@pytest.mark.parametrize("name, gpu", MACHINES)
def test_megatron_and_tst_accept_the_larger_models(name, gpu, precision):
    nodes, layout = MACHINES[name, gpu]
    more = {"PRECISION": precision} if precision else {}
    args = validated(name, NNODES=str(nodes), GPU=gpu, **more)
    steps, superposed, bag, batch, lr, text, size, vocabulary = LARGE[name]
    assert (args.train_iters, args.lr, args.global_batch_size * args.seq_length) == (
        steps,
        lr,
        batch,
    )
    assert layout == (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        args.expert_model_parallel_size,
    )
    count = model_size.size(args)
    assert count.every - count.mtp == pytest.approx(size, rel=1e-3)
    assert args.padded_vocab_size == vocabulary and args.bf16
    default = "mxfp8" if gpu == "b200" else None
    expected = {"": default, "fp8": "tensorwise", "fp8-blockwise": "blockwise"}[precision]
    assert (args.fp8_recipe if args.fp8 else None) == expected
    config = TSTConfig.from_args(args)
    schedule = config.schedule(args)
    assert (config.bag_size, schedule.superposition_samples) == (
        bag,
        superposed * args.global_batch_size,
    )
    assert schedule.raw_tokens(schedule.train_samples) == pytest.approx(text, rel=2e-3)
    assert nodes * 8 == recipes.of(name.replace("_", "-")).fit(gpu).gpus


@pytest.mark.filterwarnings("ignore:megatron_tst")
@pytest.mark.parametrize(
    "name, flags",
    [("moe_16b_a3b", ["--q-lora-rank", "1536"]), ("moe_671b_a37b", [])],
)
def test_the_larger_models_have_a_hugging_face_architecture(name, flags):
    """As examples/README.md says: what such a run leaves behind can be exported."""
    args = validated(name, *flags, NNODES=str(MACHINES[name, "h100"][0]))
    found = architecture_of(args, LARGE[name][-1], "bfloat16")
    assert found.name == "DeepseekV3ForCausalLM" and found.config["q_lora_rank"] == 1536


def test_a_pipeline_of_another_length_has_no_published_layout():
    groups = recipes.groups("moe-671b-a37b", {"PP": "4"})
    assert "--pipeline-model-parallel-layout" not in groups["parallel"]
    assert recipes.groups("moe-671b-a37b")["parallel"].count("Et|(tt|)*30mL") == 1
    args = validated(
        "moe_671b_a37b", NNODES="64", PP="4", LAYOUT="Et*14|(t*16|)*2t*15mL", GPU="b200"
    )
    assert args.virtual_pipeline_model_parallel_size is None


def test_the_paper_s_longer_run():
    args = validated("270m", STEPS="100000")
    assert (args.train_iters, args.tst_iters, args.lr_wsd_decay_iters) == (100000, 30000, 10000)


def test_the_export_is_measured_at_the_expert_models_shape():
    from bench_export import config_of

    assert {
        "model_type": "qwen3_moe",
        "vocab_size": 128256,
        "num_hidden_layers": 24,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1024,
        "norm_topk_prob": True,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    }.items() <= config_of("moe-10b-a1b").items()


@pytest.mark.parametrize(
    "name, variables",
    [
        ("270m", {"NNODES": "8", "GPU": "b200"}),
        ("600m", {"GPUS_PER_NODE": "1"}),
        ("3b", {"TP": "2", "CP": "2", "SEQ": "8192"}),
        ("3b", {"TP": "2", "PP": "2", "NNODES": "4"}),
        ("3b", {"TP": "2", "PRECISION": "fp8-blockwise"}),
        ("3b", {"TP": "2", "GPU": "b200", "PRECISION": "mxfp8"}),
        ("moe_10b_a1b", {"NNODES": "8", "GPU": "b200"}),
        ("moe_10b_a1b", {"NNODES": "2", "TP": "2", "CP": "2", "PP": "2", "EP": "4"}),
        ("3b", {"MOCK_DATA": "1", "STEPS": "50", "TST_STEPS": "15"}),
    ],
)
def test_other_layouts(name, variables):
    args = validated(name, **variables)
    world = int(variables.get("NNODES", 1)) * int(variables.get("GPUS_PER_NODE", 8))
    assert args.world_size == world and args.padded_vocab_size == 128256
    assert args.seq_length % (2 * args.context_parallel_size) == 0
    assert (
        not args.sequence_parallel
        or args.seq_length % (args.context_parallel_size * args.tensor_model_parallel_size) == 0
    )


@pytest.mark.parametrize(
    "name, flags, variables, message",
    [
        ("3b", ["--no-such-flag", "3"], {}, "unrecognized arguments: --no-such-flag"),
        (
            "3b",
            [],
            {"TP": "3", "SEQ": "4096", "BASELINE": "1"},
            "world size (8) is not divisible by total_model_size",
        ),
        ("3b", [], {"TP": "3", "SEQ": "4096"}, "--seq-length with --tensor-model-parallel-size 3"),
        (
            "270m",
            [],
            {"TP": "2"},
            "num_attention_heads (9) must be a multiple of tensor_model_parallel_size (2)",
        ),
        (
            "3b",
            [],
            {"PP": "8"},
            "Number of layers should be divisible by the pipeline-model-parallel size",
        ),
        ("3b", [], {"MICRO_BATCH": "3"}, "expected a multiple of micro-batch size x data-parallel"),
        (
            "moe_10b_a1b",
            [],
            {"EP": "3"},
            "Number of experts should be a multiple of expert model parallel_size",
        ),
        (
            "3b",
            ["--fp8-format", "hybrid", "--fp4-format", "e2m1"],
            {},
            "cannot be used simultaneously",
        ),
        ("3b", [], {"BAG_SIZE": "0"}, "--tst-bag-size: expected a whole number >= 1"),
        (
            "3b",
            [],
            {"TST_STEPS": "20000"},
            "--tst-iters: expected fewer than the 20000 training iterations",
        ),
        ("3b", ["--reset-position-ids"], {}, "--reset-position-ids with TST"),
        (
            "600m",
            [],
            {"PRECISION": "fp8-blockwise"},
            "--fp8-recipe blockwise: --hidden-size: expected a multiple of 128, got 960",
        ),
    ],
)
def test_a_wrong_setting_is_refused(name, flags, variables, message):
    with pytest.raises(dry_run.Refused) as refused:
        validated(name, *flags, **variables)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"PRECISION": "mxfp8"}, "Hopper has no MXFP8"),
        ({"PRECISION": "fp4"}, "PRECISION: expected bf16, fp8, fp8-blockwise or mxfp8"),
        ({"SEQ": "5000"}, "BATCH_TOKENS: expected a multiple of SEQ=5000"),
        ({"NNODES": "0"}, "NNODES: expected a whole number above 0, got '0'"),
        ({"GPUS_PER_NODE": "all"}, "GPUS_PER_NODE: expected a whole number above 0, got 'all'"),
        ({"DRY_RUN": ""}, "DATA_PATH: expected what prepare_data.sh printed"),
    ],
)
def test_what_the_scripts_refuse_themselves(variables, message):
    done = recipe("3b", **variables)
    assert done.returncode == 2 and message in done.stderr


def test_every_variable_of_a_recipe_reaches_it():
    given = {
        "GPU": "b200",
        "STEPS": "50",
        "TST_STEPS": "20,10",
        "BAG_SIZE": "8,4",
        "BATCH_TOKENS": "262144",
        "LR": "7e-4",
        "SEQ": "8192",
        "MICRO_BATCH": "2",
        "PRECISION": "fp8",
        "TP": "2",
        "PP": "2",
        "CP": "4",
        "EP": "4",
        "LAYOUT": "Et*12|t*12L",
    }
    _, got = flags_of("moe_10b_a1b", **given)
    groups = recipes.groups("moe-10b-a1b", given)
    assert list(given) == list(recipes.VARIABLES)
    text = " ".join(got)
    for group in groups.values():
        assert " ".join(group) in text
    for flags in (
        "--train-iters 50 --global-batch-size 32 --micro-batch-size 2 --lr 7e-4 ",
        "--tst-bag-size 8,4 --tst-iters 20,10 ",
        "--seq-length 8192 ",
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 ",
        "--context-parallel-size 4 --expert-model-parallel-size 4 ",
        "--make-vocab-size-divisible-by 64 ",
        "--pipeline-model-parallel-layout Et*12|t*12L ",
        "--bf16 --fp8-format hybrid --fp8-recipe tensorwise ",
    ):
        assert flags in text
    assert "--expert-model-parallel-size 1 " in " ".join(flags_of("3b", EP="4")[1])


def test_the_launchers():
    torchrun, flags = flags_of(
        "3b", "--seed", "7", NNODES="4", NODE_RANK="2", MASTER_ADDR="n0", DATA_PATH="0.5 a 0.5 b"
    )
    assert " ".join(torchrun).startswith(
        "torchrun --nnodes 4 --nproc-per-node 8 --node-rank 2 --master-addr n0"
    )
    assert flags[-2:] == ["--seed", "7"] and flags[flags.index("--data-path") :][:5] == [
        "--data-path",
        "0.5",
        "a",
        "0.5",
        "b",
    ]
    assert flags_of("3b", RANK="3")[0] == ["python"]
    done = recipe("3b", MEGATRON_LM="/lm")
    assert "-m megatron_tst.launch /lm/pretrain_gpt.py" in done.stdout


def test_dry_run_from_the_shell():
    good = recipe("270m", DRY_RUN="1")
    assert good.returncode == 0, good.stderr
    for text in (
        "dry run: accepted",
        "267.2 M parameters",
        "6,000 with bags of 6, then 14,000 plain",
        "104,857,600,000 tokens",
        "NOT checked GPU",
    ):
        assert text in good.stdout


@pytest.mark.parametrize("tp", ["1", "3"], ids=["accepted", "refused"])
def test_a_dry_run_leaves_nothing_behind(tp):
    """The machine that Megatron was told of is forgotten, however the validation ends."""
    from megatron.core import utils
    from megatron.core.models.common.embeddings import rope_utils

    def state():
        cuda = torch.cuda.get_device_capability, torch.cuda.get_device_properties
        engine = utils.get_te_version(), rope_utils.fused_apply_rotary_pos_emb
        return *cuda, *engine, list(sys.argv), dict(os.environ)

    before, (_, flags) = state(), flags_of("3b")
    flags += ["--tensor-model-parallel-size", tp]
    with pytest.raises(dry_run.Refused) if tp == "3" else contextlib.nullcontext():
        dry_run.validate(flags, 8, "h100")
    assert state() == before


def test_exit_code_and_message_of_a_refusal(capsys):
    assert (
        dry_run.main(["--world-size", "8", "--gpu", "h100", "--", *flags_of("270m", TP="2")[1]])
        == 2
    )
    error = capsys.readouterr().err
    assert (
        error.startswith("dry run: REFUSED: transformer_config.py:")
        and "num_attention_heads (9)" in error
    )


@pytest.mark.skipif(not CHECKOUTS, reason=NO_CHECKOUT)
@pytest.mark.parametrize("checkout", CHECKOUTS, ids=lambda p: p.name)
def test_dry_run_with_megatron_lms_own_arguments(checkout):
    done = recipe("moe_10b_a1b", DRY_RUN="1", MEGATRON_LM=str(checkout), GPU="b200", NNODES="8")
    assert done.returncode == 0 and "dry run: accepted" in done.stdout, done.stderr


@pytest.mark.skipif(not CHECKOUTS, reason=NO_CHECKOUT)
def test_prepare_data(tmp_path):
    """Two corpora, one of them packed: every token in place, a blend whose corpora weigh alike."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    words = {word: i for i, word in enumerate(["<end>", "one", "two", "three"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>").save_pretrained(
        tmp_path / "tokenizer"
    )
    (tmp_path / "dclm" / "part").mkdir(parents=True)
    (tmp_path / "edu").mkdir()

    def lines(*texts):
        return "".join(json.dumps({"text": text, "url": "-"}) + "\n" for text in texts)

    (tmp_path / "dclm" / "part" / "a.jsonl").write_text(lines("one two", "three"))
    with gzip.open(tmp_path / "edu" / "c.jsonl.gz", "wt") as file:
        file.write(lines("three one"))

    def prepare(*corpora):
        environment = dict(
            os.environ,
            MEGATRON_LM=str(CHECKOUTS[0]),
            OUT=str(tmp_path / "out"),
            TOKENIZER=str(tmp_path / "tokenizer"),
            WORKERS="1",
            PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
        )
        command = ["bash", str(EXAMPLES / "prepare_data.sh"), *corpora]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)

    done = prepare(f"dclm={tmp_path / 'dclm'}", f"edu={tmp_path / 'edu'}")
    assert done.returncode == 0, done.stderr
    *_, count, line = done.stdout.splitlines()
    assert count.startswith("8 tokens in ")
    blend = shlex.split(line)[0].removeprefix("DATA_PATH=").split()
    weights = {Path(prefix).name: float(weight) for weight, prefix in zip(blend[::2], blend[1::2])}
    assert weights == pytest.approx({"part_a_text_document": 0.5, "c_text_document": 0.5})
    assert [
        list(map(int, x)) for x in IndexedDataset(str(tmp_path / "out/dclm/part_a_text_document"))
    ] == [[1, 2, 0], [3, 0]]
    assert validated("3b", DATA_PATH=" ".join(blend)).data_path == blend

    (tmp_path / "edu" / "d.jsonl").write_text("no json\n")
    done = prepare(f"edu={tmp_path / 'edu'}")
    assert done.returncode == 2 and "d.jsonl: the preprocessor failed" in done.stderr
    assert not (tmp_path / "out/edu/d_text_document.idx").exists()
