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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

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
        """The sample of the run that comes after its last one."""
        return self.first_sample + self.samples

    @property
    def block(self) -> int:
        """Samples after which the long samples begun are read to their ends: where a phase may be
        ended without leaving text out.
        """
        return self.stride * self.pieces

    @property
    def long_samples(self) -> int:
        """How many long samples it reads; the last ones perhaps in part."""
        blocks, rest = divmod(self.samples, self.block)
        return blocks * self.stride + -(-rest // self.pieces)

    def place(self, j: int | np.ndarray) -> tuple[int, int] | tuple[np.ndarray, np.ndarray]:
        """Where the phase's j-th sample lies.

        The first pieces of `stride` long samples come first, then their second pieces, and so on:
        a block. An incomplete last block is cut from as few long samples as hold it.

        Example: after 4 samples of bags of 8, a phase of 12 samples of bags of 4, in batches of 4.
        A long sample holds 8 * L tokens, so 2 pieces, and a block is 4 long samples, 8 samples.
        The 4 samples that are left are the pieces of 2 long samples.

        >>> phase = Schedule((8, 4, 1), (4, 12, 16), seq_length=2, global_batch_size=4).phases[1]
        >>> phase.first_long, phase.pieces, phase.stride, phase.long_samples
        (4, 2, 4, 6)
        >>> [phase.place(j) for j in range(8)]
        [(4, 0), (5, 0), (6, 0), (7, 0), (4, 1), (5, 1), (6, 1), (7, 1)]
        >>> [phase.place(j) for j in range(8, 12)]
        [(8, 0), (9, 0), (8, 1), (9, 1)]

        Args:
            j: an int, or an integer array of any shape; 0 <= j < samples.

        Returns:
            (long sample of the run, piece of it), each as `j` is.
        """
        block, i = divmod(j, self.block)
        whole_blocks, rest = divmod(self.samples, self.block)
        stride_of_rest = -(-rest // self.pieces)
        in_rest = block == whole_blocks
        stride = self.stride + in_rest * (stride_of_rest - self.stride)
        return self.first_long + block * self.stride + i % stride, i // stride

    def begins_as(self, other: Phase) -> bool:
        """Whether their first samples are the same ones of the run, read in the same form."""
        names = "name", "bag_size", "first_sample", "first_long"
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def samples_as_in(self, other: Phase) -> int:
        """How many samples are read alike in a phase that begins alike and has another length.

        A sample that is a long sample by itself lies where it lies. Pieces move where the last
        block is incomplete, so whole blocks are alike. Recovery's stride depends on its length, so
        that its pieces move from the second sample on, and none are said to be alike.

        Example: batches of 2, and 6 samples here against 10 there. Bags of 4 in long samples of 4
        (1 piece): 6 are alike. Bags of 2 in them (2 pieces, blocks of 4): 4 are alike; samples 4
        and 5 are pieces of one long sample here, and of two there. Recovery: 0.
        """
        shorter = min(self.samples, other.samples)
        if self.pieces == 1:
            return shorter
        if self.stride == other.stride:
            return shorter // self.block * self.block
        return 0


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
        assert len(self.bag_sizes) == len(self.samples), self
        assert not any(self.width % w for w in widths), self

    @classmethod
    def of(
        cls,
        bag_size: int,
        iters: int,
        train_samples: int,
        seq_length: int,
        global_batch_size: int,
        **more: int,
    ) -> Schedule:
        """`iters` iterations with one bag size, and recovery to sample `train_samples`.

        >>> plan = Schedule.of(6, 6000, 20000 * 512, seq_length=4096, global_batch_size=512)
        >>> plan.described
        'bag size 6 for 6000 iterations, recovery for 14000'
        >>> plan.raw_tokens(plan.train_samples)  # the paper's 3B run, table 1
        104857600000

        Args:
            bag_size: s.
            iters: T1, superposed iterations.
            train_samples: of the whole run.
            more: Schedule's other fields.
        """
        first = iters * global_batch_size
        samples = first, train_samples - first
        return cls((bag_size, 1), samples, seq_length, global_batch_size, **more)

    @functools.cached_property
    def phases(self) -> tuple[Phase, ...]:
        """Of the run, in order: the superposed ones, then recovery."""
        phases, sample, long = [], 0, 0
        for i, (s, samples) in enumerate(zip(self.bag_sizes, self.samples)):
            recovery = i >= len(self.samples) - self.recovery_phases
            width = 1 if self.single_tokens_in else s
            pieces = self.width // width
            # Recovery's batches spread over all of its long samples. An earlier phase may be ended
            # early, so it finishes what it begins.
            stride = max(1, -(-samples // pieces)) if recovery else self.global_batch_size
            phase = Phase(
                name=RECOVERY if recovery else SUPERPOSITION,
                bag_size=s,
                width=width,
                first_sample=sample,
                samples=samples,
                first_long=long,
                pieces=pieces,
                stride=stride,
            )
            phases.append(phase)
            sample, long = phase.end, long + phase.long_samples
        return tuple(phases)

    @property
    def superposed_phases(self) -> tuple[Phase, ...]:
        """All but recovery."""
        return self.phases[: -self.recovery_phases]

    @property
    def train_samples(self) -> int:
        """Of the whole run, as Megatron's --train-samples."""
        return sum(self.samples)

    @property
    def superposition_samples(self) -> int:
        """N1: the samples with index < N1 are superposed."""
        return sum(self.samples[: -self.recovery_phases])

    @property
    def recovery_samples(self) -> int:
        """N2: the samples that come after them."""
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
        words = [
            f"bag size {phase.bag_size} for {phase.samples // batch} iterations"
            for phase in self.superposed_phases
        ]
        return ", ".join([*words, f"recovery for {self.recovery_samples // batch}"])

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
        """The same run with one superposed phase ended after `samples` of its samples.

        Recovery takes what that leaves: as many samples more as the phase has fewer.
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

        Example: bags of 4, then of 2, in batches of 2, and the phase of bags of 2 made 2
        iterations longer. Its first block, samples 4 to 7, is read alike, its second is not
        (Phase.samples_as_in).

        >>> plan = Schedule((4, 2, 1), (4, 6, 10), seq_length=2, global_batch_size=2)
        >>> longer = Schedule((4, 2, 1), (4, 10, 6), seq_length=2, global_batch_size=2)
        >>> [plan.reads_as(longer, consumed) for consumed in (4, 8, 9)]
        [True, True, False]
        """
        if (self.width, self.seq_length) != (other.width, other.seq_length):
            return False
        for ours, theirs in zip(self.phases, other.phases):
            done = consumed_samples - ours.first_sample
            if done <= 0:
                return True
            if not ours.begins_as(theirs):
                return False
            if ours.samples != theirs.samples and done > ours.samples_as_in(theirs):
                return False
        return True
