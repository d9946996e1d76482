"""The paper's formulas (arXiv 2605.06546, sections 2 and 3, listings 2 and 3) in fp64, in as few
lines as they need.

The oracle of tests and benchmarks. Nothing here is fast, parallel or differentiated by hand.
B rows, L positions, S tokens a bag, V vocabulary, H width.
"""

from __future__ import annotations

import math

import torch

from megatron_tst.ops.names import IGNORE


def target_weights(weighting: str, bag_size: int) -> torch.Tensor:
    """g(i), i = 1..S counted from the bag's first token (paper, section 5). A constant factor has
    no effect. fp64 [S].
    """
    g = {
        "uniform": lambda i: 1.0,
        "power-law": lambda i: 1.0 / i,
        "exponential": lambda i: math.exp(-i),
        "first-token": lambda i: float(i == 1),
        "fitted-power-law": lambda i: 3.63 + 1.35 * i**-1.25,
    }[weighting]
    return torch.tensor([g(i) for i in range(1, bag_size + 1)], dtype=torch.float64)


def superposed_embedding(table_VH: torch.Tensor, tokens_BLS: torch.Tensor) -> torch.Tensor:
    """Listing 2: the mean of the bag's embedding rows. fp64 [B, L, H]."""
    return table_VH.double()[tokens_BLS].mean(dim=2)


def multi_hot_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
    loss: str = "mce",
) -> torch.Tensor:
    """logits [..., V], labels [..., S] with -100 ignored, weights [S] -> nats [...], fp64.

    mce: weighted mean over the valid labels, with multiplicity, of the single-label cross entropy.
    mce-alt: -log of the probability of the bag as a set; with weights, each member's probability is
    scaled by its weight over the largest weight in the bag (our generalisation: uniform weights
    give the paper's formula). bce, hinge: sum over the vocabulary of t f(-z) + (1 - t) f(z), where
    t is that relative weight, 0 outside the bag, and f is softplus or max(0, 1 + z). The paper says
    of both that they were worse, and prints no formula that we know: these are our choice. A
    position without a valid label of positive weight has loss 0.
    """
    log_p = logits.double().log_softmax(-1)
    weights = torch.ones(labels.shape[-1]) if weights is None else weights
    w = weights.double().to(logits.device) * (labels != IGNORE)
    if loss == "mce":
        picked = log_p.gather(-1, labels.clamp_min(0))
        total = w.sum(-1)
        return torch.where(total > 0, -(w * picked).sum(-1) / total.clamp_min(1e-300), 0.0)
    members = torch.zeros_like(log_p)
    for i in range(labels.shape[-1]):
        member = torch.zeros_like(log_p).scatter(-1, labels[..., [i]].clamp_min(0), w[..., [i]])
        members = torch.maximum(members, member)
    largest = members.amax(-1, keepdim=True)
    t = members / largest.clamp_min(1e-300)
    if loss == "mce-alt":
        value = -(log_p + t.log()).logsumexp(-1)
    else:
        f = {"bce": torch.nn.functional.softplus, "hinge": lambda z: torch.relu(1 + z)}[loss]
        z = logits.double()
        value = torch.where(t > 0, t * f(-z) + (1 - t) * f(z), f(z)).sum(-1)
    return torch.where(largest.squeeze(-1) > 0, value, 0.0)


def paper_loss(
    logits_BLV: torch.Tensor, labels_BLS: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Listing 3: mean cross entropy of each place in the bag over the rows that have it, then over
    the places. Scalar.
    """
    log_p = logits_BLV.double().log_softmax(-1)
    weights = torch.ones(labels_BLS.shape[-1]) if weights is None else weights
    places = []
    for i in range(labels_BLS.shape[-1]):
        label = labels_BLS[..., i]
        nll = -log_p.gather(-1, label.clamp_min(0)[..., None])
        places.append(nll[label != IGNORE].mean())
    return (torch.stack(places) * weights).sum() / weights.sum()


def bag_entropy(labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Entropy in nats of the target distribution of each bag, duplicates merged: the floor of the
    mce. fp64 [...].
    """
    weights = torch.ones(labels.shape[-1]) if weights is None else weights
    out = []
    for bag in labels.reshape(-1, labels.shape[-1]):
        mass: dict[int, float] = {}
        for label, weight in zip(bag.tolist(), weights.tolist()):
            if label != IGNORE and weight > 0:
                mass[label] = mass.get(label, 0.0) + weight
        total = sum(mass.values())
        out.append(-sum(m / total * math.log(m / total) for m in mass.values()))
    return torch.tensor(out, dtype=torch.float64).reshape(labels.shape[:-1])
