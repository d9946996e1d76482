"""Nothing in a superposed step waits for the GPU: models, losses and the loop's part on tensors
without content (support/no_waits.py). tests/gpu/test_multi_hot_ce.py asks CUDA itself.
"""

import argparse
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from megatron import training
from megatron.core.utils import GlobalMemoryBuffer
from support.models import gpt, hybrid
from support.no_waits import DEVICE, Waits, gpu_without_content, no_waits, silent_collectives

from megatron_tst import TSTConfig
from megatron_tst.checkpoint.phases import store
from megatron_tst.loop import patch
from megatron_tst.loop.expert_load import ExpertLoad
from megatron_tst.loop.report import EXCESS_KEY, LOSS_KEY
from megatron_tst.loop.run import Run
from megatron_tst.ops.loss import multi_hot_cross_entropy

V, L, S, B = 96, 8, 3, 2


@pytest.fixture(autouse=True)
def on_a_gpu(megatron, monkeypatch):
    # of this test: the process's may hold tensors of the CPU by the names that are asked for here
    monkeypatch.setattr(megatron, "_GLOBAL_MEMORY_BUFFER", GlobalMemoryBuffer())
    with gpu_without_content():
        yield
    patch.remove()


def there(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


# ---- what the block refuses


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: int(x[0, 0]),
        lambda x: float(x[0, 0]),
        lambda x: [1, 2][x[0, 0].long()],
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.numpy(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x.repeat_interleave(there(2), dim=0),
        lambda x: x.index_put_((x > 0,), x.flatten()),
        lambda x: torch.tensor([1.0], device=DEVICE),
        lambda x: torch.as_tensor([1.0], device=DEVICE),
        lambda x: x.new_tensor(1.0),
        lambda x: torch.ones(2).to(DEVICE),
        lambda x: x.copy_(torch.ones(2, 2)),
        lambda x: torch.cuda.synchronize(),
    ],
)
def test_what_waits_is_refused(wait):
    x = there(2, 2, dtype=torch.float32)
    said = r"^(Tensor\.|aten\.|torch\.)|Cannot copy out of meta tensor"  # the last: torch's own
    with pytest.raises((Waits, NotImplementedError), match=said), no_waits():
        wait(x)


def test_what_does_not_wait_is_let_through():
    x = there(2, 2, dtype=torch.float32)
    with no_waits():
        x.mul_(2).add_(torch.tensor(1.0))
        x[x > 0] = 0.0
        torch.where(x > 0, x, 0.0).new_full((), 3)
        x.repeat_interleave(2, dim=0)
        x.to(DEVICE).double()


# ---- a step of a model


def inputs(superpose="both"):
    bags, row = there(B, L, S), there(B, L)
    return dict(
        input_ids=row if superpose == "output" else bags,
        position_ids=row,
        attention_mask=None,
        labels=row if superpose == "input" else bags,
        loss_mask=there(B, L, dtype=torch.float32),
    )


def step(model, arguments):
    loss = model(**arguments)
    (loss * arguments["loss_mask"]).sum().backward()
    return loss


def wrapped(model):
    """With the gradient buffers of Megatron's DistributedDataParallel, as its hook finds them."""
    for weight in model.parameters():
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        weight.grad_added_to_main_grad = False
    return model


def mtp(**settings):
    from test_multi_token import mtp_model

    return mtp_model(2, **settings)


@pytest.mark.parametrize(
    "build, config, superpose",
    [
        (gpt, dict(kernel="torch"), "both"),
        (gpt, dict(kernel="extension"), "both"),
        (lambda: gpt(dtype=torch.bfloat16), dict(kernel="torch"), "both"),
        (lambda: gpt(tied=True, position="learned_absolute"), {}, "both"),
        (gpt, dict(loss="mce-alt", kernel="torch"), "both"),
        (gpt, dict(loss="mce-alt", kernel="extension"), "both"),
        (gpt, dict(loss="bce"), "both"),
        (gpt, dict(loss="hinge"), "both"),
        (gpt, dict(target_weighting="power-law"), "both"),
        (gpt, dict(fused_linear_loss=True, kernel="torch"), "both"),
        (gpt, dict(fused_linear_loss=True, kernel="extension"), "both"),
        (gpt, {}, "input"),
        (gpt, {}, "output"),
        (hybrid, {}, "both"),
        (mtp, dict(kernel="torch"), "both"),
        (mtp, dict(kernel="extension"), "both"),
    ],
)
@pytest.mark.parametrize("buffers", [False, True])
def test_no_step_of_a_model_waits(build, config, superpose, buffers):
    patch.apply(TSTConfig(S, iters=1, superpose=superpose, **config))
    with mock.patch.object(torch.cuda, "current_device", lambda: 0):  # the CPU
        model = build().to(DEVICE)
    if buffers:
        wrapped(model)
    arguments = inputs(superpose)
    step(model, arguments)  # makes what all steps share: weights of the places, rotary angles
    model.zero_grad()
    with no_waits():
        loss = step(model, arguments)
    assert loss.shape == (B, L) and loss.device.type == DEVICE
    status = patch.status()
    assert bool(status.superposed_embeddings) == (superpose != "output")
    assert bool(status.multi_hot_losses) == (superpose != "input")


# ---- two tensor-parallel ranks, of which this is one

TWO = SimpleNamespace(size=lambda: 2, rank=lambda: 0)


@pytest.mark.parametrize("kernel", ["torch", "extension"])
@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_embedding_of_a_shard_waits(scatter, dtype, kernel):
    from megatron_tst.ops.embedding import superposed_embedding

    table = SimpleNamespace(
        weight=torch.nn.Parameter(there(V // 2, 16, dtype=dtype)),
        vocab_start_index=0,
        num_embeddings=V,
        tp_group=TWO,
        reduce_scatter_embeddings=scatter,
    )
    with silent_collectives(), no_waits():
        mean = superposed_embedding(table, there(B, L, S), kernel)
        mean.sum().backward()
    assert mean.shape == ((L // 2, B, 16) if scatter else (B, L, 16))
    assert table.weight.grad.dtype == dtype


@pytest.mark.parametrize("kernel", ["torch", "extension"])
@pytest.mark.parametrize("loss", ["mce", "mce-alt", "bce", "hinge"])
def test_no_loss_of_a_shard_waits(loss, kernel):
    if kernel == "extension" and loss in ("bce", "hinge"):
        kernel = "auto"
    logits = there(L, B, V // 2, dtype=torch.bfloat16).requires_grad_()
    with silent_collectives(), no_waits():
        losses = multi_hot_cross_entropy(
            logits, there(L, B, S), tp_group=TWO, loss=loss, kernel=kernel, inplace_backward=True
        )
        losses.sum().backward()
    assert losses.shape == (L, B)


# ---- the loop's part of an iteration


def run_of(**settings):
    config = TSTConfig(S, iters=20, **settings)
    args = argparse.Namespace(
        train_iters=40,
        train_samples=None,
        global_batch_size=B,
        seq_length=L,
        consumed_train_samples=0,
        rank=0,
        log_interval=100,
        num_experts=4,
        num_layers=2,
        num_workers=0,
        iterations_to_skip=None,
        exit_interval=None,
    )
    for name, value in vars(config).items():
        setattr(args, f"tst_{name}", value)
    store(args, config.schedule(args), planned=config.schedule(args))
    return Run(args, config, config.schedule(args))


@pytest.mark.parametrize("tp_rank", [0, 1])
@pytest.mark.parametrize("settings", [{}, dict(switch="auto"), dict(target_weighting="power-law")])
def test_no_iteration_of_the_loop_waits(monkeypatch, settings, tp_rank):
    """Batches, the entropy, the log, --tst-switch auto, before a checkpoint: between two log
    lines and away from a boundary.
    """
    monkeypatch.setattr(training, "get_tensorboard_writer", lambda: None)
    monkeypatch.setattr(training, "get_wandb_writer", lambda: None)
    run, logged = run_of(**settings), []
    batch = run.get_batch_on_this_tp_rank(None)
    log = run.training_log(lambda losses, *rest, **named: logged.append(losses))
    decide = run.checkpoint_and_decide_exit(lambda *given: None)

    def iteration(number):
        given = dict(
            tokens=there(B, L, S),
            labels=there(B, L, S),
            loss_mask=there(B, L, dtype=torch.float32),
            position_ids=there(B, L),
        )
        batch(
            given if tp_rank == 0 else {},
            tp_rank=tp_rank,
            broadcast_src_rank=0,
            broadcast_group=None,
            micro_batch_size=B,
            seq_length=L,
            create_attention_mask_in_dataloader=False,
        )
        run.args.consumed_train_samples = B * number
        log({LOSS_KEY: there(dtype=torch.float32)}, {}, 1e-3, number)
        decide([], None)

    with silent_collectives():
        iteration(1)  # makes the entropy's buffer, and brings the trend to the loss's device
        with no_waits():
            for number in range(2, 12):
                iteration(number)
    assert len(logged) == 11 and all(EXCESS_KEY in losses for losses in logged)
    assert run.entropy._seen.device.type == DEVICE


def test_no_count_of_experts_waits():
    load = ExpertLoad()
    router = SimpleNamespace(
        training=True,
        layer_number=1,
        config=SimpleNamespace(moe_router_score_function="sigmoid"),
        gating=lambda hidden: hidden[..., :4],
    )
    with no_waits():
        for _ in range(2):
            hidden = there(L, B, 16, dtype=torch.bfloat16)
            load._count(router, [hidden], (None, there(L * B, 4, dtype=torch.bool)))
    assert load.entropies[1].shape == (2,)
