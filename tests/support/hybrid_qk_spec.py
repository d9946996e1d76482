"""The HybridModel layer spec of hybrid_spec.py with norms on queries and keys, and multi-latent
attention (+). --spec support.hybrid_qk_spec hybrid_stack_spec
"""

import copy

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from support.hybrid_spec import hybrid_stack_spec as plain


def _attention(**more):
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=True, **more).submodules
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=layer.input_layernorm,
            self_attention=layer.self_attention,
            self_attn_bda=layer.self_attn_bda,
            sharded_state_dict_keys_map={
                # what the local layer spec maps; none with multi-latent attention
                ours: theirs
                for ours, theirs in layer.sharded_state_dict_keys_map.items()
                if ours.startswith("input_layernorm")
            },
        ),
    )


hybrid_stack_spec = copy.copy(plain)
hybrid_stack_spec.submodules = copy.copy(plain.submodules)
hybrid_stack_spec.submodules.attention_layer = _attention()
hybrid_stack_spec.submodules.mla_layer = _attention(multi_latent_attention=True)
