"""--tst-switch auto: end a superposition phase once its loss hardly falls any more. (The paper
leaves the switch to future work.)

The slope is the distance of two exponential averages of the loss, over n and 2n iterations, by the
distance of their mean ages: exact on a straight line. The last rank, which has the loss, averages
on its device; at every log interval its averages reach rank 0, which decides, and all ranks hear of
it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_tst.config import TSTConfig
from megatron_tst.schedule import Phase, Schedule

SETTLED = 4  # windows before which the slope is mostly noise and the phase's steep beginning


class LossTrend:
    """How fast the loss of the current phase falls.

    Args:
        config: switch_window and switch_slope.
        iterations: of the whole run.
    """

    def __init__(self, config: TSTConfig, iterations: int):
        self.window = max(1, round(config.switch_window * iterations))
        self.iterations, self.least = iterations, config.switch_slope
        self.restart()

    def restart(self, state: Sequence[float] = (0.0, 0.0, 0.0)) -> None:
        """Forget the loss (a new phase), or go on from a checkpoint's `state`: the two averages and
        how many losses are in them.
        """
        self._state = torch.tensor(state, dtype=torch.float64)
        self._rates = torch.tensor([1 / self.window, 1 / (2 * self.window)], dtype=torch.float64)

    def see(self, loss: torch.Tensor) -> None:
        """Take in an iteration's loss, a scalar tensor, without waiting for its device. An infinite
        or undefined one is left out.
        """
        # a copy the first time alone
        self._state, self._rates = self._state.to(loss.device), self._rates.to(loss.device)
        averages = self._state[:2] + self._rates * (loss.double().reshape(()) - self._state[:2])
        new = torch.cat([averages, self._state[2:] + 1])
        self._state = torch.where(new.isfinite().all(), new, self._state)

    def share(self) -> list[float]:
        """The state on every rank; called by all of them."""
        state = self._state.to(torch.cuda.current_device())
        torch.distributed.broadcast(state, torch.distributed.get_world_size() - 1)
        self._state = state
        return state.tolist()

    @property
    def fall(self) -> float | None:
        """Nats that the loss falls in a hundredth of the run's iterations; None in the first
        SETTLED windows.
        """
        fast, slow, seen = self._state.tolist()
        if seen < SETTLED * self.window:
            return None
        losses, ages = [], []
        for average, n in ((fast, self.window), (slow, 2 * self.window)):
            forgotten = (1 - 1 / n) ** seen  # the weight that a first value would still have
            losses.append(average / (1 - forgotten))
            ages.append(n - 1 - seen * forgotten / (1 - forgotten))
        return (losses[1] - losses[0]) / (ages[1] - ages[0]) * self.iterations / 100


def first_end(
    schedule: Schedule, phase: Phase, consumed: int, samples_ahead: int, not_after: set[int]
) -> int:
    """Samples of the phase at which it can end soonest without leaving text out.

    Example: batches of 8 samples, a phase of bags of 4 in long samples of 8, which begins at sample
    80: 2 pieces, blocks of 16 samples. 104 samples of the run are behind, and 8 more are fetched:
    80 + 32 = 112. That is a whole number of blocks, so the phase can end there, after 32 samples.

    >>> plan = Schedule((8, 4, 2, 1), (80, 160, 160, 400), seq_length=4, global_batch_size=8)
    >>> first_end(plan, plan.phases[1], consumed=104, samples_ahead=8, not_after=set())
    32
    >>> first_end(plan, plan.phases[1], consumed=104, samples_ahead=9, not_after=set())
    48

    Args:
        schedule, phase: the run's phases, and the one that is to end.
        consumed: samples of the run that have been trained on.
        samples_ahead: how many more must stay as they are, since they may have been fetched.
        not_after: iterations after which it is not to end.
    """
    batch, end = schedule.global_batch_size, consumed + samples_ahead - phase.first_sample
    end = -(-end // phase.block) * phase.block
    while (phase.first_sample + end) // batch in not_after:
        end += phase.block
    return end
