"""Runs killed at random moments around the boundary and started again end as the undisturbed run:
the same loss, the same bits. Forty of them, in parts that each look at every iteration.
"""

import random

import pytest
from support.runs import TINY, TST, data
from support.tiers import tiers

from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.checkpoint.verify import differences


def train(fork_server, corpus, folder, **job):
    flags = [*TINY, *TST, *data(corpus), "--eval-iters", "0", "--save-interval", "1"]
    return fork_server.train(*flags, "--save", folder, "--load", folder, **job)


@pytest.fixture(scope="module")
def whole(fork_server, corpus, tmp_path_factory):
    """The undisturbed run. -> (run, its last checkpoint, seconds that an iteration takes)"""
    folder = tmp_path_factory.mktemp("whole")
    run = train(fork_server, corpus, folder)
    assert run.ok, run.log[-3000:]
    written = [(folder / f"iter_{i:07}" / "metadata.json").stat().st_mtime for i in (2, 10)]
    return run, Checkpoint(folder / "iter_0000010"), (written[1] - written[0]) / 8


@pytest.mark.parametrize("part", tiers(range(5), {0}))
def test_killed_runs(fork_server, corpus, whole, tmp_path, part):
    undisturbed, end, step = whole
    moments, killed_after = random.Random(part), []
    for i in range(16):
        # after the start, or after an iteration's line: then comes its checkpoint, then the next
        # iteration
        at = (part + 5 * i) % 9
        after = f"[tst] iteration {at:>8} |" if at else "[tst] on: bag size"
        folder = tmp_path / str(i)
        seconds = moments.uniform(0, step)
        killed = train(fork_server, corpus, folder, after=after, seconds=seconds)
        if killed.ok:  # it was faster than the one who kills
            continue
        assert killed.codes == [-9] and after in killed.log, killed.log[-3000:]
        killed_after.append(max(killed.losses, default=0))
        again = train(fork_server, corpus, folder)
        assert again.ok, again.log[-3000:]
        if again.losses:  # else the last checkpoint was there already
            assert again.losses[10] == undisturbed.losses[10], killed_after
            assert again.grad_norms[10] == undisturbed.grad_norms[10], killed_after
        assert not differences(end, Checkpoint(folder / "iter_0000010")), killed_after
        if len(killed_after) == 8:
            break
    # on both sides of the boundary
    assert len(killed_after) == 8 and min(killed_after) < 6 <= max(killed_after), killed_after
