"""TST through whole real models of megatron-core: what the patches promise, seen from outside."""

import math

import pytest
import torch
from support.close import close
from support.models import batch, copy_gpt_to_hybrid, deepseek, gpt, hybrid

from megatron_tst.data.bags import bag_view
from megatron_tst.ops import reference

pytestmark = pytest.mark.numeric

V, L, S = 96, 8, 3


def raw_tokens(s, seed=1, rows=2):
    torch.manual_seed(seed)
    return torch.randint(0, V, (rows, L * s + 1))


def loss_and_grads(model, arguments, upstream=None):
    model.zero_grad()
    loss = model(**arguments)
    (loss * (torch.ones_like(loss) if upstream is None else upstream)).sum().backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def stock_and_patched(model, stock_arguments, arguments, kernel="auto"):
    from megatron_tst import TSTConfig
    from megatron_tst.loop import patch

    patch.remove()
    stock = loss_and_grads(model, stock_arguments)
    patch.apply(TSTConfig(kernel=kernel))
    return stock, loss_and_grads(model, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [gpt, hybrid])
def test_bag_of_one_is_stock_bit_for_bit(patched, build, dtype):
    """With the torch kernel; the extension's exp is another one, within an ulp (test_loss.py)."""
    model = build().to(dtype)
    raw = raw_tokens(1)
    (want, want_grads), (got, grads) = stock_and_patched(
        model, batch(raw, None), batch(raw, 1), "torch"
    )
    assert torch.equal(got, want) and patched.status().multi_hot_losses == 1
    for name in grads:
        # the table's gradient is accumulated in fp32 here, in the table's dtype by stock
        if "word_embeddings" not in name or dtype == torch.float32:
            assert torch.equal(grads[name], want_grads[name]), name
        else:
            close(grads[name], want_grads[name], 2**-6)


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_an_ignored_label_of_a_bag_of_one_has_no_loss(patched, kernel):
    from megatron_tst import TSTConfig

    patched.apply(TSTConfig(kernel=kernel))
    model, one = gpt(), batch(raw_tokens(1), 1)
    other = one | dict(labels=one["labels"].clone())
    other["labels"][0, 2], other["labels"][1, 5:] = -100, -100
    ignored = other["labels"].squeeze(-1) == -100
    losses, grads = loss_and_grads(model, other)
    whole, want = loss_and_grads(model, one, (~ignored).float())
    assert not losses[ignored].any() and torch.equal(losses[~ignored], whole[~ignored])
    for name in want:
        close(grads[name], want[name], 1e-6)


def test_ordinary_batches_run_stock_code(patched):
    model = gpt()
    raw = raw_tokens(1)
    (want, want_grads), (got, grads) = stock_and_patched(model, batch(raw, None), batch(raw, None))
    assert torch.equal(got, want) and all(torch.equal(grads[n], want_grads[n]) for n in grads)
    assert (patched.status().superposed_embeddings, patched.status().multi_hot_losses) == (0, 0)


@pytest.mark.parametrize("superpose", ["both", "input", "output"])
@pytest.mark.parametrize("tied, position", [(False, "rope"), (True, "learned_absolute")])
def test_whole_model_equals_the_reference_formulas(patched, superpose, tied, position):
    """Embed with the reference, run the stock decoder, take the reference loss: same losses, same
    gradients everywhere.
    """
    check_formulas(gpt(tied=tied, position=position), superpose, position)


@pytest.mark.parametrize("superpose", ["both", "input", "output"])
def test_a_deepseek_equals_the_reference_formulas(patched, latent_attention, superpose):
    check_formulas(deepseek(), superpose)


def check_formulas(model, superpose, position="rope"):
    raw = raw_tokens(1 if superpose == "output" else S)
    arguments = batch(raw, S, superpose)
    upstream = torch.rand(2, L)
    got, grads = loss_and_grads(model, arguments, upstream)

    model.zero_grad()
    tokens, labels = arguments["input_ids"], arguments["labels"]
    table = model.embedding.word_embeddings.weight
    mean = reference.superposed_embedding(
        table, tokens if tokens.dim() == 3 else tokens.unsqueeze(-1)
    ).float()
    if position == "learned_absolute":
        mean = mean + model.embedding.position_embeddings(arguments["position_ids"])
    logits = model(
        None, arguments["position_ids"], None, decoder_input=mean.transpose(0, 1).contiguous()
    )  # [b, L, V]
    want = reference.multi_hot_cross_entropy(
        logits, labels if labels.dim() == 3 else labels.unsqueeze(-1)
    )
    (want * upstream).sum().backward()
    assert got.shape == (2, L)
    close(got, want, 1e-6)  # largest seen 5e-8
    for name, parameter in model.named_parameters():
        close(grads[name], parameter.grad, 2e-6)  # largest seen 4e-7


@pytest.mark.parametrize("s", [None, 4, 16])
def test_initial_loss_is_about_log_v(patched, s):
    model = gpt(vocab=1000)
    torch.manual_seed(0)
    raw = torch.randint(0, 1000, (4, L * (s or 1) + 1))
    assert model(**batch(raw, s)).mean().item() == pytest.approx(math.log(1000), abs=0.05)


def test_causality(patched):
    """Changing bag k changes nothing before position k-1, and there only through the labels."""
    model = gpt().eval()
    raw = raw_tokens(S)
    k = 5
    changed = raw.clone()
    changed[:, k * S : (k + 1) * S] = (changed[:, k * S : (k + 1) * S] + 1) % V

    def logits(tokens):
        return model(bag_view(tokens, L, S)[0], torch.arange(L).expand(2, L), None)

    with torch.no_grad():
        a, b = logits(raw), logits(changed)
        assert torch.equal(a[:, :k], b[:, :k]) and not torch.equal(a[:, k], b[:, k])
        before, after = model(**batch(raw, S)), model(**batch(changed, S))
    assert torch.equal(before[:, : k - 1], after[:, : k - 1])
    want = reference.multi_hot_cross_entropy(a[:, k - 1], bag_view(changed, L, S)[1][:, k - 1])
    close(after[:, k - 1], want, 1e-6)  # largest seen 4e-8
    assert not torch.equal(before[:, k - 1], after[:, k - 1])


def test_order_inside_a_bag_is_lost(patched):
    model = gpt().eval()
    raw = raw_tokens(S)
    bags = raw[:, :-1].view(2, L, S)
    shuffled = torch.cat([bags[:, :, torch.randperm(S)].reshape(2, -1), raw[:, -1:]], 1)
    with torch.no_grad():
        close(model(**batch(raw, S)), model(**batch(shuffled, S)), 1e-6)  # largest seen 4e-8


def test_gpt_and_hybrid_models_give_the_same_digits(patched):
    one, other = gpt(seed=3), hybrid(seed=4)
    copy_gpt_to_hybrid(one, other)
    for s in (None, 1, S):
        arguments = batch(raw_tokens(s or 1), s)
        a, b = one(**arguments), other(**arguments)
        assert torch.equal(a, b), s


def test_mixture_of_experts_runs_both_phases(patched):
    model = gpt(experts=4, moe_aux_loss_coeff=1e-2, moe_router_load_balancing_type="aux_loss")
    for s in (S, None):
        loss, grads = loss_and_grads(model, batch(raw_tokens(s or 1), s))
        assert loss.isfinite().all() and all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("superpose", ["both", "input", "output"])
@pytest.mark.parametrize("loss", ["mce", "mce-alt"])
def test_every_mode_learns(megatron, superpose, loss):
    from megatron_tst import TSTConfig
    from megatron_tst.loop import patch

    patch.apply(
        TSTConfig(bag_size=S, iters=1, superpose=superpose, loss=loss, target_weighting="power-law")
    )
    try:
        model = gpt()
        arguments = batch(raw_tokens(1 if superpose == "output" else S), S, superpose)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(30):
            losses.append(loss_and_grads(model, arguments)[0].mean().item())
            optimizer.step()
        assert losses[-1] < losses[0] - 1.0, losses
    finally:
        patch.remove()


@pytest.mark.parametrize("kernel", ["torch", "extension"])
def test_kernel_in_the_recovery_phase(megatron, kernel):
    """One label a position through the extension, in training: Megatron's loss and gradients."""
    from megatron_tst import TSTConfig, extension
    from megatron_tst.loop import patch

    if not extension.load().loaded:
        pytest.skip(f"NOT RUN: the extension is {extension.load().description}")
    model, arguments = gpt(), batch(raw_tokens(1), None)
    want, want_grads = loss_and_grads(model, arguments)
    patch.apply(
        TSTConfig(bag_size=S, iters=1, kernel=kernel, kernel_in_recovery=kernel == "extension")
    )
    try:
        got, grads = loss_and_grads(model, arguments)
        assert patch.status().recovery_losses == (kernel == "extension")
        close(got, want, 1e-6)  # largest seen 3e-8
        for name, grad in grads.items():
            close(grad, want_grads[name], 2e-6)  # largest seen 3e-7
        model.eval()
        with torch.no_grad():
            model(**arguments)
        assert patch.status().recovery_losses == (kernel == "extension")  # evaluation is Megatron's
    finally:
        patch.remove()


def test_validation_in_the_superposition_phase_is_stock_evaluation(patched):
    """Train on bags, then evaluate the same weights with the patch on and off: the same bits."""
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for seed in range(5):
        loss_and_grads(model, batch(raw_tokens(S, seed), S))
        optimizer.step()
    model.eval()
    with torch.no_grad():
        on = model(**batch(raw_tokens(1), None))
        patched.remove()
        off = model(**batch(raw_tokens(1), None))
    assert torch.equal(on, off)
