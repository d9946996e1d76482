"""Architectures that this package has no writer for, through Megatron-Bridge: a checkpoint -> a
Hugging Face folder, and the model section of a NeMo checkpoint.

Bridge names the tensors and builds the settings from config.json (bridge_model.py). What it does
not check is checked here, before a byte is written:

    settings    of the run against those that Bridge builds from config.json, field by field
    config.json keys that Bridge does not read have the values that transformers takes for absent
    tensors     of the checkpoint against those of the model, each by name and shape
    parts       every tensor goes somewhere, and nothing is written that came from nowhere
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_tst.checkpoint.atomic import new_folder, write_json, write_text
from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.checkpoint.tensors import Tensors
from megatron_tst.errors import refuse
from megatron_tst.export import bridge_model
from megatron_tst.export.architectures import Architecture
from megatron_tst.export.bridge_settings import check_settings, check_tensors
from megatron_tst.export.card import evaluation, model_card
from megatron_tst.export.hf import check_phase, number_of, vocab_size_of
from megatron_tst.export.safetensors_files import DTYPES, Weight, write_weights
from megatron_tst.export.tokenizer import check_end_ids, end_of_text, tokenizer_of, write_tokenizer
from megatron_tst.json_file import read_json

# Megatron's local layers -> Transformer Engine's, which keep a norm in the layer behind it
_NORMS = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_"),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_"),
)
# A layer in one of multi-token prediction, in the module and in its checkpoints (Megatron's
# multi_token_prediction.py); Bridge's mappings have one of them or both.
_NEXT_TOKENS = "mtp_model_layer.", "transformer_layer."
_LAYERS = re.compile(r"(decoder|mtp)\.layers\.(?!\d)(.+)")
_NOT_OF_MODEL = "optimizer.", "rng_state", "rerun_state", "chained_"
_EXPERT = re.compile(r"(.*mlp\.experts)\.local_experts\.(\d+)\.(linear_fc[12]\.(?:weight|bias))")
_ROUTER_BIAS = "router.expert_bias"
_PADDED = _EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclasses.dataclass
class Model:
    """The run's model as Bridge has it: a description, whose tensors hold no memory.

    Attributes:
        path: of the given config.json.
        config: transformers' config of it.
        raw: what that file holds.
        provider: Bridge's, with the run's arguments over it.
        module: a Megatron model of one process on "meta".
        parts, stored: its tensors, and where the checkpoint has them, by name in one spelling.
        bridge: Bridge's converter of this architecture.
        vocab: rows of the embedding without Megatron's padding.
        tied: the output layer is the embedding.
    """

    path: Path
    config: Any
    raw: dict
    provider: Any
    module: torch.nn.Module
    parts: dict[str, _Part]
    stored: dict[str, _Stored]
    bridge: Any
    vocab: int
    tied: bool


@contextlib.contextmanager
def bridged(source: Checkpoint, hf_config: Path, vocab: int) -> Iterator[Model]:
    """The checkpoint's model, built by Bridge from config.json, and found to be the run's.

    Args:
        source: the checkpoint.
        hf_config: a folder with config.json.
        vocab: rows of the embedding without Megatron's padding.

    Raises:
        TSTError: Bridge is not installed or does not know the architecture, config.json and the
            run's arguments differ, or the tensors do.
    """
    path = hf_config / "config.json"
    raw = read_json(path, do=bridge_model.ANOTHER)
    with bridge_model.alone():
        config, provider, bridge = bridge_model.known(raw, path)
        bridge_model.check_layers(provider, path, config)
        bridge_model.check_read(bridge, config, raw, path)
        if provider.vocab_size != vocab:
            do = f"Write the run's into it, or name the rows that count: --vocab-size {vocab}."
            refuse(f"{path}: vocab_size", vocab, provider.vocab_size, do)
        run = bridge_model.of_run(source.args)
        names = [field.name for field in dataclasses.fields(provider)]
        fields = {name: getattr(run, name, None) for name in names}
        check_settings(fields, {name: getattr(provider, name) for name in names})
        for name in bridge_model.RUNS_OWN:
            if hasattr(run, name) and hasattr(provider, name):
                setattr(provider, name, getattr(run, name))
        model = _described(path, raw, config, provider, bridge, vocab)
        model.stored |= _stored(source, vocab)
        wanted, got = (
            {name: one.shape for name, one in all_.items()} for all_ in (model.parts, model.stored)
        )
        check_tensors(wanted, got, source.path)
        yield model


def described(path: Path, vocab: int) -> Model:
    """The model that Bridge builds from a config.json, of no checkpoint. Within `alone`.

    Args:
        path: of config.json.
        vocab: rows of the embedding.

    Raises:
        TSTError: Bridge is not installed or does not know the architecture.
    """
    raw = read_json(path, do=bridge_model.ANOTHER)
    config, provider, bridge = bridge_model.known(raw, path)
    bridge_model.check_layers(provider, path, config)
    return _described(path, raw, config, provider, bridge, vocab)


def _described(path, raw, config, provider, bridge, vocab) -> Model:
    module = bridge_model.built(provider, vocab)
    tied = bool(provider.share_embeddings_and_output_weights)
    bridge.hf_config = config
    parts = _parts(module, tied)
    return Model(path, config, raw, provider, module, parts, {}, bridge, vocab, tied)


@dataclasses.dataclass(frozen=True)
class _Part:
    """One tensor of the model.

    Args:
        name: its name in the module.
        shape: of the whole tensor, without the rows that pad the vocabulary.
        module: that has it.
    """

    name: str
    shape: tuple[int, ...]
    module: torch.nn.Module


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Where the checkpoint has a tensor: under which name, at which place (layer, expert) of it."""

    name: str
    place: tuple[int, ...]
    shape: tuple[int, ...]


def _parts(module: torch.nn.Module, tied: bool) -> dict[str, _Part]:
    """Every tensor of the model, by its name in one spelling."""
    modules, found = dict(module.named_modules()), {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor) or name.endswith("_extra_state"):
            continue
        if not (tied and name == _HEAD):
            owner = modules[name.rpartition(".")[0]]
            found[_canonical(name)] = _Part(name, tuple(tensor.shape), owner)
    return found


def _canonical(name: str) -> str:
    """A tensor's name whatever layers it was trained with: a norm by the local layers' name, a
    layer of multi-token prediction by its checkpoints'.
    """
    for local, fused in _NORMS:
        name = name.replace(fused, local)
    return name.replace(*_NEXT_TOKENS)


def _stored(source: Checkpoint, vocab: int) -> dict[str, _Stored]:
    """The model's tensors in the checkpoint, layer by layer and expert by expert, by their names in
    one spelling.
    """
    found = {}
    for name, about in source.tensors.items():
        if name.startswith(_NOT_OF_MODEL) or "_extra_state" in name:
            continue
        shape, match = tuple(about.size), _LAYERS.fullmatch(name)
        if name in _PADDED and shape[0] >= vocab:
            shape = (vocab, *shape[1:])
        layers = [(name, (), shape)]
        if match is not None:  # all layers in one tensor
            stack, rest = match.groups()
            layers = [(f"{stack}.layers.{i}.{rest}", (i,), shape[1:]) for i in range(shape[0])]
        for layer, place, size in layers:
            before, experts, rest = layer.partition(".experts.experts.")
            if not experts:
                found[_canonical(layer)] = _Stored(name, place, size)
                continue
            for e in range(size[0]):
                one = f"{before}.experts.local_experts.{e}.{rest}"
                found[one] = _Stored(name, (*place, e), size[1:])
    return found


def _names(name: str) -> Iterator[str]:
    """A tensor's names in the layouts that Bridge's mappings know, the module's own first."""
    yield name
    for local, fused in _NORMS:
        if local in name:
            yield name.replace(local, fused)
    if expert := _EXPERT.fullmatch(name):
        before, number, rest = expert.groups()
        yield f"{before}.{rest}{number}"  # of grouped experts: linear_fc1.weight7
    if _NEXT_TOKENS[0] in name:
        yield from _names(name.replace(*_NEXT_TOKENS))


class _Task:
    """A tensor and where Bridge puts it, as Bridge's converter takes it (WeightConversionTask). The
    tensor is read when it is asked for.
    """

    vp_stage = weight_dtype = export_hook = None
    pp_rank = 0

    def __init__(self, name: str, mapping: Any, part: _Part, read: Callable[[], torch.Tensor]):
        self.param_name = self.global_param_name = name
        self.mapping, self.megatron_module, self._read = mapping, part.module, read

    @property
    def param_weight(self) -> torch.Tensor:
        """The tensor, on CPU. Bridge asks twice, so the last one is kept by who reads it."""
        return self._read()


def _groups(model: Model, read: Callable[[str], torch.Tensor], path: Path) -> list[list[_Task]]:
    """Tasks for all tensors of the model, those together that come out as one (experts, in some
    architectures).

    Raises:
        TSTError: Bridge has no place for a tensor.
    """
    registry, groups = model.bridge.mapping_registry(), {}
    for name, part in model.parts.items():
        for known in _names(part.name):
            if mapping := registry.megatron_to_hf_lookup(known):
                break
        else:
            do = "Megatron-Bridge would leave it out without a word."
            refuse(path, f"a place for {part.name} in {model.config.architectures[0]}", "none", do)
        together = getattr(mapping, "is_grouped_export", False)
        key = mapping.group_key if together else known
        task = _Task(known, mapping, part, functools.partial(read, name))
        groups.setdefault(key, []).append(task)
    return list(groups.values())


def _converted(model: Model, tasks: list[_Task]) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face's name and tensor, one after the other, as Bridge makes them. Of a tied head
    Bridge makes a copy, which is left out.
    """
    head = None
    if model.tied and tasks[0].param_name == _EMBEDDING:  # the registry takes long to make
        head = model.bridge.mapping_registry().megatron_to_hf_lookup(_HEAD).hf_param
    made = model.bridge.stream_weights_megatron_to_hf(
        [model.module],
        model.config,
        cpu=False,
        show_progress=False,
        conversion_tasks=tasks,
        merge_adapter_weights=False,
    )
    for name, tensor in made:
        if name != head:
            yield name, tensor.detach()


def weights(model: Model, tensors: Tensors, path: Path) -> list[Weight]:
    """Every tensor of the export.

    Args:
        path: of the checkpoint, for messages.

    Raises:
        TSTError: Bridge has no place for a tensor, or as many numbers do not come out as go in.
    """
    parts = model.parts

    def nothing(name):  # of the shape, without memory
        return torch.empty(parts[name].shape, device="meta")

    @functools.lru_cache(maxsize=1)
    def read(name):
        stored = model.stored[name]
        return tensors.read(stored.name, *stored.place)[: parts[name].shape[0]]

    groups = _groups(model, read, path)

    @functools.lru_cache(maxsize=1)  # queries, keys and values come out together
    def converted(i):
        return dict(_converted(model, groups[i]))

    found = []
    for i, group in enumerate(_groups(model, nothing, path)):
        # it chooses experts: rounded, it would choose others (transformers keeps it in fp32 too)
        dtype = "float32" if group[0].param_name.endswith(_ROUTER_BIAS) else None
        for name, empty in _converted(model, group):
            whole = functools.partial(lambda i, name: converted(i)[name], i, name)
            found.append(Weight(name, tuple(empty.shape), whole, dtype))
    into = sum(math.prod(part.shape) for part in parts.values())
    out = number_of(found)
    if into != out or len({weight.name for weight in found}) != len(found):
        got = f"{out} in {len(found)} tensors"
        refuse(path, f"{into} numbers, each once", got, "Megatron-Bridge loses or repeats some.")
    return found


def export(
    source: Checkpoint,
    target: Path,
    hf_config: Path,
    *,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
    dtype: str = "bfloat16",
    shard_bytes: int = 2 << 30,
    allow_superposition: bool = False,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Path:
    """Write a folder that `transformers` loads, of an architecture that Megatron-Bridge knows.

    Args:
        source, target, tokenizer, vocab_size, dtype, shard_bytes, allow_superposition, force,
            progress: as hf.export's.
        hf_config: a folder with the config.json of the model that was trained.

    Returns:
        the folder.

    Raises:
        TSTError: as bridged and hf.export, or transformers does not find its tensors in the folder.
    """
    if dtype not in DTYPES:
        refuse("--dtype", " or ".join(DTYPES), dtype, "Give one of them.")
    check_phase(source, allow_superposition)
    files, ids = tokenizer_of(source, tokenizer)
    tensors = Tensors(source)
    vocab = vocab_size_of(source, tensors, files, ids, vocab_size)
    with bridged(source, hf_config, vocab) as model:
        made = weights(model, tensors, source.path)
        total = sum(weight.bytes_in(dtype) for weight in made)
        with new_folder(target, total, force, [*source.folders, *files, model.path]) as part:
            write_weights(
                part, made, dtype, shard_bytes, lambda done: progress(min(done, total), total)
            )
            config_files(part, model, dtype, end_of_text(files))
            card = model_card(source.args, architecture(model), dtype, number_of(made))
            write_text(part / "README.md", card)
            write_text(part / "evaluate.md", evaluation())
            write_tokenizer(part, files)
            _check_loads(part, target, model)
    return target


def architecture(model: Model) -> Architecture:
    """The model as the model card names it."""
    of = model.provider
    return Architecture(
        name=model.config.architectures[0],
        layers=of.num_layers,
        heads=of.num_attention_heads,
        groups=of.num_query_groups or of.num_attention_heads,
        head_dim=of.kv_channels or of.hidden_size // of.num_attention_heads,
        hidden=of.hidden_size,
        experts=of.num_moe_experts or 0,
        expert_layers=frozenset(),
        tied=model.tied,
        vocab=model.vocab,
        config=model.raw,
    )


def config_files(folder: Path, model: Model, dtype: str, end: int | None) -> None:
    """config.json as it was given, with the dtype of the weights, not quantised and without names
    of code, and generation_config.json.

    Args:
        end: the id that ends a document; None: as config.json says.

    Raises:
        TSTError: an end token that is no id of the model.
    """
    names = [name for name in ("dtype", "torch_dtype") if name in model.raw] or ["torch_dtype"]
    config = model.raw | dict.fromkeys(names, dtype)
    for key in ("quantization_config", "auto_map"):  # of the released weights; of files beside them
        config.pop(key, None)
    if end is not None:
        config["eos_token_id"] = end
    check_end_ids(config, model.path, model.vocab)
    write_json(folder / "config.json", config)
    generation = {key: config.get(key) for key in ("bos_token_id", "eos_token_id")}
    write_json(folder / "generation_config.json", generation)


def _check_loads(folder: Path, target: Path, model: Model) -> None:
    """Refuse an export in which transformers misses a tensor, or finds one too many. Layers of
    multi-token prediction, which come after the others, it does not read.

    Raises:
        TSTError: it does.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as said

    said.disable_progress_bar()
    _, about = AutoModelForCausalLM.from_pretrained(
        folder, device_map="meta", output_loading_info=True
    )
    layers, mtp = model.provider.num_layers, model.provider.mtp_num_layers or 0
    behind = tuple(f"model.layers.{n}." for n in range(layers, layers + mtp))
    for kind in ("missing", "unexpected", "mismatched"):
        found = sorted(map(str, about[f"{kind}_keys"]))
        if found := [name for name in found if kind != "unexpected" or not name.startswith(behind)]:
            got = f"{kind}: {', '.join(found[:3])}"
            do = "Megatron-Bridge names them otherwise than the installed transformers."
            refuse(target, "the tensors that transformers looks for", got, do)


def provider_section(model: Model, layer_spec: str) -> dict:
    """The `model:` section of run_config.yaml: Bridge's provider of this model, where it differs
    from the provider's defaults.

    Args:
        layer_spec: "local" or "transformer_engine".
    """
    of, local = model.provider, layer_spec == "local"
    spec = {
        "_target_": "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec",
        "_partial_": True,
        "use_transformer_engine": not local,
        "normalization": of.normalization,
    }
    section = {"_target_": _path_of(type(of)), "transformer_layer_spec": spec}
    for field in dataclasses.fields(of):
        value, default = getattr(of, field.name), field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        same = value == default and field.name not in bridge_model.RUNS_OWN  # looked up in the file
        if field.name in section or field.name.startswith(("_", "hf_model_")) or same:
            continue
        if callable(value):
            value = {"_target_": _path_of(value), "_call_": False}
        elif isinstance(value, torch.dtype):
            value = {"_target_": str(value), "_call_": False}
        elif isinstance(value, tuple):
            value = list(value)
        section[field.name] = value
    if local:
        section |= {name: False for name in bridge_model.LOCAL_HAS_NOT if hasattr(of, name)}
    # Bridge's convention, which keeps padding out of its exports
    padded = {"make_vocab_size_divisible_by": min(model.vocab & -model.vocab, 128)}
    return section | padded | {"vocab_size": model.vocab, "should_pad_vocab": True}


def _path_of(what) -> str:
    return f"{what.__module__}.{what.__qualname__}"
