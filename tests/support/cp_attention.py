"""What attention does with Transformer Engine alone, for the tests without it: context parallelism,
and the head sizes of multi-latent attention.

Causal self-attention, unpacked, no window. Rank r of n holds chunks r and 2n-1-r of the sequence
(get_batch_on_this_cp_rank).
"""

import copy
import sys

import torch
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention

# where Megatron looks for flash-linear-attention (0.19: gated_delta_net/common.py)
gated_delta_net = sys.modules[GatedDeltaNet.reset_parameters.__module__]


def install():
    """Let DotProductAttention take context parallelism and multi-latent attention, in this
    process. -> a function that takes it back
    """
    build, attend = DotProductAttention.__init__, DotProductAttention.forward

    def __init__(self, config, *rest, k_channels=None, v_channels=None, **named):
        alone = copy.copy(config)
        alone.context_parallel_size = 1  # asked by an assertion alone
        if v_channels is not None:
            # the width of the output; of the keys' only the scale depends, which MLA gives
            assert k_channels is not None and named.get("softmax_scale") is not None
            alone.kv_channels = v_channels
        build(self, alone, *rest, **named)
        self.config, self.cp_group = config, self.pg_collection.cp
        self.latent = v_channels is not None

    def forward(self, query, key, value, attention_mask, *rest, **named):
        if self.latent:
            # All heads share the rotary part of a key, and Megatron's local projection leaves its
            # gradient the sum over this rank's heads (multi_latent_attention.py, where kv_combined
            # is gathered). Transformer Engine's, under sequence parallelism, sums over all ranks.
            own, shared = key.split([self.config.qk_head_dim, self.config.qk_pos_emb_head_dim], -1)
            shared = copy_to_tensor_model_parallel_region(shared, group=self.tp_group)
            key = torch.cat([own, shared], -1)
        ranks, rank = self.cp_group.size(), self.cp_group.rank()
        if ranks == 1:
            return attend(self, query, key, value, attention_mask, *rest, **named)
        length = len(query)
        chunks = [chunk for r in range(ranks) for chunk in (r, 2 * ranks - 1 - r)]
        # of the chunks in sequence order
        positions = torch.arange(ranks * length, device=query.device).view(2 * ranks, -1)

        def whole(tensor):
            # before: this rank's two chunks; after: all of them, in sequence order. Backward:
            # reduce-scatter
            gathered = gather_from_sequence_parallel_region(
                tensor.contiguous(), group=self.cp_group
            )
            return gathered.index_select(0, positions[torch.tensor(chunks).argsort()].flatten())

        own = positions[[rank, 2 * ranks - 1 - rank]].flatten()
        hidden = positions.flatten() > own.unsqueeze(-1)  # [own, all]: a key after its query
        return attend(self, query, whole(key), whole(value), hidden[None, None], *rest, **named)

    DotProductAttention.__init__, DotProductAttention.forward = __init__, forward
    _let_gated_delta_nets_build()

    def remove():
        DotProductAttention.__init__, DotProductAttention.forward = build, attend

    return remove


def _let_gated_delta_nets_build():
    """Megatron's rule for --deterministic-mode is torch's, but for a norm and the demand that
    flash-linear-attention is there.
    """
    if not gated_delta_net.HAVE_FLA:
        gated_delta_net.HAVE_FLA, gated_delta_net.l2norm = True, _l2norm


def _l2norm(x):
    """flash-linear-attention's (fla/modules/l2norm.py): the last dimension gets length 1."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
