"""A HybridModel layer spec of local modules (Megatron ships Transformer Engine's alone). --spec
support.hybrid_spec hybrid_stack_spec
"""

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

_gpt = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
_norm = _gpt.input_layernorm
# MLA's norms of the compressed queries, keys and values: --qk-layernorm
_mla = get_gpt_layer_local_spec(
    normalization="RMSNorm", multi_latent_attention=True, qk_layernorm=True
).submodules
_mla_layer = {}
if hasattr(HybridStackSubmodules, "mla_layer"):  # not in 0.18
    _mla_layer["mla_layer"] = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=_mla.input_layernorm,
            self_attention=_mla.self_attention,
            self_attn_bda=_mla.self_attn_bda,
        ),
    )
# the number is the configuration's
_moe = get_gpt_layer_local_spec(num_experts=2, normalization="RMSNorm").submodules

hybrid_stack_spec = ModuleSpec(
    module=HybridStack,
    submodules=HybridStackSubmodules(
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=_gpt.input_layernorm,
                self_attention=_gpt.self_attention,
                self_attn_bda=_gpt.self_attn_bda,
                sharded_state_dict_keys_map={
                    "input_layernorm.": "self_attention.linear_qkv.layer_norm_"
                },
            ),
        ),
        gdn_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=_norm,
                self_attention=ModuleSpec(
                    module=GatedDeltaNet,
                    submodules=GatedDeltaNetSubmodules(
                        in_proj=ColumnParallelLinear,
                        out_norm=_norm,
                        out_proj=RowParallelLinear,
                    ),
                ),
                self_attn_bda=_gpt.self_attn_bda,
            ),
        ),
        **_mla_layer,
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=_gpt.pre_mlp_layernorm,
                mlp=_gpt.mlp,
                mlp_bda=_gpt.mlp_bda,
                sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
            ),
        ),
        moe_layer=ModuleSpec(
            module=MoETransformerLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=_moe.pre_mlp_layernorm, mlp=_moe.mlp, mlp_bda=_moe.mlp_bda
            ),
        ),
        mtp_block_spec=ModuleSpec(
            module=MultiTokenPredictionBlock,
            submodules=MultiTokenPredictionBlockSubmodules(
                layer_specs=[
                    ModuleSpec(
                        module=MultiTokenPredictionLayer,
                        submodules=MultiTokenPredictionLayerSubmodules(
                            enorm=_norm,
                            hnorm=_norm,
                            eh_proj=ColumnParallelLinear,
                            mtp_model_layer=None,
                            layer_norm=_norm,
                        ),
                    )
                ]
            ),
        ),
    ),
)
