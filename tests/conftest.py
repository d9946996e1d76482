"""Shared set-up: every test runs real megatron-core, on CPU with gloo unless there is a GPU."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from support.paths import EVERYTHING, PACKAGE, environment

sys.path[:1] = EVERYTHING  # support's parent is one of them
os.environ.update(environment(PACKAGE))  # processes take the package from this checkout too
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["MEGATRON_TST_CPU"] = "1"

from megatron_tst import compat, cpu

cpu.enable_if_asked()
compat.hide_broken_transformer_engine()

import pytest
from support.runs import ForkServer

pytest_plugins = ["support.processes"]
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_addoption(parser):
    group = parser.getgroup("distributed", "tests/distributed (its README.md)")
    group.addoption(
        "--backend",
        default="nccl" if HAS_GPU else "gloo",
        help="gloo or nccl; gloo lets several ranks share a GPU",
    )
    group.addoption(
        "--nodes", type=int, default=1, help="the same command runs on so many nodes at once"
    )
    group.addoption("--node", type=int, default=0, help="which of them this is, from 0")
    group.addoption("--master", default="localhost", help="address of node 0")
    group.addoption("--shared-folder", help="a new folder that all nodes see; needed with --nodes")
    group.addoption(
        "--parallel-report",
        help="write what the layouts differed by to this file (tools/parallel_matrix.py)",
    )


NEEDS_GPU = (
    "the CUDA kernels against the reference (tests/gpu), their memory, determinism and capture in "
    "CUDA graphs, tensor parallelism on a GPU, NCCL, "
    "compute-sanitizer, Transformer Engine's layers, FP8 training, speed on a GPU"
)


def pytest_terminal_summary(terminalreporter):
    from megatron_tst import extension

    terminalreporter.section("megatron_tst")
    terminalreporter.line(f"extension: {extension.load().description}")
    if not HAS_GPU:
        terminalreporter.line(
            f"GPU: no GPU here, so these did NOT run: {NEEDS_GPU}. On a GPU machine: "
            f"tools/gpu_check.sh OUT"
        )


@pytest.fixture(scope="session")
def megatron():
    """Model-parallel state of one process, and Megatron's random-number tracker."""
    from megatron.core import parallel_state, tensor_parallel

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    return parallel_state


@pytest.fixture
def patched(megatron):
    """megatron_tst applied for one test and removed after it."""
    from megatron_tst.loop import patch

    patch.apply()
    yield patch
    patch.remove()


@pytest.fixture
def latent_attention(megatron):
    """Local layers can be built with multi-latent attention, in one test."""
    from support import cp_attention

    remove = cp_attention.install()
    yield
    remove()


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory, pytestconfig):
    """Starts training runs and multi-rank functions in processes that need not import torch and
    Megatron again.
    """
    where = (pytestconfig.getoption(name) for name in ("nodes", "node", "master"))
    with ForkServer(tmp_path_factory.mktemp("fork_server"), *where) as running:
        yield running


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small real corpus in Megatron's format: part of the standard library, vocabulary 512. ->
    prefix
    """
    import sysconfig

    from megatron_tst import cli

    prefix = tmp_path_factory.mktemp("corpus") / "text"
    folders = [
        str(Path(sysconfig.get_path("stdlib")) / name)
        for name in ("json", "email", "http", "asyncio")
    ]
    flags = ["--output", str(prefix), "--vocab-size", "512", "--input", *folders]
    assert cli.main(["corpus", *flags]) == 0
    return prefix
