"""python make_models.py FOLDER: models of transformers' own making, with random weights, and its
answers.

FOLDER/<name>/hf is the model as transformers writes it, answers.pt its prompts and logits. In a
process without Megatron's shims.
"""

import sys
from pathlib import Path

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
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
DEEPSEEK = SIZES | dict(
    num_hidden_layers=3,
    num_key_value_heads=4,
    moe_intermediate_size=16,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    num_nextn_predict_layers=0,
    bos_token_id=None,
    eos_token_id=None,
)
del DEEPSEEK["head_dim"]
YARN = dict(  # DeepSeek-V3's
    rope_type="yarn",
    rope_theta=10000.0,
    factor=40.0,
    original_max_position_embeddings=4096,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
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
    "deepseek": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(**DEEPSEEK, rope_parameters=dict(YARN))
    ),
    "deepseek-tied": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **DEEPSEEK | dict(q_lora_rank=None, n_group=1, topk_group=1, first_k_dense_replace=0),
            tie_word_embeddings=True,
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
        for at, buffer in model.named_buffers():
            if at.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(buffer, std=0.2)
        model.save_pretrained(Path(folder) / name / "hf")
        prompts = torch.randint(0, 500, (5, 12), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.save(
                {"prompts": prompts, "logits": model(prompts).logits},
                Path(folder) / name / "answers.pt",
            )


if __name__ == "__main__":
    main(sys.argv[1])
