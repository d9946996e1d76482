"""Who gets what: every rank's micro-batches, in both phases, are its part of the batches that one
process gets.
"""

import pytest
import torch
from support.harness import ALONE
from support.layouts import ITERATIONS, SEQ_LENGTH, SUPERPOSED, Case, Layout
from support.tiers import tiers

TOKENS, LABELS = {"tokens", "position_ids"}, {"labels", "loss_mask"}


def coordinates(rank, layout):
    """Megatron's order of ranks: tensor, context, data, pipeline."""
    place = {}
    for what in ("tp", "cp", "dp", "pp"):
        place[what] = rank % layout.size(what)
        rank //= layout.size(what)
    return place


def own_positions(rank, ranks):
    """Context parallelism: chunks r and 2n-1-r of the sequence's 2n."""
    chunks = torch.arange(SEQ_LENGTH).view(2 * ranks, -1)
    return chunks[[rank, 2 * ranks - 1 - rank]].flatten()


CASES = [
    Case("tp2"),
    Case("tp2 sp cp2"),
    Case("cp4", s=4),
    Case("tp2 pp2"),
    Case("pp4", "deep"),
    Case("cp2 dp2"),
    Case("tp2 pp2", "mtp"),
    Case("tp2", options="--tst-superpose input"),
    Case("cp2", options="--tst-superpose output"),
    Case("tp2 cp2", options="--eod-mask-loss"),
]
FAST = {"cp2 dp2, dense, s3, fp32", "tp2 pp2, mtp, s3, fp32"}


@pytest.mark.parametrize("case", tiers(CASES, FAST, lambda case: case.id))
def test_every_rank_gets_its_part(trainer, case):
    layout = Layout(case.layout)
    whole = trainer.train(case, ALONE, KEEP_BATCHES="1").batches[0]
    found = trainer.train(case, layout, KEEP_BATCHES="1").batches
    micro_batches = len(whole) // ITERATIONS
    superposed = case.options.removeprefix("--tst-superpose ")
    for rank, batches in enumerate(found):
        place = coordinates(rank, layout)
        first, last = place["pp"] == 0, place["pp"] == layout.size("pp") - 1
        needed = (TOKENS if first else set()) | (LABELS if last else set())
        if last and "mtp" in case.model:
            needed = TOKENS | LABELS
        positions = (
            own_positions(place["cp"], layout.size("cp"))
            if layout.size("cp") > 1
            else torch.arange(SEQ_LENGTH)
        )
        assert len(batches) == len(whole) // layout.size("dp")
        for i, batch in enumerate(batches):
            expected = whole[i * layout.size("dp") + place["dp"]]
            assert set(batch) == needed, (rank, place)
            for name, tensor in batch.items():
                assert torch.equal(tensor, expected[name][:, positions]), (rank, i, name)
            bags = i * layout.size("dp") // micro_batches < SUPERPOSED
            if "tokens" in batch:
                assert batch["tokens"].dim() == (3 if bags and superposed != "output" else 2)
            if "labels" in batch:
                assert batch["labels"].dim() == (3 if bags and superposed != "input" else 2)


def test_labels_of_a_chunk_are_the_bags_after_it(trainer):
    """Across the border of two context-parallel ranks too: the target of a chunk's last bag is the
    first bag of the next chunk.
    """
    case = Case("cp2", s=4)
    ranks = trainer.train(case, Layout("cp2"), KEEP_BATCHES="1").batches
    half = SEQ_LENGTH // 4
    for one, other in zip(*ranks):
        if one["tokens"].dim() == 3:  # rank 0 holds chunks 0 and 3, rank 1 chunks 1 and 2
            assert torch.equal(one["labels"][:, half - 1], other["tokens"][:, 0])
            assert torch.equal(other["labels"][:, -1], one["tokens"][:, half])
            assert torch.equal(other["labels"][:, half - 1], other["tokens"][:, half])
            assert torch.equal(one["labels"][:, : half - 1], one["tokens"][:, 1:half])
