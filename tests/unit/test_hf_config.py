"""config.json of a released model: read as transformers reads it, and as flags that Megatron's own
parser and validation take.
"""

import json

import pytest
from support.hf_folder import config_of

from megatron_tst.checks import dry_run
from megatron_tst.errors import TSTError
from megatron_tst.export.architectures import LLAMA3_ROPE, architecture_of
from megatron_tst.export.hf_config import DEFAULTS, arguments, flags
from megatron_tst.json_file import parse_json

LLAMA3 = {"rope_type": "llama3", **LLAMA3_ROPE}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
# what people's files say: (kind, changes of a small config.json; ... leaves a key out)
TAKEN = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", dict(tie_word_embeddings=True)),
    "llama, no tie": ("llama", dict(tie_word_embeddings=...)),
    "llama, no groups": ("llama", dict(num_key_value_heads=...)),
    "llama, null groups": ("llama", dict(num_key_value_heads=None)),
    "llama, no head_dim": ("llama", dict(head_dim=...)),
    "llama, null head_dim": ("llama", dict(head_dim=None)),
    "llama, wide heads": ("llama", dict(head_dim=64)),
    "llama, no positions": ("llama", dict(max_position_embeddings=...)),
    "llama, no eps": ("llama", dict(rms_norm_eps=...)),
    "llama, long eps": ("llama", dict(rms_norm_eps=1.23456789e-06)),
    "llama, no std": ("llama", dict(initializer_range=...)),
    "llama, dropout": ("llama", dict(attention_dropout=0.125)),
    "llama, swish": ("llama", dict(hidden_act="swish")),
    "llama, theta of 4": ("llama", dict(rope_theta=500000.0, rope_scaling=None)),
    "llama, theta of 5": (
        "llama",
        dict(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
    ),
    "llama, empty rope": ("llama", dict(rope_parameters={}, rope_theta=3e4)),
    "llama, theta beside rope": (
        "llama",
        dict(rope_theta=20000, rope_parameters={"rope_type": "default"}),
    ),
    "llama, two thetas": (
        "llama",
        dict(rope_theta=20000, rope_parameters={"rope_type": "default", "rope_theta": 3e4}),
    ),
    "llama, both ropes": (
        "llama",
        dict(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_theta": 5e5}),
    ),
    "llama 3.1 of 4": ("llama", dict(rope_theta=500000.0, rope_scaling=LLAMA3)),
    "llama 3.1 of 5": ("llama", dict(rope_parameters=LLAMA3 | {"rope_theta": 500000.0})),
    "llama 3.1, its positions": (
        "llama",
        dict(
            rope_scaling={k: v for k, v in LLAMA3.items() if not k.startswith("orig")},
            max_position_embeddings=8192,
        ),
    ),
    "llama3, its original outside": (
        "llama",
        dict(
            rope_scaling={k: v for k, v in LLAMA3.items() if not k.startswith("original")},
            original_max_position_embeddings=8192,
        ),
    ),
    "linear of 4": ("llama", dict(rope_scaling={"type": "linear", "factor": 4.0})),
    "linear of 5": ("llama", dict(rope_parameters=LINEAR)),
    "linear of one": ("llama", dict(rope_parameters=LINEAR | {"factor": 1.0})),
    "linear, whole": ("qwen3", dict(rope_parameters=LINEAR | {"factor": 2})),
    "qwen3": ("qwen3", {}),
    "qwen3, no head_dim": ("qwen3", dict(head_dim=...)),
    "qwen3, no groups": ("qwen3", dict(num_key_value_heads=..., num_attention_heads=64)),
    "qwen3, null groups": ("qwen3", dict(num_key_value_heads=None)),
    "qwen3, a window that is off": (
        "qwen3",
        dict(use_sliding_window=False, sliding_window=4096, max_window_layers=1),
    ),
    "qwen3, layer types": ("qwen3", dict(layer_types=["full_attention"] * 2)),
    "qwen3 moe": ("qwen3_moe", {}),
    "qwen3 moe, no norm": ("qwen3_moe", dict(norm_topk_prob=...)),
    "qwen3 moe, no head_dim": ("qwen3_moe", dict(head_dim=...)),
    "qwen3 moe, no groups": ("qwen3_moe", dict(num_key_value_heads=...)),
    "qwen3 moe, no width": ("qwen3_moe", dict(moe_intermediate_size=...)),
    "qwen3 moe, no top k": ("qwen3_moe", dict(num_experts_per_tok=..., num_experts=16)),
    "qwen3 moe, no experts": ("qwen3_moe", dict(num_experts=...)),
    "qwen3 moe, of 5": ("qwen3_moe", dict(num_experts=..., num_local_experts=6)),
    "qwen3 moe, a dense layer": ("qwen3_moe", dict(mlp_only_layers=[0])),
    "qwen3 moe, null": ("qwen3_moe", dict(mlp_only_layers=None)),
    "qwen3 moe, a layer beyond": ("qwen3_moe", dict(mlp_only_layers=[7])),
    "qwen3 moe, every second": ("qwen3_moe", dict(decoder_sparse_step=2, num_hidden_layers=4)),
    "qwen3 moe, top 1": ("qwen3_moe", dict(num_experts_per_tok=1, norm_topk_prob=False)),
}


def theirs(config):
    """transformers' own reading of it."""
    from transformers import AutoConfig

    kind = config["model_type"]
    return AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != "model_type"})


@pytest.mark.parametrize("name", TAKEN)
def test_it_is_read_as_transformers_reads_it(name):
    kind, changes = TAKEN[name]
    config = config_of(kind, **changes)
    args, want = arguments(config), theirs(json.loads(json.dumps(config)))
    head_dim = getattr(want, "head_dim", None) or want.hidden_size // want.num_attention_heads
    rope = want.rope_parameters
    assert (
        vars(args).items()
        >= {
            "num_layers": want.num_hidden_layers,
            "hidden_size": want.hidden_size,
            "num_attention_heads": want.num_attention_heads,
            "num_query_groups": want.num_key_value_heads,
            "kv_channels": head_dim,
            "ffn_hidden_size": want.intermediate_size,
            "max_position_embeddings": want.max_position_embeddings,
            "layernorm_epsilon": want.rms_norm_eps,
            "untie_embeddings_and_output_weights": not want.tie_word_embeddings,
            "vocab_size": want.vocab_size,
            "init_method_std": want.initializer_range,
            "attention_dropout": want.attention_dropout,
            "rotary_base": rope["rope_theta"],
            "use_rope_scaling": rope["rope_type"] == "llama3",
        }.items()
    )
    factor = rope["factor"] if rope["rope_type"] == "linear" else 1
    assert (args.rotary_seq_len_interpolation_factor or 1) == factor
    if kind == "qwen3_moe":
        assert (args.num_experts, args.moe_router_topk, args.moe_ffn_hidden_size) == (
            want.num_experts,
            want.num_experts_per_tok,
            want.moe_intermediate_size,
        )
        assert args.moe_router_pre_softmax is not want.norm_topk_prob
        # Qwen3MoeDecoderLayer
        assert args.moe_layer_freq == [
            int(i not in want.mlp_only_layers and (i + 1) % want.decoder_sparse_step == 0)
            for i in range(want.num_hidden_layers)
        ]


@pytest.mark.parametrize("name", TAKEN)
def test_megatron_takes_the_flags_for_this_model(name):
    """Its parser, its validation and its TransformerConfig."""
    kind, changes = TAKEN[name]
    want = arguments(config_of(kind, **changes))
    given = " ".join(flags(want)).split()
    run = (
        "--micro-batch-size 1 --global-batch-size 1 --seq-length 32 --train-iters 1 --lr 1e-3 "
        "--tokenizer-type NullTokenizer --vocab-size 96 --bf16"
    ).split()
    args = dry_run.validate([*given, *run], 1, "h100")
    asked = set(vars(want)) - {
        "vocab_size",
        "consumed_train_samples",
        "consumed_valid_samples",
        "moe_layer_freq",  # left out where all layers have experts
    }
    if kind != "qwen3_moe":
        asked = {name for name in asked if not name.startswith("moe_")}
    differing = {n for n in asked if getattr(args, n) != getattr(want, n)}
    assert not differing, {n: (getattr(args, n), getattr(want, n)) for n in differing}
    arch = architecture_of(args, 96, "float32")
    expected = architecture_of(want, 96, "float32")
    assert arch.config == expected.config and arch.expert_layers == expected.expert_layers


@pytest.mark.parametrize("kind", DEFAULTS)
def test_defaults_are_those_of_transformers_class(kind):
    from transformers import AutoConfig

    made = type(AutoConfig.for_model(kind))()
    derived = {"num_key_value_heads", "head_dim", "mlp_only_layers"}
    for key, value in DEFAULTS[kind].items():
        if value is not None or key not in derived:
            assert getattr(made, key) == value, key
    assert made.rope_parameters["rope_theta"] == 10000.0


ROPE = "rope: expected default, linear, or Llama 3.1's"
REFUSED = {
    "gpt2": ("llama", dict(model_type="gpt2"), "model_type: expected llama or qwen3 or qwen3_moe"),
    "no type": ("llama", dict(model_type=...), "model_type: expected llama .* got null"),
    "list as type": ("llama", dict(model_type=["llama"]), r'model_type: .*, got \["llama"\]'),
    "bias": (
        "llama",
        dict(attention_bias=True),
        "attention_bias: expected false or null, got true",
    ),
    "mlp bias": ("llama", dict(mlp_bias=True), "mlp_bias: expected false"),
    "gelu": (
        "llama",
        dict(hidden_act="gelu"),
        'hidden_act: expected "silu" or "swish", got "gelu"',
    ),
    "quantised": (
        "llama",
        dict(quantization_config={"quant_method": "fp8"}),
        "quantization_config: expected null, or DeepSeek's .*, got",
    ),
    "window": ("qwen3", dict(use_sliding_window=True), "use_sliding_window: expected false"),
    "moe window": ("qwen3_moe", dict(use_sliding_window=True), "use_sliding_window: expected f"),
    "a window's layer": (
        "qwen3",
        dict(layer_types=["full_attention", "sliding_attention"]),
        'layer_types: expected full_attention in all layers, got "sliding_attention"',
    ),
    "bidirectional": ("llama", dict(is_causal=False), "is_causal: expected true or null, got fal"),
    "yarn": ("llama", dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), ROPE),
    "dynamic": ("qwen3", dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), ROPE),
    "longrope": ("llama", dict(rope_scaling={"type": "longrope"}), ROPE),
    "type of no text": ("llama", dict(rope_scaling={"type": 3}), ROPE),
    "layers of another number": (
        "qwen3",
        dict(layer_types=["full_attention"]),
        "layer_types: expected one for each of the 2 layers, got 1",
    ),
    "llama 3.2's factor": (
        "llama",
        dict(rope_scaling=LLAMA3 | {"factor": 32.0}),
        "rope_scaling: factor: expected 8.0, got 32.0",
    ),
    "llama3, other low": (
        "llama",
        dict(rope_scaling=LLAMA3 | {"low_freq_factor": 2.0}),
        "low_freq_factor: expected 1.0, got 2.0",
    ),
    "llama3, other high": (
        "llama",
        dict(rope_scaling=LLAMA3 | {"high_freq_factor": 8.0}),
        "high_freq_factor: expected 4.0, got 8.0",
    ),
    "llama3, other original": (
        "llama",
        dict(rope_scaling=LLAMA3 | {"original_max_position_embeddings": 4096}),
        "original_max_position_embeddings: expected 8192, got 4096",
    ),
    "llama3, another original outside": (
        "llama",
        dict(rope_scaling=LLAMA3, original_max_position_embeddings=64),
        "original_max_position_embeddings: expected 8192, got 64",
    ),
    "llama3 without factors": (
        "llama",
        dict(rope_scaling={"rope_type": "llama3"}),
        "factor: expected 8.0, got null",
    ),
    "partial": ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor: expected 1.0"),
    "partial rope": ("llama", dict(rope_parameters={"partial_rotary_factor": 0.5}), ROPE),
    "a rope a kind": ("qwen3", dict(rope_parameters={"full_attention": {"rope_theta": 1e4}}), ROPE),
    "a third": (
        "llama",
        dict(rope_scaling={"type": "linear", "factor": 2.5}),
        "factor: expected a w",
    ),
    "no factor": (
        "llama",
        dict(rope_scaling={"type": "linear"}),
        "factor: expected a whole number",
    ),
    "half": (
        "llama",
        dict(rope_scaling={"type": "linear", "factor": 0.5}),
        "of at least 1, got 0.5",
    ),
    "theta": (
        "llama",
        dict(rope_theta=10000.5),
        "rope_theta: expected a whole number, got 10000.5",
    ),
    "theta of text": ("llama", dict(rope_theta="1e6"), 'rope_theta: expected a number .*"1e6"'),
    "theta of 0": ("llama", dict(rope_theta=0), "rope_theta: expected a number of at least 1"),
    "rope is a list": (
        "llama",
        dict(rope_scaling=[8.0]),
        r"rope_scaling: expected a JSON obj.*\[8",
    ),
    "groups": ("llama", dict(num_key_value_heads=3), "num_key_value_heads: expected a divisor"),
    "odd": ("llama", dict(head_dim=7), "head_dim: expected an even number.*, got 7"),
    "more heads than width": (
        "qwen3_moe",
        dict(head_dim=..., num_attention_heads=64, num_key_value_heads=64),
        "head_dim: expected an even number.*, got 0",
    ),
    "uneven": ("llama", dict(hidden_size=34), "hidden_size: expected a multiple of the 4 heads"),
    "step": ("qwen3_moe", dict(decoder_sparse_step=0), "decoder_sparse_step: .* at least 1"),
    "no experts": ("qwen3_moe", dict(num_experts=0), "num_experts: .* at least 1 .*, got 0"),
    "two counts": ("qwen3_moe", dict(num_local_experts=8), r"num_experts: .*, got \[4, 8\]"),
    "top k": ("qwen3_moe", dict(num_experts_per_tok=5), "num_experts_per_tok: .* at most 4, got 5"),
    "top k absent": (
        "qwen3_moe",
        dict(num_experts_per_tok=...),
        "num_experts_per_tok: expected at most the 4 experts, got 8, its default",
    ),
    "top 1": ("qwen3_moe", dict(num_experts_per_tok=1), "norm_topk_prob: expected false where one"),
    "all dense": ("qwen3_moe", dict(mlp_only_layers=[0, 1]), "some layer with experts, got none"),
    "dense by name": (
        "qwen3_moe",
        dict(mlp_only_layers=["0"]),
        "mlp_only_layers: expected numbers",
    ),
    "shared": (
        "qwen3_moe",
        dict(shared_expert_intermediate_size=64),
        "shared_expert_inter.* got 64",
    ),
    "norm of text": ("qwen3_moe", dict(norm_topk_prob="true"), "norm_topk_prob: .*true or false"),
    "eps": ("llama", dict(rms_norm_eps=-1e-6), "rms_norm_eps: .* of at least 0"),
    "null tie": ("llama", dict(tie_word_embeddings=None), "tie_word_embeddings: .*, got null"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_megatron_computes_otherwise_is_refused(name):
    kind, changes, message = REFUSED[name]
    config = config_of(kind) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    with pytest.raises(TSTError, match=f"^F: .*{message}") as error:
        arguments(config, "F")
    assert len(str(error.value)) < 400


SIZES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "num_key_value_heads",
    "head_dim",
    "decoder_sparse_step",
]


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize(
    "value", ["0", "-1", '"32"', "null", "true", "2.0", "[]", "{}", "1" + "0" * 30, "1e3"]
)
def test_a_size_that_is_none_is_refused_by_its_key(key, value):
    config = config_of("qwen3_moe") | {key: parse_json(value, "value")}
    with pytest.raises(TSTError, match=f"^F: {key}: expected a whole number .*, got "):
        arguments(config, "F")


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
def test_sizes_must_be_there(key):
    with pytest.raises(TSTError, match=f"^F: {key}: expected a whole number .*, got no such key"):
        arguments(config_of(**{key: ...}), "F")
