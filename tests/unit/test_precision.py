"""FP8 and NVFP4 rules: which GPU, which shapes, what is warned of."""

import argparse
import copy
import warnings

import pytest

from megatron_tst.checks import refusals
from megatron_tst.checks.precision import check_precision, recipe_of, tokens_of_a_rank
from megatron_tst.config import TSTConfig
from megatron_tst.errors import TSTError
from megatron_tst.hardware import recipes

TST = TSTConfig(bag_size=4, step_ratio=0.3)
H100, B200 = ((9, 0), "13.0"), ((10, 0), "13.0")


def arguments(**changes):
    fine = dict(
        fp8="hybrid",
        fp8_recipe="tensorwise",
        fp4=None,
        fp4_recipe="nvfp4",
        seq_length=2048,
        micro_batch_size=1,
        context_parallel_size=1,
        tensor_model_parallel_size=1,
        sequence_parallel=False,
        first_last_layers_bf16=True,
        fp8_output_proj=False,
        hidden_size=1024,
        padded_vocab_size=128256,
        num_attention_heads=8,
        kv_channels=128,
        group_query_attention=False,
        num_query_groups=1,
        ffn_hidden_size=4096,
        num_experts=None,
        moe_ffn_hidden_size=None,
        expert_tensor_parallel_size=1,
        tp_comm_overlap=False,
        fp8_dot_product_attention=False,
        fp8_multi_head_attention=False,
    )
    return argparse.Namespace(**(fine | changes))


SP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)


CORRECT = {
    "tokens": "in both phases: change one of them.",
    "width": "Use another recipe or another layout.",
    "attention": "Change --seq-length, or leave attention in bf16.",
    "output": "Drop the flag, or change --make-vocab-size-divisible-by.",
}
MXFP8, BLOCKWISE = dict(fp8_recipe="mxfp8"), dict(fp8_recipe="blockwise")
NVFP4 = dict(fp8=None, fp4="e2m1")
TP2, TP4 = (dict(tensor_model_parallel_size=size) for size in (2, 4))
GROUPS = dict(group_query_attention=True)
EXPERTS = dict(num_experts=8, moe_ffn_hidden_size=1024)
# DeepSeek-V3's, on 8 heads
LATENT = dict(
    multi_latent_attention=True,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_head_dim=128,
    qk_pos_emb_head_dim=64,
    v_head_dim=128,
)


@pytest.mark.parametrize(
    "gpu, changes, message",
    [
        (
            None,
            {},
            "--fp8-recipe tensorwise: expected an NVIDIA GPU and Transformer Engine, got training "
            "on CPU. Drop it, or train on a GPU.",
        ),
        (
            None,
            NVFP4,
            "--fp4-format: expected an NVIDIA GPU and Transformer Engine, got training on CPU. "
            "Drop it, or train on a GPU.",
        ),
        (
            ((8, 0), "13.0"),
            {},
            "--fp8-recipe tensorwise: expected sm_89 or newer, got sm_80 with CUDA 13.0. Use one "
            "that runs: none does; train in bf16.",
        ),
        (
            H100,
            MXFP8,
            "--fp8-recipe mxfp8: expected sm_100 or newer, below sm_120, got sm_90 with CUDA 13.0. "
            "Use one that runs: delayed, tensorwise, blockwise.",
        ),
        (
            ((12, 1), "13.0"),
            MXFP8,
            "--fp8-recipe mxfp8: expected sm_100 or newer, below sm_120, got sm_121 with CUDA "
            "13.0. Use one that runs: delayed, tensorwise, blockwise, nvfp4.",
        ),
        (
            H100,
            NVFP4,
            "--fp4-format: expected sm_100 or newer, got sm_90 with CUDA 13.0. Use one that runs: "
            "delayed, tensorwise, blockwise.",
        ),
        (
            ((9, 0), "12.8"),
            BLOCKWISE,
            "--fp8-recipe blockwise: expected sm_90 or newer with CUDA 12.9, got sm_90 with CUDA "
            "12.8. Use one that runs: delayed, tensorwise.",
        ),
        (
            ((8, 9), "13.0"),
            BLOCKWISE,
            "--fp8-recipe blockwise: expected sm_90 or newer with CUDA 12.9, got sm_89 with CUDA "
            "13.0. Use one that runs: delayed, tensorwise.",
        ),
        (
            H100,
            dict(seq_length=2056),
            "--fp8-recipe tensorwise: tokens of a rank: expected a multiple of 16, got 2056. "
            "--seq-length 2056 / CP 1 x --micro-batch-size 1, {tokens}",
        ),
        (
            H100,
            dict(seq_length=72, micro_batch_size=4, context_parallel_size=2, **SP2),
            "--fp8-recipe tensorwise: tokens of a rank: expected a multiple of 16, got 72. "
            "--seq-length 72 / CP 2 / TP 2 x --micro-batch-size 4, {tokens}",
        ),
        (
            H100,  # without sequence parallelism each rank has all positions
            dict(seq_length=24, **TP2),
            "--fp8-recipe tensorwise: tokens of a rank: expected a multiple of 16, got 24. "
            "--seq-length 24 / CP 1 x --micro-batch-size 1, {tokens}",
        ),
        (
            H100,
            dict(fp8_recipe="delayed", seq_length=24),
            "--fp8-recipe delayed: tokens of a rank: expected a multiple of 16, got 24. "
            "--seq-length 24 / CP 1 x --micro-batch-size 1, {tokens}",
        ),
        (
            H100,
            dict(seq_length=2048 + 128, **BLOCKWISE, **SP2),
            "--fp8-recipe blockwise --sequence-parallel: tokens of a rank: expected a multiple of "
            "128, got 1088. --seq-length 2176 / CP 1 / TP 2 x --micro-batch-size 1, {tokens}",
        ),
        (
            B200,
            dict(seq_length=2048 + 16, **MXFP8),
            "--fp8-recipe mxfp8: tokens of a rank: expected a multiple of 32, got 2064. "
            "--seq-length 2064 / CP 1 x --micro-batch-size 1, {tokens}",
        ),
        (
            B200,
            dict(seq_length=2048 + 64, tp_comm_overlap=True, **MXFP8),
            "--fp8-recipe mxfp8 --tp-comm-overlap: tokens of a rank: expected a multiple of 128, "
            "got 2112. --seq-length 2112 / CP 1 x --micro-batch-size 1, {tokens}",
        ),
        (
            B200,
            dict(seq_length=2056, **NVFP4),
            "--fp4-format: tokens of a rank: expected a multiple of 16, got 2056. "
            "--seq-length 2056 / CP 1 x --micro-batch-size 1, {tokens}",
        ),
        (
            B200,
            dict(fp8_multi_head_attention=True, seq_length=192, **MXFP8),
            "--fp8-recipe mxfp8 in attention: positions of a rank: expected a multiple of 128, got "
            "192. {attention}",
        ),
        (
            B200,
            dict(fp8_dot_product_attention=True, seq_length=256, context_parallel_size=4, **MXFP8),
            "--fp8-recipe mxfp8 in attention: positions of a rank: expected a multiple of 128, got "
            "64. {attention}",
        ),
        (
            B200,
            dict(hidden_size=1040, **MXFP8),
            "--fp8-recipe mxfp8: --hidden-size: expected a multiple of 32, got 1040. {width}",
        ),
        (
            H100,
            dict(ffn_hidden_size=11008, **BLOCKWISE, **TP4),
            "--fp8-recipe blockwise: --ffn-hidden-size of a rank: expected a multiple of 128, got "
            "2752. {width}",
        ),
        (
            H100,
            dict(
                num_attention_heads=9,
                hidden_size=576,
                kv_channels=64,
                num_query_groups=3,
                **GROUPS,
                **BLOCKWISE,
            ),
            "--fp8-recipe blockwise: --hidden-size: expected a multiple of 128, got 576. {width}",
        ),
        (
            H100,  # (6 + 2 * 6) * 36: as many query groups as heads, whatever is set
            dict(num_attention_heads=6, kv_channels=36, num_query_groups=1),
            "--fp8-recipe tensorwise: queries, keys and values of a rank: expected a multiple of "
            "16, got 648. {width}",
        ),
        (
            H100,
            dict(num_attention_heads=4, kv_channels=40, **TP4),
            "--fp8-recipe tensorwise: queries, keys and values of a rank: expected a multiple of "
            "16, got 120. {width}",
        ),
        (
            H100,  # (12 + 2 * 3) * 20 / 2
            dict(num_attention_heads=12, kv_channels=20, num_query_groups=3, **GROUPS, **TP2),
            "--fp8-recipe tensorwise: queries, keys and values of a rank: expected a multiple of "
            "16, got 180. {width}",
        ),
        (
            H100,  # queries, keys and values have (12 + 2 * 2) * 20 / 2 = 160
            dict(num_attention_heads=12, kv_channels=20, num_query_groups=2, **GROUPS, **TP2),
            "--fp8-recipe tensorwise: --num-attention-heads x --kv-channels of a rank: expected a "
            "multiple of 16, got 120. {width}",
        ),
        (
            H100,
            dict(num_experts=8, moe_ffn_hidden_size=1000),
            "--fp8-recipe tensorwise: --moe-ffn-hidden-size of a rank: expected a multiple of 16, "
            "got 1000. {width}",
        ),
        (
            H100,  # whole, it is a multiple
            dict(num_experts=8, moe_ffn_hidden_size=1040, expert_tensor_parallel_size=2),
            "--fp8-recipe tensorwise: --moe-ffn-hidden-size of a rank: expected a multiple of 16, "
            "got 520. {width}",
        ),
        (
            H100,
            dict(ffn_hidden_size=4144, **TP2),
            "--fp8-recipe tensorwise: --ffn-hidden-size of a rank: expected a multiple of 16, got "
            "2072. {width}",
        ),
        (
            H100,  # of the dense layers beside experts
            dict(ffn_hidden_size=4144, **EXPERTS, moe_layer_freq=[0, 1], **TP2),
            "--fp8-recipe tensorwise: --ffn-hidden-size of a rank: expected a multiple of 16, got "
            "2072. {width}",
        ),
        (
            H100,
            dict(ffn_hidden_size=1000, **EXPERTS, moe_layer_freq=2),
            "--fp8-recipe tensorwise: --ffn-hidden-size of a rank: expected a multiple of 16, got "
            "1000. {width}",
        ),
        (
            H100,  # whole, it is a multiple; tensor parallelism cuts it, not that of experts
            dict(moe_shared_expert_intermediate_size=2064, **EXPERTS, **TP2),
            "--fp8-recipe tensorwise: --moe-shared-expert-intermediate-size of a rank: expected a "
            "multiple of 16, got 1032. {width}",
        ),
        (
            H100,
            dict(moe_latent_size=1000, **EXPERTS),
            "--fp8-recipe tensorwise: --moe-latent-size: expected a multiple of 16, got 1000. "
            "{width}",
        ),
        (
            H100,  # gpt-oss's
            dict(**EXPERTS | dict(moe_ffn_hidden_size=2880), **BLOCKWISE),
            "--fp8-recipe blockwise: --moe-ffn-hidden-size of a rank: expected a multiple of 128, "
            "got 2880. {width}",
        ),
        (
            H100,
            dict(hidden_size=2880, **BLOCKWISE),
            "--fp8-recipe blockwise: --hidden-size: expected a multiple of 128, got 2880. {width}",
        ),
        (
            B200,
            dict(
                **EXPERTS | dict(moe_ffn_hidden_size=2880, expert_tensor_parallel_size=4), **MXFP8
            ),
            "--fp8-recipe mxfp8: --moe-ffn-hidden-size of a rank: expected a multiple of 32, got "
            "720. {width}",
        ),
        (
            H100,  # the product of two hidden states
            dict(hidden_size=1024 + 16, mtp_num_layers=1, **TP2),
            "--fp8-recipe tensorwise: --hidden-size of a rank, in multi-token prediction: expected "
            "a multiple of 16, got 520. {width}",
        ),
        (
            H100,  # keys and values of (8 + 2 * 1) * 20 = 200; the gate adds 160
            dict(kv_channels=20, attention_output_gate=True, **GROUPS),
            "--fp8-recipe tensorwise: queries, keys and values of a rank: expected a multiple of "
            "16, got 360. {width}",
        ),
        (
            H100,
            dict(**LATENT | dict(q_lora_rank=1000)),
            "--fp8-recipe tensorwise: --q-lora-rank: expected a multiple of 16, got 1000. {width}",
        ),
        (
            H100,
            dict(**LATENT | dict(kv_lora_rank=500)),
            "--fp8-recipe tensorwise: --kv-lora-rank: expected a multiple of 16, got 500. {width}",
        ),
        (
            H100,
            dict(**LATENT | dict(qk_head_dim=12, qk_pos_emb_head_dim=20, v_head_dim=20)),
            "--fp8-recipe tensorwise: --kv-lora-rank + --qk-pos-emb-head-dim: expected a multiple "
            "of 16, got 532. {width}",
        ),
        (
            B200,  # 576 is a multiple of 32, 528 is none
            dict(**LATENT | dict(qk_pos_emb_head_dim=16), **MXFP8),
            "--fp8-recipe mxfp8: --kv-lora-rank + --qk-pos-emb-head-dim: expected a multiple of "
            "32, got 528. {width}",
        ),
        (
            H100,  # 8 heads of 129 on 2 ranks
            dict(**LATENT | dict(qk_head_dim=65), **TP2),
            "--fp8-recipe tensorwise: --num-attention-heads x (--qk-head-dim + "
            "--qk-pos-emb-head-dim) of a rank: expected a multiple of 16, got 516. {width}",
        ),
        (
            H100,
            dict(**LATENT | dict(v_head_dim=65), **TP2),
            "--fp8-recipe tensorwise: --num-attention-heads x (--qk-head-dim + --v-head-dim) of a "
            "rank: expected a multiple of 16, got 772. {width}",
        ),
        (
            H100,  # 8 * (124 + 66) / 2 and 8 * (124 + 68) / 2 are multiples of 8 alone
            dict(**LATENT | dict(qk_head_dim=126, v_head_dim=66, qk_pos_emb_head_dim=66), **TP2),
            "--fp8-recipe tensorwise: --num-attention-heads x --v-head-dim of a rank: expected a "
            "multiple of 16, got 264. {width}",
        ),
        (
            B200,
            dict(fp8_output_proj=True, padded_vocab_size=512 + 32, **MXFP8, **TP2),
            "--fp8-output-proj: vocabulary / TP: expected a multiple of 32, got 272. {output}",
        ),
    ],
)
def test_refused_with_the_numbers(gpu, changes, message):
    with pytest.raises(TSTError) as refused:
        check_precision(TST, arguments(**changes), gpu)
    assert str(refused.value) == message.format(**CORRECT)
    check_precision(TSTConfig(), arguments(**changes), gpu)  # without TST it is Megatron's business


FIRST_LAYER = (
    "megatron_tst: {0}: the first layer sees means of embeddings, then single ones; "
    "--first-last-layers-bf16 keeps it out of {0}"
)


@pytest.mark.parametrize(
    "gpu, changes, message",
    [
        (
            H100,
            dict(fp8_recipe="delayed", first_last_layers_bf16=False),
            "megatron_tst: --fp8-recipe delayed (Megatron's default) keeps scales of earlier "
            "steps, also over the boundary, and newer Transformer Engines refuse to load them from "
            "a checkpoint (NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1, or `megatron-tst boundary "
            "--drop-fp8-state`). tensorwise, blockwise and mxfp8 have no state",
        ),
        (
            H100,
            dict(first_last_layers_bf16=False),
            FIRST_LAYER.format("--fp8-recipe tensorwise"),
        ),
        (B200, dict(first_last_layers_bf16=False, **NVFP4), FIRST_LAYER.format("--fp4-format")),
        (
            H100,
            dict(seq_length=2048 + 64, **BLOCKWISE),
            "megatron_tst: --fp8-recipe blockwise: 2112 tokens of a rank (--seq-length 2112 / CP 1 "
            "x 1); whole blocks need a multiple of 128",
        ),
        (
            H100,  # what mxfp8 would refuse
            dict(seq_length=128 + 64, tp_comm_overlap=True, **BLOCKWISE),
            "megatron_tst: --fp8-recipe blockwise: 192 tokens of a rank (--seq-length 192 / CP 1 x "
            "1); whole blocks need a multiple of 128",
        ),
        (
            B200,
            dict(seq_length=256 + 64, micro_batch_size=3, context_parallel_size=2, **SP2, **NVFP4),
            "megatron_tst: --fp4-format: 240 tokens of a rank (--seq-length 320 / CP 2 / TP 2 x "
            "3); whole blocks need a multiple of 128",
        ),
    ],
)
def test_warned_of(gpu, changes, message):
    with pytest.warns(UserWarning) as caught:
        check_precision(TST, arguments(**changes), gpu)
    assert [str(warning.message) for warning in caught] == [message]


# What another recipe refuses, at a length that is a multiple of what this one needs alone.
ATTENTION = dict(fp8_multi_head_attention=True, fp8_dot_product_attention=True)


@pytest.mark.parametrize(
    "gpu, changes",
    [
        (H100, {}),
        (H100, BLOCKWISE),
        (H100, dict(seq_length=2048, micro_batch_size=4, context_parallel_size=2, **SP2)),
        (H100, dict(seq_length=2056, micro_batch_size=2)),  # the product counts
        (H100, dict(seq_length=2048 + 128, micro_batch_size=2, **BLOCKWISE, **SP2)),
        (H100, dict(seq_length=2 * (1024 + 16), **SP2)),
        (H100, dict(seq_length=1024 + 16, tp_comm_overlap=True, **ATTENTION)),
        (H100, dict(seq_length=128 + 64, micro_batch_size=2, **ATTENTION, **BLOCKWISE)),
        (B200, dict(seq_length=1024 + 32, **MXFP8)),
        (B200, dict(seq_length=2 * (1024 + 32), **MXFP8, **SP2)),
        (B200, dict(seq_length=128, tp_comm_overlap=True, **ATTENTION, **MXFP8)),
        (
            B200,
            dict(
                fp8_recipe="mxfp8",
                fp8_output_proj=True,
                fp8_multi_head_attention=True,
                tp_comm_overlap=True,
            ),
        ),
        (B200, dict(padded_vocab_size=16, **MXFP8)),  # the output layer is in bf16
        # before the tokenizer is built
        (B200, dict(padded_vocab_size=None, fp8_output_proj=True, **MXFP8)),
        (B200, NVFP4),
        # 576 wide into the latent of keys and values, in blocks of 128: as published
        (H100, LATENT | BLOCKWISE),
        (H100, LATENT | dict(q_lora_rank=None) | SP2),
        (B200, LATENT | MXFP8 | SP2),
        # which multi-latent attention does not have, and a model of experts alone
        (H100, LATENT | dict(kv_channels=3)),
        (H100, EXPERTS | dict(ffn_hidden_size=1000, moe_layer_freq=1)),
        (H100, EXPERTS | dict(ffn_hidden_size=1000, moe_layer_freq=[1, 1])),
        (H100, EXPERTS | dict(ffn_hidden_size=1000, hybrid_layer_pattern="*E")),
        (H100, dict(fp8_recipe="custom", seq_length=2049)),  # the user's own
        (None, dict(fp8=None)),
    ],
)
def test_what_fits_says_nothing(gpu, changes):
    with warnings.catch_warnings(action="error"):
        check_precision(TST, arguments(**changes), gpu)


@pytest.mark.parametrize(
    "config",
    [TST, TSTConfig(bag_size=4, step_ratio=0.3, fused_linear_loss=True)],
    ids=["", "fused linear"],
)
def test_gathering_parameters_in_fp8_passes_through(config):
    """The weights that gather in FP8 and the buffers they reuse are Transformer Engine's linear
    layers', not the embedding or output layer.
    """
    args = arguments(
        fp8_recipe="mxfp8",
        fp8_param_gather=True,
        reuse_grad_buf_for_mxfp8_param_ag=True,
        train_iters=100,
        train_samples=None,
        global_batch_size=8,
    )
    before = copy.copy(args)
    with warnings.catch_warnings(action="error"):
        refusals.check_arguments(config, args, lambda: B200)
    assert args == before


def test_flags_that_a_version_does_not_have():
    names = "fp8 fp8_recipe seq_length micro_batch_size tensor_model_parallel_size".split()
    names += "context_parallel_size sequence_parallel hidden_size num_attention_heads".split()
    names += "kv_channels group_query_attention ffn_hidden_size num_experts".split()
    args = argparse.Namespace(**{name: getattr(arguments(), name) for name in names})
    with pytest.warns(UserWarning) as caught:
        check_precision(TST, args, H100)
    (said,) = caught
    assert "the first layer sees means of embeddings" in str(said.message)
    args.fp8_recipe = "delayed"
    with pytest.warns(UserWarning) as caught:
        check_precision(TST, args, H100)
    (said,) = caught
    assert "Megatron's default" in str(said.message)
    assert recipe_of(argparse.Namespace()) is None
    assert recipe_of(argparse.Namespace(fp8="e4m3")) == "delayed"
    assert recipe_of(argparse.Namespace(fp4="e2m1")) == "nvfp4"
    assert recipe_of(argparse.Namespace(fp4="e2m1", fp4_recipe="custom")) == "custom"


def test_recipe_and_tokens():
    assert [
        recipe_of(arguments(**c))
        for c in ({}, dict(fp8=None), dict(fp8_recipe=None), dict(fp8=None, fp4="e2m1"))
    ] == [
        "tensorwise",
        None,
        "delayed",
        "nvfp4",
    ]
    assert (
        tokens_of_a_rank(arguments(tensor_model_parallel_size=2)) == 2048
    )  # without sequence parallelism each rank has all
    assert tokens_of_a_rank(arguments(micro_batch_size=3, context_parallel_size=2, **SP2)) == 1536


@pytest.mark.parametrize(
    "capability, cuda, runs",
    [
        ((8, 0), "13.0", ""),
        ((8, 9), "13.0", "delayed tensorwise"),
        ((9, 0), None, "delayed tensorwise"),
        ((9, 0), "12.8", "delayed tensorwise"),
        ((9, 0), "12.9", "delayed tensorwise blockwise"),
        ([10, 0], "13.0", "delayed tensorwise blockwise mxfp8 nvfp4"),
        ((10, 3), "13.0", "delayed tensorwise blockwise mxfp8 nvfp4"),
        ((12, 0), "12.9", "delayed tensorwise blockwise nvfp4"),
    ],
)
def test_which_recipes_run_where(capability, cuda, runs):
    assert recipes(capability, cuda) == runs.split()
