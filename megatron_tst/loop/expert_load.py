"""How Megatron's routers spread tokens over experts, while somebody is watching."""

from __future__ import annotations

import math

import torch


class ExpertLoad:
    """Counts the tokens that each expert is given, and how undecided the routers are, while it is
    attached. Each rank counts its own tokens; `imbalance` and `entropy` sum over all ranks.
    """

    def __init__(self):
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        # layer number, from 1 -> int64 [experts] of this rank's tokens
        self.counts: dict[int, torch.Tensor] = {}
        # layer number -> fp64 [2]: sum of the tokens' router entropies, and their number
        self.entropies: dict[int, torch.Tensor] = {}

    def attach(self, model: list[torch.nn.Module]) -> None:
        """Start counting anew in the routers of Megatron's model chunks."""
        from megatron.core.transformer.moe.router import TopKRouter

        self.detach()
        self.counts, self.entropies = {}, {}
        modules = [module for chunk in model for module in chunk.modules()]
        routers = [module for module in modules if isinstance(module, TopKRouter)]
        self.handles = [router.register_forward_hook(self._count) for router in routers]

    def detach(self) -> None:
        """Stop counting, and keep the counts."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _count(self, router, inputs, output):
        if not torch.is_grad_enabled() or not router.training:
            return  # evaluation, or the first pass of recomputed activations
        layer = router.layer_number
        _add(self.counts, layer, output[1].detach().sum(0))
        with torch.no_grad():
            scores = router.gating(inputs[0].detach()).double().flatten(0, -2)
        if router.config.moe_router_score_function == "sigmoid":
            scores = scores.sigmoid().log()
        log_p = scores.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1) / math.log(log_p.shape[-1])
        tokens = entropy.new_full((), len(entropy))  # made there: a copy would wait for the GPU
        _add(self.entropies, layer, torch.stack([entropy.sum(), tokens]))

    def imbalance(self, layers: int, experts: int) -> list[float]:
        """The busiest expert's tokens over the mean, for each layer that has experts.

        Called by all ranks: they sum their counts.

        Args:
            layers: of the model, those of multi-token prediction too.
            experts: of a layer.
        """
        device = torch.cuda.current_device()
        counts = torch.zeros(layers + 1, experts, dtype=torch.int64, device=device)
        for layer, per_expert in self.counts.items():
            counts[min(layer, layers)] += per_expert
        # before: this rank's tokens; after: all ranks'
        torch.distributed.all_reduce(counts)
        counts = counts[counts.sum(1) > 0].double()
        return (counts.max(1).values / counts.mean(1)).tolist()

    def entropy(self, layers: int) -> list[float]:
        """Mean entropy of the routers' probabilities over log(experts), from 0 to 1 (undecided),
        for each layer that has experts.

        Called by all ranks: they sum their tokens'.
        """
        sums = torch.zeros(layers + 1, 2, dtype=torch.float64, device=torch.cuda.current_device())
        for layer, noted in self.entropies.items():
            sums[min(layer, layers)] += noted
        torch.distributed.all_reduce(sums)
        sums = sums[sums[:, 1] > 0]
        return (sums[:, 0] / sums[:, 1]).tolist()


def _add(sums, layer, more):
    sums[layer] = sums[layer] + more if layer in sums else more
