"""From one superposition checkpoint: the switch in process, a resume with megatron_tst, and stock
Megatron after a conversion, with the same
text: the same digits, and at the end the same bits."""

import re
import shutil

import numpy as np
import pytest
import torch
from support.runs import ROOT, TINY, TST, data
from support.tiers import tiers

from megatron_tst import TSTConfig, cli
from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.checkpoint.verify import differences
from megatron_tst.data import stock_index
from megatron_tst.data.dataset import PhasedDataset
from megatron_tst.errors import TSTError
from megatron_tst.schedule import Schedule

MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2"
).split()
LAYOUTS = {
    "one process": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--make-vocab-size-divisible-by", "64"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "dp2": (2, []),
    "one process, moe": (1, MOE),
    "ep2, moe": (
        2,
        [*MOE, "--moe-token-dispatcher-type", "alltoall", "--expert-model-parallel-size", "2"],
    ),
    "one process, moe, muon": (1, [*MOE, "--optimizer", "muon"]),
    "dp2, dist_muon": (2, ["--optimizer", "dist_muon", "--bf16"]),
}


@pytest.fixture(scope="session")
def stock_script(tmp_path_factory):
    """The package's script without its two lines of TST. (Stock Megatron runs `make` in the wheel,
    which has no Makefile.)
    """
    text = (ROOT / "megatron_tst" / "pretrain_gpt.py").read_text()
    for ours, stock in (
        (r"from megatron_tst import training  # \(TST\)", "from megatron_tst import cpu"),
        (
            r"training\.prepare\(\)  # \(TST\).*",
            "cpu.enable_if_asked()\nimport megatron.core.datasets.utils as "
            "utils\nutils.compile_helpers = lambda: None",
        ),
    ):
        text, found = re.subn(ours, stock, text)
        assert found == 1
    path = tmp_path_factory.mktemp("stock") / "pretrain_gpt.py"
    path.write_text(text)
    return str(path)


def shown(run):
    """Loss and gradient norm of each iteration as Megatron prints them."""
    return {i: (run.stock_losses[i], run.grad_norms[i]) for i in run.grad_norms}


def boundary_alone(folder, here):
    shutil.copytree(folder / "iter_0000006", here / "iter_0000006")
    (here / "latest_checkpointed_iteration.txt").write_text("6")
    return here


@pytest.mark.parametrize("name", tiers(LAYOUTS, {"tp2", "ep2, moe"}))
def test_three_ways_over_the_boundary(fork_server, corpus, stock_script, tmp_path, name):
    nproc, layout = LAYOUTS[name]
    flags = [*TINY, *data(corpus), *layout]
    save = ["--save-interval", "6"]
    a = fork_server.train(
        *flags,
        *TST,
        *save,
        "--save",
        tmp_path / "a",
        "--tst-stock-index",
        tmp_path / "index",
        nproc=nproc,
    )
    assert a.ok, a.log[-3000:]

    stopped = fork_server.train(
        *flags,
        *TST,
        "--save",
        tmp_path / "b",
        "--save-interval",
        "100",
        "--tst-exit-at-boundary",
        nproc=nproc,
    )
    b = fork_server.train(
        *flags, *TST, *save, "--load", tmp_path / "b", "--save", tmp_path / "b", nproc=nproc
    )
    assert stopped.ok and b.ok, b.log[-3000:]

    source = boundary_alone(tmp_path / "a", tmp_path / "boundary")
    assert cli.main(["boundary", str(source), str(tmp_path / "c")]) == 0
    continued = [
        *flags,
        *save,
        "--load",
        tmp_path / "c",
        "--save",
        tmp_path / "c",
        "--data-cache-path",
        tmp_path / "index",
    ]
    c = fork_server.train(*continued, script=stock_script, nproc=nproc)
    assert c.ok and "[tst]" not in c.log, c.log[-3000:]

    one, two, three = (shown(run) for run in (a, b, c))
    assert set(two) == set(three) == {7, 8, 9, 10} and two == three
    for i in (7, 9, 10):  # the line of 8 averages 7 and 8 after a start
        assert one[i] == two[i], i
    assert a.validation[10] == b.validation[10] == c.validation[10]
    ends = [Checkpoint(tmp_path / way / "iter_0000010") for way in "abc"]
    assert not differences(ends[0], ends[1]) and not differences(ends[0], ends[2])


CLASSES = {
    "dense": ([], "*-*-", []),
    "experts": (MOE, "*E*E", []),
    "muon": (["--optimizer", "muon"], "*-*-", []),
    # as HybridModel's own layer specs name the norm before experts
    "experts, renamed": (
        [*MOE, "--optimizer", "muon"],
        "*E*E",
        ["--layer-spec", "transformer_engine"],
    ),
}


@pytest.mark.parametrize("name", tiers(CLASSES, set()))
def test_a_hybrid_model_goes_on_from_a_conversion(
    fork_server, corpus, stock_script, tmp_path, name
):
    """A GPTModel's superposition phase, converted, and the recovery phase by stock Megatron with
    HybridModel: the digits of GPTModel throughout.
    """
    flags, pattern, renamed = CLASSES[name]
    flags = [*TINY, *data(corpus), *flags]
    save = ["--save", tmp_path / "a", "--save-interval", "6"]
    whole = fork_server.train(*flags, *TST, *save, "--tst-stock-index", tmp_path / "index")
    assert whole.ok, whole.log[-3000:]
    source = boundary_alone(tmp_path / "a", tmp_path / "boundary")
    assert cli.main(["boundary", str(source), str(tmp_path / "c"), *renamed]) == 0
    del flags[(at := flags.index("--num-layers")) : at + 2]
    spec = "support.hybrid_spec" if renamed else "support.hybrid_local_names"
    hybrid = ["--spec", spec, "hybrid_stack_spec", "--hybrid-layer-pattern", pattern]
    read = ["--load", tmp_path / "c", "--data-cache-path", tmp_path / "index"]
    run = fork_server.train(*flags, *hybrid, *read, script=stock_script)
    assert run.ok and "[tst]" not in run.log, run.log[-3000:]
    got, want = shown(run), shown(whole)
    for i in (7, 9, 10):  # the line of 8 averages 7 and 8 after a start
        assert got[i] == want[i], i
    assert run.validation[10] == whole.validation[10]


def test_without_the_index_other_text_is_read(fork_server, corpus, stock_script, tmp_path):
    """The control: the same weights and state, and stock Megatron's own order of the text."""
    a = fork_server.train(
        *TINY, *TST, *data(corpus), "--save", tmp_path / "a", "--save-interval", "6"
    )
    assert (
        cli.main(
            [
                "boundary",
                str(boundary_alone(tmp_path / "a", tmp_path / "boundary")),
                str(tmp_path / "c"),
            ]
        )
        == 0
    )
    c = fork_server.train(*TINY, *data(corpus), "--load", tmp_path / "c", script=stock_script)
    assert a.ok and c.ok and shown(a)[7] != shown(c)[7]


def datasets(prefix, blend, size, length, cache):
    """Megatron's training dataset of `size` samples of `length` tokens."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=length,
        blend=([str(prefix), str(prefix)], [0.3, 0.7]) if blend else ([str(prefix)], None),
        split="90,10,0",
        path_to_cache=str(cache),
        tokenizer=NullTokenizer(512),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.05,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [size, 0, 0], lambda: True, config).build()[0]


@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize(
    "s, superposed, total, superpose",
    [
        (4, 24, 40, "both"),
        (3, 8, 101, "both"),
        (2, 4, 17, "output"),
        ((8, 4, 2), (12, 20, 8), 90, "both"),
        ((6, 4), (8, 12), 61, "input"),
        (4, 400, 4000, "both"),
    ],
)
def test_every_recovery_sample_is_the_one_that_tst_would_read(
    megatron, corpus, tmp_path, s, superposed, total, superpose, blend
):
    """Over one epoch and over several (the last case), one bag size and several, one dataset and a
    blend: every sample's tokens, labels, mask.
    """
    length, batch = 32, 4
    sizes, samples = (s, superposed) if isinstance(s, tuple) else ((s,), (superposed,))
    superposed = sum(samples)
    schedule = Schedule(
        (*sizes, 1),
        (*samples, total - superposed),
        length,
        batch,
        single_tokens_in=superpose == "output",
    )
    config = TSTConfig(
        bag_size=s, iters=samples if len(sizes) > 1 else samples[0], superpose=superpose
    )
    long = datasets(
        corpus, blend, schedule.long_samples, schedule.long_sample_length, tmp_path / "long"
    )
    stock = datasets(corpus, blend, total, length, tmp_path / "stock")
    files = stock_index.write(long, stock, schedule)
    assert len(files) == (3 if not blend else 8) and all(
        path.parent == tmp_path / "stock" for path in files
    )
    again, ours = (
        datasets(corpus, blend, total, length, tmp_path / "stock"),
        PhasedDataset(long, schedule, config),
    )
    assert len(again) == len(stock) >= total
    for one in again.datasets if blend else [again]:  # every whole sample of the row, once
        row = one.dataset.sequence_lengths[one.document_index].sum()
        assert np.array_equal(np.sort(one.shuffle_index), np.arange((row - 1) // length))
        assert len(one.sample_index) == len(one.shuffle_index) + 1
    if blend:
        for name in ("dataset_index", "dataset_sample_index"):
            new, old = getattr(again, name), getattr(stock, name)
            assert new.dtype == old.dtype and len(new) == len(old)
    for i in range(superposed):  # the first of the text of a sample of bags
        assert torch.equal(
            torch.as_tensor(again[i]["tokens"]), ours[i]["tokens"].flatten()[:length]
        )
    for i in range(superposed, total):
        want, got = ours[i], again[i]
        assert all(
            torch.equal(torch.as_tensor(got[key]), want[key])
            for key in ("tokens", "labels", "loss_mask")
        ), i


def test_other_datasets_are_refused(megatron, corpus, tmp_path):
    """Two of one kind, a blend and no blend, a GPTDataset and none."""
    one, blend = (datasets(corpus, many, 8, 32, tmp_path) for many in (False, True))
    for long, stock in (([], []), ([], one), ([], blend), (one, []), (one, blend), (blend, one)):
        kind = type(long).__name__
        with pytest.raises(
            TSTError,
            match=f"--tst-stock-index: expected a GPTDataset or a blend of them, got {kind}",
        ):
            stock_index.write(long, stock, Schedule.of(4, 1, 8, 32, 4))
