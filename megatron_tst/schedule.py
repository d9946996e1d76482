"""Iterations, samples and raw tokens of a run's phases: integers only, no torch.

A *sample* is what Megatron counts (`consumed_train_samples`): one row of a batch, `seq_length` (L)
positions wide in every phase. A *raw token* is one token of the corpus. A sample of bags of s spans
s*L of them. A *long sample* is what Megatron's dataset is built of: `width` * L raw tokens, so that
a whole number of samples of every phase fits in.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

SUPERPOSITION = "superposition"
RECOVERY = "recovery"


@dataclass(frozen=True)
class Phase:
    """A stretch of a run with one bag size.

    Args:
        name: SUPERPOSITION or RECOVERY.
        bag_size: s.
        width: raw tokens that one position reads: s, or 1 where only the output is superposed.
        first_sample, samples: its samples of the run.
        first_long: the long sample that it begins with; none is shared with another phase.
        pieces: samples that one long sample is cut into.
        stride: long samples that are cut together; neighbouring samples come from different ones.
    """

    name: str
    bag_size: int
    width: int
    first_sample: int
    samples: int
    first_long: int
    pieces: int
    stride: int

    @property
    def end(self) -> int:
        return self.first_sample + self.samples

    @property
    def block(self) -> int:
        """Samples after which the long samples begun are read to their ends: where a phase may be
        ended without leaving text out.
        """
        return self.stride * self.pieces

    @property
    def long_samples(self) -> int:
        blocks, rest = divmod(self.samples, self.block)
        return blocks * self.stride + -(-rest // self.pieces)

    def place(self, j):
        """Where the phase's j-th sample lies (int, or an integer array of any shape).

        Returns:
            (long sample, piece of it). The first pieces of `stride` long samples come first, then
            their second pieces, and so on; an incomplete last block is cut from as few long samples
            as hold it.
        """
        block, i = divmod(j, self.block)
        whole = self.samples // self.block
        stride = self.stride + (block == whole) * (
            self.long_samples - whole * self.stride - self.stride
        )
        return self.first_long + block * self.stride + i % stride, i // stride


@dataclass(frozen=True)
class Schedule:
    """Where the phases lie in a run.

    Args:
        bag_sizes: s of each phase in order; the recovery's is 1.
        samples: how many samples each phase has, as Megatron counts them.
        seq_length: L, positions of a sample in every phase (Megatron's --seq-length).
        global_batch_size: samples an iteration; constant over the run.
        single_tokens_in: only the output is superposed, so that every sample reads L raw tokens.
        width: raw tokens of a long sample for each of its L positions; 0: the least common multiple
            of the phases' own.
        recovery_phases: how many phases at the end are recovery: one, and one more each time a run
            in recovery was made longer.
    """

    bag_sizes: tuple[int, ...]
    samples: tuple[int, ...]
    seq_length: int
    global_batch_size: int
    single_tokens_in: bool = False
    width: int = 0
    recovery_phases: int = 1

    def __post_init__(self):
        widths = [1 if self.single_tokens_in else s for s in self.bag_sizes]
        if not self.width:
            object.__setattr__(self, "width", math.lcm(*widths))
        assert len(self.bag_sizes) == len(self.samples) and not any(
            self.width % w for w in widths
        ), self

    @classmethod
    def of(
        cls,
        bag_size,
        iters: int,
        train_samples: int,
        seq_length: int,
        global_batch_size: int,
        **more,
    ) -> Schedule:
        """`iters` iterations with one bag size, and recovery to sample `train_samples`."""
        first = iters * global_batch_size
        return cls(
            (bag_size, 1), (first, train_samples - first), seq_length, global_batch_size, **more
        )

    @functools.cached_property
    def phases(self) -> tuple[Phase, ...]:
        phases, sample, long = [], 0, 0
        for i, (s, samples) in enumerate(zip(self.bag_sizes, self.samples)):
            recovery = i >= len(self.samples) - self.recovery_phases
            width = 1 if self.single_tokens_in else s
            pieces = self.width // width
            # Recovery's batches spread over all of its long samples. An earlier phase may be ended
            # early, so it finishes what it begins.
            stride = max(1, -(-samples // pieces)) if recovery else self.global_batch_size
            phases.append(
                Phase(
                    RECOVERY if recovery else SUPERPOSITION,
                    s,
                    width,
                    sample,
                    samples,
                    long,
                    pieces,
                    stride,
                )
            )
            sample, long = phases[-1].end, long + phases[-1].long_samples
        return tuple(phases)

    @property
    def superposed_phases(self) -> tuple[Phase, ...]:
        return self.phases[: -self.recovery_phases]

    @property
    def train_samples(self) -> int:
        return sum(self.samples)

    @property
    def superposition_samples(self) -> int:
        """N1: the samples with index < N1 are superposed."""
        return sum(self.samples[: -self.recovery_phases])

    @property
    def recovery_samples(self) -> int:
        """N2."""
        return self.train_samples - self.superposition_samples

    @property
    def long_samples(self) -> int:
        """How many long samples Megatron is to build. The last one of each phase may be read in
        part.
        """
        return sum(phase.long_samples for phase in self.phases)

    @property
    def long_sample_length(self) -> int:
        """Raw tokens of a long sample (without Megatron's extra token)."""
        return self.width * self.seq_length

    @property
    def described(self) -> str:
        """The phases in words: "bag size 16 for 100 iterations, ..., recovery for 800"."""
        batch = self.global_batch_size
        lengths = [
            f"bag size {p.bag_size} for {p.samples // batch} iterations"
            for p in self.superposed_phases
        ]
        return ", ".join([*lengths, f"recovery for {self.recovery_samples // batch}"])

    def locate(self, index: int) -> tuple[Phase, int, int]:
        """(phase, long sample, piece of it) of a sample of the run.

        Raises:
            IndexError: outside the run.
        """
        if not 0 <= index < self.train_samples:
            raise IndexError(
                f"sample index: expected 0 <= index < {self.train_samples}, got {index}"
            )
        phase = self.phase_at(index)
        return phase, *phase.place(index - phase.first_sample)

    def phase_at(self, consumed_samples: int) -> Phase:
        """The phase of the sample that comes after `consumed_samples` samples; at the end of the
        run the last one.
        """
        return next(
            (phase for phase in self.phases if consumed_samples < phase.end), self.phases[-1]
        )

    def raw_tokens(self, consumed_samples: int) -> int:
        """Raw tokens read by the first `consumed_samples` samples."""
        read = [
            min(max(consumed_samples - phase.first_sample, 0), phase.samples) * phase.width
            for phase in self.phases
        ]
        return self.seq_length * sum(read)

    def ending(self, phase: Phase, samples: int) -> Schedule:
        """The same run with one superposed phase ended after `samples` of its samples; recovery
        takes what that leaves.
        """
        i, changed = self.phases.index(phase), list(self.samples)
        changed[-1] += changed[i] - samples
        changed[i] = samples
        return dataclasses.replace(self, samples=tuple(changed))

    def lengthened(self, samples: int) -> Schedule:
        """The same run with `samples` more samples of recovery, read from long samples of their
        own.
        """
        return dataclasses.replace(
            self,
            bag_sizes=(*self.bag_sizes, 1),
            samples=(*self.samples, samples),
            recovery_phases=self.recovery_phases + 1,
        )

    def reads_as(self, other: Schedule, consumed_samples: int) -> bool:
        """Whether the first `consumed_samples` samples are the same raw tokens, in the same form,
        in both.
        """
        if (self.width, self.seq_length) != (other.width, other.seq_length):
            return False
        for ours, theirs in zip(self.phases, other.phases):
            done = consumed_samples - ours.first_sample
            if done <= 0:
                return True
            if (ours.name, ours.bag_size, ours.first_sample, ours.first_long) != (
                theirs.name,
                theirs.bag_size,
                theirs.first_sample,
                theirs.first_long,
            ):
                return False
            if ours.samples == theirs.samples:
                continue
            shorter = min(ours.samples, theirs.samples)
            unchanged = (
                shorter
                if ours.pieces == 1
                else shorter // ours.block * ours.block
                if ours.stride == theirs.stride
                else 0
            )
            if done > unchanged:
                return False
        return True
