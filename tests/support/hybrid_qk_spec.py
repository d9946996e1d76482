"""The HybridModel layer spec of hybrid_spec.py with norms on queries and keys. --spec
support.hybrid_qk_spec hybrid_stack_spec
"""

import copy

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from support.hybrid_spec import hybrid_stack_spec as plain

_layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=True).submodules

hybrid_stack_spec = copy.copy(plain)
hybrid_stack_spec.submodules = copy.copy(plain.submodules)
_attention = hybrid_stack_spec.submodules.attention_layer = copy.copy(
    plain.submodules.attention_layer
)
_attention.submodules = copy.copy(_attention.submodules)
_attention.submodules.self_attention = _layer.self_attention
