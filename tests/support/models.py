"""Tiny real GPTModel and HybridModel on local layer specs, with the same weights where they are the
same network.
"""

import torch


def config(of=None, **changes):
    from megatron.core.transformer import TransformerConfig

    defaults = dict(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
    )
    return (of or TransformerConfig)(**(defaults | changes))


def gpt(
    vocab=96, seed=0, tied=False, position="rope", dtype=torch.float32, experts=None, **changes
):
    """GPTModel, untied and rotary unless told otherwise."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    torch.manual_seed(seed)
    if experts:
        changes |= dict(
            num_moe_experts=experts,
            moe_router_topk=2,
            moe_ffn_hidden_size=32,
            moe_token_dispatcher_type="alltoall",
        )
    model = GPTModel(
        config=config(params_dtype=dtype, bf16=dtype == torch.bfloat16, **changes),
        transformer_layer_spec=get_gpt_layer_local_spec(
            num_experts=experts, normalization="RMSNorm"
        ),
        vocab_size=vocab,
        max_sequence_length=64,
        position_embedding_type=position,
        share_embeddings_and_output_weights=tied,
    )
    return model.to(dtype)


def deepseek(vocab=96, seed=0, mtp=0, **changes):
    """GPTModel with DeepSeek-V3's parts: latent attention, a dense first layer, a shared expert,
    sigmoid scores with a bias (not zero here), groups, a balancing loss of each sequence. Its
    attention is the tests' own (cp_attention.install).
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer import MLATransformerConfig

    forget_metrics()
    torch.manual_seed(seed)
    parts = dict(
        num_layers=3,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_head_dim=8,
        qk_pos_emb_head_dim=4,
        v_head_dim=6,
        qk_layernorm=True,
        moe_layer_freq=[0, 1, 1],
        num_moe_experts=8,
        moe_router_topk=2,
        moe_ffn_hidden_size=16,
        moe_shared_expert_intermediate_size=16,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_num_groups=2,
        moe_router_group_topk=1,
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=1e-2,
        moe_token_dispatcher_type="alltoall",
        mtp_num_layers=mtp or None,
        mtp_loss_scaling_factor=0.3,
    )
    settings = config(MLATransformerConfig, **(parts | changes))
    block = get_gpt_decoder_block_spec(
        settings, use_transformer_engine=False, normalization="RMSNorm"
    )
    model = GPTModel(
        config=settings,
        transformer_layer_spec=block,
        vocab_size=vocab,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        mtp_block_spec=get_gpt_mtp_block_spec(settings, block, use_transformer_engine=False),
    )
    for name, bias in model.named_buffers():
        if name.endswith("expert_bias"):
            bias.copy_(torch.rand(len(bias)))
    return model


def forget_metrics():
    """Of earlier models of the process: Megatron's logs keep the depth of the first."""
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker.clear()
    destroy_moe_metrics_tracker()


def hybrid(vocab=96, seed=0, **changes):
    """HybridModel of the pattern `*-*-`: the network of gpt() with two layers."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from support.hybrid_spec import hybrid_stack_spec

    torch.manual_seed(seed)
    return HybridModel(
        config=config(num_layers=4, **changes),
        hybrid_stack_spec=hybrid_stack_spec,
        vocab_size=vocab,
        max_sequence_length=64,
        hybrid_layer_pattern="*-*-",
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def copy_gpt_to_hybrid(source, target):
    """Layer i of GPTModel is layers 2i (attention) and 2i+1 (MLP) of the HybridModel."""
    weights = {}
    for name, tensor in source.state_dict().items():
        if name.startswith("decoder.layers."):
            _, _, layer, rest = name.split(".", 3)
            half = 2 * int(layer) + (
                0 if rest.startswith(("input_layernorm", "self_attention")) else 1
            )
            name = f"decoder.layers.{half}.{rest}"
        weights[name.replace("decoder.final_layernorm", "decoder.final_norm")] = tensor
    missing = {k for k in target.state_dict() if "_extra_state" not in k} ^ {
        k for k in weights if "_extra_state" not in k
    }
    assert not missing, missing
    target.load_state_dict(weights, strict=False)


def batch(raw, s, superpose="both"):
    """raw [b, n] token ids -> keyword arguments of model.forward; s = None: an ordinary batch."""
    from megatron_tst.data.bags import superposed_sample

    rows = []
    for row in raw:
        sample = {"tokens": row[:-1], "labels": row[1:], "loss_mask": torch.ones(len(row) - 1)}
        if s is None:
            sample["position_ids"] = torch.arange(len(row) - 1)
        else:
            length = (len(row) - 1) // (1 if superpose == "output" else s)
            sample = superposed_sample(sample, length, s, superpose, torch.ones(s))
        rows.append(sample)
    stacked = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return {
        "input_ids": stacked["tokens"],
        "position_ids": stacked["position_ids"],
        "attention_mask": None,
        "labels": stacked["labels"],
    }
