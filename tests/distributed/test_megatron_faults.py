"""What Megatron itself does not keep equal over ranks: the rows of docs/parallelism.md, "What
Megatron itself does not keep equal".

A test that shows a fault of Megatron's fails when Megatron mends it, and then says what to change.
"""

import math
import re
import types

import pytest
import torch
import torch.distributed as dist
from support.close import close
from support.layouts import PER_TOKEN, Case, Layout
from support.paths import ROOT

pytestmark = pytest.mark.numeric

B, L, V = 2, 8, 96
MENDED = "Megatron has mended this. Take its row out of docs/parallelism.md, with this test"


def start(**sizes):
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(**sizes)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    return parallel_state


# Row: logits gathered over the tensor-parallel ranks


def whole_model(kind, gathered):
    """A model over two tensor-parallel ranks, and the further argument of its forward."""
    from support.models import gpt, hybrid

    make = {"gpt": gpt, "hybrid": hybrid, "heads": with_heads}[kind]
    model = make(vocab=V, tensor_model_parallel_size=2)
    if gathered == "parallel_output":  # what parallel_output=False builds
        model.output_layer.gather_output = True
    return model, {"runtime_gather_output": True} if gathered == "runtime_gather_output" else {}


def with_heads(vocab, tied=False, pre_process=True, post_process=True, **settings):
    """GPTModel with one head of multi-token prediction."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
    from support.models import config

    MTPLossLoggingHelper.tracker.clear()
    torch.manual_seed(0)
    settings = config(mtp_num_layers=1, mtp_loss_scaling_factor=0.3, **settings)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    return GPTModel(
        config=settings,
        transformer_layer_spec=layer,
        vocab_size=vocab,
        max_sequence_length=64,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
        mtp_block_spec=get_gpt_mtp_block_spec(settings, layer, use_transformer_engine=False),
    )


def loss_and_gradients(kind, gathered, s):
    from support.models import batch

    model, further = whole_model(kind, gathered)
    if kind == "heads":
        further["loss_mask"] = torch.ones(B, L)
    torch.manual_seed(3)
    loss = model(**batch(torch.randint(0, V, (B, L * (s or 1) + 1)), s), **further)
    loss.sum().backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def rank_takes_its_own_columns(kind):
    import megatron_tst

    start(tensor_model_parallel_size=2)
    ways = "parallel_output", "runtime_gather_output"
    stock = loss_and_gradients(kind, "", None)
    for gathered in ways:
        wrong = loss_and_gradients(kind, gathered, None)
        assert not torch.equal(wrong[0], stock[0]), f"{MENDED}, and _own_columns of loop/patch.py"
        close(wrong[0] - stock[0], torch.full((B, L), math.log(2)), 1e-5)
        assert not all(map(torch.equal, wrong[1:], stock[1:]))
    for config in (
        megatron_tst.TSTConfig(3, iters=1),
        megatron_tst.TSTConfig(3, iters=1, kernel="torch", loss="mce-alt"),
        megatron_tst.TSTConfig(3, iters=1, kernel_in_recovery=True),
    ):
        megatron_tst.apply(config)
        for s in (3, 1, None):
            want = loss_and_gradients(kind, "", s)
            assert len(want) > 9
            for gathered in ways:
                got = loss_and_gradients(kind, gathered, s)
                assert all(map(torch.equal, got, want)), (config, s, gathered)
            if s is None and not config.kernel_in_recovery:
                assert all(map(torch.equal, want, stock))  # ordinary logits: Megatron's own loss
    megatron_tst.remove()


@pytest.mark.parametrize("kind", ["gpt", "hybrid", "heads"])
def test_gathered_logits_have_the_loss_of_split_ones(fork_server, kind):
    """In both phases. Without TST the loss is log(tp) too large, and the gradient lacks labels."""
    fork_server.call(rank_takes_its_own_columns, kind, nproc=2)


# Rows: how much a label of the heads of multi-token prediction weighs


def weight_of_a_label(mask, s, per_token, cp_group, scale=0.3):
    """What process_mtp_loss multiplies each label's loss of the only head with, [b, L]."""
    from megatron.core.transformer import multi_token_prediction as mtp

    mtp.MTPLossLoggingHelper.tracker.clear()
    b, length = mask.shape
    labels = torch.ones((b, length, s) if s else (b, length), dtype=torch.int64)
    config = types.SimpleNamespace(
        mtp_num_layers=1,
        mtp_loss_scaling_factor=scale,
        calculate_per_token_loss=per_token,
        mtp_detach_heads=False,
    )
    hidden = torch.zeros(2 * length, b, 1, requires_grad=True)
    out = mtp.process_mtp_loss(
        hidden_states=hidden,
        labels=labels,
        loss_mask=mask,
        output_layer=lambda hidden, **_: (hidden, None),
        output_weight=torch.zeros(1),
        runtime_gather_output=None,
        is_training=False,
        compute_language_model_loss=lambda labels, logits: logits.squeeze(-1).t(),
        config=config,
        cp_group=cp_group,
    )
    out.sum().backward()
    return hidden.grad[length:].squeeze(-1).t() / scale


def rank_weighs_labels(group, s):
    """Of the heads, over ranks of context or data parallelism with unequal numbers of labels."""
    import megatron_tst

    start(context_parallel_size=2 if group == "cp" else 1)
    megatron_tst.apply()
    rank = dist.get_rank()
    cp_group = dist.group.WORLD if group == "cp" else None
    # of each rank: its labels, and those that have one after them in the sample
    if group == "cp":  # rank 0 holds the first and the last chunk, and no label is masked
        mask, labels, shifted = torch.ones(1, 4), (4, 4), (3, 4)
    else:
        mask, labels, shifted = torch.ones(1, 8), (8, 3), (7, 2)
        mask[:, labels[rank] :] = 0
    for per_token in (False, True):
        weight = weight_of_a_label(mask, s, per_token, cp_group)
        # Megatron divides the sum over ranks by all labels, or by the number of ranks
        weight /= sum(labels) if per_token else 2
        alike = labels[rank] / sum(labels) if per_token else 1 / 2
        want = alike / shifted[rank]
        fair = 1 / sum(shifted)
        assert weight.count_nonzero() == shifted[rank]
        close(weight[weight > 0], torch.full((shifted[rank],), want), 1e-6)
        assert abs(want / fair - 1) > 0.02, MENDED
        if group == "dp":  # a rank without labels has no NaN
            assert not weight_of_a_label(0 * mask, s, per_token, cp_group).any()
        else:  # without masks the flag changes nothing
            close(torch.tensor(want), torch.tensor(1 / 2 / shifted[rank]), 1e-6)
    megatron_tst.remove()


@pytest.mark.parametrize("s", [0, 3], ids=["recovery", "superposition"])
@pytest.mark.parametrize("group", ["cp", "dp"])
def test_labels_of_the_heads_weigh_by_their_rank(fork_server, group, s):
    """Each rank averages over its own labels. --calculate-per-token-loss weighs ranks by their
    labels before the shift, which is not the number after it: with context parallelism and no
    masks it changes nothing, with masks it leaves the shift's part alone.
    """
    fork_server.call(rank_weighs_labels, group, s, nproc=2)


# (model, options, what they differ by from one process with two context-parallel ranks: gradient
# norms of the superposition and the recovery phase, at least and at most)
UNEQUAL = [
    ("dense", "--eod-mask-loss", (0, 1e-6), (1e-3, 2e-2)),
    ("dense", f"--eod-mask-loss {PER_TOKEN}", (0, 1e-6), (0, 1e-6)),
    ("mtp", "", (5e-5, 5e-3), (5e-4, 5e-3)),
    ("mtp", PER_TOKEN, (5e-5, 5e-3), (5e-4, 5e-3)),
    ("mtp", "--eod-mask-loss", (5e-5, 5e-3), (2e-3, 2e-2)),
    ("mtp", f"--eod-mask-loss {PER_TOKEN}", (5e-5, 5e-3), (5e-4, 2e-3)),
]


@pytest.mark.slow
@pytest.mark.parametrize("model, options, superposition, recovery", UNEQUAL)
def test_averages_of_context_parallel_ranks(trainer, model, options, superposition, recovery):
    """What checks/refusals.py warns of, and that its remedy helps."""
    case = Case("cp2", model, options)
    got, want = trainer.train(case, Layout("cp2")), trainer.reference(case)
    off = [abs(a - b) / b for a, b in zip(got.norms, want.norms)]
    for norms, (least, most) in ((off[:3], superposition), (off[3:], recovery)):
        assert least <= max(norms) <= most, (off, MENDED if max(norms) < least else "")


# Row: label smoothing


def rank_smooths():
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    state = start(tensor_model_parallel_size=1)
    torch.manual_seed(0)
    logits, labels = torch.randn(L, B, V), torch.randint(0, V, (L, B))
    alone = vocab_parallel_cross_entropy(logits.clone(), labels, 0.1)
    state.destroy_model_parallel()
    start(tensor_model_parallel_size=2)
    mine = logits.chunk(2, -1)[dist.get_rank()].contiguous()
    got = vocab_parallel_cross_entropy(mine, labels, 0.1)
    whole = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=0.1 * V / (V - 1)
    )
    close(alone.flatten(), whole, 1e-6)
    assert (got.flatten() - whole).abs().max() > 1e-3, MENDED
    others = [torch.empty_like(got) for _ in range(2)]
    dist.all_gather(others, got)
    assert not torch.equal(*others), MENDED


def test_label_smoothing_differs_over_ranks(fork_server):
    fork_server.call(rank_smooths, nproc=2)


def test_nothing_asks_for_label_smoothing(megatron):
    """Neither a flag nor a setting of the model: the loss method never hands it on."""
    import argparse
    import inspect

    from megatron.core.models.common.language_module import language_module
    from megatron.core.transformer import TransformerConfig
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    names = {action.dest for action in parser._actions} | set(vars(TransformerConfig))
    again = "Refuse it in checks/conflicts.py: it is defined for one label a position."
    assert "label_smoothing" not in names, again
    assert "label_smoothing" not in inspect.getsource(language_module), again


# Row: the recomputation of multi-token prediction, and saved activations that are distributed


def rank_recomputes():
    """Two ranks of the global group that hold different data, as replicas of a model with a
    tensor-parallel group of its own do.
    """
    from megatron.core import tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    state = start(tensor_model_parallel_size=2)
    # models of megatron.training have the global group: their data is the same there
    own = ProcessGroupCollection.use_mpu_process_groups().tp
    assert own is state.get_tensor_model_parallel_group()
    data = torch.arange(4.0) + 10 * dist.get_rank()
    given = data.clone().requires_grad_()
    tensor_parallel.checkpoint(lambda x: x * x, True, given).sum().backward()
    assert not torch.equal(given.grad, 2 * data), MENDED
    assert given.grad.tolist() == [0, 2, 24, 26]  # half of the one, half of the other


def test_distributed_activations_take_the_global_group(fork_server):
    fork_server.call(rank_recomputes, nproc=2)


# Rows: the gradient norm


def norm_of_ones(model):
    """The optimizer's gradient norm of gradients that are all one."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(gradient_reduce_div_fusion=False), model
    )
    bf16 = next(model.parameters()).dtype == torch.bfloat16
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-3, bf16=bf16), [wrapped])
    for parameter in model.parameters():
        parameter.main_grad.fill_(1)
    optimizer.prepare_grads()
    return optimizer.get_grad_norm()


def elements(model):
    """Of all weights, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def rank_counts_sinks():
    from megatron.core import parallel_state
    from support.models import gpt

    start(tensor_model_parallel_size=1)
    whole = elements(gpt(softmax_type="learnable"))
    parallel_state.destroy_model_parallel()
    start(tensor_model_parallel_size=2)
    model = gpt(softmax_type="learnable", tensor_model_parallel_size=2)
    missing = 2 * 2  # two layers, the heads of rank 1
    norm = norm_of_ones(model)
    assert abs(norm - whole**0.5) > 1e-3, MENDED
    close(torch.tensor(norm), torch.tensor((whole - missing) ** 0.5), 1e-6)


def test_learnable_sinks_of_other_ranks_are_not_in_the_norm(fork_server):
    fork_server.call(rank_counts_sinks, nproc=2)


def rank_counts_experts(bf16):
    from megatron.core import parallel_state
    from support.models import gpt

    dtype = torch.bfloat16 if bf16 else torch.float32
    start(tensor_model_parallel_size=1)
    whole = elements(gpt(experts=4, dtype=dtype))
    parallel_state.destroy_model_parallel()
    start(tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1)
    model = gpt(
        experts=4,
        dtype=dtype,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
    )
    close(torch.tensor(norm_of_ones(model)), torch.tensor(whole**0.5), 1e-6)


@pytest.mark.parametrize("bf16", [False, True])
def test_experts_of_other_ranks_are_in_the_norm(fork_server, bf16):
    """Megatron-LM#5916 is not in the tested version."""
    fork_server.call(rank_counts_experts, bf16, nproc=2)


# Rows: weights that every tensor-parallel rank has, under heads that are spread over them


def rank_reduces_norms():
    """Without sequence parallelism: which gradients of such weights Megatron sums."""
    from megatron.core.distributed.finalize_model_grads import (
        _allreduce_non_tensor_model_parallel_grads as reduce,
    )
    from support.models import config

    start(tensor_model_parallel_size=2)
    names = "q_layernorm", "k_layernorm", "kv_layernorm", "out_norm"
    model = torch.nn.Module()
    model.ddp_config = types.SimpleNamespace(use_megatron_fsdp=False)
    for name in names:
        weight = torch.nn.Parameter(torch.zeros(2))
        weight.main_grad = torch.ones(2)
        model.register_parameter(name, weight)
    reduce([model], config(qk_layernorm=True, tensor_model_parallel_size=2))
    got = {name: weight.main_grad[0].item() for name, weight in model.named_parameters()}
    # right for one norm a head. MLA's q_layernorm has the whole gradient on every rank: doubled;
    # the gated delta net's out_norm is one a head: only this rank's heads
    assert got == {"q_layernorm": 2, "k_layernorm": 2, "kv_layernorm": 1, "out_norm": 1}, MENDED


def test_norms_that_are_summed_by_their_name(fork_server):
    fork_server.call(rank_reduces_norms, nproc=2)


class Attention(torch.nn.Module):
    """What Transformer Engine's does for latent attention: head sizes of its own."""

    def __init__(self, *_, **__):
        super().__init__()

    def forward(self, query, key, value, *_, **__):
        # [L, b, heads, size] each
        heads = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def latent_gradients(ranks, sequence_parallel):
    """Name -> gradient of this rank's weights of the last layer's latent attention, as the
    optimizer gets it.
    """
    from megatron.core.distributed.finalize_model_grads import (
        _allreduce_non_tensor_model_parallel_grads as reduce,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import MLATransformerConfig
    from support.models import batch, config

    sizes = dict(q_lora_rank=8, kv_lora_rank=12, qk_head_dim=6, qk_pos_emb_head_dim=4, v_head_dim=6)
    plain = config(
        tensor_model_parallel_size=ranks, sequence_parallel=sequence_parallel, qk_layernorm=True
    )
    settings = {
        name: getattr(plain, name)
        for name in (
            "num_layers hidden_size num_attention_heads ffn_hidden_size add_bias_linear "
            "normalization hidden_dropout attention_dropout gated_linear_unit activation_func "
            "use_cpu_initialization masked_softmax_fusion persist_layer_norm "
            "bias_activation_fusion tensor_model_parallel_size sequence_parallel qk_layernorm"
        ).split()
    }
    spec = get_gpt_layer_local_spec(
        qk_layernorm=True, multi_latent_attention=True, normalization="RMSNorm"
    )
    spec.submodules.self_attention.submodules.core_attention = Attention
    torch.manual_seed(0)
    model = GPTModel(
        config=MLATransformerConfig(rope_type="rope", apply_rope_fusion=False, **settings, **sizes),
        transformer_layer_spec=spec,
        vocab_size=V,
        max_sequence_length=64,
        position_embedding_type="rope",
    )
    model.ddp_config = types.SimpleNamespace(use_megatron_fsdp=False)
    torch.manual_seed(3)
    model(**batch(torch.randint(0, V, (B, L + 1)), None)).sum().backward()
    for weight in model.parameters():
        weight.main_grad = weight.grad
    reduce([model], model.config)
    attention = model.decoder.layers[-1].self_attention  # what is wrong in it reaches those before
    return {name: weight.main_grad for name, weight in attention.named_parameters()}


def rank_attends_to_latents():
    from megatron.core import parallel_state

    start(tensor_model_parallel_size=1)
    whole = latent_gradients(1, False)
    parallel_state.destroy_model_parallel()
    start(tensor_model_parallel_size=2)
    norm, down, rank = "q_layernorm.weight", "linear_kv_down_proj.weight", dist.get_rank()
    for sequence_parallel in (False, True):
        got = latent_gradients(2, sequence_parallel)
        # rows of the compressed keys and values, and after them the rotary part's, of rank 1
        want = whole[down].chunk(2)[rank]
        latents = 8 if rank == 0 else 4
        close(got[down][:latents], want[:latents], 1e-5)
        if rank == 1:
            off = (got[down][4:] - want[4:]).norm() / want[4:].norm()
            assert off > 0.1, MENDED  # a rank's own heads alone
        close(got["kv_layernorm.weight"], whole["kv_layernorm.weight"], 1e-5)
        assert sequence_parallel or not torch.allclose(got[norm], whole[norm], rtol=1e-3), MENDED
        close(got[norm], whole[norm] * (1 if sequence_parallel else 2), 1e-5)


def test_gradients_of_latent_attention(fork_server):
    """The queries' compressed norm: doubled without sequence parallelism. The keys' rotary part:
    a rank's own heads, in the local layers with sequence parallelism too, where Transformer
    Engine's gather it (multi_latent_attention.py).
    """
    fork_server.call(rank_attends_to_latents, nproc=2)


# Rows: padding masks in the router, which no batch of pre-training has


def rank_counts_tokens():
    from megatron.core.transformer.moe.moe_utils import get_tokens_per_expert_and_token_count

    start(tensor_model_parallel_size=2)
    routed = torch.zeros(4, 2, dtype=torch.int64)
    routed[: 4 - dist.get_rank(), 0] = 1  # rank 1 has a padded token
    _, local, total = get_tokens_per_expert_and_token_count(
        routed, dist.group.WORLD, topk=1, with_padding_mask=True
    )
    assert (int(local), int(total)) == (7, 7), MENDED  # its own are 4 and 3
    _, local, total = get_tokens_per_expert_and_token_count(routed, dist.group.WORLD, topk=1)
    assert (local, total) == (4, 8)  # without a mask each rank counts its own


def test_a_padding_mask_counts_all_ranks_tokens_as_ones_own(fork_server):
    fork_server.call(rank_counts_tokens, nproc=2)


def attached_losses(monkeypatch, router, valid, with_padding_mask):
    """The global balancing losses that a router attaches to micro-batches of 8 tokens, of which so
    many are no padding, spread evenly over its 4 experts.
    """
    from megatron.core.transformer.moe import router as module

    seen = []
    monkeypatch.setattr(
        module.MoEAuxLossAutoScaler,
        "apply",
        staticmethod(lambda activation, loss: (seen.append(float(loss)), activation)[1]),
    )
    router.reset_global_aux_loss_tracker()
    for tokens in valid:
        scores = torch.full((8, 4), 0.25)
        scores[tokens:] = 0
        routed = torch.zeros(8, 4, dtype=torch.bool)
        for token in range(tokens):
            routed[token, [token % 4, (token + 1) % 4]] = True
        router._apply_global_aux_loss(scores, scores, routed, with_padding_mask)
    return seen


def test_global_balancing_of_unequal_micro_batches(monkeypatch, megatron):
    """Counts of experts are averaged over micro-batches, and divided by the last one's tokens."""
    from support.models import gpt

    balancing = dict(moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=0.01)
    router = gpt(experts=4, **balancing).decoder.layers[0].mlp.router
    close(torch.tensor(attached_losses(monkeypatch, router, (8, 8), False)), [0.01, 0.01], 1e-6)
    close(torch.tensor(attached_losses(monkeypatch, router, (4, 4), True)), [0.01, 0.01], 1e-6)
    unequal = attached_losses(monkeypatch, router, (8, 4), True)
    assert abs(unequal[1] / 0.01 - 1) > 0.1, MENDED
    close(torch.tensor(unequal), [0.01, 0.015], 1e-6)


def test_no_batch_of_pre_training_has_a_padding_mask(monkeypatch, request):
    """The rows above reach no run: the script hands the model none, nor do Megatron's own."""
    from megatron_tst.loop import patch

    request.addfinalizer(patch.remove)  # importing the script patches Megatron's loop
    pretrain_gpt = pytest.importorskip(
        "megatron_tst.pretrain_gpt",
        reason="NOT RUN: our script needs Megatron 0.19",
        exc_type=ImportError,
    )
    given = []

    def model(*_, **named):
        given.append(set(named))

    model.vp_stage = None
    monkeypatch.setattr(pretrain_gpt, "get_attr_wrapped_model", getattr)
    monkeypatch.setattr(pretrain_gpt, "get_batch", lambda *_: [torch.zeros(1, 2)] * 5)
    pretrain_gpt.forward_step(iter(()), model)
    assert given == [{"labels", "loss_mask"}]


# Row: --calculate-per-token-loss, masked labels and the router's balancing loss


def test_balancing_weighs_all_positions_by_the_labels_that_count(monkeypatch, megatron):
    """Gradients are divided by the labels that count, the balancing loss is multiplied by all
    positions: it is positions / labels larger, in every layout alike.
    """
    from support.models import gpt

    balancing = dict(moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=0.01)
    model = gpt(experts=4, calculate_per_token_loss=True, **balancing)
    router = model.decoder.layers[0].mlp.router
    close(torch.tensor(attached_losses(monkeypatch, router, (8,), False)), [8 * 0.01], 1e-6)


def test_global_balancing_is_an_average_over_the_micro_batches_so_far(monkeypatch, megatron):
    """So a step that is cut into other micro-batches has another loss."""
    from megatron.core.transformer.moe import router as module
    from support.models import gpt

    seen = []
    monkeypatch.setattr(
        module.MoEAuxLossAutoScaler,
        "apply",
        staticmethod(lambda activation, loss: (seen.append(float(loss)), activation)[1]),
    )
    balancing = dict(moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=0.01)
    router = gpt(experts=4, **balancing).decoder.layers[0].mlp.router
    halves = torch.zeros(2, 4, 4)
    halves[0, :, :2] = halves[1, :, 2:] = 0.5  # each half of the tokens has experts of its own
    router.reset_global_aux_loss_tracker()
    for half in (halves.flatten(0, 1), *halves):
        router._apply_global_aux_loss(half, half, half > 0)
        if len(seen) == 1:
            router.reset_global_aux_loss_tracker()
    assert abs(seen[1] / seen[0] - 1) > 0.1, MENDED
    close(torch.tensor(seen), [0.01, 0.02, 0.01], 1e-6)


# Row: multi-token prediction, tied embeddings and a pipeline


def rank_describes_its_weights():
    start(pipeline_model_parallel_size=2)
    last = dist.get_rank() == 1
    stage = dict(pre_process=not last, post_process=last)
    sizes = dict(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    for tied in (False, True):
        model = with_heads(V, tied, **stage, **sizes)
        if tied and last:
            with pytest.raises(AssertionError):
                model.sharded_state_dict()
                pytest.fail(f"{MENDED}, and its warning in checks/megatron_faults.py")
        else:
            assert model.sharded_state_dict()


def test_tied_heads_on_a_pipeline_cannot_be_saved(fork_server):
    fork_server.call(rank_describes_its_weights, nproc=2)


def test_every_row_of_the_page_has_its_test():
    """But one, which is read alone: it needs Transformer Engine and two GPUs."""
    page = (ROOT / "docs" / "parallelism.md").read_text()
    section = page.partition("## What Megatron itself")[2].partition("## The matrix")[0]
    rows = [int(number) for number in re.findall(r"^\| (\d+) \|", section, re.M)]
    notes = re.split(r"^(\d+)\. ", section, flags=re.M)[1:]
    assert [int(number) for number in notes[::2]] == rows == list(range(1, len(rows) + 1))
    named = [set(re.findall(r"`(test_\w+)`", note)) for note in notes[1::2]]
    assert [number for number, tests in zip(rows, named) if not tests] == [15]
    here = {name for name in globals() if name.startswith("test_")}
    here -= {"test_every_row_of_the_page_has_its_test"}
    muon = (ROOT / "tests" / "training" / "test_muon.py").read_text()
    elsewhere = set().union(*named) - here
    assert all(f"\ndef {name}(" in muon for name in elsewhere) and here < set().union(*named)
