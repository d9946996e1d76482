"""How often a run reads each corpus of its training data, and whether its bags fit into the text.

Megatron repeats a corpus without a word (megatron/core/datasets/gpt_dataset.py, _get_num_epochs),
and superposition reads s times the text of a plain step: too little text is its likeliest mistake.
What is counted here is what Megatron's dataset of long samples will give out
(blended_megatron_dataset_builder.py):

    one corpus                  repeated as often as needed
    several with weights        each repeated as often as its weight needs
    several without weights     each read once at most, in proportion to its long samples

A long sample is `schedule.long_sample_length` tokens; the text at a corpus's end that fills none is
left out.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tst.config import TSTConfig
from megatron_tst.errors import refuse, warn
from megatron_tst.schedule import RECOVERY, Schedule


@dataclass(frozen=True)
class Corpus:
    """One corpus of the training blend.

    Args:
        prefix: its path, without .bin and .idx.
        tokens: of its training share.
        weight: in the blend, any scale above 0; None in a blend without weights.
    """

    prefix: str
    tokens: int
    weight: float | None = None


@dataclass(frozen=True)
class Reading:
    """How much of a corpus a run reads.

    Args:
        corpus: which.
        by_phase: tokens read in each phase of the schedule, in order; whole up to rounding.
    """

    corpus: Corpus
    by_phase: tuple[float, ...]

    @property
    def tokens(self) -> float:
        """Read in the whole run."""
        return sum(self.by_phase)

    @property
    def times(self) -> float:
        """How often each token is read, on average."""
        return self.tokens / self.corpus.tokens

    @property
    def said(self) -> str:
        """ "text is read 1.50 times (6,000 tokens of 4,000)" """
        return self.told(_times(self.times))

    def told(self, times: str) -> str:
        """`said`, with `times` written as it is given."""
        return (
            f"{self.corpus.prefix} is read {times} times "
            f"({round(self.tokens):,} tokens of {self.corpus.tokens:,})"
        )


def count(
    blend: tuple[Sequence[str], Sequence[float] | None], share: tuple[float, float]
) -> list[Corpus] | None:
    """Count the tokens of a training blend, as its index files say.

    Args:
        blend: prefixes, and their weights or None (Megatron's get_blend_from_list).
        share: where the training split begins and ends, in [0, 1]; it is cut between sequences.

    Returns:
        the corpora in order; None where one lies in object storage and is not counted.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefixes, weights = blend
    if any("://" in prefix for prefix in prefixes):
        return None
    corpora = []
    for prefix, weight in zip(prefixes, weights or [None] * len(prefixes)):
        dataset = IndexedDataset(prefix)  # kept: its lengths lie in its mapped file
        lengths = dataset.sequence_lengths
        begin, end = (round(place * float(len(lengths))) for place in share)
        corpora.append(Corpus(prefix, int(lengths[begin:end].sum()), weight))
    return corpora


def readings(corpora: Sequence[Corpus], schedule: Schedule) -> list[Reading]:
    """How much a run reads of each corpus; of one that a blend has twice, in all.

    Example: bags of 4 for 2 of 4 iterations of 1 sample of 8 positions: 64 tokens in bags, 16 in
    recovery, a quarter of them from the second corpus.

    >>> plan = Schedule.of(4, 2, train_samples=4, seq_length=8, global_batch_size=1)
    >>> a, b = readings([Corpus("a", 40, 3.0), Corpus("b", 40, 1.0)], plan)
    >>> a.by_phase, a.times, b.times
    ((48.0, 12.0), 1.5, 0.5)

    Args:
        corpora: count's, with text for at least one long sample each.
        schedule: the run's phases.
    """
    alone = len(corpora) == 1
    parts = [1 if alone else c.weight or long_samples(c, schedule) for c in corpora]
    phases = [phase.samples * phase.width * schedule.seq_length for phase in schedule.phases]
    found: dict[str, Reading] = {}
    for corpus, part in zip(corpora, parts):
        tokens = [tokens * part / sum(parts) for tokens in phases]
        place = os.path.realpath(corpus.prefix)  # named twice, it is still one text
        if place in found:
            tokens = map(sum, zip(tokens, found[place].by_phase))
            corpus = found[place].corpus
        found[place] = Reading(corpus, tuple(tokens))
    return list(found.values())


def long_samples(corpus: Corpus, schedule: Schedule) -> int:
    """How many long samples one reading of a corpus gives. Each needs one token more, its last
    label, which the next one shares.
    """
    return max(0, corpus.tokens - 1) // schedule.long_sample_length


def check_text(config: TSTConfig, corpora: Sequence[Corpus], schedule: Schedule) -> list[Reading]:
    """Refuse text that the bags do not fit into, or that would be read too often; warn of text that
    is read more than once.

    Args:
        config: the TST settings.
        corpora: count's.
        schedule: the run's phases.

    Returns:
        what is read of each corpus.

    Raises:
        TSTError: naming the corpus, its tokens, and what to do.
    """
    check_fit(corpora, schedule)
    found = readings(corpora, schedule)
    worst = max(found, key=lambda reading: reading.times)
    if worst.times > config.max_epochs:
        refuse(
            "--tst-max-epochs",
            f"no corpus to be read more than {config.max_epochs:g} times",
            f"what {_exactly(worst, config.max_epochs)}",
            "Give more text, lower --tst-bag-size or the iterations, or allow it with "
            f"--tst-max-epochs {math.ceil(worst.times)}.",
        )
    if worst.times > 1:
        warn(
            f"{worst.said}: Megatron repeats it. More text, smaller bags or fewer iterations "
            "change that"
        )
    return found


def check_fit(corpora: Sequence[Corpus], schedule: Schedule) -> None:
    """Refuse a corpus too small for a long sample, and a blend too small for the run.

    Raises:
        TSTError: naming the corpus, or the tokens that are there.
    """
    length = schedule.long_sample_length
    whole = f"{length:,} tokens ({schedule.width} x --seq-length {schedule.seq_length}) and a label"
    for corpus in corpora:
        if corpus.tokens < 1:
            refuse(
                corpus.prefix,
                "text in its training share",
                "none",
                "Give it more text or a larger share in --split, or leave it out.",
            )
    repeated = len(corpora) == 1 or corpora[0].weight is not None
    largest = max(corpora, key=lambda corpus: corpus.tokens)
    if repeated and largest.tokens <= length:
        limit = (largest.tokens - 1) // schedule.seq_length
        sizes = ",".join(str(s) for s in schedule.bag_sizes[: -schedule.recovery_phases])
        what = "bags whose least common multiple is " if "," in sizes else ""
        refuse(
            "--tst-bag-size",
            f"{what}at most {limit:,}, with --seq-length {schedule.seq_length} and the "
            f"{largest.tokens:,} training tokens of {largest.prefix}",
            sizes,
            f"A sample of the run's data is {whole}. Lower one of the two, or give more text.",
        )
    if repeated:
        return
    for corpus in corpora:
        if not long_samples(corpus, schedule):
            refuse(
                corpus.prefix,
                f"training text for one sample of {whole}",
                f"{corpus.tokens:,}",
                "Lower --tst-bag-size, leave the corpus out or join it to another, or give all "
                "data paths weights (so that Megatron repeats it).",
            )
    there = sum(long_samples(corpus, schedule) for corpus in corpora)
    if there < schedule.long_samples:
        refuse(
            "training data",
            f"{schedule.long_samples} samples of {length} tokens",
            f"{there} in {', '.join(f'{c.tokens:,} tokens of {c.prefix}' for c in corpora)}",
            "Add data, give the data paths weights (so that Megatron repeats them), train for "
            "fewer iterations, or lower --tst-bag-size.",
        )


def said(found: Sequence[Reading], schedule: Schedule) -> str:
    """How often each corpus is read, in a line."""
    parts = []
    for reading in found:
        shares = [
            f"{_times(tokens / reading.corpus.tokens)} in "
            + ("recovery" if phase.name == RECOVERY else f"bag size {phase.bag_size}")
            for phase, tokens in zip(schedule.phases, reading.by_phase)
        ]
        parts.append(f"{reading.said}: {', '.join(shares)}")
    return " | ".join(parts)


def _times(times) -> str:
    return f"{times:.2f}" if times >= 0.1 else f"{times:.2g}"


def _exactly(reading, limit) -> str:
    """With as many digits as show that it is above the limit."""
    digits = next(n for n in itertools.count(2) if float(f"{reading.times:.{n}f}") > limit)
    return reading.told(f"{reading.times:.{digits}f}")
