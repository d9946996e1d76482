"""megatron.training.pretrain through both phases and the switch: phases, resuming, layouts, logs,
equality with stock.
"""

import re
import shutil

import pytest
import torch
from support.close import close
from support.runs import ROOT, TINY, TST, data, losses_close
from support.tiers import tiers

from megatron_tst import extension

TP2 = ["--tensor-model-parallel-size", "2", "--make-vocab-size-divisible-by", "64"]


@pytest.fixture(scope="module")
def whole(fork_server, corpus, tmp_path_factory):
    """The undisturbed run, with checkpoints before, at and after the boundary. -> (run, folder of
    checkpoints)
    """
    folder = tmp_path_factory.mktemp("whole")
    run = fork_server.train(
        *TINY,
        *TST,
        *data(corpus),
        "--save",
        folder / "ck",
        "--save-interval",
        "2",
        "--tensorboard-dir",
        folder / "tb",
    )
    assert run.ok, run.log[-3000:]
    return run, folder


def resume(fork_server, corpus, folder, iteration, tmp_path, *flags, nproc=1):
    """Continue from one of the checkpoints in a copy of the folder."""
    here = tmp_path / "ck"
    shutil.copytree(folder / "ck" / f"iter_{iteration:07d}", here / f"iter_{iteration:07d}")
    (here / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return fork_server.train(*TINY, *TST, *data(corpus), "--load", here, *flags, nproc=nproc)


def test_both_phases_and_what_is_said(whole, corpus):
    run, _ = whole
    L, s, batch = 32, 4, 4
    assert {i: phase for i, (phase, _, _) in run.phases.items()} == {
        i: "superposition" if i <= 6 else "recovery" for i in range(1, 11)
    }
    assert [bag for _, bag, _ in run.phases.values()] == [4] * 6 + [1] * 4
    assert [raw for _, _, raw in run.phases.values()] == [
        batch * L * (s * min(i, 6) + max(i - 6, 0)) for i in range(1, 11)
    ]
    assert (
        "on: bag size 4 (both superposed), 6 iterations of superposition (24 samples, 3072 raw "
        "tokens)" in run.log
    )
    assert (
        run.log.count("[tst] boundary after iteration 6") == 1
        and "superposed on this rank: 12 embedding and 12 loss calls" in run.log
    )
    excess = re.findall(r"iteration +(\d+)/.*mce minus bag entropy: ([\d.E+]+)", run.log)
    assert [int(i) for i, _ in excess] == [1, 2, 3, 4, 5, 6]
    assert all(0 < float(x) < float(run.losses[int(i)]) for i, x in excess if int(i) != 2)
    assert "bag size 4" not in "".join(
        line for line in run.log.splitlines() if "UserWarning" in line
    )


def test_learns_in_both_phases(whole):
    losses = {i: float(x) for i, x in whole[0].losses.items()}
    assert 6.1 < losses[1] < 6.4  # log 512 = 6.24
    assert losses[6] < losses[1] and losses[10] < losses[7] and 5.5 < losses[7] < 6.5
    validation = [float(x) for x in whole[0].validation.values()]
    assert len(validation) == 2 and validation[1] < validation[0] < 6.4


def test_tensorboard_has_phase_and_raw_tokens(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole[1] / "tb"))
    events.Reload()
    read = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert [read["tst bag size"][i] for i in range(1, 11)] == [4] * 6 + [1] * 4
    assert read["tst raw tokens"][10] == 3584
    assert sorted(read["mce minus bag entropy"]) == [1, 2, 3, 4, 5, 6]
    assert all(f"{read['lm loss'][i]:.6E}" == whole[0].losses[i] for i in range(1, 11))


@pytest.mark.parametrize("iteration", tiers([2, 4, 6, 8], {4, 6}))
def test_stopped_and_resumed_prints_the_same_losses(
    fork_server, corpus, whole, tmp_path, iteration
):
    """Before, at (6) and after the boundary, to the last digit."""
    run, folder = whole
    again = resume(fork_server, corpus, folder, iteration, tmp_path)
    assert again.ok, again.log[-3000:]
    later = range(iteration + 1, 11)
    assert again.losses == {i: run.losses[i] for i in later} and again.phases == {
        i: run.phases[i] for i in later
    }
    assert {i: again.grad_norms[i] for i in later} == {i: run.grad_norms[i] for i in later}
    assert again.validation == {i: run.validation[i] for i in run.validation if i > iteration}


RESUMED = {
    "TP2": TP2,
    "TP2+SP": [*TP2, "--sequence-parallel"],
    "PP2": ["--pipeline-model-parallel-size", "2"],
    "DP2, prefetch workers": ["--num-workers", "2"],
    "TP2+SP, fused linear": [*TP2, "--sequence-parallel", "--tst-fused-linear-loss"],
    "PP2, fused linear": ["--pipeline-model-parallel-size", "2", "--tst-fused-linear-loss"],
}


@pytest.mark.parametrize(
    "layout", tiers(RESUMED, {"DP2, prefetch workers", "TP2+SP, fused linear"})
)
def test_resumed_in_another_layout(fork_server, corpus, whole, tmp_path, layout):
    run, folder = whole
    again = resume(fork_server, corpus, folder, 4, tmp_path, *RESUMED[layout], nproc=2)
    assert again.ok, again.log[-3000:]
    losses_close(again, run, range(5, 11))
    assert again.phases == {i: run.phases[i] for i in range(5, 11)}


@pytest.mark.parametrize(
    "flags",
    [["--tst-kernel", "torch"], ["--tst-kernel-in-recovery"], ["--tst-fused-linear-loss"]],
    ids=["torch", "in recovery", "fused linear"],
)
def test_every_kernel_trains_the_same(fork_server, corpus, whole, flags):
    """Both phases, gradients through DistributedDataParallel's buffers; nothing else depends on the
    kernel.
    """
    if "--tst-kernel-in-recovery" in flags and not extension.load().loaded:
        pytest.skip(f"NOT RUN: the extension is {extension.load().description}")
    run = fork_server.train(*TINY, *TST, *data(corpus), *flags)
    assert run.ok, run.log[-3000:]
    losses_close(run, whole[0], whole[0].losses)
    norms = ([float(each.grad_norms[i]) for i in whole[0].losses] for each in (run, whole[0]))
    close(*norms, 2e-3)  # printed with three digits after the point
    assert ("GPTModel.forward" in run.log) == ("--tst-fused-linear-loss" in flags)
    said = "torch" if "torch" in flags else extension.choose("auto", "cpu")
    assert run.log.count(f"loss kernel: {said} (extension: ") == 1


def test_skipped_iterations_reach_tensor_parallel_ranks(fork_server, corpus, whole, tmp_path):
    skip = ["--iterations-to-skip", "5", "9"]
    one = resume(fork_server, corpus, whole[1], 4, tmp_path / "a", *skip)
    two = resume(fork_server, corpus, whole[1], 4, tmp_path / "b", *skip, *TP2, nproc=2)
    assert one.ok and two.ok, two.log[-3000:]
    assert sorted(one.losses) == sorted(two.losses) == [6, 7, 8, 10]
    losses_close(two, one, one.losses)


def test_attention_mask_from_the_dataloader(fork_server, corpus, whole, tmp_path):
    """Megatron's default: the mask has the latent length in both phases, and the losses do not
    change.
    """
    flags = [f for f in TINY if f != "--no-create-attention-mask-in-dataloader"]
    here = tmp_path / "ck"
    shutil.copytree(whole[1] / "ck" / "iter_0000004", here / "iter_0000004")
    (here / "latest_checkpointed_iteration.txt").write_text("4")
    for nproc, layout in ((1, []), (2, TP2)):
        run = fork_server.train(*flags, *TST, *data(corpus), "--load", here, *layout, nproc=nproc)
        assert run.ok, run.log[-3000:]
        losses_close(run, whole[0], range(5, 11))


def test_masked_end_of_document_and_samples_instead_of_iterations(fork_server, corpus):
    flags = [f for f in TINY if f != "10"]
    flags[flags.index("--train-iters")] = "--train-samples"
    flags.insert(flags.index("--train-samples") + 1, "40")
    for name in ("--lr-wsd-decay-iters", "--lr-warmup-iters"):
        flags[flags.index(name)] = name.replace("iters", "samples")
    run = fork_server.train(
        *flags, "--tst-bag-size", "4", "--tst-step-ratio", "0.6", "--eod-mask-loss", *data(corpus)
    )
    assert run.ok, run.log[-3000:]
    assert [p for p, _, _ in run.phases.values()] == ["superposition"] * 6 + ["recovery"] * 4


def test_bag_size_one_is_stock(fork_server, corpus, tmp_path):
    """The script without flags, and with bag size 1, against the same script on
    megatron.training.pretrain alone.
    """
    stock = tmp_path / "stock.py"
    ours = (ROOT / "megatron_tst/pretrain_gpt.py").read_text().splitlines(keepends=True)
    lines = [line for line in ours if "(TST)" not in line]
    assert len(lines) == len(ours) - 2
    built = (
        "import megatron.core.datasets.utils\nmegatron.core.datasets.utils.compile_helpers = "
        "lambda: None\n"
    )
    stock.write_text("".join(lines).replace("if __name__", built + "if __name__"))
    want = fork_server.train(*TINY, *data(corpus), script=str(stock))
    assert want.ok and len(want.stock_losses) == 10, want.log[-3000:]
    for flags in ([], ["--tst-bag-size", "1"]):
        got = fork_server.train(*TINY, *data(corpus), *flags)
        assert (
            got.stock_losses == want.stock_losses
            and got.grad_norms == want.grad_norms
            and got.validation == want.validation
        )
        assert "[tst]" not in got.log


def test_weights_of_the_boundary_evaluate_as_in_stock_megatron(
    fork_server, corpus, whole, tmp_path
):
    """The boundary's checkpoint loads without TST and gives the validation loss that TST's own run
    gives, to the last digit.
    """
    _, folder = whole
    weights = tmp_path / "ck"
    shutil.copytree(folder / "ck" / "iter_0000006", weights / "iter_0000006")
    (weights / "latest_checkpointed_iteration.txt").write_text("6")
    stock = fork_server.train(
        *TINY,
        *data(corpus),
        "--load",
        weights,
        "--finetune",
        "--no-load-optim",
        "--no-load-rng",
        "--train-iters",
        "1",
        "--skip-train",
    )
    assert stock.ok, stock.log[-3000:]
    again = fork_server.train(*TINY, *TST, *data(corpus), "--load", weights, "--skip-train")
    assert again.ok, again.log[-3000:]
    evaluated = [re.findall(r"lm loss value: ([\d.E+]+)", r.log) for r in (stock, again)]
    assert evaluated[0] and evaluated[0] == evaluated[1]


def test_exit_at_boundary_and_resume(fork_server, corpus, whole, tmp_path):
    run, _ = whole
    flags = [
        *TINY,
        *TST,
        *data(corpus),
        "--tst-exit-at-boundary",
        "--save",
        tmp_path / "ck",
        "--save-interval",
        "1000",
    ]
    first = fork_server.train(*flags)
    assert first.ok and sorted(first.losses) == [1, 2, 3, 4, 5, 6], first.log[-3000:]
    assert (tmp_path / "ck" / "latest_checkpointed_iteration.txt").read_text() == "6"
    second = fork_server.train(*flags, "--load", tmp_path / "ck")
    assert second.ok and second.losses == {i: run.losses[i] for i in range(7, 11)}, second.log[
        -3000:
    ]
    assert {**first.losses, **second.losses} == run.losses


@pytest.mark.parametrize("superpose", tiers(["input", "output"], {"output"}))
def test_half_superposed_modes_train_and_resume(fork_server, corpus, tmp_path, superpose):
    flags = [*TINY, *TST, *data(corpus), "--tst-superpose", superpose]
    run = fork_server.train(*flags, "--save", tmp_path / "ck", "--save-interval", "4")
    assert run.ok and len(run.losses) == 10, run.log[-3000:]
    assert float(run.losses[6]) < float(run.losses[1]) and float(run.losses[10]) < float(
        run.losses[7]
    )
    raw = run.phases[6][2]
    assert raw == 6 * 4 * 32 * (4 if superpose == "input" else 1)
    (tmp_path / "ck" / "latest_checkpointed_iteration.txt").write_text("4")
    again = fork_server.train(*flags, "--load", tmp_path / "ck", *TP2, nproc=2)
    assert again.ok, again.log[-3000:]
    losses_close(again, run, range(5, 11))


def test_mixture_of_experts(fork_server, corpus, tmp_path):
    moe = (
        "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 "
        "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2"
    ).split()
    flags = [*TINY, *TST, *data(corpus), *moe, "--moe-token-dispatcher-type", "alltoall"]
    run = fork_server.train(*flags, "--save", tmp_path / "ck", "--save-interval", "4")
    assert run.ok and len(run.losses) == 10 and "load_balancing_loss" in run.log, run.log[-3000:]
    (tmp_path / "ck" / "latest_checkpointed_iteration.txt").write_text("4")
    again = fork_server.train(
        *flags,
        "--load",
        tmp_path / "ck",
        "--no-load-optim",
        "--expert-model-parallel-size",
        "2",
        nproc=2,
    )
    assert again.ok, again.log[-3000:]
    losses_close(again, run, [5])


def test_weights_hold_no_trace_of_tst(whole):
    """No parameter is added: the checkpoint has exactly the keys of a stock model's."""
    import torch.distributed.checkpoint as dcp

    keys = {
        k
        for k in dcp.FileSystemReader(whole[1] / "ck" / "iter_0000006")
        .read_metadata()
        .state_dict_metadata
        if "optimizer" not in k
    }
    assert keys and not [k for k in keys if "tst" in k.lower()]
    assert torch.cuda.is_available() or "embedding.word_embeddings.weight" in keys
