"""python make_models.py FOLDER: models of transformers' own making, with random weights, and its
answers.

FOLDER/<name>/hf is the model as transformers writes it, answers.pt its prompts and logits. In a
process without Megatron's shims.
"""

import sys
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES = dict(
    vocab_size=500,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    intermediate_size=80,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    hidden_act="silu",
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=LLAMA3)
    ),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=False)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES,
            tie_word_embeddings=False,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            norm_topk_prob=True,
            mlp_only_layers=[],
        )
    ),
    "qwen3-moe-mixed": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES,
            tie_word_embeddings=False,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            norm_topk_prob=False,
            mlp_only_layers=[0],
        )
    ),
}


def main(folder):
    for i, (name, make) in enumerate(MODELS.items()):
        torch.manual_seed(i)
        model = make().float().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(
                parameter, std=0.08
            ) if parameter.dim() > 1 else torch.nn.init.uniform_(parameter, 0.7, 1.3)
        model.save_pretrained(Path(folder) / name / "hf")
        prompts = torch.randint(0, 500, (5, 12), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.save(
                {"prompts": prompts, "logits": model(prompts).logits},
                Path(folder) / name / "answers.pt",
            )


if __name__ == "__main__":
    main(sys.argv[1])
