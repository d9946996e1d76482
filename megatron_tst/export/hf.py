"""A checkpoint -> a Hugging Face folder, tensor by tensor: TST adds no parameter, so it is exactly
the standard model.

Names and layouts (Megatron: queries, keys and values of each group of heads together; gate above
up):

    model.embed_tokens.weight         embedding.word_embeddings.weight, without the rows that pad
                                      the vocabulary
    layers.N.self_attn.{q,k,v}_proj   self_attention.linear_qkv, a group after the other [q.. k v]
    layers.N.mlp.{gate,up}_proj       mlp.linear_fc1 [gate; up], or each expert's
    lm_head.weight                    output_layer.weight, unless tied
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megatron_tst.checkpoint.atomic import flushed, new_folder, write_json, write_text
from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.checkpoint.phases import stored
from megatron_tst.checkpoint.tensors import Tensors
from megatron_tst.errors import refuse
from megatron_tst.export.architectures import Architecture, architecture_of
from megatron_tst.export.card import evaluation, model_card
from megatron_tst.export.hf_config import arguments
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


def export(
    source: Checkpoint,
    target: Path,
    *,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
    dtype: str = "bfloat16",
    shard_bytes: int = 2 << 30,
    allow_superposition: bool = False,
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
    all_weights = list(weights(tensors, arch))
    parameters = number_of(all_weights)
    total = parameters * DTYPES[dtype].itemsize
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
    d, h, per = arch.head_dim, arch.hidden, arch.heads // arch.groups
    config = arch.config

    @functools.lru_cache(maxsize=1)  # queries, keys and values are asked for one after the other
    def attention(layer):
        qkv = tensors.of_layer(layer, "self_attention.linear_qkv.weight")
        qkv = qkv.view(arch.groups, per + 2, d, h)
        parts = qkv[:, :per], qkv[:, per], qkv[:, per + 1]
        return [part.reshape(-1, h) for part in parts]

    def mlp(layer, expert, name):
        if expert is None:
            return tensors.of_layer(layer, f"mlp.{name}.weight")
        return tensors.of_layer(layer, f"mlp.experts.experts.{name}.weight", at=(expert,))

    @functools.lru_cache(maxsize=1)  # gate and up likewise
    def gated(layer, expert):
        return mlp(layer, expert, "linear_fc1").chunk(2)

    yield Weight(
        "model.embed_tokens.weight",
        (arch.vocab, h),
        lambda: tensors.read("embedding.word_embeddings.weight")[: arch.vocab],
    )
    for n in range(arch.layers):
        a, of_this = f"model.layers.{n}.", functools.partial(tensors.of_layer, n)
        yield Weight(
            a + "input_layernorm.weight",
            (h,),
            functools.partial(
                of_this, "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"
            ),
        )
        for i, (name, rows) in enumerate(zip("qkv", (arch.heads, arch.groups, arch.groups))):
            yield Weight(
                f"{a}self_attn.{name}_proj.weight", (rows * d, h), lambda n=n, i=i: attention(n)[i]
            )
        for name in "qk" if arch.qk_norm else "":
            yield Weight(
                f"{a}self_attn.{name}_norm.weight",
                (d,),
                functools.partial(of_this, f"self_attention.{name}_layernorm.weight"),
            )
        yield Weight(
            a + "self_attn.o_proj.weight",
            (h, arch.heads * d),
            functools.partial(of_this, "self_attention.linear_proj.weight"),
        )
        expert = n in arch.expert_layers
        # of experts: Transformer Engine's spec, the local one
        norms = "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
        yield Weight(
            a + "post_attention_layernorm.weight",
            (h,),
            functools.partial(of_this, *(norms if expert else norms[::-1])),
        )
        width = config["moe_intermediate_size"] if expert else config["intermediate_size"]
        if expert:
            yield Weight(
                a + "mlp.gate.weight",
                (arch.experts, h),
                functools.partial(of_this, "mlp.router.weight"),
            )
        for e in range(arch.experts) if expert else (None,):
            b = a + (f"mlp.experts.{e}." if expert else "mlp.")
            yield Weight(b + "gate_proj.weight", (width, h), lambda n=n, e=e: gated(n, e)[0])
            yield Weight(b + "up_proj.weight", (width, h), lambda n=n, e=e: gated(n, e)[1])
            yield Weight(
                b + "down_proj.weight", (h, width), lambda n=n, e=e: mlp(n, e, "linear_fc2")
            )
    yield Weight("model.norm.weight", (h,), lambda: tensors.read("decoder.final_layernorm.weight"))
    if not arch.tied:
        yield Weight(
            "lm_head.weight",
            (arch.vocab, h),
            lambda: tensors.read("output_layer.weight")[: arch.vocab],
        )


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
        if key not in _FREE and theirs.get(key) != value:
            refuse(f"{key} in {path}", value, theirs.get(key), "It is of another model: remove it.")
    # transformers 5 writes the first, and both may be there
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    changed = dict.fromkeys(names, dtype)
    if args.vocab_size != arch.vocab:
        changed["vocab_size"] = arch.vocab
    if changed.items() <= config.items():
        flushed(folder / "config.json", lambda file: file.write(path.read_bytes()))
    else:
        write_json(folder / "config.json", config | changed)
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
