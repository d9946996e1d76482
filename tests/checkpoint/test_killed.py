"""Runs killed at random moments around the boundary and started again end as the undisturbed run:
the same loss, the same bits.
"""

import random

import pytest
from support.runs import TINY, TST, data

from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.checkpoint.verify import differences


@pytest.mark.timeout(1800)  # sixty runs
def test_thirty_killed_runs(fork_server, corpus, tmp_path):
    def train(name, **job):
        folder = tmp_path / name
        return fork_server.train(
            *TINY,
            *TST,
            *data(corpus),
            "--eval-iters",
            "0",
            "--save",
            folder,
            "--load",
            folder,
            "--save-interval",
            "1",
            **job,
        )

    whole = train("whole")
    assert whole.ok, whole.log[-3000:]
    written = [
        (tmp_path / "whole" / f"iter_{i:07}" / "metadata.json").stat().st_mtime for i in (2, 10)
    ]
    step = (written[1] - written[0]) / 8
    end = Checkpoint(tmp_path / "whole" / "iter_0000010")
    moments, killed_after = random.Random(0), []
    for i in range(60):
        # after the start, or after an iteration's line: then comes its checkpoint, then the next
        # iteration
        after = f"[tst] iteration {i % 9:>8} |" if i % 9 else "[tst] on: bag size"
        killed = train(str(i), after=after, seconds=moments.uniform(0, step))
        if killed.ok:  # it was faster than the one who kills
            continue
        assert killed.codes == [-9] and after in killed.log, killed.log[-3000:]
        killed_after.append(max(killed.losses, default=0))
        again = train(str(i))
        assert again.ok, again.log[-3000:]
        if again.losses:  # else the last checkpoint was there already
            assert (
                again.losses[10] == whole.losses[10]
                and again.grad_norms[10] == whole.grad_norms[10]
            ), killed_after
        assert not differences(end, Checkpoint(tmp_path / str(i) / "iter_0000010")), killed_after
        if len(killed_after) == 30:
            break
    assert len(killed_after) == 30 and min(killed_after) < 6 <= max(killed_after), (
        killed_after
    )  # on both sides of the boundary
