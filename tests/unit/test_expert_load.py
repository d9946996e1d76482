"""The counter of tokens per expert, on Megatron's own router."""

import math

import pytest
import torch
from support.close import close

from megatron_tst.loop.expert_load import ExpertLoad

pytestmark = pytest.mark.numeric


@pytest.fixture
def router(megatron):
    return router_of()


def router_of(score_function="softmax"):
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=3,
        hidden_size=16,
        num_attention_heads=2,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_router_load_balancing_type="none",
        moe_router_score_function=score_function,
        use_cpu_initialization=True,
    )
    router = TopKRouter(config, pg_collection=pg_collection())
    router.set_layer_number(2)
    return router


def pg_collection():
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups()


def test_counts_training_tokens_alone(router):
    load, torch_input = ExpertLoad(), torch.randn(6, 1, 16)
    load.attach([torch.nn.ModuleList([router])])
    chosen = [router(torch_input)[1], router(torch_input * -1)[1]]
    with torch.no_grad():
        router(torch_input)  # the first of two passes of recomputed activations
    router.eval()
    router(torch_input)
    per_expert = sum(m.sum(0) for m in chosen)
    assert torch.equal(load.counts[2], per_expert) and int(per_expert.sum()) == 2 * 6 * 2
    close(load.imbalance(3, 4), [float(per_expert.max()) / 6], 1e-6)
    log_p = torch.stack(
        [router.gating(x).double().log_softmax(-1) for x in (torch_input, torch_input * -1)]
    ).detach()
    want = (-(log_p.exp() * log_p).sum(-1) / math.log(4)).mean()
    close(load.entropy(3), [want], 1e-6)  # largest seen 2e-8
    load.detach()
    router.train()
    router(torch_input)
    assert torch.equal(load.counts[2], per_expert)
    load.attach([router])
    assert load.counts == {} and load.imbalance(3, 4) == [] == load.entropy(3)


def test_probabilities_of_a_sigmoid_router(megatron):
    """Each score by itself is a sigmoid; of a token they are held against their sum."""
    router, load, tokens = router_of("sigmoid"), ExpertLoad(), torch.randn(6, 1, 16) * 9
    load.attach([router])
    router(tokens)
    scores = router.gating(tokens).detach().double().sigmoid()
    p = scores / scores.sum(-1, keepdim=True)
    close(load.entropy(3), [-(p * p.log()).sum(-1).mean() / math.log(4)], 1e-6)


def test_layers_of_multi_token_prediction(megatron):
    """They have no number of their own beyond the model's layers: those above it count as the last
    one. Layers without a token have no figure.
    """
    load = ExpertLoad()
    load.counts = {2: torch.tensor([4, 0]), 3: torch.tensor([1, 3]), 5: torch.tensor([2, 0])}
    load.entropies = {
        layer: torch.tensor([total, 2.0], dtype=torch.float64)
        for layer, total in ((2, 1.0), (3, 2.0), (5, 0.5))
    }
    assert load.imbalance(3, 2) == [2.0, 1.0]  # (4, 0) and (1 + 2, 3)
    assert load.entropy(3) == [0.5, 2.5 / 4]
