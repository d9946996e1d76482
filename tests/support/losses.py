"""Logits, labels and gradients for the tests of the losses."""

import torch

IGNORE = -100


def draw(shape, vocab, s, seed=0, ignored=0.3, scale=3.0, few=None):
    """-> (logits [*shape, vocab], labels [*shape, s]); few: of that many distinct labels."""
    torch.manual_seed(seed)
    labels = torch.randint(0, few or vocab, (*shape, s))  # few distinct labels: duplicates in a bag
    labels[torch.rand(labels.shape) < ignored] = IGNORE
    return scale * torch.randn(*shape, vocab), labels


def grad_of(function, logits, upstream):
    """-> (loss, its gradient at the logits for this gradient of the loss)"""
    logits = logits.detach().clone().requires_grad_()
    loss = function(logits)
    (grad,) = torch.autograd.grad((loss * upstream.to(loss.dtype)).sum(), logits)
    return loss.detach(), grad
