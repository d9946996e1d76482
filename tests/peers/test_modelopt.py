"""NVIDIA's ModelOpt (make test-modelopt): its exporter of Megatron's models agrees with ours, and our export is quantised by it."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runner import TINY, TST, data

if importlib.util.find_spec("modelopt") is None:
    pytest.skip("NOT RUN: ModelOpt, its exporter against ours and FP8 and NVFP4 export; make test-modelopt", allow_module_level=True)

from megatron_tst.checkpoint.export_hf import export
from megatron_tst.checkpoint.format import Checkpoint

HERE = Path(__file__).parent
VOCAB = 500  # padded to 512, or 768 under TP2
GQA = "--group-query-attention --num-query-groups 2 --kv-channels 12 --rotary-base 50000".split()
NORM = ["--qk-layernorm"]
MOE = "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 --moe-token-dispatcher-type alltoall".split()
TP2_EP2 = "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2".split()
RUNS = {  # name: (flags of the model, of the layout it was trained in, its processes)
    "llama": (TINY, [], 1),
    "qwen3": ([*TINY, *GQA, *NORM], [], 1),
    "qwen3 moe": ([*TINY, *GQA, *NORM, *MOE], TP2_EP2, 4),
}
SAMPLES, LENGTH = 32, 32


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A corpus of ids below VOCAB, one of ids above, a short one. -> prefix of the first; the others are beside it"""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix, ids = tmp_path_factory.mktemp("ids") / "text", np.random.default_rng(0)
    for name, shift, documents in ("text", 0, 60), ("other", 1, 60), ("short", 0, 5):
        builder = IndexedDatasetBuilder(f"{prefix.parent / name}.bin", dtype=np.int32)
        for _ in range(documents):
            document = np.cumsum(ids.integers(0, 4, int(ids.integers(50, 400)))) % VOCAB + shift
            builder.add_document(document.astype(np.int32), [len(document)])
        builder.finalize(f"{prefix.parent / name}.idx")
    return prefix


@pytest.fixture(scope="module")
def runs(zygote, corpus, tmp_path_factory):
    """name -> a checkpoint folder, trained through both phases when it is first asked for"""
    made = {}

    def get(name):
        if name not in made:
            flags, layout, nproc = RUNS[name]
            folder = tmp_path_factory.mktemp("run") / "ck"
            run = zygote.train(*flags, *layout, *TST, *known(corpus), "--save", folder, "--save-interval", "5", "--lr", "1e-2", nproc=nproc)
            assert run.ok, run.log[-3000:]
            made[name] = folder
        return made[name]

    return get


def known(corpus):
    return [*data(corpus)[:-1], str(VOCAB)]


@pytest.mark.parametrize("name", RUNS)
def test_modelopts_exporter_writes_the_same_tensors(zygote, runs, corpus, tmp_path, name):
    """The checkpoint in Megatron's own model of one process, written by ModelOpt, and ours from the files: the same bits."""
    from safetensors.torch import load_file

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    export(Checkpoint(runs(name)), ours, dtype="float32")
    theirs.mkdir()
    flags = [*RUNS[name][0], *known(corpus), "--load", runs(name), "--finetune", "--no-load-optim", "--no-load-rng"]
    run = zygote.train(ours, theirs, *flags, script=str(HERE / "export_by_modelopt.py"))
    assert run.ok, run.log[-3000:]
    want = {key: tensor for file in theirs.glob("*.safetensors") for key, tensor in load_file(file).items()}
    got = load_file(ours / "model.safetensors")
    assert got.keys() == want.keys()
    for key, tensor in got.items():
        theirs_too = want[key]
        if key in ("model.embed_tokens.weight", "lm_head.weight"):  # ModelOpt leaves the padding of Megatron's vocabulary in
            assert len(theirs_too) == 512 and len(tensor) == VOCAB
            theirs_too = theirs_too[:VOCAB]
        assert torch.equal(tensor, theirs_too), key
