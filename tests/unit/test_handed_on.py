"""Every flag of a verb reaches the function that does the work, under the right name."""

import argparse
import json
from importlib import import_module
from pathlib import Path

import pytest

from megatron_tst import cli


class Handed(Exception):
    """Carries what a function was called with."""


EXPORT = (
    "ck out --tokenizer words --vocab-size 90 --allow-superposition --force",
    dict(tokenizer=Path("words"), vocab_size=90, allow_superposition=True, force=True),
)
NO_EXPORT = dict(tokenizer=None, vocab_size=None, allow_superposition=False, force=False)
BOUNDARY = dict(
    drop_optimizer=False,
    reset_optimizer=False,
    reinit=(),
    layer_spec=None,
    legacy=None,
    drop_fp8_state=False,
    seed=0,
    force=False,
)
# verb, function, command line, what it is called with beside progress; "ck" is the checkpoint
CALLS = [
    ("export-hf", "export.hf.export", "ck out", ["ck", "out"], dict(dtype="bfloat16", **NO_EXPORT)),
    (
        "export-hf",
        "export.hf.export",
        f"{EXPORT[0]} --dtype float32",
        ["ck", "out"],
        dict(dtype="float32", **EXPORT[1]),
    ),
    (
        "export-hf",
        "export.through_bridge.export",
        f"{EXPORT[0]} --through-bridge --hf-config shape --dtype float32",
        ["ck", "out"],
        dict(dtype="float32", hf_config=Path("shape"), **EXPORT[1]),
    ),
    (
        "export-nemo",
        "export.nemo.export",
        "ck out",
        ["ck", "out"],
        dict(hf_config=None, layer_spec=None, drop_optimizer=False, **NO_EXPORT),
    ),
    (
        "export-nemo",
        "export.nemo.export",
        f"{EXPORT[0]} --hf-config shape --layer-spec local --drop-optimizer",
        ["ck", "out"],
        dict(hf_config=Path("shape"), layer_spec="local", drop_optimizer=True, **EXPORT[1]),
    ),
    (
        "quantize",
        "export.quantize.quantize",
        "ck out --recipe fp8 --data-path text",
        ["ck", "out"],
        dict(
            recipe="fp8", data="text", samples=512, sequence_length=None, device=None, **NO_EXPORT
        ),
    ),
    (
        "quantize",
        "export.quantize.quantize",
        f"{EXPORT[0]} --recipe nvfp4 --data-path text --samples 3 --sequence-length 7 --device cpu",
        ["ck", "out"],
        dict(recipe="nvfp4", data="text", samples=3, sequence_length=7, device="cpu", **EXPORT[1]),
    ),
    (
        "import-hf",
        "export.import_hf.import_",
        "model out",
        ["model", "out"],
        dict(layer_spec="transformer_engine", force=False),
    ),
    (
        "import-hf",
        "export.import_hf.import_",
        "model out --layer-spec local --force",
        ["model", "out"],
        dict(layer_spec="local", force=True),
    ),
    ("boundary", "checkpoint.boundary.convert", "ck out", ["ck", "out"], BOUNDARY),
    (
        "boundary",
        "checkpoint.boundary.convert",
        "ck out --reset-optimizer --reinit head,embedding --seed 5 --layer-spec local --format "
        "0.18 --drop-fp8-state --force",
        ["ck", "out"],
        BOUNDARY
        | dict(
            reset_optimizer=True,
            reinit=("head", "embedding"),
            seed=5,
            layer_spec="local",
            legacy=True,
            drop_fp8_state=True,
            force=True,
        ),
    ),
    (
        "boundary",
        "checkpoint.boundary.convert",
        "ck out --drop-optimizer --format 0.19",
        ["ck", "out"],
        BOUNDARY | dict(drop_optimizer=True, legacy=False),
    ),
    ("verify", "checkpoint.verify.differences", "ck out", ["ck", "ck"], dict(optimizer=True)),
    (
        "verify",
        "checkpoint.verify.differences",
        "ck out --weights-only",
        ["ck", "ck"],
        dict(optimizer=False),
    ),
    (
        "corpus",
        "data.corpus.make",
        "--output out",
        ["out", []],
        dict(vocab_size=2048, seed=0, force=False),
    ),
    (
        "corpus",
        "data.corpus.make",
        "--output out --input a b --vocab-size 300 --seed 4 --force",
        ["out", [Path("a"), Path("b")]],
        dict(vocab_size=300, seed=4, force=True),
    ),
]


@pytest.mark.parametrize("verb, function, line, given, named", CALLS)
def test_every_flag_reaches_the_work(monkeypatch, capsys, verb, function, line, given, named):
    seen = []

    def work(*positional, progress, **rest):
        assert callable(progress)
        seen.append((positional, rest))
        raise Handed

    module, _, name = function.rpartition(".")
    monkeypatch.setattr(import_module(f"megatron_tst.{module}"), name, work)
    ck = argparse.Namespace(path=Path("ck"), args=argparse.Namespace())
    monkeypatch.setattr("megatron_tst.checkpoint.format.Checkpoint", lambda path: ck)
    assert cli.main([verb, *line.split()]) == 2
    assert "got Handed" in capsys.readouterr().err
    wanted = [ck if x == "ck" else Path(x) if isinstance(x, str) else x for x in given]
    assert seen == [(tuple(wanted), named)]


@pytest.mark.parametrize("check", [False, True])
def test_inspect_reads_all_where_it_is_asked(monkeypatch, capsys, check):
    ck = argparse.Namespace(check_all=lambda progress: (3, 70))
    monkeypatch.setattr("megatron_tst.checkpoint.format.Checkpoint", lambda path: ck)
    monkeypatch.setattr(
        "megatron_tst.checkpoint.inspect.describe", lambda given: {"it": given is ck, "tensors": {}}
    )
    assert cli.main(["inspect", "ck", "--json", *["--check"] * check]) == 0
    found = json.loads(capsys.readouterr().out)
    said = {"checked": "3 items, 70 bytes: as their checksums and description say"} if check else {}
    assert found == {"it": True, "tensors": {}} | said


@pytest.mark.parametrize("found, code", [({}, 0), ({"a": "differs"}, 1)])
def test_the_exit_code_of_verify_is_its_answer(monkeypatch, capsys, found, code):
    ck = argparse.Namespace(path=Path("ck"), tensors={"a": 1, "b": 2})
    monkeypatch.setattr("megatron_tst.checkpoint.format.Checkpoint", lambda path: ck)
    monkeypatch.setattr("megatron_tst.checkpoint.verify.differences", lambda *_, **__: found)
    assert cli.main(["verify", "ck", "other", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == {
        "checkpoints": ["ck", "ck"],
        "weights_only": False,
        "same": not code,
        "differences": found,
    }


def test_launch_gives_the_script_its_own_flags(monkeypatch):
    seen = []
    monkeypatch.setattr("megatron_tst.launch.main", seen.append)
    flags = ["--lr", "1", "--debug-mode", "--", "-x", "--help"]
    assert cli.main(["launch", "script.py", *flags]) == 0
    assert seen == [["script.py", *flags]]
