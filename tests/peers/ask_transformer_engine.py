"""python ask_transformer_engine.py FOLDER: what the real Transformer Engine says, on a machine
without a GPU.

In a process of its own: with Transformer Engine importable Megatron picks its optimizer, and its
modules can be built, not run, once torch.cuda.is_available is faked. FOLDER holds jobs.json,
{"recipes": [[capability, CUDA]], "shapes": [[recipe, [gemm]]], "dry_runs": [[flag]], "models":
{name: folder}}, and gets answers.pt. A gemm is [tokens, width in, width out, input gathered]. A
model's folder holds `for_te`, a checkpoint, and gets `te`, what the model with Transformer Engine's
layers saves after loading it.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from unittest import mock

import te_models
import torch
import transformer_engine
import transformer_engine.pytorch
from torch.distributed.checkpoint.api import CheckpointException
from transformer_engine.common import recipe as te_recipe
from transformer_engine.pytorch import quantization
from transformer_engine.pytorch.utils import assert_dim_for_all_gather, assert_dim_for_fp8_exec

from megatron_tst import TSTConfig, cli, cpu
from megatron_tst.checks import dry_run
from megatron_tst.loop import patch

RECIPES = {
    "delayed": (te_recipe.DelayedScaling, quantization.check_fp8_support),
    "tensorwise": (te_recipe.Float8CurrentScaling, quantization.check_fp8_support),
    "blockwise": (te_recipe.Float8BlockScaling, quantization.check_fp8_block_scaling_support),
    "mxfp8": (te_recipe.MXFP8BlockScaling, quantization.check_mxfp8_support),
    "nvfp4": (te_recipe.NVFP4BlockScaling, quantization.check_nvfp4_support),
}
DELAYED, SCALE = "llama", 0.25  # the model that gets delayed scaling's state, and a made-up scale


def recipes(capability, cuda):
    """Names of the recipes that run on such a GPU; past the cache of each check, which is of one
    GPU a process.
    """
    with (
        mock.patch.object(quantization, "get_device_compute_capability", lambda: tuple(capability)),
        mock.patch.object(torch.version, "cuda", cuda),
    ):
        return [name for name, (_, check) in RECIPES.items() if check.__wrapped__()[0]]


def refusal(recipe, gemms):
    """Why Transformer Engine does not take one of these GEMMs, or an empty string: its linear
    layers' checks and its tensors' own.
    """
    for tokens, width_in, width_out, gathered in gemms:
        shapes = (tokens, width_in), (width_out, width_in)
        inputs, weight = (torch.empty(shape, device="meta") for shape in shapes)
        state = quantization.RecipeState.create(
            RECIPES[recipe][0](), mode="forward", num_quantizers=3
        )
        quantizers = state.make_quantizers()  # of input, weight, output
        try:
            assert_dim_for_fp8_exec(inputs, weight)
            assert_dim_for_all_gather(inputs, gathered, quantizers[0])
            for shape, quantizer in zip(shapes, quantizers):
                quantizer.make_empty(shape, device="meta")
        except AssertionError as error:
            return str(error)
    return ""


def dry_runs(flags):
    """dry_run.py's exit code and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = dry_run.main(flags)
    return code, printed.getvalue()


def new_model(name):
    args = te_models.arguments(name, "transformer_engine")
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        return args, te_models.built(args)


def superposed(model, fused):
    """Bags through the whole model but for its decoder, whose layers need a GPU: hidden states go
    on as they came.
    """
    from megatron.core.transformer.transformer_block import TransformerBlock

    torch.manual_seed(0)
    tokens, labels = (torch.randint(0, te_models.VOCAB, (2, 8, 3)) for _ in range(2))
    labels[0, 0, 1] = labels[1, 5, 0] = labels[1, 7] = -100
    before = patch.status()
    patch.apply(TSTConfig(fused_linear_loss=fused))
    model.zero_grad()
    with mock.patch.object(
        TransformerBlock, "forward", lambda self, hidden_states, **named: hidden_states
    ):
        loss = model(tokens, torch.arange(8).expand(2, 8), None, labels=labels)
    loss.sum().backward()
    ends = {"table": model.embedding.word_embeddings.weight, "head": model.output_layer.weight}
    answer = {
        "tokens": tokens,
        "labels": labels,
        "loss": loss.detach(),
        "patched": patch.status().seams,
    }
    answer["ran"] = [
        patch.status().superposed_embeddings,
        patch.status().multi_hot_losses,
        patch.status().fused_linear_losses,
    ]
    for end, weight in ends.items():
        answer |= {end: weight.detach().clone(), f"{end}'s gradient": weight.grad.clone()}
    patch.remove()
    assert not before.seams and not patch.status().seams
    return answer


def quantising(model):
    """Transformer Engine's modules that may run in FP8, by name: its linear layers (attention, not
    asked to, has no weights).
    """
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TransformerEngineBaseModule) and [*module.parameters(recurse=False)]
    }


def delayed_scaling(model):
    """Give every module that may run in FP8 delayed scaling's state, as its first step would."""
    for module in quantising(model).values():
        module.fp8_meta |= {
            "recipe": te_recipe.DelayedScaling(),
            "fp8_checkpoint": True,
            "num_gemms": 1,
        }
        module.init_fp8_meta_tensors(module.fp8_meta["recipe"])
        module.fp8_meta["scaling_fwd"].scale.fill_(SCALE)


def one_model(name, folder):
    args, model = new_model(name)
    kinds = {type(module) for module in model.modules()}
    answer = {
        "layers": sorted(
            {kind.__name__ for kind in kinds if "transformer_engine" in kind.__module__}
        )
    }
    answer["refusal"] = refused_load(args, model, folder / "for_te")
    te_models.load(args, model, folder / "for_te", "log_all")
    if name in te_models.EXPORTED:
        answer |= {"bags": superposed(model, False), "bags, fused": superposed(model, True)}
    if name == DELAYED:
        delayed_scaling(model)
    te_models.save(args, model, folder / "te")
    answer["weights"] = {key: value.detach().clone() for key, value in model.named_parameters()}
    return answer


def refused_load(args, model, folder):
    """What a load in Megatron's default strictness is refused with, or an empty string."""
    try:
        te_models.load(args, model, folder, args.dist_ckpt_strictness)
    except CheckpointException as error:
        return str(error)
    return ""


def delayed_scaling_again(folder):
    """A checkpoint with delayed scaling's state, and a converted one without it, each loaded into a
    new model.
    """
    (_, kept), (args, dropped) = new_model(DELAYED), new_model(DELAYED)
    te_models.load(args, kept, folder / "te", args.dist_ckpt_strictness)
    flags = ["boundary", str(folder / "te"), str(folder / "dropped"), "--drop-fp8-state"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(flags) == 0
    answer = {
        "refusal": refused_load(args, dropped, folder / "dropped"),
        "printed": printed.getvalue(),
    }
    te_models.load(args, dropped, folder / "dropped", "log_all")
    states = [
        [m.fp8_meta.get("scaling_fwd") for m in quantising(model).values()]
        for model in (kept, dropped)
    ]
    scales = [[state and state.scale.tolist() for state in of] for of in states]
    return answer | {"scales": scales[0], "scales when dropped": scales[1]}


def main(folder):
    jobs = json.loads((folder / "jobs.json").read_text())
    for name in (
        "_devices",
        "_streams",
        "_random_state",
    ):  # what cpu.py answers for CUDA, without hiding Transformer Engine
        getattr(cpu, name)(torch)
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    answers = {
        "version": transformer_engine.__version__,
        "recipes": [recipes(*job) for job in jobs["recipes"]],
        "shapes": [refusal(*job) for job in jobs["shapes"]],
        "dry_runs": [dry_runs(flags) for flags in jobs["dry_runs"]],
        "models": {name: one_model(name, Path(where)) for name, where in jobs["models"].items()},
        "delayed": delayed_scaling_again(Path(jobs["models"][DELAYED])),
    }
    torch.save(answers, folder / "answers.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
