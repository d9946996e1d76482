"""apply, remove, status: the only file that assigns into megatron.* (cpu.py apart, which is for
machines without a GPU).

    2 functions in the model           VocabParallelEmbedding.forward     3-D ids: the bag's mean
                                       compute_language_model_loss        3-D labels: the bag loss
    2 for multi-token prediction       roll_tensor, acceptance counts     3-D: bag by bag
    2 for --tst-fused-linear-loss      GPTModel.forward, HybridModel.forward
    1 for graphs of whole steps        FullCudaGraphWrapper.__call__
    11 around megatron.training's loop run.py and entry.py make them

Two class methods carry TST. Which phase it is, only the shape of the batch says: with 2-D ids and
labels they call the stock method. So validation, inference, the recovery phase and other models in
the process run stock code. Two flags change that, in training alone: with --tst-kernel-in-recovery
the extension takes one label a position too, and with --tst-fused-linear-loss the output layer's
work is handed to the loss (ops/linear_loss.py). One fault of Megatron's is mended on the way, in
every phase: of logits that were gathered over the tensor-parallel ranks each rank takes its own
columns, which every loss here expects (_own_columns).
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections import Counter
from collections.abc import Callable, Collection
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
        superposed_embeddings: calls of the embedding with bags. These and the following are calls
            from Python: steps that a CUDA graph replays are not among them.
        multi_hot_losses: calls of the loss with bags.
        recovery_losses: calls of our loss with one label a position (kernel_in_recovery,
            fused_linear_loss).
        fused_linear_losses: calls of the loss without materialised logits (fused_linear_loss).
        in_scripts: the names in user's scripts that are replaced now.
    """

    seams: tuple[str, ...] = ()
    config: TSTConfig | None = None
    superposed_embeddings: int = 0
    multi_hot_losses: int = 0
    recovery_losses: int = 0
    fused_linear_losses: int = 0
    in_scripts: tuple[str, ...] = ()


@dataclass
class _State:
    installed: dict = field(default_factory=dict)  # seam -> (stock, ours)
    config: TSTConfig | None = None
    calls: Counter = field(default_factory=Counter)  # a counter of Status -> calls


_state = _State()


def apply(config: TSTConfig | None = None) -> Status:
    """Patch the two methods, and multi-token prediction's shift. Idempotent; may come before or
    after models are built, in any import order. Each process patches for itself.

    Args:
        config: target weighting and loss of the superposed objective; None: uniform mce. The bag
            size is the batch's.

    Returns:
        the status after it.

    Raises:
        PatchError: a seam does not look as tested; then nothing is patched.
    """
    _state.config = config = config or TSTConfig()
    replacements = {
        seams.EMBEDDING: _embedding,
        seams.LOSS: _loss,
        seams.MTP_ROLL: _roll_tensor,
    }
    if seams.MTP_ACCEPTANCE.exists:
        replacements[seams.MTP_ACCEPTANCE] = _acceptance
    if config.fused_linear_loss:
        replacements |= {seams.GPT_FORWARD: _model_forward, seams.HYBRID_FORWARD: _model_forward}
    install(replacements)
    return status()


def remove(keep: Collection[seams.Seam] = ()) -> Status:
    """Put every Megatron function back, and what was replaced in a user's script.

    Args:
        keep: seams that stay as they are, for the next run of this process.

    Returns:
        the status after it: nothing else is patched, and the counters are 0.

    Raises:
        PatchError: somebody patched over one of ours; nothing is changed, since restoring would
            drop their patch.
    """
    leaving = {seam: both for seam, both in _state.installed.items() if seam not in keep}
    for seam, (_, ours) in leaving.items():
        if seam.function() is not ours:
            raise PatchError(
                f"{seam} was patched again after megatron_tst.apply(). Remove that patch first."
            )
    for seam, (stock, _) in leaving.items():
        _put(seam, stock)
        del _state.installed[seam]
    _state.config = None
    _state.calls.clear()
    return status()


def status() -> Status:
    """What is patched in this process and how often it ran."""
    scripts = [seam for seam in _state.installed if isinstance(seam, seams.ScriptSeam)]
    megatron = [seam for seam in _state.installed if seam not in scripts]
    return Status(
        seams=tuple(map(str, megatron)),
        config=_state.config,
        in_scripts=tuple(map(str, scripts)),
        **_state.calls,
    )


def install(replacements: dict[seams.Seam | seams.ScriptSeam, Callable]) -> None:
    """Replace functions of Megatron, or in a user's script, all of them or none.

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
        stock = seam.function()
        ours = functools.wraps(stock)(make(stock))
        _put(seam, ours)
        _state.installed[seam] = (stock, ours)
    if new and os.environ.get("RANK", "0") == "0":
        logger.info(
            "megatron_tst patched %s (Megatron %s)",
            ", ".join(map(str, new)),
            compat.megatron_version(),
        )


def _put(seam: seams.Seam | seams.ScriptSeam, function: Callable) -> None:
    if isinstance(seam, seams.ScriptSeam):
        seam.namespace[seam.attribute] = function
    else:
        setattr(seam.owner(), seam.attribute, function)


def _embedding(stock):
    from megatron_tst.ops import main_grad
    from megatron_tst.ops.embedding import superposed_embedding

    def forward(self, input_, *rest, **named):
        if input_.dim() != 3:
            main_grad.left_to_autograd(self.weight)
            return stock(self, input_, *rest, **named)
        _no_further(seams.EMBEDDING, *rest, *named)
        _state.calls["superposed_embeddings"] += 1
        if input_.shape[-1] == 1:
            # a bag of one is a token: Megatron's own code, so equal bit for bit in every layout
            return stock(self, input_.squeeze(-1))
        return superposed_embedding(self, input_, _state.config.kernel)

    return forward


def _loss(stock):
    from megatron_tst.ops.linear_loss import DeferredLogits, loss_of_deferred
    from megatron_tst.ops.loss import multi_hot_cross_entropy
    from megatron_tst.ops.names import IGNORE

    def compute_language_model_loss(self, labels, logits, *rest, **named):
        config, deferred = _state.config, isinstance(logits, DeferredLogits)
        bags = labels.dim() == 3
        if not deferred:
            logits = _own_columns(self, logits)
        if not (bags or deferred or (config.kernel_in_recovery and torch.is_grad_enabled())):
            return stock(self, labels, logits, *rest, **named)
        _no_further(seams.LOSS, *rest, *named)
        if bags:
            _state.calls["multi_hot_losses"] += 1
            # the softmax losses of one label are the ordinary loss (the ablations' are not)
            ordinary = labels.shape[-1] == 1 and config.loss not in ABLATIONS
            if ordinary and config.kernel == "auto" and not deferred:
                # as in the embedding: Megatron's own code, equal bit for bit
                label = labels.squeeze(-1)
                return stock(self, label.clamp_min(0), logits).masked_fill(label == IGNORE, 0.0)
            labels, loss, kernel = labels.transpose(0, 1), config.loss, config.kernel
        else:
            _state.calls["recovery_losses"] += 1
            labels, loss, kernel = labels.t().unsqueeze(-1), "mce", config.kernel
        # labels [L, b, S], logits [L, b, V/tp]
        if deferred:
            _state.calls["fused_linear_losses"] += 1
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


def _own_columns(model, logits):
    """This rank's columns of the logits.

    A model with parallel_output=False, or called with runtime_gather_output=True, hands [L, b, V]
    of all ranks to a loss that takes them for [L, b, V/tp]: Megatron's own then adds log(tp) and
    loses the labels' part of the gradient. The backward of the gathering takes each rank's own
    columns of the gradient, so the cut is exact.
    """
    ranks = 1 if model.tp_group is None else model.tp_group.size()
    if ranks == 1 or logits.shape[-1] != getattr(model, "vocab_size", None):
        return logits
    columns = logits.shape[-1] // ranks
    return logits.narrow(-1, model.tp_group.rank() * columns, columns).contiguous()


def _roll_tensor(stock):
    from megatron_tst.ops.multi_token import SEQUENCE, rolls_bags

    signature = inspect.signature(stock)

    def roll_tensor(*positional, **named):
        call = signature.bind(*positional, **named)
        call.apply_defaults()
        if rolls_bags(call.arguments["tensor"], call.arguments["dims"]):
            call.arguments["dims"] = SEQUENCE
        return stock(*call.args, **call.kwargs)

    return roll_tensor


def _acceptance(stock):
    from megatron.core.transformer.multi_token_prediction import (
        _mtp_logits_are_vocab_sharded as sharded,
    )

    from megatron_tst.ops.multi_token import accepted_in_bags

    signature, taken = inspect.signature(stock), seams.MTP_ACCEPTANCE.named

    def _compute_mtp_acceptance_counts(*positional, **named):
        call = signature.bind(*positional, **named)
        if call.arguments["mtp_labels"].dim() != 3:
            return stock(*positional, **named)
        _no_further(seams.MTP_ACCEPTANCE, *(name for name in call.arguments if name not in taken))
        call.apply_defaults()
        logits, labels, mask, layer, gathered, group = (call.arguments[name] for name in taken)
        return accepted_in_bags(logits, labels, mask, not sharded(layer, gathered), group)

    return _compute_mtp_acceptance_counts


def _no_further(seam: seams.Seam, *given: object) -> None:
    """Refuse arguments that this Megatron gives with bags and that nobody has given a meaning."""
    if given:
        raise PatchError(
            f"{seam} with bags: expected no further arguments, got {', '.join(map(str, given))} "
            f"(Megatron {compat.megatron_version()}). "
            f"Use a tested version ({', '.join(compat.TESTED_MEGATRON)}) or report this."
        )


def _weights(labels: torch.Tensor) -> torch.Tensor:
    """Of the places in a bag, fp32 [S] on the labels' device."""
    from megatron_tst.ops.loss import target_weights

    return target_weights(_state.config.target_weighting, labels.shape[-1], labels.device)


def _model_forward(stock):
    from megatron_tst.ops.linear_loss import deferred_logits

    signature = inspect.signature(stock)

    def forward(self, *positional, **named):
        labels = signature.bind(self, *positional, **named).arguments.get("labels")
        trains = labels is not None and self.post_process and torch.is_grad_enabled()
        if not (trains and _state.config.fused_linear_loss):
            return stock(self, *positional, **named)
        with deferred_logits(self.output_layer):
            return stock(self, *positional, **named)

    return forward
