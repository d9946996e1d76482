"""A checkpoint -> a checkpoint of Megatron-Bridge, NeMo's library for pre-training: the same
torch_dist files, and beside them what Bridge reads.

In TARGET:
    latest_checkpointed_iteration.txt, latest_train_state.pt   which iteration
In TARGET/iter_N:
    *.distcp, .metadata, metadata.json   weights and optimizer state, byte by byte
    run_config.yaml                      the model, as Bridge's GPTModelProvider takes it
    train_state.pt                       iteration and samples
    tokenizer/                           the tokenizer
    hf/                                  config.json and tokenizer, for exports by Bridge
"""

from __future__ import annotations

import argparse
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from megatron_tst.checkpoint.atomic import flushed, write_text
from megatron_tst.checkpoint.boundary import drop_optimizer_state, renaming, stock_arguments
from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.checkpoint.rewrite import Changes, rewrite, saved
from megatron_tst.checkpoint.tensors import Tensors
from megatron_tst.errors import refuse
from megatron_tst.export import through_bridge
from megatron_tst.export.architectures import ROPE_FACTOR, Architecture, architecture_of
from megatron_tst.export.bridge_model import LOCAL_HAS_NOT
from megatron_tst.export.card import model_card
from megatron_tst.export.hf import check_phase, config_files, number_of, vocab_size_of, weights
from megatron_tst.export.tokenizer import end_of_text, tokenizer_of, write_tokenizer

# Fields of Bridge's GPTModelProvider that have the names and meanings of Megatron's arguments.
_SAME = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "normalization",
    "add_bias_linear",
    "rotary_percent",
    "position_embedding_type",
    "init_method_std",
    "hidden_dropout",
    "attention_dropout",
    "bf16",
    "fp16",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_router_load_balancing_type",
    "moe_router_pre_softmax",
    "moe_router_dtype",
    "moe_layer_freq",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_grouped_gemm",
    "moe_token_dispatcher_type",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
)
_OPTIMIZER = (
    "optimizer",
    "lr",
    "min_lr",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "sgd_momentum",
    "clip_grad",
    "bf16",
    "fp16",
    "use_distributed_optimizer",
    "use_precision_aware_optimizer",
)
_MUON = (  # of a Muon run beside these
    *("muon_momentum", "muon_nesterov", "muon_split_qkv", "muon_scale_mode", "muon_tp_mode"),
    *("muon_fp32_matmul_prec", "muon_coefficient_type", "muon_num_ns_steps"),
    *("muon_extra_scale_factor", "muon_scalar_optimizer", "use_layer_wise_distributed_optimizer"),
)
_SCHEDULE = (
    "lr_decay_style",
    "lr_wsd_decay_style",
    "lr_decay_iters",
    "lr_decay_samples",
    "lr_wsd_decay_iters",
    "lr_wsd_decay_samples",
    "lr_warmup_fraction",
    "lr_warmup_iters",
    "lr_warmup_samples",
    "lr_warmup_init",
    "start_weight_decay",
    "end_weight_decay",
    "weight_decay_incr_style",
)


def export(
    source: Checkpoint,
    target: Path,
    *,
    hf_config: Path | None = None,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
    layer_spec: str | None = None,
    drop_optimizer: bool = False,
    allow_superposition: bool = False,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Path:
    """Write a checkpoint that Megatron-Bridge loads, resumes and exports.

    Args:
        source: of any layout; torch_dist of 0.18 or 0.19.
        target: a new folder, for Bridge's checkpoint.load.
        hf_config: a folder with the config.json of the model that was trained, of which Bridge
            builds the model; None: a Llama, Qwen3 or Qwen3-MoE, of the run's arguments alone.
        tokenizer, vocab_size, allow_superposition, force: as hf.export's.
        layer_spec: "local" or "transformer_engine", of the Bridge run; None: the run's own. They
            name the norm before experts differently.
        drop_optimizer: weights alone.

    Returns:
        the iteration's folder.

    Raises:
        TSTError: as hf.export, rewrite.rewrite and, with hf_config, through_bridge.bridged.
    """
    check_phase(source, allow_superposition)
    args = source.args
    files, ids = tokenizer_of(source, tokenizer)
    tensors = Tensors(source)
    vocab = vocab_size_of(source, tensors, files, ids, vocab_size)
    dtypes = {"bf16": "bfloat16", "fp16": "float16"}
    dtype = next((dtypes[flag] for flag in dtypes if getattr(args, flag, False)), "float32")
    layer_spec = layer_spec or getattr(args, "transformer_impl", "transformer_engine")
    rename = renaming(source, layer_spec)
    described = _described if hf_config is None else _described_by_bridge
    model = described(source, tensors, vocab, dtype, end_of_text(files), layer_spec, hf_config)
    common = source.common | {"args": stock_arguments(args)}
    dropped = drop_optimizer_state(source, common) if drop_optimizer else set()
    run_config = {
        "model": model.section,
        # Bridge finds the optimizer's groups again by these: a recipe that resumes needs the same
        # learning rates and weight decay
        "optimizer": {
            "_target_": "megatron.bridge.training.config.OptimizerConfig",
            **_same(args, _OPTIMIZER),
            **_same(args, _MUON if "muon" in args.optimizer else ()),
        },
        "scheduler": {
            "_target_": "megatron.bridge.training.config.SchedulerConfig",
            **_same(args, _SCHEDULE),
        },
        "checkpoint": {
            "_target_": "megatron.bridge.training.config.CheckpointConfig",
            "save_optim": not (drop_optimizer or getattr(args, "no_save_optim", False)),
            "save_rng": not getattr(args, "no_save_rng", False),
            "fully_parallel_save": bool(getattr(args, "ckpt_fully_parallel_save", False)),
        },
    }
    if files:
        run_config["tokenizer"] = {
            "_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig",
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": str(target.absolute() / source.path.name / "tokenizer"),
        }

    def more(folder):
        write_text(folder / "run_config.yaml", yaml.safe_dump(run_config, sort_keys=False))
        state = saved(train_state(source.common, args))
        for path in (folder / "train_state.pt", folder.parent / "latest_train_state.pt"):
            flushed(path, lambda file: file.write(state))
        for name in ("hf", "tokenizer") if files else ("hf",):
            (folder / name).mkdir()
            write_tokenizer(folder / name, files)
        model.config_files(folder / "hf")
        card = model_card(args, model.arch, dtype, model.parameters, library="megatron-bridge")
        write_text(folder.parent / "README.md", card)

    changes = Changes(
        common=common,
        keep=lambda name: name not in dropped,
        name=rename,
        more=more,
    )
    return rewrite(source, target, changes, force=force, also_read=files, progress=progress)


@dataclass(frozen=True)
class _Described:
    """What the files beside the checkpoint say of the model.

    Args:
        arch: for the model card.
        section: of run_config.yaml.
        parameters: how many.
        config_files: writes config.json and generation_config.json into a folder.
    """

    arch: Architecture
    section: dict
    parameters: int
    config_files: Callable[[Path], None]


def _described(source, tensors, vocab, dtype, end, layer_spec, _) -> _Described:
    """By the run's arguments."""
    arch = architecture_of(source.args, vocab, dtype, end)
    _check(source.args, arch)
    if 0 < len(arch.expert_layers) < arch.layers:
        warnings.warn(
            "megatron_tst: Megatron-Bridge 0.6 resumes this model but exports no dense layers "
            "among experts: use hf",
            stacklevel=3,
        )
    return _Described(
        arch,
        provider(source.args, arch, layer_spec),
        number_of(weights(tensors, arch)),
        functools.partial(config_files, arch=arch, kept=source.path / "hf"),
    )


def _described_by_bridge(source, tensors, vocab, dtype, end, layer_spec, hf_config) -> _Described:
    """By Bridge, which has found every tensor of the checkpoint in the model of config.json, and a
    place for each in a Hugging Face folder.
    """
    with through_bridge.bridged(source, hf_config, vocab) as model:
        return _Described(
            through_bridge.architecture(model),
            through_bridge.provider_section(model, layer_spec),
            number_of(through_bridge.weights(model, tensors, source.path)),
            functools.partial(through_bridge.config_files, model=model, dtype=dtype, end=end),
        )


def _check(args, arch):
    """What `provider` does not describe."""
    has = {
        "--multi-latent-attention": arch.latent,
        "--hybrid-layer-pattern": arch.hybrid,
        "--mtp-num-layers": bool(getattr(args, "mtp_num_layers", None)),
    }
    if flags := [flag for flag, there in has.items() if there]:
        do = "Give --hf-config, or export it with `megatron-tst export-hf`."
        refuse(" and ".join(flags), "a Llama, Qwen3 or Qwen3-MoE without", "one with", do)


def provider(args: argparse.Namespace, arch: Architecture, layer_spec: str) -> dict:
    """The `model:` section of run_config.yaml: a GPTModelProvider of this model.

    Args:
        args: Megatron's arguments from the checkpoint.
        arch: the model.
        layer_spec: "local" or "transformer_engine".
    """
    given = _same(args, _SAME)
    if not arch.experts:
        given = {name: value for name, value in given.items() if not name.startswith("moe_")}
    return {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "transformer_layer_spec": _layer_spec(arch, layer_spec),
        "activation_func": _named("torch.nn.functional.silu"),
        "params_dtype": _named(f"torch.{arch.config['torch_dtype']}"),
        **given,
        "gated_linear_unit": True,
        "num_query_groups": arch.groups,
        "kv_channels": arch.head_dim,
        "qk_layernorm": arch.qk_norm,
        "num_moe_experts": arch.experts or None,
        "layernorm_epsilon": arch.config["rms_norm_eps"],
        "rotary_base": arch.config["rope_theta"],
        "rope_scaling": bool(getattr(args, "use_rope_scaling", False)),
        "rope_scaling_factor": ROPE_FACTOR,
        "seq_len_interpolation_factor": getattr(args, "rotary_seq_len_interpolation_factor", None),
        "share_embeddings_and_output_weights": arch.tied,
        "vocab_size": arch.vocab,
        # Bridge's convention, which keeps padding out of its exports; a checkpoint's embedding
        # loads whatever its padding is
        "make_vocab_size_divisible_by": min(arch.vocab & -arch.vocab, 128),
        "should_pad_vocab": True,
        "seq_length": arch.config["max_position_embeddings"],  # Bridge's convention
        **({name: False for name in LOCAL_HAS_NOT} if layer_spec == "local" else {}),
    }


def _same(args, names):
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def _layer_spec(arch, layer_spec):
    if 0 < len(arch.expert_layers) < arch.layers:  # Bridge's own specs make all layers alike
        block = "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec"
        return {
            "_target_": block,
            "_partial_": True,
            "use_transformer_engine": layer_spec == "transformer_engine",
        }
    return _named(f"megatron.bridge.models.gpt_provider.{layer_spec}_layer_spec")


def _named(what: str) -> dict:
    """A function or type as Bridge's yaml names one."""
    return {"_target_": what, "_call_": False}


def train_state(common: dict, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """train_state.pt: what Bridge counts (its TrainState). Samples are Megatron's, as many a step
    in superposition as in recovery.

    Args:
        common: the checkpoint's common state.
        args: Megatron's arguments in it.

    Returns:
        name -> scalar: counts int64, floating-point operations fp64, flags bool.
    """
    counts = {
        "step": common.get("iteration", 0),
        "consumed_train_samples": getattr(args, "consumed_train_samples", 0),
        "skipped_train_samples": getattr(args, "skipped_train_samples", 0),
        "consumed_valid_samples": getattr(args, "consumed_valid_samples", 0),
    }
    state = {name: torch.tensor(count, dtype=torch.int64) for name, count in counts.items()}
    operations = common.get("num_floating_point_operations_so_far", 0)
    state["floating_point_operations_so_far"] = torch.tensor(operations, dtype=torch.float64)
    return state | {name: torch.tensor(False) for name in ("do_train", "do_valid", "do_test")}
