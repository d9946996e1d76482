"""A checkpoint -> a Hugging Face folder, tensor by tensor: TST adds no parameter, so it is exactly
the standard model. Names and layouts are mapping.py's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from megatron_tst.checkpoint.atomic import flushed, new_folder, write_json, write_text
from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.checkpoint.phases import stored
from megatron_tst.checkpoint.tensors import Tensors
from megatron_tst.errors import refuse, warn
from megatron_tst.export.architectures import Architecture, architecture_of
from megatron_tst.export.card import evaluation, model_card
from megatron_tst.export.hf_config import arguments
from megatron_tst.export.mapping import ROUTER_BIAS, pairs
from megatron_tst.export.safetensors_files import DTYPES, Weight, write_weights
from megatron_tst.export.tokenizer import (
    check_end_ids,
    end_of_text,
    own_files,
    tokenizer_of,
    write_tokenizer,
)
from megatron_tst.json_file import read_json

# in config.json, and no part of the model
_FREE = "bos_token_id", "eos_token_id", "initializer_range", "router_aux_loss_coef"
_FREE += "aux_loss_alpha", "seq_aux"
_MTP = "num_nextn_predict_layers"
# of a model, as Megatron names its tensors
_PARTS = "embedding.", "decoder.", "output_layer.", "mtp."


def export(
    source: Checkpoint,
    target: Path,
    *,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
    dtype: str = "bfloat16",
    shard_bytes: int = 2 << 30,
    allow_superposition: bool = False,
    mtp: bool = True,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Path:
    """Write a folder that `transformers` loads.

    Args:
        source: of any layout; torch_dist of 0.18 or 0.19.
        target: a new folder.
        tokenizer: a tokenizer.json or a folder of tokenizer files; None: the run's own, where it
            has one.
        vocab_size: ids of the tokenizer; None: the tokenizer's, or the run's --vocab-size.
        dtype: of the weights, "bfloat16" or "float32".
        shard_bytes: most bytes of one safetensors file.
        allow_superposition: export before recovery has begun.
        mtp: with the layers of multi-token prediction, where the format has them.
        force: replace an existing target.

    Returns:
        the folder.

    Raises:
        TSTError: the model has no counterpart, the tokenizer does not fit, no recovery yet, another
            dtype, or atomic.new_folder's.
    """
    if dtype not in DTYPES:
        refuse("--dtype", " or ".join(DTYPES), dtype, "Give one of them.")
    check_phase(source, allow_superposition)
    files, ids = tokenizer_of(source, tokenizer)
    tensors = Tensors(source)
    vocab = vocab_size_of(source, tensors, files, ids, vocab_size)
    arch = architecture_of(source.args, vocab, dtype, end_of_text(files))
    if arch.mtp_layers and not mtp:
        warn("the layers of multi-token prediction (--mtp-num-layers) are left out")
        arch = dataclasses.replace(arch, mtp_layers=0, config=arch.config | {_MTP: 0})
    all_weights = list(weights(tensors, arch))
    parameters = number_of(all_weights)
    total = sum(weight.bytes_in(dtype) for weight in all_weights)
    _check_rest(tensors, arch)
    with new_folder(target, total, force, [*source.folders, *files]) as part:
        # headers come to a few bytes more
        write_weights(
            part, all_weights, dtype, shard_bytes, lambda done: progress(min(done, total), total)
        )
        config_files(part, arch, source.path / "hf")
        write_text(part / "README.md", model_card(source.args, arch, dtype, parameters))
        write_text(part / "evaluate.md", evaluation())
        write_tokenizer(part, files)
    return target


def weights(tensors: Tensors, arch: Architecture) -> Iterator[Weight]:
    """Every tensor of the export, in the order of the layers."""

    @functools.lru_cache(maxsize=1)  # queries, keys and values are asked for one after the other
    def parts(pair):
        return pair.split(_read(tensors, pair))

    biased = getattr(tensors.checkpoint.args, "moe_router_enable_expert_bias", False)
    for pair in pairs(arch):
        for i, (name, shape) in enumerate(pair.theirs):
            read = functools.partial(lambda pair, i: parts(pair)[i], pair, i)
            if name.endswith(ROUTER_BIAS) and not biased:
                read = functools.partial(torch.zeros, shape)
            yield Weight(name, shape, read, "float32" if pair.fp32 else None)


def _read(tensors, pair):
    at = () if pair.expert is None else (pair.expert,)
    if pair.layer is not None:
        return tensors.of_layer(pair.layer, *pair.ours, at=at, block=pair.block)
    names = [f"{pair.block}.{name}" if pair.block else name for name in pair.ours]
    return tensors.read(next((name for name in names if name in tensors), names[0]), *at)


def _check_rest(tensors: Tensors, arch: Architecture):
    """Whether every tensor of the model is in the export: one more would be a part of it that the
    architecture does not have.
    """
    known = set()
    for pair in pairs(arch):
        layers = ("",) if pair.layer is None else ("", f"{pair.layer}.")
        block = f"{pair.block}." if pair.block else ""
        known |= {f"{block}{layer}{name}" for layer in layers for name in pair.ours}
    # where mtp layers are left out, it has been said (architecture_of)
    parts = _PARTS if arch.mtp_layers else _PARTS[:-1]
    for name in tensors.checkpoint.tensors:
        if name.startswith(parts) and name not in known and "_extra_state" not in name:
            do = "The model is of another kind than its arguments say."
            if name.endswith("linear_q_proj.layer_norm_weight"):
                do = (
                    "Megatron-Core 0.19 gives multi-latent attention without --q-lora-rank a norm "
                    "of its own there, which DeepSeek-V3 does not have: train with --q-lora-rank."
                )
            refuse(tensors.checkpoint.path, f"the tensors of {arch.name}", f"{name} too", do)


def number_of(all_weights: Iterable[Weight]) -> int:
    """Parameters in all."""
    return sum(math.prod(weight.shape) for weight in all_weights)


def config_files(folder: Path, arch: Architecture, kept: Path) -> None:
    """config.json and generation_config.json of the model.

    Args:
        folder: to write into.
        kept: where an import has left the files that it read, which say more (ids of special
            tokens); used where they say the same model.

    Raises:
        TSTError: they say another model.
    """
    generation = {key: arch.config[key] for key in ("bos_token_id", "eos_token_id")}
    path = kept / "config.json"
    if not path.is_file():
        write_json(folder / "config.json", arch.config)
        write_json(folder / "generation_config.json", generation)
        return
    dtype = arch.config["torch_dtype"]
    config = read_json(path)
    args = arguments(config, path)
    theirs = architecture_of(args, args.vocab_size, dtype).config
    if arch.vocab < theirs["vocab_size"]:  # --vocab-size cuts rows that the tokenizer has no id for
        theirs["vocab_size"] = arch.vocab
    for key, value in arch.config.items():
        if key not in _FREE and key != _MTP and theirs.get(key) != value:
            refuse(f"{key} in {path}", value, theirs.get(key), "It is of another model: remove it.")
    # transformers 5 writes the first, and both may be there
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    changed = dict.fromkeys(names, dtype)
    if args.vocab_size != arch.vocab:
        changed["vocab_size"] = arch.vocab
    if theirs.get(_MTP, 0) != arch.mtp_layers:  # the run had others, or none
        changed[_MTP] = arch.mtp_layers
    quantised = config.pop("quantization_config", None)  # an import has undone it
    if changed.items() <= config.items() and not quantised:
        flushed(folder / "config.json", lambda file: file.write(path.read_bytes()))
    else:
        write_json(folder / "config.json", config | changed)
    if "auto_map" in config:
        warn(
            "auto_map of config.json names code of the released folder, which is not copied: "
            "whoever loads the export with trust_remote_code needs it beside the weights"
        )
    check_end_ids(config, path, arch.vocab)
    theirs = kept / "generation_config.json"
    if theirs.is_file():
        check_end_ids(read_json(theirs), theirs, arch.vocab)
        flushed(folder / theirs.name, lambda file: file.write(theirs.read_bytes()))
    else:
        generation = {key: config.get(key, value) for key, value in generation.items()}
        write_json(folder / theirs.name, generation)


def vocab_size_of(
    source: Checkpoint, tensors: Tensors, files: list[Path], ids: int | None, asked: int | None
) -> int:
    """Rows of the exported embedding: those of the checkpoint without Megatron's padding.

    As many as an import read, as the run's --vocab-size says, or as the tokenizer has ids for.

    Args:
        source, tensors: the checkpoint.
        files, ids: tokenizer_of's.
        asked: --vocab-size.

    Raises:
        TSTError: nothing says how many, two say it differently, or the tokenizer has an id without
            a row.
    """
    rows = tensors.shape("embedding.word_embeddings.weight")[0]
    own = getattr(source.args, "vocab_size", None)
    vocab = next((number for number in (asked, own, ids) if number is not None), None)
    do = "Give the tokenizer that the run was trained with."
    if vocab is None:
        do = f"The embedding has {rows} rows, and some may be padding."
        refuse("--vocab-size", "it or --tokenizer", "neither", do)
    if vocab < 1:
        refuse("vocabulary", "at least one id", vocab, "Leave --vocab-size out.")
    if ids is not None and ids > vocab:
        refuse("vocabulary", f"at least {ids}, the tokenizer's largest id + 1", vocab, do)
    if vocab > rows:
        refuse("vocabulary", f"at most the embedding's {rows} rows", vocab, do)
    # Fewer ids than rows are right where the tokenizer is known to be the run's own. Otherwise it
    # may be another one.
    known = ids is not None and (own_files(source) or (source.path / "hf/config.json").is_file())
    if own is not None and not known:
        for number in (asked, ids if asked is None else None):
            if number not in (None, own):
                do = (
                    f"{do.removesuffix('.')}, or --vocab-size {own} if the ids above it are unused."
                )
                refuse("vocabulary", f"{own}, the run's --vocab-size", number, do)
    return vocab


def check_phase(source: Checkpoint, allowed: bool) -> None:
    """Refuse a checkpoint before recovery, unless it is allowed.

    Raises:
        TSTError: the checkpoint is of the superposition phase or its end.
    """
    schedule = stored(source.args)
    samples = getattr(source.args, "consumed_train_samples", 0)
    if schedule and samples <= schedule.superposition_samples and not allowed:
        refuse(
            source.path,
            "a checkpoint of the recovery phase",
            f"one after {samples} of {schedule.superposition_samples} superposed samples",
            "The model has learned to predict bags: its next-token logits mean nothing yet. "
            "Recover first, or add --allow-superposition.",
        )
