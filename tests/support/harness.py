"""Train a case in its layout and in one process, and say by how much they differ."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from support.layouts import BASE, ITERATIONS, MODELS, SUPERPOSED, VOCAB, Case, Layout

SCRIPT = str(Path(__file__).parent / "train.py")
ALONE = Layout("dp1")


@dataclass
class Figures:
    """Of a run: per iteration the losses and the gradient norm, the validation losses, the whole
    weights, each rank's batches.
    """

    losses: list[dict]
    norms: list[float]
    validation: list[dict]
    weights: dict[str, torch.Tensor]
    batches: list[list[dict]]
    schedule_plans: int
    log: str


class Trainer:
    """Starts runs, and keeps those in one process for the cases that share them.

    On several nodes (fork_server.nodes) each starts its share of a layout's processes; runs in one
    process are node 0's, the others wait for its files in `folder`, which all see.
    """

    def __init__(self, fork_server, folder: Path, data: Path, backend: str):
        self.fork_server, self.folder, self.data, self.backend = fork_server, folder, data, backend
        self.alone: dict[tuple, Figures] = {}
        self.starts: dict[str, Path] = {}
        self.runs = 0

    def reference(self, case: Case) -> Figures:
        """The case in one process."""
        key = case.model, case.s, case.options, case.precision, case.load
        if key not in self.alone:
            self.alone[key] = self.train(case, ALONE)
        return self.alone[key]

    def train(self, case: Case, layout: Layout, **env: str) -> Figures:
        """The case in a layout, through both phases, from the model's start checkpoint."""
        flags = self.flags(case, layout)
        if case.load:
            load = "--finetune --no-load-optim --no-load-rng".split()
            flags += ["--load", str(self.start(case.model)), *load]
        return self._run(flags, layout, env | ({"BAG_OF_ONE": "1"} if case.s == 1 else {}))

    def flags(self, case: Case, layout: Layout) -> list[str]:
        """Of a run through both phases."""
        tst = ["--tst-bag-size", str(case.s), "--tst-iters", str(SUPERPOSED)] if case.s else []
        return [*self._flags(case), *layout.flags, "--train-iters", str(ITERATIONS), *tst]

    def start(self, model: str) -> Path:
        """A checkpoint of the model's weights, written by one process."""
        if model not in self.starts:
            self.starts[model] = self.folder / f"start{len(self.starts)}"
            flags = [*self._flags(Case("dp1", model)), *ALONE.flags]
            flags += "--train-iters 1 --lr-decay-iters 1 --no-save-optim --no-save-rng".split()
            save = ["--save", str(self.starts[model]), "--save-interval", "1"]
            self._run([*flags, *save], ALONE, {})
        return self.starts[model]

    def _flags(self, case):
        precision = {"fp32": [], "bf16": ["--bf16"]}[case.precision]
        data = ["--data-path", str(self.data), "--vocab-size", str(VOCAB)]
        model = [*BASE.split(), *MODELS[case.model].split(), *case.options.split()]
        return [*model, *precision, *data, "--distributed-backend", self.backend]

    def _run(self, flags, layout, env):
        self.runs += 1
        folder = self.folder / f"run{self.runs}"
        folder.mkdir(exist_ok=True)
        if "fsdp" in layout.name:
            # Megatron demands it there, and 1 elsewhere
            env = env | {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
        if layout.world > 1 or self.fork_server.node == 0:
            run = self.fork_server.train(
                str(folder), *flags, script=SCRIPT, nproc=layout.world, env=env
            )
            assert run.ok, run.log[-4000:]
        ranks = [self._result(folder / f"rank{rank}.pt") for rank in range(layout.world)]
        last = ranks[-1]  # the last pipeline stage has the losses
        return Figures(
            [losses for losses, _ in last["steps"]],
            [norm for _, norm in last["steps"]],
            last["validation"],
            whole_weights(ranks),
            [rank["batches"] for rank in ranks],
            last["schedule_plans"],
            run.log if self.fork_server.node == 0 else "",
        )

    def _result(self, path):
        deadline = time.time() + (0 if self.fork_server.nodes == 1 else 300)
        while not path.exists() and time.time() < deadline:
            time.sleep(0.1)
        return torch.load(path, weights_only=True)


def whole_weights(ranks) -> dict[str, torch.Tensor]:
    """Put the shards of all ranks together. Every element must be there, and the same wherever
    several ranks hold it.
    """
    whole, seen = {}, {}
    for rank in ranks:
        for name, shape, offset, shard in rank["weights"]:
            place = tuple(slice(start, start + size) for start, size in zip(offset, shard.shape))
            tensor = whole.setdefault(name, torch.zeros(shape, dtype=torch.float64))
            held = seen.setdefault(name, torch.zeros(shape, dtype=torch.bool))
            assert torch.equal(tensor[place][held[place]], shard.double()[held[place]]), (
                f"{name}: ranks hold different copies"
            )
            tensor[place], held[place] = shard.double(), True
    missing = [name for name, held in seen.items() if not held.all()]
    assert not missing, f"no rank holds all of {missing}"
    return whole


@dataclass
class Difference:
    """Largest relative difference of the losses in either phase, of the validation losses and of
    the gradient norms; of the weights the largest difference of an element, and the length of the
    whole difference over the length of the weights.
    """

    superposition: float
    recovery: float
    validation: float
    norms: float
    weights: float
    weights_length: float


# The length of the weights is what a fault shows in. An element can be off by a part of Adam's way,
# which is the sum of the learning rates, 3.3e-3: where a gradient is near zero, its rounding noise
# decides. In bf16 by the whole way, and by an ulp of a norm's weight, 2**-8.
TOLERANCE = {
    "fp32": Difference(
        superposition=1e-6,  # largest seen 2e-7
        recovery=1e-6,  # largest seen 2e-7
        validation=1e-6,  # largest seen 2e-7
        norms=1e-5,  # largest seen 6e-7
        weights=1e-4,  # largest seen 1e-5
        weights_length=4e-6,  # largest seen 5e-7
    ),
    "bf16": Difference(
        superposition=2e-3,  # largest seen 7e-4
        recovery=2e-3,  # largest seen 1.1e-3
        validation=2e-3,  # largest seen 1.1e-3
        norms=2e-2,  # largest seen 7e-3
        weights=2e-2,  # largest seen 4e-3
        weights_length=4e-3,  # largest seen 1.7e-3
    ),
}


def difference(got: Figures, want: Figures) -> Difference:
    """Of a run against another of the same case; without weights where the run has none to show
    (Megatron-FSDP).
    """
    assert len(got.losses) == len(got.norms) == ITERATIONS and (
        not got.weights or got.weights.keys() == want.weights.keys()
    )
    deltas = {name: weight - want.weights[name] for name, weight in got.weights.items()}
    length = (
        sum(delta.square().sum() for delta in deltas.values())
        / sum(w.square().sum() for w in want.weights.values())
        if deltas
        else 0
    )
    return Difference(
        _losses(got.losses[:SUPERPOSED], want.losses[:SUPERPOSED]),
        _losses(got.losses[SUPERPOSED:], want.losses[SUPERPOSED:]),
        _losses(got.validation, want.validation),
        max(map(_relative, got.norms, want.norms)),
        max([delta.abs().max().item() for delta in deltas.values()], default=0.0),
        float(length) ** 0.5,
    )


def _losses(some, other):
    assert len(some) == len(other) and all(set(a) == set(b) and b for a, b in zip(some, other)), (
        some,
        other,
    )
    return max(_relative(a[key], b[key]) for a, b in zip(some, other) for key in b)


def _relative(a, b):
    return abs(a - b) / abs(b)
