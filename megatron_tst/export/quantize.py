"""A checkpoint -> a quantised Hugging Face folder, by NVIDIA's ModelOpt: post-training
quantisation, calibrated on an indexed dataset.

    fp8     weights and inputs of the linear layers (experts' too) in E4M3, one scale a tensor;
            on any device
    nvfp4   the same in E2M1, a scale in E4M3 for 16 values and one for the tensor; on an NVIDIA GPU

Embedding, output layer, norms and routers stay in bfloat16. Calibration reads the dataset from its
start, perplexity is measured on its end, before and after.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron_tst import compat, cpu
from megatron_tst.checkpoint.atomic import new_folder, write_json, write_text
from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.checkpoint.inspect import OPTIMIZER
from megatron_tst.checkpoint.tensors import Tensors
from megatron_tst.errors import optional, refuse
from megatron_tst.export.calibration import ends_of
from megatron_tst.export.hf import export, vocab_size_of
from megatron_tst.export.tokenizer import tokenizer_of

RECIPES = {"fp8": "FP8_DEFAULT_CFG", "nvfp4": "NVFP4_DEFAULT_CFG"}  # ModelOpt's names
NEEDS_GPU = {"nvfp4"}  # ModelOpt computes with E2M1 in CUDA alone
_BLOCK = 16  # values of one NVFP4 scale
_TOKENS = 4096  # of one forward pass, at least one sample


def quantize(
    source: Checkpoint,
    target: Path,
    *,
    recipe: str,
    data: str | os.PathLike,
    samples: int = 512,
    sequence_length: int | None = None,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
    device: str | None = None,
    allow_superposition: bool = False,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Path, float, float]:
    """Write a folder for vLLM, TensorRT-LLM and SGLang. The device holds the whole model; its
    bfloat16 export lies beside it meanwhile.

    Args:
        source: of any layout; the architectures of export.hf.
        target: a new folder.
        recipe: "fp8" or "nvfp4".
        data: prefix of Megatron's indexed dataset (.bin, .idx), tokenized with the run's tokenizer.
        samples: sequences to calibrate on, and as many others to measure perplexity on.
        sequence_length: tokens of one; None: the run's --seq-length.
        tokenizer, vocab_size, allow_superposition, force: as hf.export.
        device: "cpu", "cuda", "cuda:1"; None: the GPU where there is one.
        progress: called with (samples done, samples in all), three passes of `samples`.

    Returns:
        the folder, and the perplexity (exp of the mean next-token loss in nats) before and after.

    Raises:
        TSTError: no ModelOpt, no GPU where the recipe needs one, the dataset is missing, too short
            or of another vocabulary, a layer without a usable scale, a perplexity that is not
            finite, or what hf.export raises. Nothing is left behind.
    """
    device = _device(recipe, device)
    mtq, write_folder = _modelopt()
    safetensors = optional("safetensors", "megatron-tst[hf]")
    files, ids = tokenizer_of(source, tokenizer)
    vocab = vocab_size_of(source, Tensors(source), files, ids, vocab_size)
    length = source.args.seq_length if sequence_length is None else sequence_length
    if samples < 1 or not 1 <= length <= source.args.max_position_embeddings:
        expected = f"at least one sample of 1 to {source.args.max_position_embeddings} tokens"
        refuse(
            "--samples and --sequence-length", expected, f"{samples} of {length}", "Give others."
        )
    calibration, held_out = (
        torch.from_numpy(part) for part in ends_of(data, samples, length, vocab)
    )
    entries = source.tensors.items()
    weights = sum(math.prod(e.size) for name, e in entries if not name.startswith(OPTIMIZER))
    passes = 0

    def batches(rows) -> Iterator[torch.Tensor]:
        nonlocal passes
        for batch in rows.split(max(1, _TOKENS // length)):
            yield batch.to(device)
            progress(passes := passes + len(batch), 3 * samples)

    def calibrate(model):
        for batch in batches(calibration):
            model(batch[:, :-1], use_cache=False)

    read = [*source.folders, *files, *(Path(f"{data}{ending}") for ending in (".bin", ".idx"))]
    try:
        with new_folder(target, 4 * weights, force, read) as part, torch.no_grad():
            plain = export(
                source,
                part / "plain",
                tokenizer=tokenizer,
                vocab_size=vocab_size,
                allow_superposition=allow_superposition,
                mtp=False,  # transformers loads none, so ModelOpt would write none
            )
            config = json.loads((plain / "config.json").read_text())
            _check_blocks(recipe, config)
            model = _loaded(plain, device)
            before = _perplexity(model, batches(held_out), data)
            mtq.quantize(model, getattr(mtq, RECIPES[recipe]), calibrate)
            _check_scales(model)
            after = _perplexity(model, batches(held_out), data)
            write_folder(model, export_dir=part)
            # transformers' words for what ours says, and ModelOpt's part
            written = json.loads((part / "config.json").read_text())
            for file in plain.iterdir():
                if not file.name.startswith("model"):
                    shutil.copyfile(file, part / file.name)
            config["quantization_config"] = written["quantization_config"]
            write_json(part / "config.json", config)
            about = {
                "data": Path(data).name,
                "samples": samples,
                "length": length,
                "before": before,
                "after": after,
            }
            write_text(
                part / "README.md", _card((plain / "README.md").read_text(), recipe, **about)
            )
            write_text(part / "evaluate.md", _evaluation((plain / "evaluate.md").read_text()))
            shutil.rmtree(plain)
    except safetensors.SafetensorError as error:
        refuse(target, "a place that can be written to", error, "Make room or choose another disk.")
    return target, before, after


def _device(recipe, device) -> str:
    if recipe not in RECIPES:
        refuse("--recipe", " or ".join(RECIPES), recipe, "Give one of them.")
    if cpu.enabled():  # the replaced functions break other people's models
        expected = f"a process without {cpu.SWITCH}'s shims"
        refuse("quantize", expected, "one with them", "Unset it.")
    gpu = torch.cuda.is_available()
    device = device or ("cuda" if gpu else "cpu")
    if not gpu and (device != "cpu" or recipe in NEEDS_GPU):
        refuse(
            f"--recipe {recipe}" if recipe in NEEDS_GPU else "--device",
            "a GPU",
            "none",
            "Run it on a machine with one, or use --recipe fp8 --device cpu.",
        )
    if device == "cpu" and recipe in NEEDS_GPU:
        refuse(f"--recipe {recipe}", "a GPU", "--device cpu", "Leave --device out.")
    return device


def _modelopt():
    """(modelopt.torch.quantization, its export function)"""
    compat.hide_broken_transformer_engine()  # ModelOpt imports Megatron
    try:
        import modelopt.torch.quantization as mtq
        import transformers  # noqa: F401
        from modelopt.torch.export import export_hf_checkpoint
    except ImportError as error:
        refuse(
            "quantize",
            "nvidia-modelopt and transformers",
            error,
            "pip install 'megatron-tst[modelopt]'.",
        )
    return mtq, export_hf_checkpoint


def _check_blocks(recipe, config):
    sizes = "hidden_size", "intermediate_size", "moe_intermediate_size"
    ranks = "q_lora_rank", "kv_lora_rank"  # of DeepSeek-V3
    widths = {name: config[name] for name in (*sizes, *ranks) if config.get(name)}
    width = "v_head_dim" if "v_head_dim" in config else "head_dim"
    heads = "num_attention_heads"
    widths[f"{heads} x {width}"] = config[heads] * config[width]
    for name, width in widths.items():
        if recipe == "nvfp4" and width % _BLOCK:
            refuse("--recipe nvfp4", f"{name} divisible by {_BLOCK}", width, "Use --recipe fp8.")


def _loaded(folder, device):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()


def _perplexity(model, batches, data) -> float:
    """exp of the mean over all positions of the next token's loss; logits in fp32. `batches` yields
    ids [b, length + 1].
    """
    total, count = 0.0, 0
    for batch in batches:
        logits = model(batch[:, :-1], use_cache=False).logits.float()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        ).item()
        count += batch[:, 1:].numel()
    if not total / count < 700:  # whose exp overflows
        refuse(
            data,
            "a finite loss of the model on it",
            f"{total / count:g} nats",
            "Is it this tokenizer's, and the run sound?",
        )
    return math.exp(total / count)


def _check_scales(model):
    """Every quantiser has seen numbers. Experts share the scale of their inputs, and a weight's
    needs no token: none is left out.
    """
    from modelopt.torch.quantization.nn import TensorQuantizer

    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled:
            amax = module.amax
            if amax is None or not (torch.isfinite(amax) & (amax > 0)).all():
                got = "none" if amax is None else f"{amax.min().item():g} to {amax.max().item():g}"
                refuse(
                    name,
                    "a positive largest value to scale by",
                    got,
                    "The layer is dead, or calibrate with more --samples.",
                )


def _card(text, recipe, data, samples, length, before, after) -> str:
    """The model card of the export, with what was done to it; its table is its end."""
    what = {
        "fp8": "FP8 (E4M3, a scale a tensor)",
        "nvfp4": "NVFP4 (E2M1, a scale for 16 values)",
    }[recipe]
    library = "library_name: transformers\n"
    load = "Load it with `transformers.AutoModelForCausalLM.from_pretrained`."
    assert library in text and load in text and text.rstrip().endswith("|")
    serve = (
        "Quantised by ModelOpt, for vLLM, TensorRT-LLM or SGLang. transformers loads it "
        "without its scales, which gives nonsense."
    )
    rows = [
        (
            "quantised",
            f"{what}, weights and inputs of linear layers; embedding, output layer, norms and "
            "routers are not",
        ),
        (
            "calibration",
            f"{samples} samples of {length} tokens from the start of `{data}`, "
            f"{samples * length:,} tokens",
        ),
        ("perplexity", f"{before:.4f} before, {after:.4f} after, on as many tokens from its end"),
        ("quantised with", f"nvidia-modelopt {_modelopt_version()}"),
    ]
    table = "".join(f"| {name} | {row} |\n" for name, row in rows)
    return text.replace(library, "").replace(load, serve).rstrip() + "\n" + table


def _evaluation(text) -> str:
    """The export's commands, by vLLM: transformers does not load ModelOpt's format."""
    hf, rest = "lm_eval --model hf ", "On several GPUs"
    assert hf in text and rest in text
    command = text.partition(rest)[0].replace(hf, "lm_eval --model vllm ")
    return command + "This command was not run by the export.\n"


def _modelopt_version() -> str:
    import modelopt

    return modelopt.__version__
