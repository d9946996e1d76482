"""Which parameters Muon has and which Adam, in Megatron's own optimizer over a model with experts
and multi-token prediction, and that what a superposed batch says reaches both.
tests/training/test_muon.py trains with it.
"""

import pytest
import torch
from support.models import batch, config

pytestmark = pytest.mark.numeric
pytest.importorskip("emerging_optimizers")

V, L, S = 96, 8, 3
# 1-D parameters, the tables and nothing else are Adam's (emerging_optimizers.py,
# _is_nonlinear_or_embedding): learned positions are no table to it.
TABLES = {"embedding.word_embeddings.weight", "output_layer.weight"}
MATRICES = {
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.router",
    "linear_fc1",
    "linear_fc2",
    "eh_proj",
    "embedding.position_embeddings",
}


def experts_and_heads(**changes):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker.clear()  # the class's, with the depth of the first model
    torch.manual_seed(0)
    settings = config(
        mtp_num_layers=1,
        mtp_loss_scaling_factor=0.3,
        num_moe_experts=4,
        moe_router_topk=4,  # so that each has a gradient
        moe_ffn_hidden_size=32,
        moe_token_dispatcher_type="alltoall",
        **changes,
    )
    layer = get_gpt_layer_local_spec(num_experts=4, normalization="RMSNorm")
    return GPTModel(
        config=settings,
        transformer_layer_spec=layer,
        vocab_size=V,
        max_sequence_length=64,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=False,
        mtp_block_spec=get_gpt_mtp_block_spec(settings, layer, use_transformer_engine=False),
    )


def optimizer_of(model, **changes):
    """(Megatron's optimizer, name -> the torch optimizer that has the parameter)"""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    settings = dict(optimizer="muon", lr=1e-3, clip_grad=0.0, muon_fp32_matmul_prec="high")
    optimizer = get_megatron_optimizer(OptimizerConfig(**settings | changes), [model])
    names, found = {id(p): name for name, p in model.named_parameters()}, {}
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            found |= {names[id(p)]: part.optimizer for p in group["params"]}
    assert found.keys() == set(names.values())
    return optimizer, found


@pytest.mark.parametrize("scalar", ["adam", "lion"])
def test_who_has_which_parameters(patched, scalar):
    model = experts_and_heads()
    _, found = optimizer_of(model, muon_scalar_optimizer=scalar)
    names = {name for name, inner in found.items() if type(inner).__name__ == "TensorParallelMuon"}
    rest = {"adam": "AdamW", "lion": "Lion"}[scalar]
    assert {type(found[name]).__name__ for name in found.keys() - names} == {rest}
    for name, parameter in model.named_parameters():
        assert (name in names) == (parameter.dim() == 2 and name not in TABLES), name
    ends = {next(end for end in MATRICES if end in name) for name in names}
    assert ends == MATRICES and TABLES <= found.keys() - names
    assert any(name.startswith("mtp.layers.0.") and "router" in name for name in names)


def test_the_gradient_of_bags_reaches_every_optimizer(patched):
    model = experts_and_heads()
    optimizer, found = optimizer_of(model)
    torch.manual_seed(1)
    raw = torch.randint(0, V // 2, (2, L * S + 1))  # the other half of the table is not read
    model(**batch(raw, S), loss_mask=torch.ones(2, L)).sum().backward()
    assert patched.status().superposed_embeddings
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    succeeded, _, _ = optimizer.step()
    assert succeeded
    for name, parameter in model.named_parameters():
        inner = found[name]
        (group,) = [g for g in inner.param_groups if any(p is parameter for p in g["params"])]
        state, grad = inner.state[parameter], grads[name]
        if "momentum_buffer" in state:
            share = 1 - group["momentum"]
            assert set(state) == {"momentum_buffer"} and grad.any()
            assert torch.allclose(state["momentum_buffer"], share * grad, rtol=1e-5, atol=0)
        else:
            first, second = group["betas"]
            assert state["step"] == 1
            assert torch.allclose(state["exp_avg"], (1 - first) * grad, rtol=1e-5, atol=0)
            assert torch.allclose(state["exp_avg_sq"], (1 - second) * grad**2, rtol=1e-4, atol=0)
        assert not torch.equal(parameter, before[name]), name
    table = grads["embedding.word_embeddings.weight"]
    read = torch.zeros(V, dtype=torch.bool)
    read[raw[:, :-1].unique()] = True
    assert torch.equal(table.abs().sum(-1) > 0, read)
