"""Models of architectures that the package has no writer for: how they are trained, and the
config.json that says the same.
"""

from __future__ import annotations

from support.runs import TINY
from support.trained import EP2, GQA, MOE, NORM, RUNS, TIED, TP2, VOCAB

_ALIKE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    intermediate_size=64,
    max_position_embeddings=64,
    rope_theta=50000,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
_GLM = """
    --num-layers 3 --moe-layer-freq [0,1,1] --num-experts 8 --add-qkv-bias --rotary-percent 0.5
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias
    --moe-router-bias-update-rate 1e-2 --moe-shared-expert-intermediate-size 48
    --moe-router-num-groups 2 --moe-router-group-topk 1 --moe-router-topk-scaling-factor 1.5
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-3
    --moe-router-dtype fp32
""".split()
_GPT_OSS = """
    --quick-geglu --glu-linear-offset 1.0 --activation-func-clamp-value 7.0
    --softmax-type learnable --window-size 7,0 --window-attn-skip-freq 2
    --position-embedding-type yarn --rotary-scaling-factor 32
    --yarn-original-max-position-embeddings 4096 --yarn-beta-fast 32 --yarn-beta-slow 1
    --no-yarn-correction-range-round-to-int --moe-router-load-balancing-type none
""".split()
_NO_GLU = [flag for flag in TINY if flag not in ("--swiglu", "--disable-bias-linear")]
FLAGS = {  # name: (processes, flags)
    "glm 4.5, tp2 ep2": (4, [*TINY, *GQA, *NORM, *MOE, *_GLM, *TP2, *EP2]),
    # two, since Megatron's experts with biases fail in the backward of one process: mlp.py adds in
    # place to a view
    "gpt-oss, ep2": (2, [*_NO_GLU, *GQA, *MOE, *_GPT_OSS, *EP2]),
    "qwen2, tied, tp2": (2, [*TIED, *GQA, "--add-qkv-bias", *TP2]),
    "mistral, windows": (1, [*TINY, *GQA, "--window-size", "7,0"]),
}
DEEPSEEK = "deepseek, tp2 ep2"  # which has a writer here too
FLAGS[DEEPSEEK] = RUNS[DEEPSEEK][:2]

CONFIGS = {
    "glm 4.5, tp2 ep2": _ALIKE
    | dict(
        architectures=["Glm4MoeForCausalLM"],
        model_type="glm4_moe",
        num_hidden_layers=3,
        moe_intermediate_size=48,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=1.5,
        norm_topk_prob=True,
        first_k_dense_replace=1,
        attention_bias=True,
        use_qk_norm=True,
        partial_rotary_factor=0.5,
    ),
    "gpt-oss, ep2": _ALIKE
    | dict(
        architectures=["GptOssForCausalLM"],
        model_type="gpt_oss",
        intermediate_size=48,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        attention_bias=True,
        quantization_config=dict(quant_method="mxfp4"),  # of the released weights
        rope_scaling=dict(
            rope_type="yarn",
            factor=32.0,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=False,
            original_max_position_embeddings=4096,
        ),
    ),
    "qwen2, tied, tp2": _ALIKE
    | dict(
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        use_sliding_window=False,
        tie_word_embeddings=True,
    ),
    "mistral, windows": _ALIKE
    | dict(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=8),
    DEEPSEEK: dict(
        architectures=["DeepseekV3ForCausalLM"],
        model_type="deepseek_v3",
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        rope_theta=10000,
        rms_norm_eps=1e-6,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=4,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        first_k_dense_replace=1,
        num_nextn_predict_layers=1,
        tie_word_embeddings=False,
        # as released: transformers has the class, and the code is not asked
        auto_map=dict(AutoConfig="configuration_deepseek.DeepseekV3Config"),
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        moe_layer_freq=1,
    ),
}
GLM, QWEN2, _OSS = "glm 4.5, tp2 ep2", "qwen2, tied, tp2", "gpt-oss, ep2"
# name: (whose checkpoint, config.json with these keys changed, what the refusal says); None: the
# checkpoint without its last norm
REFUSED = {
    "a tensor missing": (
        QWEN2,
        None,
        "expected a tensor decoder.final_layernorm.weight [32], as config.json says, got none",
    ),
    "base": (QWEN2, dict(rope_theta=10000), "--rotary-base: expected rotary_base 10000"),
    "epsilon": (QWEN2, dict(rms_norm_eps=1e-6), "--norm-epsilon: expected layernorm_epsilon"),
    "untied": (
        QWEN2,
        dict(tie_word_embeddings=False),
        "--untie-embeddings-and-output-weights: expected share_embeddings_and_output_weights False",
    ),
    "layers": (QWEN2, dict(num_hidden_layers=3), "--num-layers: expected num_layers 3"),
    "vocabulary": (QWEN2, dict(vocab_size=512), "vocab_size: expected 500, got 512"),
    "windows": (QWEN2, dict(use_sliding_window=True, max_window_layers=0), "use_sliding_window"),
    "linear rope": (
        QWEN2,
        dict(rope_scaling=dict(rope_type="linear", factor=4.0)),
        "rope_scaling: expected default or yarn, got linear",
    ),
    "no class": (QWEN2, dict(architectures=[]), "architectures: expected the class of the model"),
    "code": (
        QWEN2,
        dict(model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        'auto_map: expected a model_type that transformers has, got "mine". Code',
    ),
    "end": (QWEN2, dict(eos_token_id=151643), "eos_token_id: expected ids below"),
    "scaling": (
        GLM,
        dict(routed_scaling_factor=1.0),
        "--moe-router-topk-scaling-factor: expected moe_router_topk_scaling_factor 1.0",
    ),
    "groups": (GLM, dict(n_group=1), "--moe-router-group-topk"),
    "not normalised": (
        GLM,
        dict(norm_topk_prob=False),
        "norm_topk_prob: expected True, got False. Megatron-Bridge does not read this key",
    ),
    "partial": (
        GLM,
        dict(partial_rotary_factor=1.0),
        "--rotary-percent: expected rotary_percent 1.0",
    ),
    "next tokens": (
        GLM,
        dict(num_nextn_predict_layers=1),
        "--mtp-num-layers: expected mtp_num_layers 1",
    ),
    "factor": (
        _OSS,
        dict(rope_scaling=dict(CONFIGS[_OSS]["rope_scaling"], factor=16.0)),
        "rope_scaling: expected yarn_rotary_scaling_factor 32.0, got 16.0",
    ),
    "window": (_OSS, dict(sliding_window=16), "--window-size: expected window_size (15, 0)"),
    "mixtral": (
        QWEN2,
        dict(
            architectures=["MixtralForCausalLM"],
            model_type="mixtral",
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        "got MixtralForCausalLM (Model architecture 'MixtralForCausalLM' is not yet supported)",
    ),
    "minimax": (
        QWEN2,
        dict(
            architectures=["MiniMaxM2ForCausalLM"],
            model_type="minimax_m2",
            num_local_experts=4,
            num_experts_per_tok=2,
            rotary_dim=6,
        ),
        "got MiniMaxM2ForCausalLM (minimax_m2_layer_spec)",
    ),
    "olmoe": (
        QWEN2,
        dict(
            architectures=["OlmoeForCausalLM"],
            model_type="olmoe",
            num_experts=4,
            num_experts_per_tok=2,
        ),
        "got OlmoeForCausalLM (olmoe_layer_spec)",
    ),
    "kimi": (
        DEEPSEEK,
        dict(model_type="kimi_k2"),
        'auto_map: expected a model_type that transformers has, got "kimi_k2"',
    ),
}
# Parameters in billions, as their makers state them: DeepSeek-V3, gpt-oss-120b, Mistral 7B
SIZES = {"DeepseekV3ForCausalLM": 671.0, "GptOssForCausalLM": 116.83, "MistralForCausalLM": 7.24}
