"""DeepSeek-V3's config.json and Megatron's arguments, each as its own side reads them."""

import argparse
import math

import pytest
from support.hf_folder import config_of

from megatron_tst.checks import dry_run
from megatron_tst.errors import TSTError
from megatron_tst.export.architectures import architecture_of
from megatron_tst.export.hf_config import arguments, blocks_of, flags
from megatron_tst.export.mapping import pairs
from megatron_tst.export.nemo import _check as check_for_bridge

YARN = dict(type="yarn", factor=40.0, mscale=1.0, mscale_all_dim=1.0)
# as they were published: DeepSeek-V3, Kimi K2 (without its beta_fast) and Moonlight
V3 = config_of(
    "deepseek_v3",
    **dict(vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61),
    **dict(num_attention_heads=128, num_key_value_heads=128, max_position_embeddings=163840),
    **dict(q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64),
    **dict(v_head_dim=128, n_routed_experts=256, n_shared_experts=1, moe_intermediate_size=2048),
    **dict(num_experts_per_tok=8, n_group=8, topk_group=4, first_k_dense_replace=3),
    **dict(rope_theta=10000, num_nextn_predict_layers=1, moe_layer_freq=1, ep_size=1),
    **dict(scoring_func="sigmoid", topk_method="noaux_tc", seq_aux=True, aux_loss_alpha=0.001),
    rope_scaling=YARN
    | dict(beta_fast=32, beta_slow=1, factor=40, original_max_position_embeddings=4096),
    quantization_config=dict(
        quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128]
    ),
)
TAKEN = {
    "small": config_of("deepseek_v3"),
    "v3": V3,
    "kimi": config_of("deepseek_v3") | {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1},
    "no rank of queries": config_of("deepseek_v3", q_lora_rank=None),
    "tied": config_of("deepseek_v3", tie_word_embeddings=True),
    "top 1": config_of(
        "deepseek_v3", num_experts_per_tok=1, norm_topk_prob=False, n_group=1, topk_group=1
    ),
    "all groups": config_of("deepseek_v3", n_group=2, topk_group=2),
    "no dense layer": config_of("deepseek_v3", first_k_dense_replace=0),
    "yarn of 5": config_of(
        "deepseek_v3",
        rope_parameters=dict(rope_type="yarn", rope_theta=5e4, factor=4.0, mscale=0.7)
        | dict(mscale_all_dim=0.9, original_max_position_embeddings=4096),
    ),
    "yarn without mscale": config_of(
        "deepseek_v3",
        rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=4096),
    ),
    "an attention factor": config_of(
        "deepseek_v3",
        rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=4096)
        | dict(attention_factor=1.0, mscale=1.0, mscale_all_dim=1.0),
    ),
    "mtp": config_of("deepseek_v3", num_nextn_predict_layers=2),
    "aux": config_of("deepseek_v3", seq_aux=False, aux_loss_alpha=0.01),
}


@pytest.mark.filterwarnings("ignore:megatron_tst")
@pytest.mark.parametrize("name", TAKEN)
def test_megatron_takes_the_flags_for_this_model(name):
    """Its parser, its validation and its configuration; and the same model comes back."""
    want = arguments(TAKEN[name])
    run = (
        "--micro-batch-size 1 --global-batch-size 1 --seq-length 32 --train-iters 1 --lr 1e-3 "
        f"--tokenizer-type NullTokenizer --vocab-size {want.vocab_size} --bf16"
    ).split()
    args = dry_run.validate([*" ".join(flags(want)).split(), *run], 1, "h100")
    # Megatron takes a list of one apart, and a list where all layers have experts is left out
    asked = set(vars(want)) - {"consumed_train_samples", "consumed_valid_samples", "vocab_size"}
    asked -= {"moe_layer_freq", "num_query_groups"}
    differing = {n for n in asked if getattr(args, n) != getattr(want, n)}
    assert not differing, {n: (getattr(args, n), getattr(want, n)) for n in differing}
    arch, expected = (architecture_of(one, want.vocab_size, "float32") for one in (args, want))
    assert arch == expected


@pytest.mark.filterwarnings("ignore:megatron_tst")
@pytest.mark.parametrize("name", TAKEN)
def test_transformers_reads_the_same_out_of_ours(name):
    """What is imported and exported again is the same model in transformers."""
    from transformers import AutoConfig

    config = TAKEN[name] | {"model_type": "deepseek_v3"}
    ours = architecture_of(arguments(TAKEN[name]), config["vocab_size"], "float32").config
    theirs, again = (
        AutoConfig.for_model("deepseek_v3", **{k: v for k, v in one.items() if k != "model_type"})
        for one in (config, ours)
    )
    free = {"architectures", "bos_token_id", "eos_token_id", "dtype", "rope_parameters"}
    free |= {"n_group", "topk_group", "quantization_config", "ep_size", "aux_loss_alpha", "seq_aux"}
    free |= {"scoring_func", "topk_method", "moe_layer_freq"}
    for key, value in theirs.to_dict().items():
        assert key in free or again.to_dict()[key] == value, key
    # a limit to all groups is none
    limits = [
        (one.n_group, one.topk_group) if one.topk_group < one.n_group else None
        for one in (theirs, again)
    ]
    assert limits[0] == limits[1]


@pytest.mark.filterwarnings("ignore:megatron_tst")
@pytest.mark.parametrize("name", [name for name in TAKEN if "yarn" in name or name == "v3"])
def test_the_turns_are_transformers_own(name):
    """YaRN's frequencies and factors, from what came in and from what goes out."""
    from transformers import AutoConfig
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    found = []
    ours = architecture_of(arguments(TAKEN[name]), 96, "float32").config
    for config in (TAKEN[name], ours):
        given = {k: v for k, v in config.items() if k not in ("model_type", "quantization_config")}
        made = AutoConfig.for_model("deepseek_v3", **given)
        turns = theirs.DeepseekV3RotaryEmbedding(made)
        scale = theirs.yarn_apply_mscale(made.rope_parameters, 1.0)
        found.append((turns.inv_freq.tolist(), turns.attention_scaling, scale))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "mscale, all_dim", [(1.0, 1.0), (1.0, 0.0), (0.7, 0.0), (0.7, 0.9), (0.0, 0.8), (0.0, 0.0)]
)
def test_the_turns_are_megatrons(mscale, all_dim):
    """Angles, and what cosines and the softmax are multiplied by, of Megatron's own module."""
    import torch
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as ours
    from transformers import AutoConfig
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    scaled = dict(rope_type="yarn", rotary_scaling_factor=40.0, rotary_base=50000)
    args = run(mscale=mscale, mscale_all_dim=all_dim, **scaled)
    config = architecture_of(args, 96, "float32").config
    made = AutoConfig.for_model(**config)
    turns = theirs.DeepseekV3RotaryEmbedding(made)
    want, factor = ours.YarnRotaryEmbedding(
        args.qk_pos_emb_head_dim,
        rotary_base=args.rotary_base,
        use_cpu_initialization=True,
        scaling_factor=args.rotary_scaling_factor,
        mscale=mscale,
        mscale_all_dim=all_dim,
    ).get_emb(64)
    angles = torch.outer(torch.arange(64.0), turns.inv_freq)
    torch.testing.assert_close(angles.repeat(1, 2), want[:, 0, 0], rtol=1e-6, atol=0)
    assert turns.attention_scaling == pytest.approx(factor, rel=1e-9)
    softmax = ours._yarn_get_mscale(args.rotary_scaling_factor, all_dim) ** 2
    assert theirs.yarn_apply_mscale(made.rope_parameters, 1.0) == pytest.approx(softmax, rel=1e-9)
    again = arguments(config)  # and an import finds the same
    assert (again.mscale, again.mscale_all_dim) in ((mscale, all_dim), (1.0, all_dim))
    assert ours._yarn_get_concentration_factor(40.0, again.mscale, all_dim) == pytest.approx(factor)


REFUSED = {
    "attention bias": (dict(attention_bias=True), "attention_bias: expected false or null"),
    "softmax scores": (dict(scoring_func="softmax"), 'scoring_func: expected "sigmoid"'),
    "greedy groups": (dict(topk_method="greedy"), 'topk_method: expected "noaux_tc"'),
    "every second": (dict(moe_layer_freq=2), "moe_layer_freq: expected 1 or null, got 2"),
    "halves": (dict(rope_interleave=False), "rope_interleave: expected true, got false"),
    "fewer keys": (dict(num_key_value_heads=2), "num_key_value_heads: expected the 4 heads, got 2"),
    "odd positions": (dict(qk_rope_head_dim=5), "qk_rope_head_dim: expected an even number"),
    "not normed": (dict(norm_topk_prob=False), "norm_topk_prob: expected true where 4 of the"),
    "a third of groups": (dict(topk_group=1), "topk_group: expected half of .* 4, got 1"),
    "uneven groups": (dict(n_group=3), "n_group: expected groups of two or more of the 8 experts"),
    "groups of one": (dict(n_group=8), "n_group: expected groups of two or more"),
    "no scale": (dict(routed_scaling_factor=0.0), "routed_scaling_factor: expected a number above"),
    "null groups": (dict(n_group=None), "n_group: expected a whole number .*, got null"),
    "all dense": (
        dict(first_k_dense_replace=2),
        "first_k_dense_replace: expected fewer than the 2",
    ),
    "no shared": (
        dict(n_shared_experts=0),
        "n_shared_experts: expected a whole number of at least",
    ),
    "rank of 0": (dict(q_lora_rank=0), "q_lora_rank: expected a whole number of at least 1"),
    "rank of text": (dict(kv_lora_rank="16"), "kv_lora_rank: expected a whole number"),
    "aux of text": (dict(seq_aux="yes"), "seq_aux: expected true or false"),
    "linear": (
        dict(rope_scaling=dict(type="linear", factor=2.0)),
        "rope: expected default or yarn, for all dimensions",
    ),
    "beta": (  # Kimi K2's
        dict(rope_scaling=YARN | dict(beta_fast=1, original_max_position_embeddings=4096)),
        "beta_fast: expected 32, got 1",
    ),
    "no original": (dict(rope_scaling=YARN), "original_max_position_embeddings: expected 4096"),
    "no factor": (
        dict(rope_scaling=dict(type="yarn", original_max_position_embeddings=4096)),
        "factor: expected a number of at least 1, got no such key",
    ),
    "not truncated": (
        dict(rope_scaling=YARN | dict(truncate=False, original_max_position_embeddings=4096)),
        "truncate: expected true, got false",
    ),
    "a factor of its own": (
        dict(rope_scaling=YARN | dict(attention_factor=3, original_max_position_embeddings=4096)),
        "rope_scaling: expected cosines and sines .*, got by 3",
    ),
    "int8": (
        dict(quantization_config=dict(quant_method="gptq")),
        'quantization_config: expected null, or DeepSeek\'s "fp8" .*, got {"quant_method": "gptq"}',
    ),
    "fp8, no blocks": (
        dict(quantization_config=dict(quant_method="fp8")),
        'quantization_config: .*, got {"quant_method": "fp8"}',
    ),
    "fp8, blocks of text": (
        dict(quantization_config=dict(quant_method="fp8", weight_block_size=["a", 2])),
        "quantization_config: expected null",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_megatron_computes_otherwise_is_refused(name):
    changes, message = REFUSED[name]
    with pytest.raises(TSTError, match=f"^F: .*{message}") as error:
        arguments(config_of("deepseek_v3", **changes), "F")
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_blocks_of_a_quantised_release():
    assert blocks_of(V3) == (128, 128) and blocks_of({}) is None


def run(**changes):
    return argparse.Namespace(**vars(arguments(config_of("deepseek_v3"))) | changes)


@pytest.mark.parametrize(
    "changes",
    [
        # losses, dispatchers and kernels
        dict(moe_z_loss_coeff=1e-3, moe_router_bias_update_rate=1e-2, moe_router_dtype="fp64"),
        dict(moe_token_dispatcher_type="flex", moe_shared_expert_overlap=True),
        dict(mla_down_proj_fusion=True, recompute_modules=["mla_up_proj"], qk_clip=True),
        # what multi-latent attention does not ask
        dict(use_rope_scaling=True, rotary_seq_len_interpolation_factor=4),
        dict(kv_channels=None, num_query_groups=2, group_query_attention=True),
        dict(rope_type="yarn", rotary_scaling_factor=1.0, mscale=0.5, mscale_all_dim=0.7),
        dict(rope_type=None),
        dict(position_embedding_type="none"),
        dict(mtp_num_layers=0, mtp_use_repeated_layer=True),
    ],
)
def test_arguments_that_make_no_other_model(changes):
    assert architecture_of(run(**changes), 96, "float32").config == _config()


def _config():
    return architecture_of(run(), 96, "float32").config


def test_groups_without_a_limit():
    """Megatron asks --moe-router-group-topk alone, and a limit to all is none."""
    for changes in (dict(moe_router_group_topk=None), dict(moe_router_group_topk=4)):
        config = architecture_of(run(**changes), 96, "float32").config
        assert (config["n_group"], config["topk_group"]) == (1, 1)
    assert (_config()["n_group"], _config()["topk_group"]) == (4, 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(qk_layernorm=False), "--multi-latent-attention: expected --qk-layernorm beside"),
        (dict(num_experts=None), "--num-experts and --moe-layer-freq: expected experts in all"),
        (dict(moe_layer_freq=[1, 0]), "--num-experts and --moe-layer-freq: expected experts in al"),
        (dict(moe_router_score_function="softmax"), "-function: expected sigmoid, got softmax"),
        (dict(moe_router_score_function="sqrtsoftplus"), "expected sigmoid, got sqrtsoftplus"),
        (dict(moe_shared_expert_gate=True), "--moe-shared-expert-gate: expected False, got True"),
        (
            dict(moe_shared_expert_intermediate_size=40),
            "--moe-shared-expert-intermediate-size: expected a multiple of the 24 of an expert",
        ),
        (dict(moe_shared_expert_intermediate_size=None), "intermediate-size: .*, got none"),
        (dict(moe_router_group_topk=1), "--moe-router-group-topk: expected half of .* 4, got 1"),
        (dict(moe_router_num_groups=8), "--num-experts: expected at least two experts in each of"),
        (dict(qk_pos_emb_head_dim=5), "--qk-pos-emb-head-dim: expected an even number, got 5"),
        (
            dict(rope_type="rope", rotary_scaling_factor=4.0, mscale_all_dim=0.5),
            "--mscale-all-dim: expected 0 with --rope-type rope, got 0.5",
        ),
        (dict(rotary_interleaved=True), "--rotary-interleaved: expected False"),
        (
            dict(position_embedding_type="learned_absolute"),
            "--position-embedding-type: expected rope or none, got learned_absolute",
        ),
        (dict(moe_latent_size=8), "--moe-latent-size: expected None"),
        (
            dict(moe_shared_expert_glu_interleave_size=8),
            "--moe-shared-expert-glu-interleave-size: expected None",
        ),
        (
            dict(mtp_num_layers=2, mtp_use_repeated_layer=True),
            "--mtp-use-repeated-layer: expected none with --mtp-num-layers above 1, got 2",
        ),
        (dict(experimental_attention_variant="dsa"), "--experimental-attention-variant: expected"),
    ],
)
def test_arguments_that_change_the_model_are_refused_by_name(changes, message):
    with pytest.raises(TSTError, match=message):
        architecture_of(run(**changes), 96, "float32")


def test_another_epsilon_of_the_latents_norms_is_said():
    with pytest.warns(UserWarning, match="--norm-epsilon 1e-05: transformers normalises the laten"):
        architecture_of(run(layernorm_epsilon=1e-5), 96, "float32")


def test_a_norm_that_megatron_adds_is_said():
    with pytest.warns(UserWarning, match="q_lora_rank is null: Megatron-Core 0.19 puts a norm"):
        arguments(config_of("deepseek_v3", q_lora_rank=None))


HYBRID = dict(spec=["a", "hybrid_stack_spec"], is_hybrid_model=True, num_layers=4)


@pytest.mark.parametrize("pattern", ["+-+E", "+-|+E", "+-+E/"])
def test_a_hybrid_model_of_turns_is_the_same_model(pattern):
    """The i-th attention and the i-th MLP are a layer; | are pipeline stages."""
    given = run(hybrid_layer_pattern=pattern, moe_layer_freq=1, **HYBRID)
    arch = architecture_of(given, 96, "float32")
    assert arch.config == _config() and arch.hybrid and arch.expert_layers == {1}
    places = {(pair.ours[0], pair.layer) for pair in pairs(arch) if pair.layer is not None}
    assert ("self_attention.linear_proj.weight", 2) in places
    assert ("mlp.router.weight", 3) in places and ("mlp.linear_fc2.weight", 1) in places


@pytest.mark.parametrize(
    "pattern", ["M*-*", "+-", "++--", "-+E+", "+-+E+", "+-+E/+-", "G-*-", "D-DE", "*-+E", "*E*E"]
)
def test_other_patterns_are_refused(pattern):
    given = run(hybrid_layer_pattern=pattern, moe_layer_freq=1, **HYBRID)
    with pytest.raises(TSTError, match="--(hybrid-layer-pattern|num-exp.*|multi-l.*): expected"):
        architecture_of(given, 96, "float32")


@pytest.mark.parametrize(
    "spec, got", [(["my", "layers"], "my layers"), ("local", "local"), (None, "none"), ([], "none")]
)
def test_a_hybrid_spec_of_ones_own_is_refused(spec, got):
    given = run(hybrid_layer_pattern="+-+E", **HYBRID | dict(spec=spec))
    message = f"--spec: expected Megatron's hybrid_stack_spec, got {got}. A spec of"
    with pytest.raises(TSTError, match=message):
        architecture_of(given, 96, "float32")


@pytest.mark.parametrize(
    "changes, flag",
    [
        ({}, "--multi-latent-attention"),
        (dict(mtp_num_layers=1), "--multi-latent-attention and --mtp-num-layers"),
        (
            dict(hybrid_layer_pattern="+-+E", **HYBRID),
            "--multi-latent-attention and --hybrid-layer-pattern",
        ),
    ],
)
def test_bridges_own_provider_is_refused_by_name(changes, flag):
    given = run(**changes)
    with pytest.raises(TSTError, match=f"^{flag}: expected a Llama, Qwen3 or Qwen3-MoE without"):
        check_for_bridge(given, architecture_of(given, 96, "float32"))


def test_layers_of_multi_token_prediction_lie_after_the_others():
    arch = architecture_of(run(mtp_num_layers=2), 96, "float32")
    names = {name for pair in pairs(arch) for name, _ in pair.theirs}
    for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head"):
        assert {f"model.layers.{n}.{name}.weight" for n in (2, 3)} <= names
    assert "model.layers.3.mlp.experts.7.up_proj.weight" in names


def test_llama_has_no_layers_of_multi_token_prediction():
    given = vars(arguments(config_of("llama"))) | dict(mtp_num_layers=1)
    with pytest.warns(UserWarning, match="prediction .--mtp-num-layers. are left out: LlamaFor"):
        arch = architecture_of(argparse.Namespace(**given), 96, "float32")
    assert arch.mtp_layers == 0 and "num_nextn_predict_layers" not in arch.config


def test_deepseek_v3_has_the_size_that_its_makers_state():
    """671B, and a layer of multi-token prediction with 11.5B of its own and copies of embedding and
    head, 0.9B each (DeepSeek-V3's README_WEIGHTS.md).
    """
    arch = architecture_of(arguments(V3), V3["vocab_size"], "bfloat16")
    own, shared, main = 0, 0, 0
    for pair in pairs(arch):
        for name, shape in pair.theirs:
            size = math.prod(shape)
            if pair.copy:
                shared += size
            elif name.startswith("model.layers.61."):
                own += size
            else:
                main += size
    assert round(main / 1e9) == 671 and round(shared / 2e9, 1) == 0.9
    assert own / 1e9 == pytest.approx(11.5, rel=1e-2)
