"""apply, remove, status: the only file that assigns into megatron.* (cpu.py apart, which is for
machines without a GPU).

Two class methods carry TST; which phase it is, only the shape of the batch says:

    VocabParallelEmbedding.forward(ids)                          3-D ids    -> mean of the bag's rows    else stock
    LanguageModule.compute_language_model_loss(labels, logits)   3-D labels -> multi-hot cross entropy   else stock

So validation, inference, the recovery phase and other models in the process run stock code. (With
--tst-kernel-in-recovery the extension takes one label a position too, in training alone. With
--tst-fused-linear-loss one more patch, on the forward of GPTModel and HybridModel, hands the output
layer's work to the loss in training: ops/linear_loss.py. Multi-token prediction shifts 3-D tokens and
labels by a bag: ops/multi_token.py.)
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from megatron_tst import compat
from megatron_tst.config import TSTConfig
from megatron_tst.errors import PatchError
from megatron_tst.loop import seams
from megatron_tst.ops.names import ABLATIONS

logger = logging.getLogger(__name__)


@dataclass
class Status:
    """What is patched, and how often the superposed paths have run in this process.

    Args:
        seams: the Megatron functions that are replaced now.
        config: the settings that the loss uses, None when nothing is applied.
        superposed_embeddings: calls of the embedding with bags.
        multi_hot_losses: calls of the loss with bags.
        recovery_losses: calls of our loss with one label a position (kernel_in_recovery,
            fused_linear_loss).
        fused_linear_losses: calls of the loss without materialised logits (fused_linear_loss).
    """

    seams: tuple[str, ...] = ()
    config: TSTConfig | None = None
    superposed_embeddings: int = 0
    multi_hot_losses: int = 0
    recovery_losses: int = 0
    fused_linear_losses: int = 0


@dataclass
class _State:
    installed: dict = field(default_factory=dict)  # Seam -> (stock, ours)
    config: TSTConfig | None = None
    embeddings: int = 0
    losses: int = 0
    recovery_losses: int = 0
    fused_linear_losses: int = 0


_state = _State()


def apply(config: TSTConfig | None = None) -> Status:
    """Patch the two methods, and multi-token prediction's shift. Idempotent; may come before or
    after models are built, in any import order.

    Args:
        config: target weighting and loss of the superposed objective; None: uniform mce. The bag
            size is the batch's.

    Returns:
        the status after it.

    Raises:
        PatchError: a seam does not look as tested; then nothing is patched.
    """
    config = config or TSTConfig()
    _state.config = config
    fused = (
        {seams.GPT_FORWARD: _model_forward, seams.HYBRID_FORWARD: _model_forward}
        if config.fused_linear_loss
        else {}
    )
    mtp = {seams.MTP_ROLL: _roll_tensor}
    if seams.MTP_ACCEPTANCE.exists:
        mtp[seams.MTP_ACCEPTANCE] = _acceptance
    install({seams.EMBEDDING: _embedding, seams.LOSS: _loss} | mtp | fused)
    return status()


def remove() -> Status:
    """Put every Megatron function back.

    Raises:
        PatchError: somebody patched over one of ours; nothing is changed, since restoring would
            drop their patch.
    """
    for seam, (_, ours) in _state.installed.items():
        if vars(seam.owner())[seam.attribute] is not ours:
            raise PatchError(
                f"{seam} was patched again after megatron_tst.apply(). Remove that patch first."
            )
    for seam, (stock, _) in _state.installed.items():
        setattr(seam.owner(), seam.attribute, stock)
    _state.installed.clear()
    _state.config = None
    _state.embeddings = _state.losses = _state.recovery_losses = _state.fused_linear_losses = 0
    return status()


def status() -> Status:
    """What is patched in this process and how often it ran."""
    counts = _state.embeddings, _state.losses, _state.recovery_losses, _state.fused_linear_losses
    return Status(tuple(map(str, _state.installed)), _state.config, *counts)


def install(replacements: dict[seams.Seam, Callable]) -> None:
    """Replace functions of Megatron, all of them or none.

    Args:
        replacements: seam -> function that takes the stock function and returns ours. A seam that
            is ours already is left.

    Raises:
        PatchError: naming every seam that is missing or has changed, and the tested versions.
    """
    new = {seam: make for seam, make in replacements.items() if seam not in _state.installed}
    problems = [problem for seam in new if (problem := seam.problem())]
    if problems:
        raise PatchError(
            f"this Megatron ({compat.megatron_version()}) does not fit megatron_tst, nothing was "
            f"patched: {'; '.join(problems)}. "
            f"Use a tested version ({', '.join(compat.TESTED_MEGATRON)}) or report this."
        )
    for seam, make in new.items():
        stock = vars(seam.owner())[seam.attribute]
        ours = functools.wraps(stock)(make(stock))
        setattr(seam.owner(), seam.attribute, ours)
        _state.installed[seam] = (stock, ours)
    if new and os.environ.get("RANK", "0") == "0":
        logger.info(
            "megatron_tst patched %s (Megatron %s)",
            ", ".join(map(str, new)),
            compat.megatron_version(),
        )


def _embedding(stock):
    from megatron_tst.ops import main_grad
    from megatron_tst.ops.embedding import superposed_embedding

    def forward(self, input_):
        if input_.dim() != 3:
            main_grad.left_to_autograd(self.weight)
            return stock(self, input_)
        _state.embeddings += 1
        if (
            input_.shape[-1] == 1
        ):  # a bag of one is a token: Megatron's own code, so equal bit for bit in every layout
            return stock(self, input_.squeeze(-1))
        return superposed_embedding(self, input_)

    return forward


def _loss(stock):
    from megatron_tst.ops.linear_loss import DeferredLogits, loss_of_deferred
    from megatron_tst.ops.loss import multi_hot_cross_entropy
    from megatron_tst.ops.names import IGNORE

    def compute_language_model_loss(self, labels, logits):
        config, deferred = _state.config, isinstance(logits, DeferredLogits)
        if labels.dim() == 3:
            _state.losses += 1
            one_label = (
                labels.shape[-1] == 1 and config.loss not in ABLATIONS
            )  # of which the softmax losses make the same
            if one_label and config.kernel == "auto" and not deferred:  # as in the embedding
                label = labels.squeeze(-1)
                return stock(self, label.clamp_min(0), logits).masked_fill(label == IGNORE, 0.0)
            labels, loss, kernel = labels.transpose(0, 1), config.loss, config.kernel
        elif deferred or (config.kernel_in_recovery and torch.is_grad_enabled()):
            _state.recovery_losses += 1
            labels, loss, kernel = labels.t().unsqueeze(-1), "mce", config.kernel
        else:
            return stock(self, labels, logits)
        # labels [L, b, S], logits [L, b, V/tp]
        if deferred:
            _state.fused_linear_losses += 1
            loss = loss_of_deferred(logits, labels, _weights(labels), loss=loss, kernel=kernel)
        else:
            # nothing else reads the logits here, so their memory becomes the gradient's
            loss = multi_hot_cross_entropy(
                logits,
                labels,
                _weights(labels),
                tp_group=self.tp_group,
                loss=loss,
                inplace_backward=True,
                kernel=kernel,
            )
        return loss.transpose(0, 1).contiguous()

    return compute_language_model_loss


def _roll_tensor(stock):
    from megatron_tst.ops.multi_token import roll_bags

    def roll_tensor(tensor, shifts=-1, dims=-1, cp_group=None, packed_seq_params=None):
        if tensor is None or tensor.dim() != 3:
            return stock(tensor, shifts, dims, cp_group, packed_seq_params)
        return roll_bags(stock, tensor, shifts, cp_group, packed_seq_params)

    return roll_tensor


def _acceptance(stock):
    from megatron.core.transformer.multi_token_prediction import (
        _mtp_logits_are_vocab_sharded as sharded,
    )

    from megatron_tst.ops.multi_token import accepted_in_bags

    def _compute_mtp_acceptance_counts(
        mtp_logits, mtp_labels, loss_mask, output_layer, runtime_gather_output, tp_group=None
    ):
        if mtp_labels.dim() != 3:
            return stock(
                mtp_logits, mtp_labels, loss_mask, output_layer, runtime_gather_output, tp_group
            )
        return accepted_in_bags(
            mtp_logits,
            mtp_labels,
            loss_mask,
            not sharded(output_layer, runtime_gather_output),
            tp_group,
        )

    return _compute_mtp_acceptance_counts


def _weights(labels: torch.Tensor) -> torch.Tensor:
    """Of the places in a bag, fp32 [S] on the labels' device."""
    from megatron_tst.ops.loss import target_weights

    return target_weights(_state.config.target_weighting, labels.shape[-1], labels.device)


def _model_forward(stock):
    from megatron_tst.ops.linear_loss import deferred_logits

    signature = inspect.signature(stock)

    def forward(self, *positional, **named):
        labels = signature.bind(self, *positional, **named).arguments.get("labels")
        if (
            labels is None
            or not self.post_process
            or not torch.is_grad_enabled()
            or not _state.config.fused_linear_loss
        ):
            return stock(self, *positional, **named)
        with deferred_logits(self.output_layer):
            return stock(self, *positional, **named)

    return forward
