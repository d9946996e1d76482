"""Multi-token prediction over bags: the shift is one bag, the losses are those of the formulas, the
guesses are looked up in the bag.
"""

from types import SimpleNamespace

import pytest
import torch
from support.close import close
from support.models import batch, config, deepseek, forget_metrics

from megatron_tst.loop import seams
from megatron_tst.ops import reference
from megatron_tst.ops.multi_token import accepted_in_bags, rolls_bags

pytestmark = pytest.mark.numeric

V, L, S, B = 96, 8, 3, 2


def mtp_model(depth, **settings):
    """GPTModel with `depth` heads of multi-token prediction."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )

    forget_metrics()
    torch.manual_seed(0)
    changes = config(mtp_num_layers=depth, mtp_loss_scaling_factor=0.3, **settings)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    return GPTModel(
        config=changes,
        transformer_layer_spec=layer,
        vocab_size=V,
        max_sequence_length=64,
        position_embedding_type="rope",
        mtp_block_spec=get_gpt_mtp_block_spec(changes, layer, use_transformer_engine=False),
    )


def test_tokens_and_labels_move_by_one_bag(patched):
    from megatron.core.transformer.multi_token_prediction import roll_tensor

    bags = torch.arange(1, B * L * S + 1).view(B, L, S)
    rolled, total = roll_tensor(bags, shifts=-1, dims=-1)
    assert (
        torch.equal(rolled[:, :-1], bags[:, 1:])
        and not rolled[:, -1].any()
        and total == rolled.sum()
    )
    flat = bags.view(B, -1)
    rolled, _ = roll_tensor(flat, shifts=-1, dims=-1)
    assert torch.equal(rolled[:, :-1], flat[:, 1:]) and not rolled[:, -1].any()


@pytest.mark.parametrize(
    "tensor, dims, rolled_along",
    [
        (torch.arange(B * L * S).view(B, L, S), -1, 1),
        (torch.arange(B * L * S).view(B, L, S), 2, 1),
        (torch.arange(B * L * S).view(B, L, S), 1, 1),
        (torch.arange(B * L * S).view(B, L, S), 0, 0),
        (torch.arange(B * L * S).view(B, L, S).int(), -1, 1),
        (torch.randn(B, 32, L), -1, 2),  # hidden states, whose sequence is last
        (torch.randn(B, 32, L).bfloat16(), -1, 2),
        (torch.rand(B, 32, L) < 0.5, -1, 2),
        (torch.randn(B, L), -1, 1),
        (torch.arange(2 * B * L * S).view(2, B, L, S), -1, 3),
    ],
    ids=lambda value: str(value.dtype)[6:] if torch.is_tensor(value) else str(value),
)
def test_tokens_and_labels_alone_are_rolled_as_bags(
    megatron, monkeypatch, tensor, dims, rolled_along
):
    """Of all that Megatron rolls, by a roll_tensor of 0.20, which may leave the sum out."""
    from megatron.core.transformer import multi_token_prediction as mtp

    from megatron_tst.loop import patch

    stock = mtp.roll_tensor
    want, total = stock(tensor, dims=rolled_along)

    def roll_tensor(
        tensor, shifts=-1, dims=-1, cp_group=None, packed_seq_params=None, return_sum=True
    ):
        rolled, total = stock(tensor, shifts, dims, cp_group, packed_seq_params)
        return rolled, total if return_sum else None

    monkeypatch.setattr(mtp, "roll_tensor", roll_tensor)
    patch.apply()
    try:
        for further in ({}, dict(return_sum=True), dict(return_sum=False)):
            got, summed = mtp.roll_tensor(tensor, shifts=-1, dims=dims, **further)
            assert torch.equal(got, want) and got.dtype == want.dtype
            assert summed == (total if further.get("return_sum", True) else None)
    finally:
        patch.remove()


def test_a_stage_without_tokens_has_none_to_roll():
    assert not rolls_bags(None, -1)


def test_single_tokens_are_no_bags():
    tokens = torch.zeros(B, L, dtype=torch.int64)
    assert not rolls_bags(tokens, -1) and rolls_bags(tokens.unsqueeze(-1), -1)


@pytest.mark.parametrize("bag_size", [None, S])
def test_hidden_states_are_mixed_as_in_stock(megatron, monkeypatch, bag_size):
    """Hidden state mixing (--mtp-hsm): what is mixed into a head are older hidden states, each
    rolled by one position, whether a position is a token or a bag. One position is left out of the
    sequence of all of them, not one channel of all positions.
    """
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer import multi_token_prediction as mtp

    from megatron_tst.loop import patch

    if not hasattr(TransformerConfig, "mtp_hsm"):
        pytest.skip("NOT RUN: Megatron mixes hidden states from 0.20 on")
    rolled, mix = [], mtp._mix_hidden_state_history

    def seen(older, newest, **named):
        rolled.append((older.detach(), newest.detach()))
        return mix(older, newest, **named)

    monkeypatch.setattr(mtp, "_mix_hidden_state_history", seen)
    patch.apply()
    try:
        model = mtp_model(2, mtp_hsm=True)
        model.train()
        arguments = batch(torch.randint(0, V, (B, L * (bag_size or 1) + 1)), bag_size)
        model(**arguments, loss_mask=torch.ones(B, L)).sum().backward()
    finally:
        patch.remove()
    ((older, newest),) = rolled
    assert older.shape[-3:] == newest.shape == (L, B, 32)
    assert not older[:, -1].any() and older[:, :-1].abs().sum(-1).all()


def rank_rolls():
    """Context parallelism: what the ranks have after the roll are the parts of the rolled whole."""
    import torch.distributed as dist
    from megatron.core.utils import get_batch_on_this_cp_rank

    import megatron_tst

    megatron_tst.apply()
    from megatron.core.transformer.multi_token_prediction import roll_tensor

    group = dist.group.WORLD
    whole = torch.arange(1, B * 16 * S + 1).view(B, 16, S)

    def part(tensor):
        return get_batch_on_this_cp_rank(
            {"tokens": tensor.clone()}, is_hybrid_cp=False, cp_group=group
        )["tokens"]

    mine, rolled = part(whole), whole
    for _ in range(3):
        mine, _ = roll_tensor(mine, shifts=-1, dims=-1, cp_group=group)
        rolled, _ = roll_tensor(rolled, shifts=-1, dims=-1)
        assert torch.equal(mine, part(rolled))


@pytest.mark.parametrize("ranks", [2, 4])
def test_over_the_borders_of_context_parallel_ranks(fork_server, ranks):
    fork_server.call(rank_rolls, nproc=ranks)


def deepseek_of_depth(depth):
    return deepseek(V, mtp=depth)


@pytest.mark.parametrize("build, depth", [(mtp_model, 1), (mtp_model, 2), (deepseek_of_depth, 1)])
def test_heads_are_trained_on_the_bags_after_the_next(
    patched, latent_attention, monkeypatch, build, depth
):
    """The loss of head k is the formula's for bags k further on; its gradient comes in with
    mtp_loss_scaling_factor / depth.
    """
    from megatron.core.transformer import multi_token_prediction as mtp

    model = build(depth)
    arguments = batch(torch.randint(0, V, (B, L * S + 1)), S)
    mask = torch.ones(B, L)
    seen, losses = [], []
    compute = type(model).compute_language_model_loss
    monkeypatch.setattr(
        type(model),
        "compute_language_model_loss",
        lambda self, labels, logits: (
            seen.append((labels, logits.detach().clone())),
            compute(self, labels, logits),
        )[1],
    )
    scale = mtp.MTPLossAutoScaler.apply
    monkeypatch.setattr(
        mtp.MTPLossAutoScaler,
        "apply",
        staticmethod(
            lambda hidden, loss: (losses.append(loss.detach().clone()), scale(hidden, loss))[1]
        ),
    )
    model(**arguments, loss_mask=mask)
    labels = arguments["labels"]
    assert len(losses) == depth
    for k, (loss, (used, logits)) in enumerate(zip(losses, seen), start=1):
        assert torch.equal(used[:, :-k], labels[:, k:]), k
        want = reference.multi_hot_cross_entropy(logits.transpose(0, 1), used) * (
            torch.arange(L) < L - k
        )
        factor = 0.3 / depth / (B * (L - k))
        assert loss.abs().sum() > 0
        close(loss, want * factor, 1e-6)  # largest seen 1e-7


def test_every_weight_of_the_heads_learns(patched):
    model = mtp_model(1)
    model(
        **batch(torch.randint(0, V, (B, L * S + 1)), S), loss_mask=torch.ones(B, L)
    ).sum().backward()
    silent = [
        name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum()
    ]
    assert not silent and any(name.startswith("mtp.") for name, _ in model.named_parameters())


counts_guesses = pytest.mark.skipif(
    not seams.MTP_ACCEPTANCE.exists, reason="NOT RUN: Megatron counts right guesses from 0.19 on"
)


@counts_guesses
def test_a_guess_is_right_if_it_is_in_the_bag():
    torch.manual_seed(0)
    logits = torch.zeros(L, B, V)
    guess = torch.randint(0, V - 1, (L, B))
    logits.scatter_(-1, guess.unsqueeze(-1), 1.0)
    labels = torch.full((B, L, S), -100)
    labels[0, 1, 2] = guess[1, 0]
    labels[0, 2] = guess[2, 0]  # three times the same token: one right guess
    labels[1, 3, 0] = guess[3, 1]
    labels[1, 4] = guess[4, 1] + 1
    mask = torch.ones(B, L)
    mask[1, 3] = 0  # right, but does not count
    assert accepted_in_bags(logits, labels, mask, True, None) == (2.0, B * L - 1)
    alone = SimpleNamespace(size=lambda: 1)  # a group of one is not asked
    assert accepted_in_bags(logits, labels, mask, False, alone) == (2.0, B * L - 1)


@counts_guesses
def test_the_ranks_of_a_split_vocabulary_are_asked(monkeypatch):
    from megatron.core.transformer import multi_token_prediction as mtp

    def argmax(logits, group, size):
        asked.append((group, size))
        return logits.argmax(-1)

    asked, group = [], SimpleNamespace(size=lambda: 2)
    monkeypatch.setattr(mtp, "_vocab_parallel_argmax", argmax)
    rest = torch.zeros(B, L, S, dtype=torch.int64), torch.ones(B, L)
    for whole in (False, True):
        assert accepted_in_bags(torch.zeros(L, B, V), *rest, whole, group) == (B * L, B * L)
    assert asked == [(group, 2)]


def rank_counts_guesses():
    import torch.distributed as dist

    size, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    logits, labels, mask = (
        torch.randn(L, B, V),
        torch.randint(0, 8, (B, L, S)),
        torch.rand(B, L) < 0.7,
    )
    logits[..., :8] += 3
    want = accepted_in_bags(logits, labels, mask, True, dist.group.WORLD)
    assert (
        accepted_in_bags(logits.chunk(size, -1)[rank], labels, mask, False, dist.group.WORLD)
        == want
        and want[0] > 0
    )


@counts_guesses
def test_guesses_over_a_split_vocabulary(fork_server):
    fork_server.call(rank_counts_guesses, nproc=2)
