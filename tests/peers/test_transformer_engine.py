"""The real Transformer Engine (make test-te), imported without a GPU: models of its layer spec,
their checkpoints, its rules of precision.
"""

import argparse
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support.close import close
from support.paths import ROOT, environment

PARTS, TESTED = (
    ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch"),
    "2.12.0",
)


def version(part):
    try:
        return importlib.metadata.version(part)
    except importlib.metadata.PackageNotFoundError:
        return None


if {version(part) for part in PARTS} != {TESTED} or torch.cuda.is_available():
    what = (
        f"models, checkpoints and precision rules of the real Transformer Engine {TESTED}, "
        f"which is not here, or a GPU is"
    )
    pytest.skip(f"NOT RUN: {what}; make test-te", allow_module_level=True)

from te_models import EXPORTED, MODELS, VOCAB, arguments, built, fill, save

from megatron_tst import cli
from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.checkpoint.verify import differences
from megatron_tst.checks import dry_run
from megatron_tst.checks.precision import check_precision
from megatron_tst.config import TSTConfig
from megatron_tst.errors import TSTError
from megatron_tst.hardware import recipes
from megatron_tst.ops import reference

GPUS = [
    (sm, cuda)
    for sm in ((8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
    for cuda in ("12.8", "12.9", "13.0")
]
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4")
RUNS = [  # recipe of examples/, its variables
    (name, {"GPU": "b200" if precision == "mxfp8" else "h100", "PRECISION": precision})
    for name in ("270m", "600m", "3b", "moe_10b_a1b")
    for precision in ("bf16", "fp8", "fp8-blockwise", "mxfp8")
]


def widths(hidden=1024, heads=8, channels=128, ffn=4096):
    return dict(
        hidden_size=hidden, num_attention_heads=heads, kv_channels=channels, ffn_hidden_size=ffn
    )


# (positions of a rank, sequence parallelism over 2 ranks, widths of the model): one of them off at
# a time
SHAPES = [(tokens, sp, widths()) for sp in (False, True) for tokens in range(8, 400, 8)]
SHAPES += [
    (256, sp, widths(**{name: size + off}))
    for sp in (False, True)
    for name, size in (("hidden", 1024), ("channels", 128), ("ffn", 4096))
    for off in range(0, 272, 8)
]
CASES = [(recipe, *shape) for recipe in RECIPES for shape in SHAPES]


def gemms(tokens, sp, sizes):
    """Of a layer on a rank: [tokens, width in, width out, input gathered over the tensor-parallel
    ranks].
    """
    tp, hidden, ffn = 1 + sp, sizes["hidden_size"], sizes["ffn_hidden_size"]
    attention = sizes["num_attention_heads"] * sizes["kv_channels"]
    column = [[tokens, hidden, 3 * attention // tp, sp], [tokens, hidden, 2 * ffn // tp, sp]]
    row = [[tokens * tp, attention // tp, hidden, False], [tokens * tp, ffn // tp, hidden, False]]
    return column + row


def flags_of(name, variables):
    """Flags for dry_run.py of a recipe in examples/, or None where the script refuses its variables
    itself.
    """
    environment = {
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
        "HOME": "/nonexistent",
        "DRY_RUN": "print",
        **variables,
    }
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / f"{name}.sh")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.replace("\\\n", ""))
    start = next(i for i, word in enumerate(words) if word.endswith("pretrain_gpt_tst.py"))
    return ["--world-size", "8", "--gpu", variables["GPU"], "--", *words[start + 1 :]]


@pytest.fixture(scope="module")
def asked(megatron, tmp_path_factory):
    """(what ask_transformer_engine.py answers, {model: folder})

    A model's folder: `local`, a checkpoint of the local layer spec with made-up weights; `for_te`,
    what `boundary --layer-spec` makes of it; `te`, what the model with Transformer Engine's layers
    saves that has loaded it; `back`, what `boundary` makes of that.
    """
    here = tmp_path_factory.mktemp("te")
    folders = {name: here / str(i) for i, name in enumerate(MODELS)}
    for name, folder in folders.items():
        args = arguments(name, "local")
        model = built(args)
        fill(model)
        save(args, model, folder / "local")
        assert (
            convert(
                "boundary",
                folder / "local",
                folder / "for_te",
                "--layer-spec",
                "transformer_engine",
            )
            == 0
        )
    jobs = {
        "recipes": GPUS,
        "shapes": [(recipe, gemms(*shape)) for recipe, *shape in CASES],
        "dry_runs": [flags_of(*run) for run in RUNS],
        "models": {name: str(folder) for name, folder in folders.items()},
    }
    (here / "jobs.json").write_text(json.dumps(jobs))
    variables = environment(CUDA_VISIBLE_DEVICES="")
    variables.pop("MEGATRON_TST_CPU", None)
    ask = [
        sys.executable,
        "-W",
        "ignore",
        str(Path(__file__).parent / "ask_transformer_engine.py"),
        str(here),
    ]
    done = subprocess.run(ask, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for folder in folders.values():
        assert (
            convert(
                "boundary",
                folder / "te",
                folder / "back",
                "--layer-spec",
                "local",
                "--drop-fp8-state",
            )
            == 0
        )
    return torch.load(here / "answers.pt", weights_only=True), folders


def convert(*flags):
    return cli.main(list(map(str, flags)))


def test_it_is_the_real_one(asked):
    assert asked[0]["version"] == TESTED
    layers = {name: set(answer["layers"]) for name, answer in asked[0]["models"].items()}
    assert all(
        {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "RMSNorm"} <= found
        for found in layers.values()
    )
    assert {name for name, found in layers.items() if "TEColumnParallelGroupedLinear" in found} == {
        "qwen3 moe, grouped"
    }


@pytest.mark.parametrize("how", ["bags", "bags, fused"])
@pytest.mark.parametrize("name", EXPORTED)
def test_bags_in_a_model_of_its_layers(asked, name, how):
    """Embedding, output layer and loss, which are not Transformer Engine's, equal the reference
    formulas: losses and gradients.
    """
    answer = asked[0]["models"][name][how]
    fused = "fused" in how
    assert answer["ran"] == [1, 1, int(fused)] and len(answer["patched"]) == (6 if fused else 4)
    table, head = (answer[end].double().requires_grad_() for end in ("table", "head"))
    want = reference.multi_hot_cross_entropy(
        reference.superposed_embedding(table, answer["tokens"]) @ head.T, answer["labels"]
    )
    want.sum().backward()
    assert answer["loss"].shape == (2, 8) and answer["loss"].std() > 0.01
    close(answer["loss"], want, 2e-6)
    for end, weight in (("table", table), ("head", head)):
        assert weight.grad.abs().max() > 1e-3, end
        close(answer[f"{end}'s gradient"], weight.grad, 2e-6)


def contents(folder):
    """({tensor: (shape, dtype)}, names of objects) of a checkpoint, without extra states and the
    common state.
    """
    checkpoint = Checkpoint(folder)
    tensors = {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in checkpoint.tensors.items()
    }
    return tensors, {
        name
        for name in checkpoint.objects
        if "_extra_state" not in name and "common_state" not in name
    }


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_of_either_layer_spec(asked, name):
    folder = asked[1][name]
    assert contents(folder / "te") == contents(folder / "for_te") and contents(
        folder / "back"
    ) == contents(folder / "local")
    renamed = contents(folder / "te")[0].keys() ^ contents(folder / "local")[0].keys()
    assert bool(renamed) == ("moe" in name)
    for key in renamed:
        assert key.endswith(("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")), key
    extra = {
        side: {key for key in Checkpoint(folder / side).objects if "_extra_state" in key}
        for side in ("te", "back")
    }
    assert len(extra["te"]) >= 9 and not extra["back"]


@pytest.mark.parametrize("name", MODELS)
def test_the_same_weights_there_and_back(asked, name):
    """Local spec, converted, loaded by Megatron into Transformer Engine's layers, saved, converted:
    the same bits.
    """
    answers, folders = asked
    assert not differences(Checkpoint(folders[name] / "local"), Checkpoint(folders[name] / "back"))
    assert (
        "_extra_state" in answers["models"][name]["refusal"]
    )  # so docs/checkpoints.md says: --dist-ckpt-strictness log_all
    weights = answers["models"][name]["weights"]
    assert weights["decoder.layers.1.self_attention.linear_proj.weight"].std() == pytest.approx(
        0.1, rel=0.1
    )


def test_inspect_and_the_hugging_face_export(asked, tmp_path, capsys):
    from safetensors.torch import load_file

    for name in EXPORTED:
        folder = asked[1][name]
        capsys.readouterr()
        assert convert("inspect", folder / "te", "--json") == 0
        assert json.loads(capsys.readouterr().out)["phase"] == "recovery"
        made = []
        for side in ("te", "local"):
            target = tmp_path / name / side
            assert (
                cli.main(["export-hf", str(folder / side), str(target), "--dtype", "float32"]) == 0
            )
            made.append(load_file(target / "model.safetensors"))
        got, want = made
        assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
        model = asked[0]["models"][name]["weights"]
        moe = "mlp.experts" in " ".join(model)
        straight = {
            "model.embed_tokens.weight": model["embedding.word_embeddings.weight"][:VOCAB],
            "lm_head.weight": model["output_layer.weight"][:VOCAB],
            "model.norm.weight": model["decoder.final_layernorm.weight"],
            "model.layers.1.input_layernorm.weight": model[
                "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
            ],
            "model.layers.1.self_attn.o_proj.weight": model[
                "decoder.layers.1.self_attention.linear_proj.weight"
            ],
            "model.layers.1.post_attention_layernorm.weight": model[
                "decoder.layers.1."
                + ("pre_mlp_layernorm.weight" if moe else "mlp.linear_fc1.layer_norm_weight")
            ],
        }
        if not moe:
            straight["model.layers.1.mlp.down_proj.weight"] = model[
                "decoder.layers.1.mlp.linear_fc2.weight"
            ]
        if "grouped" in name:
            straight["model.layers.1.mlp.experts.3.down_proj.weight"] = model[
                "decoder.layers.1.mlp.experts.linear_fc2.weight3"
            ]
        assert all(torch.equal(got[key], tensor) for key, tensor in straight.items())


def test_delayed_scaling_in_checkpoints(asked):
    """Transformer Engine 2.12 loads it (2.20 refuses, says its source); dropped, the model loads
    without it, and starts with none.
    """
    answer = asked[0]["delayed"]
    assert len(answer["scales"]) == 8 and all(set(scale) == {0.25} for scale in answer["scales"])
    assert (
        "_extra_state" in answer["refusal"]
        and "--dist-ckpt-strictness log_all" in answer["printed"]
    )
    assert answer["scales when dropped"] == [None] * 8


def test_which_recipe_runs_where(asked):
    """precision.recipes says what Transformer Engine's own checks say of every GPU and CUDA
    version.
    """
    assert [recipes(*gpu) for gpu in GPUS] == asked[0]["recipes"]
    assert (
        asked[0]["recipes"][0] == [] and len({tuple(found) for found in asked[0]["recipes"]}) == 7
    )


def ours_refuses(recipe, tokens, sp, sizes):
    args = argparse.Namespace(
        fp8=None if recipe == "nvfp4" else "hybrid",
        fp8_recipe=recipe,
        fp4="e2m1" if recipe == "nvfp4" else None,
        fp4_recipe="nvfp4",
        seq_length=tokens * (1 + sp),
        micro_batch_size=1,
        context_parallel_size=1,
        tensor_model_parallel_size=1 + sp,
        sequence_parallel=sp,
        first_last_layers_bf16=True,
        group_query_attention=False,
        num_experts=None,
        **sizes,
    )
    with warnings.catch_warnings(action="ignore"):
        try:
            check_precision(TSTConfig(bag_size=4, step_ratio=0.3), args, ((10, 0), "13.0"))
        except TSTError:
            return True
    return False


def careful(recipe, tokens, sp, sizes):
    """Where we refuse what Transformer Engine's checks let through (docs/precision.md): widths and
    tokens that only the wgrad GEMM, which it does not look at, or whole blocks ask for."""
    if recipe in ("mxfp8", "nvfp4"):
        return False
    block = 128 if recipe == "blockwise" else 16
    return any(
        t % 16 or into % block or out % block for t, into, out, _ in gemms(tokens, sp, sizes)
    )


def test_what_it_refuses_of_tokens_and_widths_is_refused(asked):
    refused = {True: 0, False: 0}
    for case, message in zip(CASES, asked[0]["shapes"]):
        ours = ours_refuses(*case)
        assert ours or not message, (case, message)
        assert ours == (bool(message) or careful(*case)), (case, message)
        refused[bool(message)] += 1
    assert min(refused.values()) > 100


@pytest.mark.parametrize(
    "i", range(len(RUNS)), ids=["-".join([name, values["PRECISION"]]) for name, values in RUNS]
)
def test_dry_runs_beside_it_say_the_same(asked, i, capsys):
    """Megatron's validation with the real Transformer Engine and its version, and without one."""
    code, printed = asked[0]["dry_runs"][i]
    assert dry_run.main(flags_of(*RUNS[i])) == code
    said = capsys.readouterr()
    there = printed.replace(
        f"Transformer Engine ({TESTED})",
        f"Transformer Engine ({dry_run.TRANSFORMER_ENGINE} assumed)",
    )
    assert there == said.out + said.err and (there != printed) == (code == 0)
    name, precision = RUNS[i][0], RUNS[i][1]["PRECISION"]
    assert code == (2 if precision == "fp8-blockwise" and name in ("270m", "600m") else 0), printed
