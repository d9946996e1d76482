"""A language whose information has no order inside a bag, so TST must win on it: a test of the
wiring, not of the paper's claim.

64 topics, each a distribution over 2048 tokens (Zipf times exp(2 * noise)); a document is one
topic, its tokens independent given it. Three paired seeds through a real GPTModel, equal FLOPs:
every TST run ends below its baseline. If bags were mis-averaged, labels shifted or the switch lost,
the gain would shrink or turn.
"""

import pytest
import torch

V, L, BATCH, STEPS, S, RATIO = 2048, 32, 16, 200, 4, 0.3


def topics(seed):
    generator = torch.Generator().manual_seed(seed)
    zipf = 1 / torch.arange(1, V + 1).float()
    return (zipf * (2 * torch.randn(64, V, generator=generator)).exp()).double()


def documents(language, count, length, generator):
    topic = torch.randint(0, 64, (count,), generator=generator)
    return torch.multinomial(language[topic], length, replacement=True, generator=generator)


def train(seed, s):
    """Final next-token validation loss of a run with bag size s for the first part of its steps."""
    from support.models import gpt

    from megatron_tst.data.bags import bag_view

    language, generator = topics(seed), torch.Generator().manual_seed(seed + 1)
    model = gpt(vocab=V, seed=seed, hidden_size=64, ffn_hidden_size=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    warmup = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 30, (STEPS - i) / (0.2 * STEPS))
    )
    position = torch.arange(L).expand(BATCH, L)
    for step in range(STEPS):
        bags = s if step < RATIO * STEPS else 1
        raw = documents(language, BATCH, bags * L + 1, generator)
        tokens, labels = bag_view(raw, L, bags) if bags > 1 else (raw[:, :-1], raw[:, 1:])
        model(tokens, position, None, labels=labels).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
    held_out = documents(language, 8 * BATCH, L + 1, torch.Generator().manual_seed(99))
    with torch.no_grad():
        model.eval()
        losses = [
            model(part[:, :-1], position, None, labels=part[:, 1:]).mean()
            for part in held_out.split(BATCH)
        ]
    return torch.stack(losses).mean().item()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_superposition_gains_where_order_does_not_matter(patched):
    pairs = [(train(seed, 1), train(seed, S)) for seed in (0, 1, 2)]
    print("baseline, TST:", pairs)
    assert all(tst < baseline for baseline, tst in pairs), pairs
    assert sum(baseline - tst for baseline, tst in pairs) / 3 > 0.05, pairs
