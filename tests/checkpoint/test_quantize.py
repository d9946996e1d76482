"""What `quantize` says before ModelOpt has anything to do; tests/peers/test_modelopt.py has the
rest.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import export_checkpoint
import pytest
from support.runs import TINY, TST, data

from megatron_tst import cpu
from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.errors import TSTError
from megatron_tst.export.quantize import quantize


@pytest.fixture(scope="module")
def trained(fork_server, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "ck"
    assert fork_server.train(
        *TINY, *TST, *data(corpus), "--save", folder, "--save-interval", "10"
    ).ok
    return folder


def test_other_recipes_and_a_patched_torch_are_refused(trained, corpus, tmp_path):
    with pytest.raises(TSTError, match="--recipe: expected fp8 or nvfp4, got int3"):
        quantize(Checkpoint(trained), tmp_path / "out", recipe="int3", data=corpus)
    if cpu.enabled():
        with pytest.raises(
            TSTError, match="a process without MEGATRON_TST_CPU's shims, got one with them"
        ):
            quantize(Checkpoint(trained), tmp_path / "out", recipe="fp8", data=corpus)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    importlib.util.find_spec("modelopt") is not None, reason="ModelOpt is installed here"
)
def test_without_modelopt_one_line_says_what_to_install(trained, corpus, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "MEGATRON_TST_CPU"}
    flags = [
        "quantize",
        str(trained),
        str(tmp_path / "out"),
        "--recipe",
        "fp8",
        "--data-path",
        str(corpus),
    ]
    script = Path(export_checkpoint.__file__)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, *flags],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr == (
        "export_checkpoint: error: quantize: expected nvidia-modelopt and transformers, got No "
        "module named 'modelopt'. "
        "pip install 'megatron-tst[modelopt]'.\n"
    )
    assert not list(tmp_path.iterdir())
