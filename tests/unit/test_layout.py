"""The planner's rules of a parallel layout: each rule with its numbers, and when it is broken."""

import argparse
import dataclasses
import warnings

import pytest

from megatron_tst.checks import layout
from megatron_tst.config import TSTConfig

TST = TSTConfig(6, step_ratio=0.3)
H100, B200 = (9, 0), (10, 3)
OF_TST = (
    "all that checks/refusals.py asks, --seq-length (even over CP and, with --sequence-parallel, "
    "TP) first"
)


def arguments(**changes):
    """A run that divides, on 60 GPUs: TP 2 x PP 3 x CP 5, so DP 2."""
    fine = dict(
        gpus=60,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=3,
        context_parallel_size=5,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=2,
        sequence_parallel=False,
        num_layers=6,
        hidden_size=512,
        num_attention_heads=8,
        kv_channels=64,
        group_query_attention=False,
        num_query_groups=8,
        ffn_hidden_size=1024,
        num_experts=None,
        moe_ffn_hidden_size=1024,
        micro_batch_size=3,
        global_batch_size=12,
        seq_length=1280,
        train_iters=1000,
        train_samples=None,
        fp8=None,
        fp8_recipe="tensorwise",
        fp4=None,
        first_last_layers_bf16=True,
    )
    return argparse.Namespace(**fine | changes)


def asked(config=TST, capability=H100, **changes):
    """-> (what, rule, fault) of each rule; warnings"""
    found, warned = layout.checks(arguments(**changes), config, capability, "13.0")
    return [(check.what, check.rule, check.fault) for check in found], warned


GROUPS = dict(group_query_attention=True)
EXPERTS = dict(
    num_experts=8,
    expert_model_parallel_size=4,
    gpus=240,
    global_batch_size=24,
    sequence_parallel=True,
)
ONE = dict(
    gpus=1,
    tensor_model_parallel_size=1,
    pipeline_model_parallel_size=1,
    context_parallel_size=1,
    expert_tensor_parallel_size=1,
)
TP_PP_CP = ("--gpus 60", "a multiple of TP x PP x CP = 2 x 3 x 5 = 30")


def test_the_rules_of_a_dense_model():
    assert asked() == (
        [
            (*TP_PP_CP, ""),
            ("--global-batch-size 12", "a multiple of micro-batch x DP = 3 x 2 = 6", ""),
            ("--num-layers 6", "a multiple of PP = 3", ""),
            ("--num-attention-heads 8", "a multiple of TP = 2", ""),
            ("--ffn-hidden-size 1024", "a multiple of TP = 2", ""),
            ("TST", OF_TST, ""),
        ],
        [],
    )


def test_the_rules_of_query_groups():
    rules, _ = asked(num_query_groups=4, **GROUPS)
    assert rules[3:6] == [
        ("--num-attention-heads 8", "a multiple of TP = 2", ""),
        ("--num-attention-heads 8", "a multiple of query groups = 4", ""),
        ("--num-query-groups 4", "a multiple or a divisor of TP = 2", ""),
    ]


@pytest.mark.parametrize("tp, groups, fits", [(2, 4, True), (4, 2, True), (6, 4, False)])
def test_query_groups_are_spread_over_tensor_parallelism(tp, groups, fits):
    rules, _ = asked(
        tensor_model_parallel_size=tp,
        num_query_groups=groups,
        num_attention_heads=24,
        hidden_size=1536,
        **GROUPS,
    )
    fault = "--num-query-groups: expected a multiple or a divisor of TP = 6, got 4. Change one of "
    assert [fault_ for what, _, fault_ in rules if what == f"--num-query-groups {groups}"] == [
        "" if fits else fault + "them."
    ]


def test_more_query_groups_than_heads():
    rules, _ = asked(num_query_groups=16, **GROUPS)
    assert (
        "--num-attention-heads 8",
        "a multiple of query groups = 16",
        "--num-attention-heads: expected a multiple of query groups = 16, got 8. Change one of "
        "them.",
    ) in rules


def test_the_rules_of_experts():
    rules, _ = asked(**EXPERTS)
    assert rules == [
        ("--gpus 240", "a multiple of TP x PP x CP = 2 x 3 x 5 = 30", ""),
        ("--global-batch-size 24", "a multiple of micro-batch x DP = 3 x 8 = 24", ""),
        ("--num-layers 6", "a multiple of PP = 3", ""),
        ("--num-attention-heads 8", "a multiple of TP = 2", ""),
        ("--num-experts 8", "a multiple of EP = 4", ""),
        ("--moe-ffn-hidden-size 1024", "a multiple of expert TP = 2", ""),
        ("--gpus 240", "a multiple of EP x expert TP x PP = 4 x 2 x 3 = 24", ""),
        ("--sequence-parallel", "set, with experts and TP", ""),
        ("TST", OF_TST, ""),
    ]


@pytest.mark.parametrize("tp, fault", [(1, None), (2, "--sequence-parallel: expected it beside")])
def test_experts_and_tensor_parallelism_ask_for_sequence_parallelism(tp, fault):
    rules, _ = asked(**EXPERTS | dict(tensor_model_parallel_size=tp, sequence_parallel=False))
    said = [fault_ for what, _, fault_ in rules if what == "--sequence-parallel"]
    if fault is None:
        assert said == []
    else:
        assert said == [
            f"{fault} experts and TP, got none. Add it: Megatron stops in the first step without "
            "it."
        ]


@pytest.mark.parametrize("ep", [1, 2, 3])
def test_expert_parallelism_without_experts(ep):
    rules, _ = asked(expert_model_parallel_size=ep)
    fault = f"--expert-model-parallel-size: expected 1 without --num-experts, got {ep}. Leave it "
    assert [rule for rule in rules if rule[0] == "--expert-model-parallel-size"] == [
        ("--expert-model-parallel-size", "1 without --num-experts", fault + "out.")
    ] * (ep > 1)


@pytest.mark.parametrize("gpus, share", [(1, 3), (2, 6)])
def test_the_data_parallel_size(gpus, share):
    rules, _ = asked(**ONE | dict(gpus=gpus, global_batch_size=7))
    dp = share // 3
    assert rules[0] == (f"--gpus {gpus}", "a multiple of TP x PP x CP = 1 x 1 x 1 = 1", "")
    assert rules[1][1:] == (
        f"a multiple of micro-batch x DP = 3 x {dp} = {share}",
        f"--global-batch-size: expected a multiple of micro-batch x DP = 3 x {dp} = {share}, got "
        "7. Change one of them.",
    )


def test_fewer_gpus_than_the_layout_has_places():
    """The other rules are asked all the same, of a data-parallel size of 1."""
    rules, _ = asked(gpus=15)
    assert rules[:2] == [
        (
            "--gpus 15",
            "a multiple of TP x PP x CP = 2 x 3 x 5 = 30",
            "--gpus: expected a multiple of TP x PP x CP = 2 x 3 x 5 = 30, got 15. Change one of "
            "them.",
        ),
        ("--global-batch-size 12", "a multiple of micro-batch x DP = 3 x 1 = 3", ""),
    ]


def test_a_recipe_is_asked_of_a_layout_that_divides():
    shapes = "CUDA 13.0 (assumed) and the shapes of a rank, as checks/precision.py asks"
    fp8 = dict(fp8="hybrid")
    assert asked(**fp8)[0][-2:] == [("TST", OF_TST, ""), ("tensorwise", f"sm_90, {shapes}", "")]
    nvfp4 = dict(fp4="e2m1", capability=B200, micro_batch_size=1, **ONE)
    assert asked(**nvfp4)[0][-2:] == [("TST", OF_TST, ""), ("nvfp4", f"sm_103, {shapes}", "")]
    (*_, last), warned = asked(hidden_size=520, **fp8)
    assert last == (
        "tensorwise",
        f"sm_90, {shapes}",
        "--fp8-recipe tensorwise: --hidden-size: expected a multiple of 16, got 520. Use another "
        "recipe or another layout.",
    )
    assert not warned
    assert asked(hidden_size=520, num_layers=7, **fp8)[0][-1] == ("TST", OF_TST, "")


def test_what_tst_refuses():
    rules, _ = asked(seq_length=1285)
    assert rules[-1] == (
        "TST",
        OF_TST,
        "--seq-length with --context-parallel-size 5: expected a multiple of 10, got 1285. It "
        "counts positions (bags or tokens), which are spread evenly over the ranks. Change it or "
        "the layout.",
    )


@pytest.mark.parametrize(
    "settings",
    [
        dict(kernel="extension", loss="bce"),
        dict(kernel_in_recovery=True, fused_linear_loss=True),
        dict(exit_at_boundary=True),
        dict(fused_linear_loss=True),
    ],
    ids=["kernel", "kernel in recovery", "save", "fused"],
)
def test_what_the_planner_leaves_to_the_run(settings):
    """Each but the last is refused before training: the kernels that the machine has, --save."""
    assert asked(TSTConfig(6, step_ratio=0.3, **settings))[0][-1] == ("TST", OF_TST, "")


@pytest.mark.parametrize("action", ["ignore", "error", "default"])
def test_every_warning_whatever_python_shows(action):
    with warnings.catch_warnings(action=action):
        _, warned = asked(TSTConfig(16, step_ratio=0.5), fp8="hybrid", fp8_recipe="delayed")
    size, ratio, recipe = warned
    assert size.startswith("bag size 16: the paper found 4 to 8 robust")
    assert ratio == "step ratio 0.500: the paper found 0.2 to 0.4 robust"
    assert recipe.startswith("--fp8-recipe delayed (Megatron's default) keeps scales")


def test_an_outcome_stays_as_it_is():
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.Check("", "").fault = "x"
