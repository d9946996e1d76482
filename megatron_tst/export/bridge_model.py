"""What Megatron-Bridge makes of a config.json: its settings, its converter, and the model that they
describe, which holds no memory.

Bridge is an optional package and is imported when it is asked. A config.json that asks for what
Bridge does not read, or for layers of Bridge's own, is refused here.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_tst.errors import refuse
from megatron_tst.export.architectures import LLAMA3_ROPE
from megatron_tst.json_file import shown

PACKAGES = (
    "pip install megatron-bridge==0.6.2 'transformer-engine[core_cu13,pytorch]' "
    "nvidia-resiliency-ext"
)
ANOTHER = "Give the config.json of the model that was trained."
# Keys of config.json without an effect on a base model's logits, and those of rope, looked at
# apart: transformers 4 and 5 spell them differently.
_NEUTRAL = {
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "auto_map"),
    *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "output_router_logits"),
    *("router_aux_loss_coef", "router_jitter_noise", "max_window_layers", "pretraining_tp"),
    *("max_position_embeddings", "num_nextn_predict_layers", "experts_implementation"),
}
# DeepSeek-V3's keys that its own code and serving engines compute with, and the value that
# transformers' class and Bridge take for given without reading the key
_GIVEN = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
_ROPE = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
_ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "partial_rotary_factor"),
    *("low_freq_factor", "high_freq_factor"),
}


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """What Bridge's models are built in: one process, and no log of Bridge, Megatron and
    transformers.

    Raises:
        TSTError: Bridge is not installed.
    """
    with _quiet():
        _auto_bridge()
        with _one_process():
            yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the log of Bridge, Megatron and transformers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _auto_bridge():
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.bridge import AutoBridge
    except Exception as error:  # Transformer Engine raises more than ImportError
        got = f"{type(error).__name__}: {error}"
        refuse("Megatron-Bridge", "an installed package that can be imported", got, f"{PACKAGES}.")
    return AutoBridge


def known(raw: dict, path: Path) -> tuple[Any, Any, Any]:
    """-> (transformers' config, Bridge's provider, its converter of this architecture)

    Args:
        raw: what config.json holds.
        path: of it.

    Raises:
        TSTError: Bridge is not installed, or it or transformers do not know the architecture.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        refuse(f"{path}: architectures", "the class of the model", shown(names), ANOTHER)
    kind = raw.get("model_type")
    # DeepSeek-V3 was released with code, and transformers has the class: its own is taken
    if "auto_map" in raw and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        expected = "a model_type that transformers has"
        refuse(f"{path}: auto_map", expected, shown(kind), "Code from a folder is not run.")
    _check_given(raw, path)
    try:
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
        auto = _auto_bridge().from_hf_config(config)
        return config, auto.to_megatron_provider(load_weights=False), auto._model_bridge
    except Exception as error:  # of a bridge that asks for keys which this config has not, too
        first = next(iter(str(error).strip("\n ✗").splitlines()), type(error).__name__)
        expected = "an architecture that the installed Megatron-Bridge and transformers have"
        refuse(f"{path}: architectures", expected, f"{names[0]} ({first[:120]})", _SEE)


_SEE = "`megatron-tst export-hf` by itself has Llama, Qwen3, Qwen3-MoE and DeepSeek-V3."


def _check_given(raw, path):
    """Refuse values of DeepSeek-V3's config.json that neither transformers nor Bridge look at."""
    if raw.get("model_type") != "deepseek_v3":
        return
    for key, value in _GIVEN.items():
        if (got := raw.get(key)) not in (None, value) or isinstance(got, bool):
            do = "transformers and Megatron-Bridge have no other, and do not read the key."
            refuse(f"{path}: {key}", shown(value), shown(got), do)


def check_layers(provider: Any, path: Path, config: Any) -> None:
    """Refuse a model that Bridge builds of layers of its own: what they compute is in no argument
    of Megatron's.

    Raises:
        TSTError: it is one.
    """
    from megatron.bridge.models import gpt_provider
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    spec = getattr(provider, "transformer_layer_spec", type(provider))
    spec = getattr(spec, "func", spec)
    plain = gpt_provider.default_layer_spec, get_gpt_decoder_block_spec
    provides = getattr(type(provider), "provide", None) is gpt_provider.GPTModelProvider.provide
    if spec not in plain or not provides:
        own = getattr(spec, "__name__", spec) if spec not in plain else type(provider).__name__
        expected = "an architecture that Bridge builds of Megatron's own layers"
        do = "Megatron's arguments cannot ask for those, so no run of them is this model."
        refuse(f"{path}: architectures", expected, f"{config.architectures[0]} ({own})", do)


class _Reads:
    """A config that notes which keys are asked for."""

    def __init__(self, config, names):
        self.__dict__ |= {"_config": config, "_names": names}

    def __getattr__(self, name):
        self._names.add(name)
        return getattr(self._config, name)


def check_read(bridge: Any, config: Any, raw: dict, path: Path) -> None:
    """Refuse values of config.json that transformers computes with and Bridge does not see.

    Bridge takes some settings for given: that GLM's router normalises, that gpt-oss scales its
    positions by 32. With another value in config.json the export would compute something else.

    Raises:
        TSTError: with the key.
    """
    from transformers import PretrainedConfig

    names: set[str] = set()
    shim = argparse.Namespace(config=_Reads(config, names))
    provider = bridge.provider_bridge(shim)
    aliases = getattr(config, "attribute_map", {})
    names |= {aliases[name] for name in names & aliases.keys()}
    names |= {alias for alias, name in aliases.items() if name in names} | _ROPE
    given = copy.deepcopy(raw)  # transformers writes into what it is given
    plain = type(config)(**{key: value for key, value in given.items() if key in names})
    ours, theirs = config.to_dict(), plain.to_dict()
    neutral = _NEUTRAL | PretrainedConfig().to_dict().keys()  # of a pipeline, of generation
    for key in sorted(raw.keys() & theirs.keys() - neutral - names):
        if ours.get(key) != theirs[key]:
            do = "Megatron-Bridge does not read this key: its model is the one of that value."
            refuse(f"{path}: {key}", theirs[key], ours.get(key), do)
    rope = ours.get("rope_parameters") or ours.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    llama3 = kind == "llama3" and getattr(provider, "rope_scaling", False)
    if kind not in ("default", "yarn") and not llama3:
        do = "Megatron-Bridge builds this architecture without another."
        refuse(f"{path}: rope_scaling", "default or yarn", kind, do)
    for key, value in LLAMA3_ROPE.items() if llama3 else ():
        if rope.get(key) != value:
            do = "Megatron has Llama 3.1's constants alone."
            refuse(f"{path}: rope_scaling", f"{key} {value}", rope.get(key), do)
    for key, value in rope.items():
        if key not in _ROPE_KEYS and value is not None:
            do = "Megatron builds no such positions."
            refuse(f"{path}: rope_scaling", "what Megatron-Bridge reads", f"{key} {value}", do)
    # what the bridge of an architecture puts in place of config.json's
    for name, value in bridge.hf_config_to_provider_kwargs(config).items():
        fixed = getattr(provider, name, value)
        if name.startswith(("yarn_", "rotary_")) and fixed != value:
            do = "Megatron-Bridge builds this architecture with that value alone."
            refuse(f"{path}: rope_scaling", f"{name} {fixed}", value, do)


def of_run(args: argparse.Namespace) -> Any:
    """Megatron's own config of the run's model.

    Args:
        args: of the checkpoint.

    Raises:
        TSTError: they are not of GPTModel's own layers, or of another Megatron.
    """
    from megatron.training.argument_utils import gpt_config_from_args

    for name in ("hybrid_layer_pattern", "hybrid_override_pattern", "spec", "yaml_cfg"):
        if (given := getattr(args, name, None)) not in (None, "local"):
            do = "Through Megatron-Bridge models of GPTModel's own layers are exported alone."
            refuse(f"--{name.replace('_', '-')}", "none", given, do)
    args = argparse.Namespace(**vars(args))
    args.spec = None
    try:
        return gpt_config_from_args(args)
    except (AttributeError, AssertionError, ValueError) as error:
        do = "Use the megatron-core of the run. An import has them after its first step."
        refuse("the checkpoint's arguments", "those of a GPTModel of megatron-core 0.19", error, do)


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Megatron's groups of one process, which its layers ask for."""
    from megatron.core import parallel_state

    if torch.distributed.is_initialized():
        yield
        return
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


class _NoAttention(torch.nn.Module):
    """In place of an attention without parameters: nothing is computed here, and Megatron's local
    one cannot be built for multi-latent attention.
    """

    def __init__(self, *args: object, **named: object):
        super().__init__()


# Kernels that Megatron's local layers do not have without Transformer Engine and apex
LOCAL_HAS_NOT = (
    "masked_softmax_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "persist_layer_norm",
    "apply_rope_fusion",
    "gradient_accumulation_fusion",
    "moe_permute_fusion",
)
# Of training, for a run that goes on in Bridge: the run's arguments over config.json
RUNS_OWN = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "sequence_parallel"),
    *("fp16", "bf16", "params_dtype", "hidden_dropout", "attention_dropout", "init_method_std"),
    *("attention_softmax_in_fp32", "apply_query_key_layer_scaling", "fp32_residual_connection"),
    *("calculate_per_token_loss", "mtp_loss_scaling_factor", "moe_router_load_balancing_type"),
    *("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_input_jitter_eps", "moe_router_dtype"),
    *("moe_router_bias_update_rate", "moe_grouped_gemm", "moe_token_dispatcher_type"),
)


@contextlib.contextmanager
def _no_device() -> Iterator[None]:
    """Megatron's layers put some tensors on the current GPU by name: here on "meta" too."""
    before = torch.cuda.current_device
    torch.cuda.current_device = lambda: "meta"
    try:
        yield
    finally:
        torch.cuda.current_device = before


# Of the description, whatever the run had: one process, Megatron's local layers
_HERE = {
    **dict.fromkeys(
        ["tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"], 1
    ),
    **dict.fromkeys(["expert_model_parallel_size", "expert_tensor_parallel_size"], 1),
    **dict.fromkeys(["sequence_parallel", "perform_initialization", "moe_grouped_gemm"], False),
    **dict.fromkeys([*LOCAL_HAS_NOT, "moe_shared_expert_overlap", "fp8_param"], False),
    **dict.fromkeys(["overlap_moe_expert_parallel_comm", "delay_wgrad_compute"], False),
    **dict.fromkeys(["virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout"]),
    **dict.fromkeys(["num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"]),
    **dict.fromkeys(["recompute_granularity", "fp8", "fp4"]),
    "use_cpu_initialization": True,
    "transformer_impl": "local",
    "moe_token_dispatcher_type": "allgather",
    "cuda_graph_impl": "none",
}


def built(provider: Any, vocab: int) -> torch.nn.Module:
    """A GPTModel of one process on "meta", of Megatron's local layers."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_mtp_block_spec,
    )

    here = copy.copy(provider)
    for name, value in _HERE.items():
        if hasattr(here, name):
            setattr(here, name, value)
    if hasattr(here, "finalize"):
        here.finalize()
    spec = get_gpt_decoder_block_spec(
        here, use_transformer_engine=False, normalization=here.normalization
    )
    if here.multi_latent_attention:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = _NoAttention
    mtp = None
    if here.mtp_num_layers:
        mtp = get_gpt_mtp_block_spec(here, spec, use_transformer_engine=False)
    with torch.device("meta"), _no_device():
        return GPTModel(
            here,
            transformer_layer_spec=spec,
            vocab_size=vocab,
            max_sequence_length=here.seq_length,
            share_embeddings_and_output_weights=here.share_embeddings_and_output_weights,
            position_embedding_type="rope",  # no parameter is learned in any that Bridge has
            mtp_block_spec=mtp,
        )
