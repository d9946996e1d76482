"""config.json of mixtures of experts as a plan reads it: what it takes, what it says, what it
refuses; and that Megatron takes the flags.
"""

import argparse
import json

import pytest
from support.plans import accepted, planned, screen_of
from support.published import CONFIGS

from megatron_tst.errors import TSTError
from megatron_tst.export import hf_config
from megatron_tst.planning import flags as plan_flags
from megatron_tst.planning import hf_shapes

RUN = "--seq-length 4096 --train-iters 30000 --global-batch-size 1024 --gpus 64".split()


def file_of(tmp_path, name, **changes):
    """A config.json with changes; ... leaves a key out."""
    config = {key: value for key, value in (CONFIGS[name] | changes).items() if value is not ...}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    return file


def read(tmp_path, name, **changes):
    return plan_flags.read(["--hf-config", str(file_of(tmp_path, name, **changes)), *RUN])[0]


def words(tmp_path, name, **changes):
    """The flags of a config.json."""
    return planned("--hf-config", str(file_of(tmp_path, name, **changes)), *RUN)["flags"]


@pytest.mark.parametrize("name", CONFIGS)
def test_megatron_takes_the_flags_and_counts_the_same_model(tmp_path, name):
    from megatron.training.training import num_floating_point_operations

    from megatron_tst import model_size

    kind = CONFIGS[name]["model_type"]
    args, found = accepted(["--hf-config", str(file_of(tmp_path, name)), *RUN])
    size = model_size.size(args)
    assert size.every - size.mtp == found["model"]["parameters"]
    assert size.mtp == found["model"]["mtp_parameters"]
    flops = num_floating_point_operations(args, args.global_batch_size)
    if kind != "gpt_oss":  # whose gate Megatron leaves out
        assert found["cost"]["flops_of_step"] == pytest.approx(flops, rel=1e-12)
    assert args.add_bias_linear == (kind == "gpt_oss")


def test_the_flags_by_hand(tmp_path):
    args = read(tmp_path, "DeepSeek-V2-Lite")
    assert (args.multi_latent_attention, args.q_lora_rank, args.kv_lora_rank) == (True, None, 512)
    assert (args.qk_head_dim, args.qk_pos_emb_head_dim, args.v_head_dim) == (128, 64, 128)
    assert args.moe_layer_freq == [0] + [1] * 26 and args.qk_layernorm
    assert args.moe_shared_expert_intermediate_size == 2 * 1408
    assert args.vocab_size == 102400 and "--moe-router-pre-softmax" in words(
        tmp_path, "DeepSeek-V2-Lite"
    )
    glm = read(tmp_path, "GLM-4.5-Air")
    assert (glm.group_query_attention, glm.num_query_groups, glm.kv_channels) == (True, 8, 128)
    assert (glm.add_qkv_bias, glm.qk_layernorm, glm.mtp_num_layers) == (True, False, 1)
    said = " ".join(words(tmp_path, "GLM-4.5-Air"))
    assert "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --max-" in said
    oss = read(tmp_path, "gpt-oss-20b")
    assert (oss.add_bias_linear, oss.softmax_type, oss.quick_geglu, oss.swiglu) == (
        *(True, "learnable", True, False),
    )
    ling = read(tmp_path, "Ling-mini-2.0")
    assert (ling.moe_router_num_groups, ling.moe_router_group_topk) == (8, 4)
    said = " ".join(words(tmp_path, "Ling-mini-2.0"))
    assert "--moe-router-topk-scaling-factor 2.5 " in said and "--rotary-percent 0.5 " in said
    qwen = read(tmp_path, "Qwen1.5-MoE-A2.7B")
    assert qwen.moe_shared_expert_gate and qwen.add_qkv_bias and not qwen.group_query_attention


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Moonlight-16B-A3B"])
def test_both_readers_read_the_same(tmp_path, name):
    """What import-hf reads exactly, and the shape of it, where config.json is refused there."""
    exact, refused = read(tmp_path, name), read(tmp_path, name, rope_interleave=False)
    said = ["q_lora_rank is null"] * (name != "DeepSeek-V3")  # Megatron-Core 0.19's own norm
    assert len(exact.notes) == len(said) and all(map(str.count, exact.notes, said))
    assert "rope_interleave" in refused.notes[-1]
    assert "import-hf and export-hf refuse it" in refused.notes[-1]
    names = [name for name in plan_flags._MODEL if name != "num_query_groups"]
    names += ["vocab_size", "moe_router_num_groups", "moe_router_group_topk"]
    for key in names:
        assert getattr(exact, key) == getattr(refused, key), key


@pytest.mark.parametrize(
    "name, changes, expected",
    [
        ("GLM-4.5", dict(num_attention_heads=5), "num_key_value_heads: expected a divisor of the"),
        ("GLM-4.5", dict(num_experts_per_tok=161), "at most the 160 experts, got 161"),
        ("GLM-4.5", dict(first_k_dense_replace=92), "experts: expected some layer that has them"),
        ("GLM-4.5", dict(hidden_act="gelu"), 'hidden_act: expected silu, got "gelu"'),
        ("GLM-4.5", dict(hidden_size=None), "hidden_size: expected a whole number"),
        ("GLM-4.5", dict(vocab_size=-1), "vocab_size: expected a whole number"),
        ("GLM-4.5", dict(n_routed_experts=...), "n_routed_experts: expected a whole number"),
        ("GLM-4.5", dict(use_qk_norm=...), "use_qk_norm: expected"),
        ("GLM-4.5", dict(head_dim=None, num_attention_heads=24), "expected a multiple of the 24"),
        ("GLM-4.5", dict(mlp_layer_types=["dense"]), "mlp_layer_types: expected 92 of dense and"),
        ("DeepSeek-V2-Lite", dict(q_lora_rank=...), "q_lora_rank: expected"),
        ("DeepSeek-V2-Lite", dict(attention_bias=True), "attention_bias: expected false"),
        ("DeepSeek-V2-Lite", dict(moe_layer_freq=0), "moe_layer_freq: expected a whole number"),
        ("Kimi-K2", dict(scoring_func="tanh"), "scoring_func: expected sigmoid or softmax"),
        ("Ling-mini-2.0", dict(use_bias=True), "use_bias: expected false, got true"),
        ("gpt-oss-20b", dict(model_type="gpt_oss2"), "model_type: expected one of bailing_moe, "),
        ("gpt-oss-20b", dict(model_type=...), "model_type: expected one of bailing_moe, "),
        ("gpt-oss-20b", dict(model_type=["gpt_oss"]), "model_type: expected one of bailing_moe, "),
        ("Mixtral-8x7B", dict(model_type="minimax"), "got minimax. Plan it by flags"),
        ("DeepSeek-V3", dict(num_hidden_layers=0), "num_hidden_layers: expected a whole number"),
    ],
    ids=str,
)
def test_what_is_refused(tmp_path, capsys, name, changes, expected):
    code, text = screen_of(capsys, "--hf-config", str(file_of(tmp_path, name, **changes)), *RUN)
    assert code == 2 and expected in text and len(text.splitlines()) == 1, text


def test_an_unknown_kind_names_those_that_are_known():
    with pytest.raises(TSTError) as refused:
        hf_shapes.read({"model_type": "rwkv"}, "config.json", hf_config.DEFAULTS)
    known = str(refused.value).split("expected one of ")[1].split(", got rwkv")[0].split(", ")
    assert known == sorted({*hf_shapes.KINDS, *hf_config.DEFAULTS})


@pytest.mark.parametrize(
    "name, changes, notes",
    [
        ("GLM-4.5", {}, []),
        (
            "Mixtral-8x7B",
            dict(sliding_window=4096),
            ["sliding_window of config.json: no size, and"],
        ),
        (
            "MiniMax-M2",
            {},
            ["norms of queries and keys are over all heads; Megatron's are over each"],
        ),
        (
            "GLM-4.5",
            dict(rope_parameters={"rope_type": "yarn"}),
            ["rope_parameters of config.json"],
        ),
        (
            "Kimi-K2",
            dict(scoring_func="softmax"),
            ["the router's expert bias is not in the flags", "rope_scaling of config.json"],
        ),
    ],
    ids=str,
)
def test_what_the_flags_do_not_have_is_said(tmp_path, capsys, name, changes, notes):
    file = file_of(tmp_path, name, **changes)
    found = planned("--hf-config", str(file), *RUN)["notes"]
    assert len(found) == len(notes)
    for note, start in zip(found, notes, strict=True):
        assert note.startswith(start)
    _, text = screen_of(capsys, "--hf-config", str(file), *RUN)
    assert ("\nOf config.json\n" in text) == bool(notes)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, [0, 0, 0] + [1] * 89),
        (dict(first_k_dense_replace=0), [1] * 92),
        (dict(first_k_dense_replace=0, moe_layer_freq=2), [1, 0] * 46),
        (dict(mlp_layer_types=["dense"] + ["sparse"] * 91), [0] + [1] * 91),
    ],
    ids=str,
)
def test_which_layers_have_experts(tmp_path, changes, expected):
    from megatron_tst.model_size import expert_layers

    assert expert_layers(read(tmp_path, "GLM-4.5", **changes)) == expected


def test_multi_token_prediction_can_be_left_out(tmp_path):
    run = ["--hf-config", str(file_of(tmp_path, "GLM-4.5-Air")), *RUN, "--mtp-num-layers", "0"]
    args, found = accepted(run)
    assert found["model"]["mtp_parameters"] == 0 and not args.mtp_num_layers
    assert " ".join(found["flags"]).count("--mtp-num-layers") == 2  # the last counts


def test_layers_of_qwen2_moe(tmp_path):
    args = read(tmp_path, "Qwen1.5-MoE-A2.7B", decoder_sparse_step=2, mlp_only_layers=[1])
    assert args.moe_layer_freq == [0, 0] + [0, 1] * 11


@pytest.mark.parametrize("key", ["moe_layer_freq", "q_lora_rank", "n_group", "scoring_func"])
@pytest.mark.parametrize("value", [None, True, -1, 2, 10**30, 1e300, "x", [1], {"a": 1}], ids=str)
@pytest.mark.parametrize("name", ["DeepSeek-V3", "DeepSeek-V2-Lite", "GLM-4.5", "gpt-oss-20b"])
def test_any_value_is_planned_or_refused_in_a_sentence(tmp_path, name, key, value):
    try:
        planned("--hf-config", str(file_of(tmp_path, name, **{key: value})), *RUN)
    except TSTError as refused:
        assert "\n" not in str(refused)


@pytest.mark.parametrize("pattern", [[1], [0, 1, 1], [1, 0] * 5, [0] * 3 + [1] * 58])
def test_runs_of_layers_are_what_megatron_reads(pattern):
    from megatron.training.arguments import moe_freq_type

    text = hf_shapes.runs(pattern)
    assert moe_freq_type(text) == plan_flags.frequency(text) == pattern


@pytest.mark.parametrize("text", ["1", "3", "[0,1,1]", "([0]*1+[1]*2)", "([1]*3+[0]*1)*3", "[1]"])
def test_a_frequency_is_what_megatron_reads(text):
    from megatron.training.arguments import moe_freq_type

    assert plan_flags.frequency(text) == moe_freq_type(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "0", "-1", "x", "[2]", "[0]*[1]", "[0]+1", "[", "[0]**9", "[0]*99999999999", "[x]"),
        *("[__import__('os')]", "[[0],1]", "(" * 5000 + "[1]" + ")" * 5000, "[1]" + "+[1]" * 99999),
    ],
    ids=lambda text: text[:20],
)
def test_a_frequency_that_is_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected"):
        plan_flags.frequency(text)
