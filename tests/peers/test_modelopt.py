"""NVIDIA's ModelOpt (make test-modelopt): its exporter of Megatron's models agrees with ours, and
our export is quantised by it.
"""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.paths import environment
from support.runs import TINY, TST
from support.trained import GQA, MOE, NORM, TP2, VOCAB, Trained, corpus_below, known

if importlib.util.find_spec("modelopt") is None:
    pytest.skip(
        "NOT RUN: ModelOpt, its exporter against ours and FP8 and NVFP4 export; make test-modelopt",
        allow_module_level=True,
    )

from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.export.hf import export

HERE = Path(__file__).parent
TP2_EP2 = [*TP2, "--expert-model-parallel-size", "2"]
RUNS = {  # name: (flags of the model, of the layout it was trained in, its processes)
    "llama": ([*TINY, "--train-iters", "60"], [], 1),
    "qwen3": ([*TINY, *GQA, *NORM], [], 1),
    "qwen3 moe": ([*TINY, *GQA, *NORM, *MOE], TP2_EP2, 4),
}
SAMPLES, LENGTH = 160, 32  # in two batches of unequal size


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A corpus of ids below VOCAB, one of ids above, a short one. -> prefix of the first; the
    others are beside it
    """
    folder = tmp_path_factory.mktemp("ids")
    corpus_below(folder, 1, name="other")
    corpus_below(folder, documents=5, name="short")
    return corpus_below(folder)


@pytest.fixture(scope="module")
def runs(fork_server, corpus, tmp_path_factory):
    """name -> a checkpoint folder, trained through both phases when it is first asked for"""
    made = {}

    def get(name):
        if name not in made:
            flags, layout, nproc = RUNS[name]
            folder = tmp_path_factory.mktemp("run") / "ck"
            run = fork_server.train(
                *flags,
                *layout,
                *TST,
                *known(corpus),
                "--save",
                folder,
                "--save-interval",
                "5",
                "--lr",
                "1e-2",
                nproc=nproc,
            )
            assert run.ok, run.log[-3000:]
            made[name] = folder
        return made[name]

    return get


@pytest.mark.parametrize("name", RUNS)
def test_modelopts_exporter_writes_the_same_tensors(fork_server, runs, corpus, tmp_path, name):
    """The checkpoint in Megatron's own model of one process, written by ModelOpt, and ours from the
    files: the same bits.
    """
    from safetensors.torch import load_file

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    export(Checkpoint(runs(name)), ours, dtype="float32")
    theirs.mkdir()
    flags = [
        *RUNS[name][0],
        *known(corpus),
        "--load",
        runs(name),
        "--finetune",
        "--no-load-optim",
        "--no-load-rng",
    ]
    run = fork_server.train(ours, theirs, *flags, script=str(HERE / "export_by_modelopt.py"))
    assert run.ok, run.log[-3000:]
    want = {
        key: tensor
        for file in theirs.glob("*.safetensors")
        for key, tensor in load_file(file).items()
    }
    got = load_file(ours / "model.safetensors")
    assert got.keys() == want.keys()
    for key, tensor in got.items():
        theirs_too = want[key]
        if key in (
            "model.embed_tokens.weight",
            "lm_head.weight",
        ):  # ModelOpt leaves the padding of Megatron's vocabulary in
            assert len(theirs_too) == 512 and len(tensor) == VOCAB
            theirs_too = theirs_too[:VOCAB]
        assert torch.equal(tensor, theirs_too), key


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tokenizers import Tokenizer, models

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")).save(str(path))
    return path


def asked(folder, jobs):
    """What quantize_jobs.py answers."""
    (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
    variables = environment()
    variables.pop("MEGATRON_TST_CPU", None)
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            str(HERE / "quantize_jobs.py"),
            str(folder / "jobs.json"),
            str(folder / "answers.json"),
        ],
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "answers.json").read_text())


def flags_of(checkpoint, target, recipe, prefix, *more):
    return [
        "quantize",
        checkpoint,
        target,
        "--recipe",
        recipe,
        "--data-path",
        prefix,
        "--samples",
        SAMPLES,
        *more,
    ]


@pytest.fixture(scope="module")
def made(runs, corpus, tokenizer, tmp_path_factory):
    """(folder with NAME-fp8, NAME-nvfp4 and NAME-bf16 for every run, {job's name: answer})"""
    folder, jobs = tmp_path_factory.mktemp("made"), {}
    size = {"ids": f"{corpus}.bin", "samples": SAMPLES, "length": LENGTH}
    for name in RUNS:
        export(Checkpoint(runs(name)), folder / f"{name}-bf16", tokenizer=tokenizer)
        for recipe in ("fp8", "nvfp4"):
            flags = flags_of(
                runs(name), folder / f"{name}-{recipe}", recipe, corpus, "--tokenizer", tokenizer
            )
            jobs[f"{name}-{recipe}"] = {
                "tool": [str(flag) for flag in flags],
                "nvfp4": recipe == "nvfp4",
            }
        jobs[f"{name} before"] = {"loss": folder / f"{name}-bf16", **size}
        jobs[f"{name} inputs"] = {"inputs": folder / f"{name}-bf16", **size}
        if name != "qwen3 moe":  # whose experts are no linear modules
            for recipe in ("fp8", "nvfp4"):
                jobs[f"{name} after {recipe}"] = {
                    "loss": folder / f"{name}-bf16",
                    **size,
                    "like": folder / f"{name}-{recipe}",
                }
    return folder, dict(zip(jobs, asked(folder, list(jobs.values()))))


def printed(answer):
    """{"before": nats, "after": nats}"""
    assert answer["code"] == 0, answer["err"]
    found = {
        when: (float(p), float(nats))
        for when, p, nats in re.findall(
            r"perplexity (\w+) +([\d.]+) \(([\d.]+) nats\)", answer["out"]
        )
    }
    assert found.keys() == {"before", "after"} and all(
        math.isclose(math.exp(n), p, rel_tol=1e-4) for p, n in found.values()
    )
    return {when: nats for when, (_, nats) in found.items()}


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4"])
@pytest.mark.parametrize("name", RUNS)
def test_perplexity_is_that_of_transformers(made, name, recipe):
    """Before: on text read from the file's end. After: of the model with the folder's weights,
    inputs rounded by its scales.
    """
    nats, answers = printed(made[1][f"{name}-{recipe}"]), made[1]
    assert abs(nats["before"] - answers[f"{name} before"]) < 2e-5
    assert 1e-5 < abs(nats["after"] - nats["before"]) < {"fp8": 0.02, "nvfp4": 0.2}[recipe]
    if f"{name} after {recipe}" in answers:
        # sums in bfloat16 in another order; ModelOpt writes NVFP4 with one scale for fused tensors,
        # and computes with a scale for each
        assert (
            abs(nats["after"] - answers[f"{name} after {recipe}"])
            < {"fp8": 1e-3, "nvfp4": 1e-2}[recipe]
        )


@pytest.mark.parametrize("name", RUNS)
def test_calibration_reads_the_start(made, name):
    """The scales of inputs are the largest ones that transformers sees on the file's first tokens,
    not on its last.
    """
    first, last = made[1][f"{name} inputs"]
    _, found, _, _ = loaded(made, name, "fp8")
    scales = {layer: found[f"{layer}.input_scale"].item() * 448 for layer in first}
    assert len(scales) == (8 if name == "qwen3 moe" else 14)
    assert all(math.isclose(scales[layer], first[layer], rel_tol=1e-2) for layer in first), (
        scales,
        first,
    )
    assert not all(math.isclose(scales[layer], last[layer], rel_tol=1e-2) for layer in last)


def loaded(made, name, recipe):
    """(tensors of the export, of the quantised folder, names of linear layers that are to be
    quantised, the folder)
    """
    from safetensors.torch import load_file

    folder = made[0] / f"{name}-{recipe}"
    plain, found = (
        load_file(path / "model.safetensors") for path in (made[0] / f"{name}-bf16", folder)
    )
    apart = ("lm_head.weight", "model.embed_tokens.weight", "mlp.gate.weight")
    linear = [
        key.removesuffix(".weight")
        for key, tensor in plain.items()
        if tensor.dim() == 2 and not key.endswith(apart)
    ]
    assert len(linear) == {"llama": 14, "qwen3": 14, "qwen3 moe": 8 + 24}[name]
    return plain, found, linear, folder


def largest_of(plain, key, shared):
    """The largest absolute value of the tensor, or of those that are fused with it and share a
    scale.
    """
    groups = [
        [f"{name}_proj" for name in names.split() if name in shared.split()]
        for names in ("q k v", "gate up")
    ]
    names = next((group for group in groups if key.split(".")[-2] in group), [key.split(".")[-2]])
    return max(
        plain[key.replace(key.split(".")[-2], name)].float().abs().max().item() for name in names
    )


@pytest.mark.parametrize("name", RUNS)
def test_fp8(made, name):
    """Linear layers, experts' too, in E4M3 within half a step; every other tensor as it was."""
    plain, found, linear, _ = loaded(made, name, "fp8")
    assert found.keys() == plain.keys() | {
        f"{layer}.{kind}_scale" for layer in linear for kind in ("weight", "input")
    }
    for key, want in plain.items():
        layer, got = key.removesuffix(".weight"), found[key]
        if layer not in linear:
            assert got.dtype == torch.bfloat16 and torch.equal(got, want), key
            continue
        scale, inputs = found[f"{layer}.weight_scale"], found[f"{layer}.input_scale"]
        assert (
            got.dtype == torch.float8_e4m3fn
            and scale.numel() == inputs.numel() == 1
            and inputs.isfinite()
            and inputs > 0
        )
        want, largest = want.float(), largest_of(plain, key, "gate up" if "experts" in key else "")
        assert (got.float() * scale - want).abs().le(want.abs() * 2**-4 + scale * 2**-10).all(), key
        assert math.isclose(scale, largest / 448, rel_tol=1e-3), key


def test_deepseek_in_fp8(fork_server, corpus, tokenizer, tmp_path):
    """Latents, experts and shared experts in E4M3; norms, routers and their bias as they were. The
    layers of multi-token prediction, which transformers does not load, are left out of it all.
    """
    from safetensors.torch import load_file

    run = Trained(fork_server, corpus, lambda name: tmp_path / name)("deepseek, tp2 ep2") / "ck"
    export(Checkpoint(run), tmp_path / "bf16", tokenizer=tokenizer, mtp=False)
    flags = flags_of(run, tmp_path / "fp8", "fp8", corpus, "--tokenizer", tokenizer)
    (answer,) = asked(tmp_path, [{"tool": [str(flag) for flag in flags], "nvfp4": False}])
    nats = printed(answer)
    assert 1e-6 < abs(nats["after"] - nats["before"]) < 0.02
    plain, found = (load_file(tmp_path / x / "model.safetensors") for x in ("bf16", "fp8"))
    linear = {key for key in plain if "_proj" in key}
    # 5 of attention in each layer; 3 of the dense layer, of 8 experts and of the shared ones
    assert len(linear) == 3 * 5 + 3 + 2 * 9 * 3
    kinds = ("weight", "input")
    scales = {f"{key.removesuffix('weight')}{kind}_scale" for key in linear for kind in kinds}
    assert found.keys() == plain.keys() | scales
    for key, want in plain.items():
        if key not in linear:
            assert found[key].dtype == want.dtype and torch.equal(found[key], want), key
            continue
        assert found[key].dtype == torch.float8_e4m3fn
        scale, want = found[f"{key}_scale"], want.float()
        error = (found[key].float() * scale - want).abs()
        assert error.le(want.abs() * 2**-4 + scale * 2**-10).all(), key
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0 and config["n_shared_experts"] == 2


@pytest.mark.parametrize("name", RUNS)
def test_nvfp4(made, name):
    """Two values of E2M1 a byte, each the nearest one at its block's scale; every other tensor as
    it was.
    """
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([values, -values])
    plain, found, linear, _ = loaded(made, name, "nvfp4")
    scales = ("weight_scale", "weight_scale_2", "input_scale")
    assert found.keys() == plain.keys() | {f"{layer}.{kind}" for layer in linear for kind in scales}
    for key, want in plain.items():
        layer, got = key.removesuffix(".weight"), found[key]
        if layer not in linear:
            assert got.dtype == torch.bfloat16 and torch.equal(got, want), key
            continue
        blocks, whole, inputs = (found[f"{layer}.{kind}"] for kind in scales)
        assert got.dtype == torch.uint8 and got.shape == (want.shape[0], want.shape[1] // 2)
        assert (
            blocks.dtype == torch.float8_e4m3fn
            and blocks.shape == (want.shape[0], want.shape[1] // 16)
            and inputs > 0
        )
        want = want.float().reshape(*blocks.shape, 16)
        assert math.isclose(
            whole, largest_of(plain, key, "gate up q k v") / (448 * 6), rel_tol=1e-3
        ), key
        scale = blocks.float().unsqueeze(-1) * whole
        assert (
            (want.abs().amax(-1, keepdim=True) / 6 - scale).abs().le(scale * 2**-4 * 1.01).all()
        ), key
        nibbles = torch.stack([got & 15, got >> 4], -1).long().reshape(want.shape)
        error, least = (
            (values[nibbles] * scale - want).abs(),
            (values * scale.unsqueeze(-1) - want.unsqueeze(-1)).abs().amin(-1),
        )
        assert error.le(least + 0.02 * scale).all(), key  # bfloat16's ties


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4"])
@pytest.mark.parametrize("name", RUNS)
def test_the_folder(made, tokenizer, name, recipe):
    """The export's files with ModelOpt's part in config.json; what was done is in the card."""
    _, _, _, folder = loaded(made, name, recipe)
    plain = made[0] / f"{name}-bf16"
    assert {path.name for path in folder.iterdir()} == {path.name for path in plain.iterdir()} | {
        "hf_quant_config.json"
    }
    config, stock = (json.loads((path / "config.json").read_text()) for path in (folder, plain))
    about = config.pop("quantization_config")
    gates = {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"} if name == "qwen3 moe" else set()
    assert config == stock and (about["quant_method"], about["quant_algo"]) == (
        "modelopt",
        recipe.upper(),
    )
    assert set(about["ignore"]) - {"model.embed_tokens"} == {"lm_head"} | gates
    assert (
        json.loads((folder / "hf_quant_config.json").read_text())["quantization"]["quant_algo"]
        == recipe.upper()
    )
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / file).read_bytes() == (plain / file).read_bytes()
    card, answer = (folder / "README.md").read_text(), made[1][f"{name}-{recipe}"]["out"]
    before, after = re.findall(r"perplexity \w+ +([\d.]+)", answer)
    for row in (
        f"| quantised | {recipe.upper()} (",
        "| calibration | 160 samples of 32 tokens from the start of `text`, 5,120 tokens |\n",
        f"| perplexity | {before} before, {after} after, on as many tokens from its end |\n",
        "| recovery | next token: ",
        "transformers loads it without its scales",
    ):
        assert row in card, card
    assert "from_pretrained" not in card and "library_name" not in card
    assert (
        "--model vllm" in (folder / "evaluate.md").read_text()
        and "--model hf" not in (folder / "evaluate.md").read_text()
    )


@pytest.fixture(scope="module")
def refusals(fork_server, runs, corpus, tokenizer, tmp_path_factory):
    """name -> (what the tool answered, what lies in the target's folder afterwards)"""
    import argparse
    import shutil

    from tokenizers import Tokenizer, models

    from megatron_tst.checkpoint.rewrite import Changes, rewrite

    folder, llama = tmp_path_factory.mktemp("refused"), runs("llama")
    source = Checkpoint(llama)
    weights = frozenset(key for key in source.tensors if not key.startswith("optimizer."))

    def changed(name, only=None, times=1.0, **args):
        common = dict(source.common, args=argparse.Namespace(**vars(source.args) | args))
        edited = frozenset(key for key in weights if only and only in key)
        rewrite(
            source,
            folder / name,
            Changes(common=common, tensor=lambda key, offset, shard: shard * times, edited=edited),
        )
        return folder / name

    shutil.copytree(source.path, folder / "part")
    (folder / "part" / "__0_0.distcp").unlink()
    narrow = fork_server.train(
        *TINY,
        *TST,
        *known(corpus),
        "--ffn-hidden-size",
        "72",
        "--save",
        folder / "narrow",
        "--save-interval",
        "10",
    )
    assert narrow.ok, narrow.log[-3000:]
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB - 1)}, unk_token="w0")).save(
        str(folder / "tokenizer.json")
    )
    for name, bytes_of in (
        ("cut", corpus.with_suffix(".bin").read_bytes()[:-4]),
        ("index", b"nothing"),
    ):
        for suffix in (".bin", ".idx"):
            shutil.copy(corpus.with_suffix(suffix), folder / f"{name}{suffix}")
        (folder / f"{name}{'.bin' if name == 'cut' else '.idx'}").write_bytes(bytes_of)
    superposed = llama / "iter_0000005"
    asks = {  # name: (checkpoint, recipe, prefix, flags, job)
        "superposed": (superposed, "fp8", corpus, [], {}),
        "superposed, allowed": (superposed, "fp8", corpus, ["--allow-superposition"], {}),
        "no data": (llama, "fp8", folder / "none", [], {}),
        "short": (llama, "fp8", corpus.parent / "short", [], {}),
        "other ids": (llama, "fp8", corpus.parent / "other", [], {}),
        "cut": (llama, "fp8", folder / "cut", [], {}),
        "index": (llama, "fp8", folder / "index", [], {}),
        "no samples": (llama, "fp8", corpus, ["--samples", "0"], {}),
        "long": (llama, "fp8", corpus, ["--sequence-length", "65"], {}),
        "recipe": (llama, "int3", corpus, [], {}),
        "no gpu": (llama, "nvfp4", corpus, [], {}),
        "no such device": (llama, "fp8", corpus, ["--device", "cuda"], {}),
        "tokenizer": (llama, "fp8", corpus, ["--tokenizer", folder / "tokenizer.json"], {}),
        "vocabulary": (llama, "fp8", corpus, ["--vocab-size", "600"], {}),
        "architecture": (changed("norm", normalization="LayerNorm"), "fp8", corpus, [], {}),
        "dead": (changed("dead", "linear_proj", 0.0), "fp8", corpus, [], {}),
        "nan": (changed("nan", "final_layernorm", math.nan), "fp8", corpus, [], {}),
        "narrow": (folder / "narrow", "nvfp4", corpus, [], {"nvfp4": True}),
        "missing": (folder / "part", "fp8", corpus, [], {}),
        "full": (llama, "fp8", corpus, [], {"file": 50_000}),
        "full later": (llama, "fp8", corpus, [], {"file": 50_000, "plain": True}),
        "there": (llama, "fp8", corpus, [], {}),
        "there, forced": (llama, "fp8", corpus, ["--force"], {}),
    }
    jobs = []
    for name, (checkpoint, recipe, prefix, flags, job) in asks.items():
        place = folder / "targets" / name
        place.mkdir(parents=True)
        if name.startswith("there"):
            (place / "out").mkdir()
            (place / "out" / "mine").write_text("keep")
        flags = flags_of(checkpoint, place / "out", recipe, prefix, *flags)
        jobs.append({"tool": list(map(str, flags)), **job})
    answers = asked(folder, jobs)
    return {name: (answer, folder / "targets" / name) for name, answer in zip(asks, answers)}


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "superposed",
            "expected a checkpoint of the recovery phase, got one after 20 of 24 superposed "
            "samples. The model has learned to predict bags",
        ),
        (
            "no data",
            r"--data-path: expected an indexed dataset .*none.bin and .*none.idx, got none",
        ),
        (
            "short",
            r"expected 10560 tokens \(twice 160 samples of 32 and a label\), got \d+. Give fewer "
            r"--samples",
        ),
        (
            "other ids",
            "expected ids below the vocabulary of 500, got 500. Give the dataset that was "
            "tokenized",
        ),
        ("cut", r"cut.bin: expected \d+ bytes, as its index says, got \d+. Copy it again"),
        ("index", "index.idx: expected an index of Megatron's indexed dataset, got"),
        (
            "no samples",
            "--samples and --sequence-length: expected at least one sample of 1 to 64 tokens, got "
            "0 of 32",
        ),
        ("long", "expected at least one sample of 1 to 64 tokens, got 160 of 65"),
        ("recipe", "argument --recipe: invalid choice: 'int3'"),
        (
            "no gpu",
            "--recipe nvfp4: expected a GPU, got none. Run it on a machine with one, or use "
            "--recipe fp8 --device cpu",
        ),
        ("no such device", "--device: expected a GPU, got none"),
        ("tokenizer", "vocabulary: expected 500, the run's --vocab-size, got 499"),
        ("vocabulary", "vocabulary: expected at most the embedding's 512 rows, got 600"),
        (
            "architecture",
            "--normalization: expected RMSNorm, got LayerNorm. This model has no counterpart",
        ),
        (
            "dead",
            "o_proj.weight_quantizer: expected a positive largest value to scale by, got 0 to 0. "
            "The layer is dead",
        ),
        ("nan", "expected a finite loss of the model on it, got nan nats"),
        ("narrow", "--recipe nvfp4: expected intermediate_size divisible by 16, got 72"),
        ("missing", "__0_0.distcp is missing"),
        ("full", "expected a place that can be written to, got .*File too large.* Make room"),
        ("full later", "expected a place that can be written to, got .*File too large.* Make room"),
        ("there", "expected a target that is not there yet, got an existing one"),
    ],
)
def test_refused_with_nothing_left(refusals, name, message):
    answer, place = refusals[name]
    assert answer["code"] == 2 and "perplexity" not in answer["out"], answer
    assert re.search(f"error: .*{message}", answer["err"]), answer["err"]
    assert [str(path.relative_to(place)) for path in place.rglob("*")] == (
        ["out", "out/mine"] if name == "there" else []
    )


def test_what_a_flag_allows(refusals):
    for name in ("superposed, allowed", "there, forced"):
        answer, place = refusals[name]
        aside = ["out.old-1"] if name == "there, forced" else []
        assert answer["code"] == 0 and sorted(os.listdir(place)) == ["out", *aside], answer
        assert (place / "out" / "model.safetensors").exists() and not (
            place / "out" / "mine"
        ).exists()


def test_killed_at_any_moment(runs, corpus, tmp_path):
    """The target is absent or whole, and the next try cleans up and succeeds."""
    target = tmp_path / "place" / "out"
    flags = list(map(str, flags_of(runs("llama"), target, "fp8", corpus)))
    (found,) = asked(tmp_path, [{"kill": flags, "target": target, "times": 20}])
    assert "whole" in found, found["err"]
    assert found["whole"] + found["absent"] >= 20 and found["whole"] and found["absent"], found
    assert found["left"] == ["out"]
