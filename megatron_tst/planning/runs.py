"""What is known of a run: its losses by iteration, and what they cost.

FLOPs are 6 N D (model_size.flops_6nd). What a log or TensorBoard does not say is None or empty,
never 0.
"""

from __future__ import annotations

import argparse
import bisect
import math
import re
from dataclasses import dataclass, field

from megatron_tst.model_size import flops_6nd, idle_parameters, padded_vocabulary

AXES = {
    "steps": "iteration",
    "FLOPs": "FLOPs (6 N D)",
    "raw tokens": "raw tokens read",
    "seconds": "seconds of training",
}


@dataclass
class Run:
    """What is known of a run. Losses in nats per position by iteration, finite ones alone;
    `excess` is the mce minus the bags' entropy.

    Args:
        validation: of the validation set; of the one that was chosen, where there are several.
        sets: of each of several validation sets (--multiple-validation-sets), by name or number;
            NaN and infinite ones too.
        test: of the test set, which Megatron evaluates after training.
        nan: iterations whose training loss is NaN or infinite.
        nan_validation: iterations after which the validation loss is.
        skipped: iterations that Megatron skipped (--loss-scale), by the iteration that says so.
        seconds: of training since the start, by iteration; evaluation and start-up left out where a
            log says so.
        arguments: Megatron's, as text.
        parameters: of the whole model; None where the source does not say (TensorBoard), or not of
            all model-parallel ranks.
        vocabulary: rows of the embedding; None where the arguments have to say it.
        varying_batch: whether the global batch size is another one at some iterations.
        experts: what the log says of expert load and router entropy after each boundary.
        notes: what was left out or not understood, as sentences.
    """

    train: dict[int, float] = field(default_factory=dict)
    excess: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    sets: dict[str, dict[int, float]] = field(default_factory=dict)
    test: dict[int, float] = field(default_factory=dict)
    nan: set[int] = field(default_factory=set)
    nan_validation: set[int] = field(default_factory=set)
    skipped: dict[int, int] = field(default_factory=dict)
    raw_tokens: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    parameters: int | None = None
    vocabulary: int | None = None
    varying_batch: bool = False
    experts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    boundary: int | None = None
    total: int | None = None

    @property
    def last(self) -> int:
        """The last iteration that says something of its loss, be it NaN; 0 where there is none."""
        return max({*self.train, *self.nan, *self.skipped}, default=0)

    @property
    def nan_from(self) -> int | None:
        """The iteration from which on training or validation losses are NaN or infinite; None where
        the last ones are numbers.
        """
        ends = (
            (self.train, self.nan),
            (self.validation, self.nan_validation),
        )
        found = [
            min(step for step in nan if step > max(finite, default=0))
            for finite, nan in ends
            if max(nan, default=0) > max(finite, default=0)
        ]
        return min(found, default=None)

    @property
    def final_validation(self) -> float | None:
        """The last validation loss, nats; None where there is none, or where it is NaN."""
        if not self.validation or self.nan_from is not None:
            return None
        return self.validation[max(self.validation)]

    @property
    def positions(self) -> int | None:
        """Of a step; None where that is not known, or not the same at all steps."""
        batch, length = self._number("global_batch_size"), self._number("seq_length")
        if self.varying_batch or self.arguments.get("rampup_batch_size", "None") != "None":
            return None
        return batch * length if batch and length else None

    @property
    def flops(self) -> float | None:
        """Of a step; None where parameters or arguments are not known."""
        model = self.model()
        if not (self.parameters and self.positions and model):
            return None
        return flops_6nd(self.parameters, model)

    def model(self) -> argparse.Namespace | None:
        """The arguments that the FLOPs follow from, as numbers; `moe_layer_freq` is a list. None
        where they are not known.
        """
        hidden, heads = self._number("hidden_size"), self._number("mtp_num_layers", 0)
        untied = self.arguments.get("untie_embeddings_and_output_weights") == "True"
        vocabulary = self._padded_vocabulary()
        if not hidden or heads is None or (vocabulary is None and (untied or heads)):
            return None
        experts, layers = self._number("num_experts", 0), []
        width = self._number("moe_ffn_hidden_size", self._number("ffn_hidden_size", 0))
        chosen = self._number("moe_router_topk", 2)
        if experts is None or width is None or chosen is None:
            return None
        if experts:
            layers = self._layers_with_experts()
            if layers is None or not width:
                return None
        return argparse.Namespace(
            hidden_size=hidden,
            num_layers=len(layers),
            moe_layer_freq=layers,
            num_experts=experts,
            moe_ffn_hidden_size=width,
            moe_router_topk=chosen,
            mtp_num_layers=heads,
            swiglu=self.arguments.get("swiglu") == "True",
            untie_embeddings_and_output_weights=untied,
            padded_vocab_size=vocabulary or 0,
            global_batch_size=self._number("global_batch_size"),
            seq_length=self._number("seq_length"),
        )

    def whole_model(self, ranks: dict[tuple[int, ...], int]) -> int | None:
        """Parameters of the model: each weight once, and all experts.

        Megatron counts what data-parallel rank 0 holds. That is a share of the experts under expert
        parallelism. With several pipeline stages the last one has a copy of the embedding, where
        the output layer shares it, and one for multi-token prediction.

        Args:
            ranks: (tensor, ..., pipeline) rank -> parameters.

        Returns:
            None where a rank is missing or the arguments do not say enough.
        """
        sizes = [len(set(axis)) for axis in zip(*ranks)]
        complete = [max(axis) + 1 for axis in zip(*ranks)] == sizes
        tp = self._number("tensor_model_parallel_size", sizes[0] if sizes else 1)
        pp = self._number("pipeline_model_parallel_size", sizes[-1] if sizes else 1)
        if not ranks or not complete or math.prod(sizes) != len(ranks):
            return None
        if (sizes[0], sizes[-1]) != (tp, pp):
            return None
        total, ep = sum(ranks.values()), self._number("expert_model_parallel_size", 1)
        heads = self._number("mtp_num_layers", 0)
        tied = self.arguments.get("untie_embeddings_and_output_weights") == "False"
        etp = self._number("expert_tensor_parallel_size", tp)
        has_experts = self._number("num_experts", 0) != 0
        copies = (pp > 1) * (tied + bool(heads))
        if not copies and not (has_experts and (ep, etp) != (1, tp)):
            return total
        if (model := self.model()) is None or (copies and not model.padded_vocab_size):
            return None
        total -= copies * model.padded_vocab_size * model.hidden_size
        if has_experts:
            model.moe_router_topk = 0
            experts = idle_parameters(model)  # of all, since a token is sent to none
            total += experts - experts * tp // (etp * ep)
        return total

    def _number(self, name: str, default: int | None = None) -> int | None:
        """An argument; `default` where it is absent or None, None where it is no whole number."""
        value = self.arguments.get(name, "None")
        if value == "None":
            return default
        return int(value) if re.fullmatch(r"\d{1,15}", value) else None

    def _padded_vocabulary(self) -> int | None:
        if self.vocabulary or (found := self._number("padded_vocab_size")):
            return self.vocabulary or found
        size = self._number("vocab_size")
        if self.arguments.get("pad_vocab_size") == "False":
            return size
        by = self._number("make_vocab_size_divisible_by", 1)
        tp = self._number("tensor_model_parallel_size", 1)
        return padded_vocabulary(size, by, tp) if size and by and tp else None

    def _layers_with_experts(self) -> list[int] | None:
        """1 for each layer of the decoder with experts, 0 for each without. --moe-layer-freq is
        every n-th layer, or a list such as "[0, 1, 1]".
        """
        for name in ("hybrid_layer_pattern", "hybrid_override_pattern", "moe_latent_size"):
            if self.arguments.get(name, "None") != "None":
                return None
        layers, every = self._number("num_layers"), self.arguments.get("moe_layer_freq", "1")
        if not layers:
            return None
        if re.fullmatch(r"\[[01](, *[01])*\]", every):
            pattern = [int(digit) for digit in re.findall(r"\d", every)]
        elif re.fullmatch(r"[1-9]\d{0,6}", every):
            pattern = [int(i % int(every) == 0) for i in range(layers)]
        else:
            return None
        if len(pattern) != layers:
            return None
        return pattern

    def fill_raw_tokens(self) -> None:
        """Stock Megatron does not say how many: a baseline, or what went on without TST, reads a
        token a position.
        """
        said = max(self.raw_tokens, default=0)
        if not said and self.arguments.get("tst_bag_size", "1") != "1":
            return  # superposed, and the lines that say it are not there
        if self.positions:
            for step in sorted({*self.train, *self.validation, *self.nan}):
                if step > said:
                    before = self.raw_tokens.get(said, 0)
                    self.raw_tokens[step] = before + (step - said) * self.positions

    def along(self, axis: str, steps: list[int]) -> list[float] | None:
        """Where on one of AXES iterations lie; None where the run does not say."""
        if axis == "steps":
            return list(steps)
        if axis == "FLOPs":
            return [self.flops * step for step in steps] if self.flops else None
        known = self.raw_tokens if axis == "raw tokens" else self.seconds
        return interpolated({0: 0, **known}, steps) if known else None

    def curve(self, axis: str) -> tuple[list[float], list[float]] | None:
        """(where on the axis, loss) of the validation losses; None where there are none, or the run
        does not say.
        """
        steps = sorted(self.validation)
        where = self.along(axis, steps)
        return (where, [self.validation[step] for step in steps]) if where else None


def interpolated(known: dict[int, float], steps: list[int]) -> list[float]:
    """On straight lines between what is known, and on the last line beyond."""
    at, found = sorted(known), []
    for step in steps:
        i = bisect.bisect_left(at, step)
        if step in known or len(at) == 1:
            found.append(known[at[min(i, len(at) - 1)]])
            continue
        i = min(max(i, 1), len(at) - 1)
        before, after = at[i - 1], at[i]
        rise = (known[after] - known[before]) / (after - before)
        found.append(known[before] + rise * (step - before))
    return found
