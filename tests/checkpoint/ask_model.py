"""examples/pretrain_gpt_tst.py, and then Megatron's own answers: python ask_model.py OUT FLAGS

OUT gets {prompts [5, 12], logits [5, 12, V] fp32, generated [5, 8], mtp [layers, 5, 12, V]} of the
model after the last iteration, whatever its layout (without pipeline stages); ids are below
--vocab-size. mtp: the logits of multi-token prediction's layers, of which the last ones read beyond
the prompt.
"""

import sys

import megatron.training.training as loop
import torch

from megatron_tst import pretrain_gpt as script


def logits_of(model, tokens):
    """[b, L, V] on every rank: the vocabulary's parts put together, its padding taken off."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return whole(model(tokens, positions, None))


def whole(part):
    """Logits of this rank's part of the vocabulary -> of all of it."""
    from megatron.core import mpu
    from megatron.training import get_args

    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(mpu.get_tensor_model_parallel_world_size())]
    torch.distributed.all_gather(parts, part, group=mpu.get_tensor_model_parallel_group())
    return torch.cat(parts, -1)[..., : get_args().vocab_size]


def train(forward_step, model, *rest, **named):
    from megatron.core.utils import unwrap_model
    from megatron.training import get_args

    result = stock_train(forward_step, model, *rest, **named)
    (asked,) = unwrap_model(model)
    asked.eval()
    with torch.no_grad():
        prompts = torch.randint(
            0, get_args().vocab_size, (5, 12), generator=torch.Generator().manual_seed(0)
        )
        # of each layer of multi-token prediction, whose loss writes into them, and of the model
        seen = []
        hook = asked.output_layer.register_forward_hook(
            lambda _, __, out: seen.append(out[0].clone())
        )
        logits, tokens = logits_of(asked, prompts), prompts
        hook.remove()
        # [L, b, V]
        mtp = [whole(part.transpose(0, 1)) for part in seen[: get_args().mtp_num_layers or 0]]
        for _ in range(8):
            # lengths are even, so that sequence parallelism can cut them
            padded = torch.cat([tokens, tokens[:, : tokens.shape[1] % 2]], 1)
            tokens = torch.cat(
                [tokens, logits_of(asked, padded)[:, tokens.shape[1] - 1].argmax(-1, keepdim=True)],
                1,
            )
    if torch.distributed.get_rank() == 0:
        torch.save(
            {
                "prompts": prompts,
                "logits": logits.clone(),
                "generated": tokens[:, 12:].clone(),
                "mtp": torch.stack(mtp) if mtp else None,
            },
            out,
        )
    return result


if __name__ == "__main__":
    out = sys.argv.pop(1)
    if "--multi-latent-attention" in sys.argv:
        from support import cp_attention, plain_queries

        cp_attention.install()
        plain_queries.install()
    stock_train, loop.train = loop.train, train
    script.main()
