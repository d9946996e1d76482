"""hybrid_spec.py with the norm before experts stored under the name that Megatron's local layer
spec of GPTModel gives it (gpt_layer_specs.py), so that a GPTModel's checkpoint can be read on CPU.
--spec support.hybrid_local_names hybrid_stack_spec
"""

import copy

from support import hybrid_spec

hybrid_stack_spec = copy.deepcopy(hybrid_spec.hybrid_stack_spec)
hybrid_stack_spec.submodules.moe_layer.submodules.sharded_state_dict_keys_map = {
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"
}
