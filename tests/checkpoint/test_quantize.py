"""What `quantize` says before ModelOpt has anything to do; tests/peers/test_modelopt.py has the
rest.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
from support.runs import TINY, TST, data

from megatron_tst import cli, cpu
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
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megatron_tst", *flags],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr == (
        "megatron-tst quantize: error: quantize: expected nvidia-modelopt and transformers, got No "
        "module named 'modelopt'. "
        "pip install 'megatron-tst[modelopt]'.\n"
    )
    assert not list(tmp_path.iterdir())


def test_json_is_all_of_stdout_although_modelopt_prints_there(
    trained, tmp_path, capsys, monkeypatch
):
    def chatty(source, target, **options):
        print("Inserted 14 quantizers")
        return target, math.e, math.e**2

    monkeypatch.setattr("megatron_tst.export.quantize.quantize", chatty)
    out = str(tmp_path / "out")
    call = ["quantize", str(trained), out, "--recipe", "fp8", "--data-path", "x"]
    assert cli.main([*call, "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["written"] == out and found["perplexity"] == {"before": math.e, "after": math.e**2}
    assert "Inserted 14 quantizers" in said.err
    assert cli.main(call) == 0
    assert "perplexity after  7.3891 (2.00000 nats)" in capsys.readouterr().out


def test_without_tokenizers_one_line_says_what_to_install(
    trained, corpus, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    given = ["--tokenizer", f"{corpus}.tokenizer.json"]
    for verb in ("export-hf", "export-nemo"):
        assert cli.main([verb, str(trained), str(tmp_path / "out"), *given]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"megatron-tst {verb}: error: tokenizers: expected an installed")
        assert line.endswith("pip install 'megatron-tst[hf]'.\n") and line.count("\n") == 1
    assert not list(tmp_path.iterdir())
