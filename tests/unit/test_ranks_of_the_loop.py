"""What the ranks of a run tell each other outside of the model: two processes, each with half of
what is known.
"""

import argparse
import types

import pytest
import torch
from support.close import close

from megatron_tst.loop import boundary_log
from megatron_tst.loop.batches import broadcast_bags
from megatron_tst.loop.entropy import MeanBagEntropy
from megatron_tst.loop.expert_load import ExpertLoad
from megatron_tst.loop.switch import LossTrend

LOG_2 = 0.6931472


def rank_figures():
    """Losses are on the last rank alone, tokens of experts on all."""
    rank = torch.distributed.get_rank()
    mine = [torch.tensor([2.5]), None] if rank else [None, torch.tensor(9.0)]
    value, none = boundary_log._from_last(mine)
    assert value == 2.5 and none != none  # NaN: the last rank does not know it

    # the other rank has made three more; a third optimizer has nothing on this one
    parts = [types.SimpleNamespace(param_groups=[{"step": 4 + 3 * rank}], state={})]
    parts += [types.SimpleNamespace(param_groups=[{"step": 9 * rank, "params": []}], state={})]
    parts = [types.SimpleNamespace(optimizer=inner) for inner in parts]
    assert boundary_log._steps(types.SimpleNamespace(chained_optimizers=parts)) == [4, 7]
    only = parts[0] if rank else types.SimpleNamespace()
    assert boundary_log._steps(only) == 7

    load = ExpertLoad()  # layer 1 here and there, layer 2 on the last rank alone
    load.counts = {1: torch.tensor([6, 0]) if rank else torch.tensor([0, 2])}
    load.entropies = {1: torch.tensor([3.0, 6.0] if rank else [2.0, 2.0], dtype=torch.float64)}
    if rank:
        load.counts[2] = torch.tensor([3, 1])
        load.entropies[2] = torch.tensor([1.0, 4.0], dtype=torch.float64)
    assert load.imbalance(2, 2) == [6 / 4, 3 / 2]
    assert load.entropy(2) == [5 / 8, 1 / 4]

    trend = LossTrend(types.SimpleNamespace(switch_window=0.01, switch_slope=1), 1000)
    if rank:
        trend.see(torch.tensor(20.0))
    assert trend.share() == pytest.approx([2.0, 1.0, 1.0]) == trend._state.tolist()


def rank_entropy(context_parallel):
    """Over ranks that hold parts of a sequence, and over ranks that hold other samples."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(context_parallel_size=context_parallel)
    seen = MeanBagEntropy("uniform")
    if torch.distributed.get_rank():
        seen.see(torch.tensor([[[3, 3], [4, 4]]]), torch.ones(1, 2))
    else:
        seen.see(torch.tensor([[[1, 2], [1, 2]]]), torch.tensor([[1.0, 0.0]]))
    close(seen.take(), torch.tensor(LOG_2 / 3), 1e-6)
    parallel_state.destroy_model_parallel()


def rank_batches():
    """Both are tensor-parallel ranks of a stage: the second one is given nothing."""
    rank = torch.distributed.get_rank()
    for superpose in ("both", "input", "output"):
        whole = micro_batch(superpose)
        got = broadcast_bags(whole if rank == 0 else {}, 3, superpose, **layout(tp_rank=rank))
        for name, tensor in whole.items():
            assert torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype, name


def rank_all():
    rank_figures()
    rank_entropy(1)
    rank_entropy(2)
    rank_batches()


def test_two_ranks(fork_server):
    fork_server.call(rank_all, nproc=2)


# ---- which tensors a pipeline stage gets


def micro_batch(superpose="both", b=2, length=4, s=3):
    draw = torch.Generator().manual_seed(0)
    bags, row = (b, length, s), (b, length)
    ids = lambda shape: torch.randint(0, 50, shape, generator=draw)  # noqa: E731
    return {
        "tokens": ids(row if superpose == "output" else bags),
        "labels": ids(row if superpose == "input" else bags),
        "loss_mask": torch.rand(row, generator=draw),
        "position_ids": ids(row),
        "attention_mask": torch.rand(b, 1, length, length, generator=draw) < 0.5,
    }


def layout(**changes):
    return (
        dict(
            tp_rank=0,
            broadcast_src_rank=0,
            broadcast_group=torch.distributed.group.WORLD,
            micro_batch_size=2,
            seq_length=4,
            create_attention_mask_in_dataloader=True,
        )
        | changes
    )


FIRST, LAST = {"tokens", "position_ids"}, {"labels", "loss_mask"}
MASK = {"attention_mask"}


@pytest.mark.parametrize(
    "stage, names",
    [
        (dict(pipeline_model_parallel_size=1), FIRST | LAST | MASK),
        (dict(is_pipeline_first_stage=True), FIRST | MASK),
        (dict(is_pipeline_last_stage=True), LAST | MASK),
        ({}, set()),  # in the middle
        (dict(mtp_on_this_rank=True), FIRST | LAST | MASK),
        (dict(is_pipeline_last_stage=True, mtp_on_this_rank=True), FIRST | LAST | MASK),
        (dict(is_pipeline_last_stage=True, create_attention_mask_in_dataloader=False), LAST),
        (dict(pipeline_model_parallel_size=1, has_cu_seqlens=False), FIRST | LAST | MASK),
    ],
)
@pytest.mark.parametrize("superpose", ["both", "input", "output"])
def test_what_a_pipeline_stage_gets(megatron, stage, names, superpose):
    whole, two = micro_batch(superpose), dict(pipeline_model_parallel_size=2)
    got = broadcast_bags(whole, 3, superpose, **layout() | two | stage)
    assert {name for name, tensor in got.items() if tensor is not None} == names
    assert all(torch.equal(got[name], whole[name]) for name in names)
    assert {"cu_seqlens", "max_seqlen", "local_cp_size"} < got.keys()  # as Megatron's own answers


@pytest.mark.parametrize(
    "name, change",
    [
        ("tokens", lambda batch: batch["tokens"][..., 0]),  # a batch of the recovery phase
        ("labels", lambda batch: batch["labels"][..., :2]),  # of another bag size
        ("loss_mask", lambda batch: batch["loss_mask"].double()),
        ("position_ids", lambda batch: None),
    ],
)
def test_a_batch_of_another_phase_is_named(megatron, name, change):
    batch = micro_batch()
    batch[name] = change(batch)
    with pytest.raises(AssertionError, match=f"{name}: expected .* in the superposition phase"):
        broadcast_bags(batch, 3, "both", **layout(pipeline_model_parallel_size=1))


# ---- the block at a boundary


@pytest.mark.parametrize(
    "before, now, iterations, said",
    [
        (6, 11, 5, "state kept: step 6 at the boundary, 11 now"),
        (6, 5, 5, "state NOT kept, or steps were skipped: step 6 at the boundary, 5 now"),
        (6, 10, 5, "state NOT kept, or steps were skipped: step 6 at the boundary, 10 now"),
        (None, 5, 5, "does not say how many steps it has made"),
        (6, None, 5, "does not say how many steps it has made"),
        (
            6,
            [5, 11],
            5,
            "state NOT kept, or steps were skipped: step 6 at the boundary, 5 to 11 now",
        ),
        (
            [5, 6],
            11,
            5,
            "state NOT kept, or steps were skipped: step 5 to 6 at the boundary, 11 now",
        ),
    ],
)
def test_whether_the_optimizer_was_kept(before, now, iterations, said):
    assert boundary_log._kept(before, now, iterations) == said


def test_what_does_not_count_its_steps_is_named():
    kept = boundary_log._kept(6, 11, 5, ["Muon"])
    assert kept == "state kept: step 6 at the boundary, 11 now (Muon counts none)"
    none = boundary_log._kept(None, None, 5, ["Lion", "Muon"])
    assert none == "does not say how many steps it has made: Lion and Muon count none"


def test_figures_of_several_layers():
    assert boundary_log._spread([1.5, 1.0, 3.0]) == "1.50 (worst layer 3.00)"
    assert boundary_log._spread([]) == boundary_log._median(None) == "not measured"
    assert boundary_log._median([0.9, 0.1, 0.5]) == "0.500"
    assert boundary_log._figure(None, "E") == "none"


def test_steps_of_an_optimizer_of_several_parts(megatron):
    """As Megatron chains one for the experts to one for the rest: parts that hold nothing here, a
    part whose optimizer does not say, and steps in the state or in the group.
    """

    def part(steps):
        weight = torch.nn.Parameter(torch.ones(2))
        inner = torch.optim.Adam([weight])
        for _ in range(steps):
            weight.grad = torch.ones(2)
            inner.step()
        return types.SimpleNamespace(optimizer=inner)

    def chained(*parts):
        return types.SimpleNamespace(chained_optimizers=[*parts])

    without = types.SimpleNamespace()
    group = types.SimpleNamespace(param_groups=[{"step": 7}], state={})
    assert boundary_log._steps(part(4)) == 4
    assert boundary_log._steps(chained(part(0), part(4))) == 4
    assert boundary_log._steps(chained(without, part(3))) == 3
    assert boundary_log._steps(types.SimpleNamespace(optimizer=group)) == 7
    assert boundary_log._steps(chained(part(0))) is None is boundary_log._steps(without)
    assert boundary_log._steps(chained(part(4), chained(part(6)))) == [4, 6]
    loaded = part(4)  # as Megatron's distributed optimizer leaves a group of torch's Adam
    loaded.optimizer.param_groups[0]["step"] = 2
    assert boundary_log._steps(loaded) == 4
    whole = chained(part(4), chained(part(6)), part(0), types.SimpleNamespace(optimizer=group))
    assert boundary_log._without_steps(whole) == []

    class TensorParallelMuon(torch.optim.SGD):
        """Keeps a momentum and counts no steps."""

    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    muon = TensorParallelMuon([weight], lr=1.0, momentum=0.9)
    assert boundary_log._without_steps(chained(types.SimpleNamespace(optimizer=muon))) == []
    muon.step()
    whole = chained(chained(types.SimpleNamespace(optimizer=muon)), part(4))
    assert boundary_log._without_steps(whole) == ["Muon"] and boundary_log._steps(whole) == 4


def test_the_whole_block(megatron, capsys):
    """The run of test_boundary_block.py's example: 6 iterations of 4 samples in bags of 4, each of
    32 positions, and the log's block 5 iterations later.
    """
    from megatron_tst.schedule import Schedule

    schedule = Schedule.of(4, 6, 48, 32, 4)
    args = argparse.Namespace(train_iters=12, num_experts=None, rank=0, consumed_train_samples=20)
    log = boundary_log.BoundaryLog(args)
    optimizer = types.SimpleNamespace(param_groups=[{"step": 0}], state={})
    log.saw_validation(torch.tensor(4.25), schedule)
    for iteration in range(1, 12):
        args.consumed_train_samples = 4 * iteration
        optimizer.param_groups[0]["step"] = iteration
        log.saw_iteration(iteration, 0.5 / iteration, torch.tensor(10.0 - iteration))
        log.after_iteration(schedule, [], types.SimpleNamespace(optimizer=optimizer))
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == (
        " [tst] boundary: recovery since iteration 7, after bag size 4; 5 iterations later"
    )
    assert [row.removeprefix(" [tst]   ") for row in rows] == [
        "raw tokens     3072 at the boundary, 3712 now, 3840 at the end",
        "learning rate  8.333333E-02 at the boundary, 4.545455E-02 now",
        "optimizer      state kept: step 6 at the boundary, 11 now",
        "data           sample 44 of 48, next is piece 3 of long sample 26",
        "losses since   3.000000E+00 2.000000E+00 1.000000E+00 0.000000E+00 -1.000000E+00 | last "
        "validation loss: 4.250000E+00 (next-token, iteration 5)",
    ]


def test_the_losses_of_a_block_at_the_end_of_the_run(megatron, capsys):
    """Two iterations after the boundary: what the superposed objective said is not among them."""
    from megatron_tst.schedule import Schedule

    schedule = Schedule.of(4, 6, 32, 32, 4)
    args = argparse.Namespace(train_iters=8, num_experts=None, rank=0)
    log, optimizer = boundary_log.BoundaryLog(args), types.SimpleNamespace()
    for iteration in range(1, 9):
        args.consumed_train_samples = 4 * iteration
        log.saw_iteration(
            iteration, 0.5, None if iteration == 7 else torch.tensor(float(iteration))
        )
        log.after_iteration(schedule, [], optimizer)
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].endswith("after bag size 4; 2 iterations later")
    for row in (
        "losses since   NAN 8.000000E+00 | last validation loss: none yet",
        "optimizer      does not say how many steps it has made",
        "data           sample 32 of 32",
    ):
        assert f" [tst]   {row}" in rows


def test_what_the_block_says_of_experts(megatron, capsys):
    """Two layers; from a checkpoint of an earlier version the routers' entropy is not known."""
    from megatron_tst.schedule import Schedule

    args = argparse.Namespace(train_iters=12, num_experts=2, num_layers=1, mtp_num_layers=1, rank=0)
    args.consumed_train_samples = 44
    log = boundary_log.BoundaryLog(args)
    log.load.counts = {1: torch.tensor([3, 1]), 2: torch.tensor([1, 1])}
    log.load.entropies = {
        layer: torch.tensor([mean * 4, 4.0], dtype=torch.float64)
        for layer, mean in ((1, 0.5), (2, 0.75))
    }
    facts = {
        "sample": 24,
        "bag size": 4,
        "learning rate": None,
        "optimizer step": None,
        "imbalance": [1.25, 1.75],
        "validation": None,
    }
    log._print(facts, Schedule.of(4, 6, 48, 32, 4), types.SimpleNamespace())
    rows = capsys.readouterr().out.splitlines()
    for row in (
        "expert load    busiest expert over the mean, median of the layers: 1.50 (worst layer "
        "1.75) before, 1.25 (worst layer 1.50) since",
        "router entropy over log(experts), median of the layers: not measured before, 0.625 since",
        "losses since   not seen | last validation loss: none yet",
        "learning rate  none at the boundary, none now",
    ):
        assert f" [tst]   {row}" in rows, rows


def test_an_unknown_validation_loss_is_not_kept(megatron):
    args = argparse.Namespace(consumed_train_samples=20, tst_validation=(2, 4.0))
    schedule = types.SimpleNamespace(global_batch_size=4)
    log = boundary_log.BoundaryLog(args)
    log.saw_validation(None, schedule)
    assert args.tst_validation == (2, 4.0)
    log.saw_validation(torch.tensor([3.5]), schedule)
    assert args.tst_validation == (5, 3.5)
