"""Full-iteration CUDA graphs over the switch of phases on a real GPU, and steps that never wait for
it. On CPU, with tapes in the place of graphs and tensors without content:
tests/training/test_full_iteration_graphs.py, tests/unit/test_no_waits.py.
"""

import re

import pytest
import torch
from support.close import close
from support.models import batch, gpt
from support.paths import ROOT
from support.runs import TINY, TST, data

from megatron_tst import TSTConfig
from megatron_tst.loop import patch
from megatron_tst.loop.entropy import MeanBagEntropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="NOT RUN: full-iteration CUDA graphs over the switch, synchronisation: no GPU",
    ),
]
SCRIPT = str(ROOT / "tests" / "support" / "train.py")
GRAPHS = (
    "--cuda-graph-impl full_iteration --cuda-graph-warmup-steps 1 "
    "--no-check-for-nan-in-loss-and-grad --logging-level 20"
).split()
BACKEND = "nccl"  # gloo's collectives cannot be captured
RESET = re.compile(r"full-iteration CUDA graph before iteration (\d+): that of ([^,]+?) is reset")


def train(fork_server, folder, flags):
    folder.mkdir()
    flags = [*TINY, *flags, "--distributed-backend", BACKEND]
    run = fork_server.train(folder, *flags, script=SCRIPT)
    assert run.ok, run.log[-3000:]
    return run, torch.load(folder / "rank0.pt", weights_only=False, map_location="cpu")


def figures(kept, name):
    return torch.tensor([losses[name] for losses, _ in kept["steps"] if name in losses])


@pytest.mark.parametrize(
    "flags, resets",
    [
        (TST, [("7", "bag size 4")]),
        (
            "--tst-bag-size 4,2 --tst-iters 3,3 --tst-fused-linear-loss --bf16".split(),
            [("4", "bag size 4"), ("7", "bag size 2")],
        ),
    ],
    ids=["one_bag_size", "two_bag_sizes"],
)
def test_graphs_change_no_figure(fork_server, corpus, tmp_path, flags, resets):
    """A graph of the wrong phase is off by a hundredth and more. Sums of gradients in another order
    in each run are not.
    """
    flags = [*data(corpus), *flags]
    _, want = train(fork_server, tmp_path / "plain", flags)
    run, got = train(fork_server, tmp_path / "graphs", [*flags, *GRAPHS])
    bound = 1e-3 if "--bf16" in flags else 2e-4
    for name, steps in (("lm loss", 10), ("mce minus bag entropy", 6)):
        assert len(figures(got, name)) == steps
        close(figures(got, name), figures(want, name), bound)
    validation = [
        torch.tensor([losses["lm loss"] for losses in kept["validation"]]) for kept in (got, want)
    ]
    assert len(validation[0]) == 2
    close(*validation, bound)
    assert RESET.findall(run.log) == resets
    assert run.log.count("CUDA graph capture done for training!!!") == 1 + len(resets)
    assert run.log.count("CUDA graph capture done for validation!!!") == 1


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize(
    "config",
    [
        dict(kernel="extension"),
        dict(kernel="torch"),
        dict(kernel="extension", fused_linear_loss=True),
        dict(loss="mce-alt", kernel="torch"),
    ],
    ids=lambda config: " ".join(map(str, config.values())),
)
def test_no_superposed_step_waits(megatron, config, deterministic):
    """Forward, backward and the log's entropy of a step, in bf16 with Megatron's gradient buffers;
    --deterministic-mode sets torch's deterministic algorithms.
    """
    model = gpt(dtype=torch.bfloat16).cuda()
    for weight in model.parameters():
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        weight.grad_added_to_main_grad = False
    raw = torch.randint(0, 96, (2, 8 * 3 + 1))
    given = {
        key: value.cuda() if torch.is_tensor(value) else value
        for key, value in batch(raw, 3).items()
    }
    mask, entropy = torch.ones(2, 8, device="cuda"), MeanBagEntropy("uniform")

    def step():
        entropy.see(given["labels"], mask)
        model(**given).sum().backward()

    patch.apply(TSTConfig(3, iters=1, **config))
    # the deterministic kernels; warnings alone of cuBLAS, whose workspace is not set here
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        step()  # makes what all steps share
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
        patch.remove()
    assert float(entropy.take()) > 0
