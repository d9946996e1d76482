"""A TST checkpoint -> a checkpoint of a plain Megatron run, which stock scripts continue without
megatron_tst (paper, section 3: the recovery phase is ordinary training from the superposition
phase's checkpoint).
"""

from __future__ import annotations

import argparse
import copy
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.checkpoint.inspect import is_flat, parameter_of, state_of
from megatron_tst.checkpoint.phases import stored
from megatron_tst.checkpoint.rewrite import Changes, rewrite
from megatron_tst.errors import refuse

# Where Megatron's layer specs name the norm before the experts differently (gpt_layer_specs.py):
# local, Transformer Engine.
EXPERT_NORM = {
    "local": "mlp.linear_fc1.layer_norm_weight",
    "transformer_engine": "pre_mlp_layernorm.weight",
}
_ROUTER = "mlp.router.weight"
# Under both names: the norm before an MLP, and those of multi-latent attention. Local layers of
# multi-latent attention fuse none, Transformer Engine's all that they can.
_MLP_NORM = re.compile(
    r"(?P<layer>.*)(mlp\.linear_fc1\.layer_norm_|pre_mlp_layernorm\.)(?P<part>weight|bias)"
)
_LATENT_NORM = re.compile(
    r"(?P<attention>.*self_attention\.)"
    r"((?P<apart>q|kv)_layernorm\.|linear_(?P<fused>q|kv)_up_proj\.layer_norm_)(?P<part>weight|bias)"
)
ENDS = {"embedding": "embedding.word_embeddings.weight", "head": "output_layer.weight"}
# What an optimizer's state begins with is zeros: of Adam, of Lion, SGD and Muon, of adaptive Muon.
_AVERAGES = {"exp_avg", "exp_avg_sq", "momentum_buffer", "moment2_buffer"}
_COPIES = {"fp32_param", "param", "master_param"}  # of the weights, in fp32


def convert(
    source: Checkpoint,
    target: Path,
    *,
    drop_optimizer: bool = False,
    reset_optimizer: bool = False,
    reinit: tuple[str, ...] = (),
    layer_spec: str | None = None,
    legacy: bool | None = None,
    drop_fp8_state: bool = False,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Path:
    """Write the checkpoint that stock Megatron continues from.

    Args:
        source: of a superposition or recovery phase; its tensors are copied byte by byte.
        target: a new folder, for --load.
        drop_optimizer: without its state (load it with --no-load-optim); others measured that this
            loses TST's gain.
        reset_optimizer: its averages (Muon's momentum among them) zeroed and its step 0, as at the
            start of a run; schedule, iteration and data position stay.
        reinit: of "embedding" and "head" (the output layer): new normal values as the run drew them
            (--embedding-init-method-std, --init-method-std), their optimizer state zeroed (paper,
            table 2: both).
        layer_spec: "local" or "transformer_engine", to rename the norm before experts; None: as it
            is.
        legacy: common.pt as Megatron-Core <= 0.18 reads it; None: as the source has it.
        drop_fp8_state: leave out modules' `_extra_state` (delayed-scaling FP8), which newer
            Transformer Engines refuse to unpickle.
        seed: of the new values.
        force: replace an existing target.

    Returns:
        the iteration's folder.

    Raises:
        TSTError: no TST settings in the source, new values asked for of a state that cannot be
            edited, and rewrite's.
    """
    if stored(source.args) is None:
        expected = "a checkpoint of a TST run (its arguments hold the phases)"
        refuse(source.path, expected, "one without", "Stock Megatron loads it as it is.")
    common = copy.copy(source.common)
    common["args"] = stock_arguments(source.args)
    dropped = drop_optimizer_state(source, common) if drop_optimizer else set()
    new_ends = _of_ends(source, reinit)
    kept = [name for name in source.tensors if name not in dropped]
    edited = frozenset(name for name in kept if name.endswith(new_ends))
    if reset_optimizer:
        edited |= {name for name in source.tensors if state_of(name) not in (None, *_COPIES)}
    if edited or reset_optimizer:
        _check_editable(source, edited, drop_optimizer, reset_optimizer)
    if reset_optimizer:
        common["optimizer"] = _first_step(common["optimizer"])
    std = {
        ENDS["head"]: source.args.init_method_std,
        ENDS["embedding"]: _embedding_std(source.args),
    }
    dropped |= {name for name in source.objects if drop_fp8_state and "._extra_state" in name}

    def fresh(name, offset, shard):
        if state_of(name) in _AVERAGES:
            return torch.zeros_like(shard)
        # the same values in the weight and in the optimizer's fp32 copy of it
        end = next(end for end in new_ends if name.endswith(end))
        return _normal_rows(end, offset, shard, std[end], seed)

    changes = Changes(
        common=common,
        keep=lambda name: name not in dropped,
        name=renaming(source, layer_spec),
        tensor=fresh,
        edited=edited,
        legacy=legacy,
    )
    return rewrite(source, target, changes, force=force, progress=progress)


def load_flags(
    target: Path,
    *,
    drop_optimizer: bool = False,
    drop_fp8_state: bool = False,
    layer_spec: str | None = None,
) -> list[str]:
    """Flags with which stock Megatron goes on from what `convert` wrote with these options."""
    found = ["--load", str(target), "--ckpt-format", "torch_dist"]
    if drop_optimizer:
        found.append("--no-load-optim")
    if drop_fp8_state or layer_spec == "transformer_engine":
        # Transformer Engine's layers ask for an extra state each, empty without FP8, which the
        # checkpoint may lack
        found += ["--dist-ckpt-strictness", "log_all"]
    return found


def stock_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments without TST's: what a stock run would have stored."""
    kept = {name: value for name, value in vars(args).items() if not name.startswith("tst_")}
    return argparse.Namespace(**kept)


def drop_optimizer_state(source: Checkpoint, common: dict) -> set[str]:
    """Take the optimizer and its schedule out of a common state.

    Args:
        common: the state, which is changed, and its arguments too.

    Returns:
        the names of its tensors and objects, which a copy is to leave out.
    """
    for name in ("optimizer", "opt_param_scheduler"):
        common.pop(name, None)
    common["args"].no_save_optim = True
    return {name for name in source.metadata.state_dict_metadata if state_of(name)}


def renaming(source: Checkpoint, layer_spec: str | None) -> Callable[[str], str]:
    """Old name -> new name of every tensor and object, so that a model of this layer spec finds its
    own.

    Args:
        layer_spec: "local" or "transformer_engine"; None: the names stay as they are.

    Raises:
        TSTError: another layer spec.
    """
    if layer_spec is None:
        return lambda name: name
    if layer_spec not in EXPERT_NORM:
        refuse(
            "--layer-spec",
            " or ".join(EXPERT_NORM),
            layer_spec,
            "Name the spec of the run that is to load it.",
        )
    names = {parameter_of(name) for name in source.tensors}
    layers = {name.removesuffix(_ROUTER) for name in names if name.endswith(_ROUTER)}
    latent = any(name.endswith("self_attention.linear_kv_up_proj.weight") for name in names)

    def rename(name: str) -> str:
        if found := _MLP_NORM.fullmatch(name):
            experts = parameter_of(found["layer"]) in layers
            if latent:
                apart = experts or layer_spec == "local"
            elif experts:
                apart = layer_spec == "transformer_engine"
            else:
                return name
            norm = "pre_mlp_layernorm." if apart else "mlp.linear_fc1.layer_norm_"
            return f"{found['layer']}{norm}{found['part']}"
        if latent and (found := _LATENT_NORM.fullmatch(name)):
            x = found["apart"] or found["fused"]
            norm = f"{x}_layernorm." if layer_spec == "local" else f"linear_{x}_up_proj.layer_norm_"
            return f"{found['attention']}{norm}{found['part']}"
        return name

    return rename


def _of_ends(source, reinit):
    """Endings of the names of what gets new values."""
    unknown = [name for name in reinit if name not in ENDS]
    if unknown:
        do = "Name the tables that get new values."
        refuse("--reinit", "embedding, head or embedding,head", ",".join(reinit), do)
    ends = tuple(ENDS[name] for name in reinit)
    absent = [
        name
        for name, end in zip(reinit, ends)
        if not any(tensor.endswith(end) for tensor in source.tensors)
    ]
    if absent:
        do = "A tied head is the embedding: name that alone."
        refuse(f"--reinit {absent[0]}", f"a tensor {ENDS[absent[0]]}", "none", do)
    return ends


def _check_editable(source, edited, drop_optimizer, reset_optimizer):
    if reset_optimizer and drop_optimizer:
        refuse("--reset-optimizer and --drop-optimizer", "one of the two", "both", "Leave one out.")
    if any(map(is_flat, source.tensors)) and not drop_optimizer:
        refuse(
            "new values",
            "optimizer state by parameter",
            "the distributed optimizer's flat buffers",
            "Save with --dist-ckpt-optim-fully-reshardable; for --reinit alone --drop-optimizer "
            "will do.",
        )
    if reset_optimizer and "optimizer" not in source.common:
        do = "It is of weights alone: leave the flag out."
        refuse("--reset-optimizer", "an optimizer's state in the checkpoint", "none", do)
    states = {state_of(name) for name in edited}
    if unknown := states - _AVERAGES - _COPIES - {None}:
        refuse(
            "new values",
            f"optimizer state of {', '.join(sorted(_AVERAGES))}",
            f"{', '.join(sorted(unknown))} of --optimizer {source.args.optimizer}",
            "Use --drop-optimizer: the run then begins its optimizer anew.",
        )


def _first_step(part):
    """A copy of an optimizer's common state, or of a part of it, with every step at 0: with another
    one Adam's bias correction would take the zeroed averages for settled ones.
    """
    if isinstance(part, (list, tuple)):
        return type(part)(map(_first_step, part))
    if not isinstance(part, dict):
        return part
    steps = "common_step", "step"
    return {k: v * 0 if k in steps else _first_step(v) for k, v in part.items()}


def _embedding_std(args):
    std = getattr(args, "embedding_init_method_std", None)
    return args.init_method_std if std is None else std


def _normal_rows(end, offset, shard, std, seed):
    """Rows offset[0] .. of a normal matrix, each from a seed of its own, so that any shard can be
    made alone.
    """
    generator, new = torch.Generator(), torch.empty_like(shard, dtype=torch.float32)
    for i, row in enumerate(new):
        generator.manual_seed(zlib.crc32(f"{seed} {end} {offset[0] + i}".encode()))
        row.normal_(0.0, std, generator=generator)
    return new.to(shard.dtype)
