"""--tst-fused-linear-loss: the losses and every gradient of the separate output layer and loss,
without the logits.
"""

import pytest
import torch
from support.close import close
from support.models import batch, gpt, hybrid

from megatron_tst import TSTConfig, extension
from megatron_tst.loop import patch
from megatron_tst.ops.loss import multi_hot_cross_entropy

pytestmark = pytest.mark.numeric

V, L, S = 96, 8, 3


@pytest.fixture(autouse=True)
def clean(megatron):
    yield
    patch.remove()


@pytest.fixture(autouse=True)
def small_chunks(megatron, monkeypatch):
    """Several chunks, the last one shorter."""
    from megatron_tst.ops import chunks

    monkeypatch.setitem(chunks.LINEAR_LOSS, "cpu", 5 * V * 4)


def loss_and_grads(model, arguments):
    model.zero_grad()
    loss = model(**arguments)
    torch.manual_seed(7)
    (loss * torch.randn_like(loss)).sum().backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kernel", ["torch", "extension"])
@pytest.mark.parametrize("build, tied", [(gpt, False), (gpt, True), (hybrid, False)])
@pytest.mark.parametrize("s", [None, S])
@pytest.mark.parametrize("loss", ["mce", "mce-alt"])
def test_equals_the_separate_layer_and_loss(build, tied, s, loss, kernel):
    if kernel == "extension" and not extension.load().loaded:
        pytest.skip(f"NOT RUN: the extension is {extension.load().description}")
    model = build(tied=True, position="learned_absolute") if tied else build()
    torch.manual_seed(1)
    arguments = batch(torch.randint(0, V, (2, L * (s or 1) + 1)), s)
    settings = dict(bag_size=S, iters=1, loss=loss, target_weighting="power-law", kernel=kernel)
    patch.apply(TSTConfig(**settings))
    want, want_grads = loss_and_grads(model, arguments)
    patch.remove()
    patch.apply(TSTConfig(**settings, fused_linear_loss=True))
    got, grads = loss_and_grads(model, arguments)
    assert patch.status().fused_linear_losses == 1
    close(got, want, 1e-6)  # largest seen 6e-8
    for name, grad in grads.items():
        close(grad, want_grads[name], 2e-6)  # largest seen 3e-7


def test_logits_of_all_rows_never_exist(megatron):
    model = gpt(vocab=4096)
    arguments = batch(torch.randint(0, V, (2, 32 * S + 1)), S)

    def largest_tensor():
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            model(**arguments)
        return max(
            e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"
        )

    patch.apply(TSTConfig(bag_size=S, iters=1))
    separate = largest_tensor()
    patch.remove()
    patch.apply(TSTConfig(bag_size=S, iters=1, fused_linear_loss=True))
    assert separate >= 64 * 4096 * 4 > 4 * largest_tensor()


def test_evaluation_and_calls_without_labels_are_stock():
    model = gpt().eval()
    arguments = batch(torch.randint(0, V, (2, L + 1)), None)
    with torch.no_grad():
        want = model(**arguments)
    logits = model(**arguments | {"labels": None})
    patch.apply(TSTConfig(bag_size=S, iters=1, fused_linear_loss=True))
    with torch.no_grad():
        assert torch.equal(model(**arguments), want)
    assert torch.equal(model(**arguments | {"labels": None}), logits)
    assert patch.status().fused_linear_losses == 0 and "forward" not in vars(model.output_layer)


def test_gradient_goes_into_main_grad():
    """Added to what other micro-batches left there; a tied weight's dummy gradient is zeros, since
    the hook adds it.
    """
    model = gpt(dtype=torch.bfloat16)
    arguments = batch(torch.randint(0, V, (2, L * S + 1)), S)
    patch.apply(TSTConfig(bag_size=S, iters=1, fused_linear_loss=True))
    _, grads = loss_and_grads(model, arguments)
    weight = model.output_layer.weight
    before = torch.randn(weight.shape)
    weight.main_grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = (
        before.clone(),
        False,
        True,
    )
    _, with_buffer = loss_and_grads(model, arguments)
    assert weight.grad_added_to_main_grad and (with_buffer["output_layer.weight"] == 0).all()
    added = weight.main_grad - before
    close(added, grads["output_layer.weight"], 2**-7)  # largest seen 2e-3


@pytest.mark.parametrize("buffer", [False, True])
def test_many_small_gradients_of_the_weight_add_up(monkeypatch, buffer):
    """All rows alike, a chunk each: sums in 16 bits would stand still at 256 times the first."""
    from megatron_tst.ops import chunks
    from megatron_tst.ops.linear_loss import deferred_logits, loss_of_deferred

    rows, layer = 1024, gpt(dtype=torch.bfloat16).output_layer
    torch.manual_seed(3)
    one, label = torch.randn(1, 1, 32).bfloat16(), torch.tensor([[[5, 7, 5]]])
    if buffer:
        weight = layer.weight
        weight.main_grad = torch.zeros(weight.shape)
        weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, False
    monkeypatch.setitem(chunks.LINEAR_LOSS, "cpu", V * 2)

    def weight_gradient(n):
        layer.weight.grad = None
        if buffer:
            layer.weight.main_grad.zero_()
        with deferred_logits(layer):
            deferred, _ = layer(one.expand(n, 1, 32))
        labels = label.expand(n, 1, 3)
        loss_of_deferred(
            deferred, labels, torch.ones(3), loss="mce", kernel="torch"
        ).sum().backward()
        return (layer.weight.main_grad if buffer else layer.weight.grad).float().clone()

    first = weight_gradient(1)
    assert first.abs().max() > 0.1
    close(weight_gradient(rows), rows * first, 2**-8)  # largest seen 0: one rounding of either


@pytest.mark.parametrize("what", ["another", "bias", "gathers"])
def test_refuses_other_output_layers(what):
    from megatron_tst.ops.linear_loss import deferred_logits

    layer = torch.nn.Linear(4, 4, bias=False) if what == "another" else gpt().output_layer
    if what == "bias":
        layer.bias = torch.nn.Parameter(torch.zeros(V))
    if what == "gathers":
        layer.gather_output = True
    with pytest.raises(ValueError) as refused, deferred_logits(layer):
        pass
    assert str(refused.value) == (
        "--tst-fused-linear-loss: expected an output layer that is a ColumnParallelLinear without "
        f"bias that does not gather, got {type(layer).__name__}. Drop the flag."
    )


def test_gathered_logits_are_not_deferred():
    from megatron_tst.ops.linear_loss import deferred_logits

    layer = gpt().output_layer
    with (
        deferred_logits(layer),
        pytest.raises(ValueError, match="expected logits that stay split .* Drop one of the two"),
    ):
        layer(torch.zeros(2, 1, 32), runtime_gather_output=True)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_collectives_are_of_the_layers_group(monkeypatch, sequence_parallel):
    """Which need not be Megatron's. A group of one gathers no statistics: its are the whole."""
    from types import SimpleNamespace

    from megatron_tst.ops import linear_loss

    def kept(tensor, group):
        asked.append(group)
        return tensor

    mappings, asked = linear_loss.mappings, []
    gather, copy = "gather_from_sequence_parallel_region", "copy_to_tensor_model_parallel_region"
    monkeypatch.setattr(mappings, gather if sequence_parallel else copy, kept)
    layer, group = gpt().output_layer, SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    layer.tp_group, layer.sequence_parallel = group, sequence_parallel
    hidden, labels = torch.randn(L, 2, 32).requires_grad_(), torch.randint(0, V, (L, 2, S))
    deferred = linear_loss.DeferredLogits(layer, hidden, layer.weight)
    loss = linear_loss.loss_of_deferred(
        deferred=deferred, labels=labels, weights=torch.ones(S), loss="mce", kernel="torch"
    )
    assert asked == [group]
    want = multi_hot_cross_entropy(hidden @ layer.weight.t(), labels)
    close(loss, want, 1e-6)
    (grad,) = torch.autograd.grad(loss.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


@pytest.mark.parametrize("loss", ["mce", "mce-alt"])
def test_the_second_of_two_ranks(monkeypatch, loss):
    """It holds the columns from V on, of twice as many. What the first has is put in by hand."""
    from types import SimpleNamespace

    from megatron_tst.ops import linear_loss, torch_kernel

    layer, labels = gpt().output_layer, torch.randint(0, 2 * V, (L, 2, S))
    hidden, first, weights = torch.randn(L, 2, 32), torch.randn(V, 32), torch.ones(S)
    given = labels.view(-1, S), weights, 0, 2 * V, loss == "mce-alt"
    of_first = torch_kernel.statistics((hidden @ first.t()).view(-1, V), *given)

    def gathered(mine, group):
        assert group is layer.tp_group
        return torch.stack([of_first, mine])

    monkeypatch.setattr(linear_loss, "of_all_ranks", gathered)
    copy = "copy_to_tensor_model_parallel_region"
    monkeypatch.setattr(linear_loss.mappings, copy, lambda tensor, group: tensor)
    layer.tp_group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    deferred = linear_loss.DeferredLogits(layer, hidden, layer.weight)
    got = linear_loss.loss_of_deferred(deferred, labels, weights, loss=loss, kernel="torch")
    whole = hidden @ torch.cat([first, layer.weight.detach()]).t()
    close(got, multi_hot_cross_entropy(whole, labels, loss=loss), 1e-6)


def test_rows_at_once(monkeypatch):
    """Logits of five columns in bf16, 49 bytes a chunk: four rows."""
    from megatron_tst.ops import chunks, linear_loss

    monkeypatch.setitem(chunks.LINEAR_LOSS, "cpu", 49)
    hidden, weight = torch.zeros(9, 3).bfloat16(), torch.zeros(5, 3).bfloat16()
    assert list(linear_loss._chunks(hidden, weight)) == [slice(0, 4), slice(4, 8), slice(8, 12)]


def rank_compares_with_the_separate_layer(sequence_parallel):
    """TP ranks: hidden states' and weight's gradients of the fused op against Megatron's output
    layer followed by our loss.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.model_parallel_config import ModelParallelConfig

    from megatron_tst.ops import chunks, linear_loss

    size, rank = dist.get_world_size(), dist.get_rank()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    chunks.LINEAR_LOSS["cpu"] = 5 * V // size * 4
    layer = tensor_parallel.ColumnParallelLinear(
        32,
        V,
        bias=False,
        init_method=torch.nn.init.normal_,
        config=ModelParallelConfig(
            tensor_model_parallel_size=size,
            sequence_parallel=sequence_parallel,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
        ),
    )
    torch.manual_seed(0)
    hidden, labels, weights = (
        torch.randn(L, 2, 32),
        torch.randint(0, V, (L, 2, S)),
        torch.tensor([1.0, 0.5, 0.3]),
    )
    labels[1, 0, 0] = -100
    upstream = torch.randn(L, 2)
    results = []
    for fused in (False, True):
        mine = (hidden.chunk(size)[rank] if sequence_parallel else hidden).clone().requires_grad_()
        layer.weight.grad = None
        if fused:
            with linear_loss.deferred_logits(layer):
                deferred, _ = layer(mine)
            loss = linear_loss.loss_of_deferred(
                deferred, labels, weights, loss="mce", kernel="auto"
            )
        else:
            loss = multi_hot_cross_entropy(layer(mine)[0], labels, weights, tp_group=layer.tp_group)
        (loss * upstream).sum().backward()
        results.append((loss.detach(), mine.grad, layer.weight.grad.clone()))
    for want, got in zip(*results):
        close(got, want, 2e-6)  # largest seen 5e-7


@pytest.mark.parametrize("size, sequence_parallel", [(2, False), (2, True), (4, True)])
def test_tensor_and_sequence_parallel(fork_server, size, sequence_parallel):
    fork_server.call(rank_compares_with_the_separate_layer, sequence_parallel, nproc=size)


def test_logits_of_another_type_are_refused(megatron):
    """--output-logit-dtype (0.20): the fused loss has no logits to make of that type."""
    from types import SimpleNamespace

    from megatron_tst.checks.conflicts import check_fused_linear_loss
    from megatron_tst.errors import TSTError

    def arguments(logits):
        return SimpleNamespace(params_dtype=torch.bfloat16, logit_dtype=logits)

    check_fused_linear_loss(SimpleNamespace(params_dtype=torch.bfloat16))  # before 0.20
    model = gpt(dtype=torch.bfloat16)
    given = batch(torch.randint(0, V, (2, L * S + 1)), S)
    patch.apply(TSTConfig(bag_size=S, iters=1, fused_linear_loss=True))
    for same in (None, torch.bfloat16):
        check_fused_linear_loss(arguments(same))
        model.output_layer.output_dtype = same
        assert model(**given).isfinite().all()
    refused = (
        r"--output-logit-dtype with --tst-fused-.*: expected torch.bfloat16, got torch.float32"
    )
    with pytest.raises(TSTError, match=refused):
        check_fused_linear_loss(arguments(torch.float32))
    model.output_layer.output_dtype = torch.float32
    with pytest.raises(ValueError, match="expected logits of the hidden states' type torch.bfl"):
        model(**given)
    with torch.no_grad():
        model.output_layer.output_dtype = None  # as before: validation is stock
        assert model(**given).isfinite().all()
