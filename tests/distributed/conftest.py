"""One trainer for all cases, and the report of what they differed by."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from support.harness import Trainer
from support.layouts import NOT_VERIFIED, REFUSED


@pytest.fixture(scope="session")
def folder(fork_server, tmp_path_factory, pytestconfig):
    """Of the runs; on several nodes the one that all of them see."""
    shared = pytestconfig.getoption("shared_folder")
    if fork_server.nodes > 1 and not shared:
        pytest.exit("--nodes needs --shared-folder, a new folder that all nodes see", returncode=2)
    folder = Path(shared) if shared else tmp_path_factory.mktemp("runs")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def short_documents(folder, fork_server, corpus):
    """The test corpus cut into documents of 3 to 40 tokens, so that most samples hold ends of
    documents. -> prefix
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    prefix, end = folder / "text", 511
    if fork_server.node > 0:
        while not Path(f"{prefix}.idx").exists():
            time.sleep(0.1)
        return prefix
    source, random = IndexedDataset(str(corpus)), np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(512))
    tokens = np.concatenate([source[i] for i in range(20)])
    tokens = tokens[tokens != end]
    while len(tokens) > 40:
        cut = int(random.integers(3, 40))
        builder.add_document(np.append(tokens[:cut], end), [cut + 1])
        tokens = tokens[cut:]
    builder.finalize(f"{prefix}.idx.part")
    Path(f"{prefix}.idx.part").rename(f"{prefix}.idx")
    return prefix


@pytest.fixture(scope="session")
def trainer(fork_server, folder, short_documents, pytestconfig):
    """Starts the runs of a case."""
    return Trainer(fork_server, folder, short_documents, pytestconfig.getoption("backend"))


@pytest.fixture(scope="session")
def report(pytestconfig):
    """Notes one comparison: report(name of the test, case, difference, status). Written as JSON at
    the end with --parallel-report FILE.
    """
    import torch
    from megatron.core import __version__ as megatron

    rows = []

    def note(test, case, found, status):
        node = f"tests/distributed/test_layouts.py::{test}[{case.id}]"
        rows.append(
            {
                "test": node,
                "id": case.id,
                **asdict(case),
                "status": status,
                "difference": asdict(found),
            }
        )

    yield note
    path = pytestconfig.getoption("parallel_report")
    if path and pytestconfig.getoption("node") == 0:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "device": device,
            "backend": pytestconfig.getoption("backend"),
            "nodes": pytestconfig.getoption("nodes"),
            "torch": torch.__version__,
            "megatron-core": megatron,
        }
        found = {"about": about, "cases": rows, "refused": REFUSED, "not verified": NOT_VERIFIED}
        Path(path).write_text(json.dumps(found, indent=1) + "\n")
