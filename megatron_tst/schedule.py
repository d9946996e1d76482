"""Iterations, samples and raw tokens of the two phases: integers only, no torch.

A *sample* is what Megatron counts (`consumed_train_samples`): one row of a batch, `seq_length` positions wide in both phases.
A *raw token* is one token of the corpus. In the superposition phase one sample spans `raw_per_position * seq_length` of them.
"""

from __future__ import annotations

from dataclasses import dataclass

SUPERPOSITION = "superposition"
RECOVERY = "recovery"


@dataclass(frozen=True)
class Schedule:
    """Where the two phases lie in a run.

    Args:
        bag_size: s, raw tokens a bag.
        seq_length: L, positions of a sample in either phase (Megatron's --seq-length).
        global_batch_size: samples an iteration; constant over the run.
        superposition_iters: T1, iterations of the superposition phase.
        train_samples: samples of both phases together, as Megatron counts them.
        raw_per_position: raw tokens that one superposed position reads: s, or 1 when only the output is superposed.
    """

    bag_size: int
    seq_length: int
    global_batch_size: int
    superposition_iters: int
    train_samples: int
    raw_per_position: int

    @property
    def superposition_samples(self) -> int:
        """N1: the samples with index < N1 are superposed."""
        return self.superposition_iters * self.global_batch_size

    @property
    def recovery_samples(self) -> int:
        """N2."""
        return self.train_samples - self.superposition_samples

    @property
    def reserved_samples(self) -> int:
        """M: long samples set aside for the recovery phase, each cut into `raw_per_position` ordinary ones."""
        return -(-self.recovery_samples // self.raw_per_position)

    @property
    def long_samples(self) -> int:
        """N1 + M: samples of `long_sample_length` raw tokens that Megatron builds."""
        return self.superposition_samples + self.reserved_samples

    @property
    def long_sample_length(self) -> int:
        """Raw tokens of one sample that Megatron builds (without its extra token)."""
        return self.raw_per_position * self.seq_length

    def locate(self, index: int) -> tuple[int, int | None]:
        """Return (long sample, slice) for a sample index of the run; slice None means 'the whole of it, as bags'.

        Recovery sample j is slice j // M of long sample N1 + j % M, so each raw token is used once and the samples
        of one batch come from different documents.
        """
        if not 0 <= index < self.train_samples:
            raise IndexError(f"sample index: expected 0 <= index < {self.train_samples}, got {index}")
        if index < self.superposition_samples:
            return index, None
        j = index - self.superposition_samples
        return self.superposition_samples + j % self.reserved_samples, j // self.reserved_samples

    def phase(self, consumed_samples: int) -> str:
        """The phase of the sample that comes after `consumed_samples` samples."""
        return SUPERPOSITION if consumed_samples < self.superposition_samples else RECOVERY

    def raw_tokens(self, consumed_samples: int) -> int:
        """Raw tokens read by the first `consumed_samples` samples."""
        bags = min(consumed_samples, self.superposition_samples)
        return self.seq_length * (self.raw_per_position * bags + consumed_samples - bags)
