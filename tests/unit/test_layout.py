"""The planner's rules of a parallel layout: each rule with its numbers, and when it is broken."""

import argparse
import dataclasses
import warnings

import pytest

from megatron_tst.checks import layout, pipeline
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


# ---- pipelines, latent attention, groups of experts

LAYOUT, VPP = "pipeline_model_parallel_layout", "num_virtual_stages_per_pipeline_rank"
FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"
EACH = "num_layers_per_virtual_pipeline_stage"


@pytest.mark.parametrize(
    "text",
    [
        "Et|t|tL",
        "Et*3|(tt|)*29mL",
        "Et|(tt|)*30mL",
        "Et*4|(tttt|)*14tmL",
        "E,t*2|tt,|,mL",
        "(|t)*2,L",
        "E||t|L",
        "Ett|(t|t)*2|L",
    ],
)
def test_stages_are_those_that_megatron_reads(text):
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    letters = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
    theirs = PipelineParallelLayerLayout.parse_str_to_list(text)
    assert pipeline.stages(text) == ["".join(letters[x.name] for x in stage) for stage in theirs]


PIPELINES = (
    dict(num_layers=8),
    dict(num_layers=7),
    {VPP: 2},
    {VPP: 3},
    {VPP: 4},
    {EACH: 2},
    {EACH: 3},
    {FIRST: 2},
    {FIRST: 3},
    {LAST: 2},
    {LAST: 1},
    {FIRST: 1, LAST: 1},
    {FIRST: 4, LAST: 4},
    {FIRST: 4, LAST: 3},
    {FIRST: 9},
    {FIRST: 2, LAST: 2, VPP: 2},
    {FIRST: 1, LAST: 3, VPP: 2},
    dict(num_layers=7, account_for_embedding_in_pipeline_split=True),
    dict(num_layers=6, account_for_embedding_in_pipeline_split=True)
    | dict(account_for_loss_in_pipeline_split=True),
    dict(num_layers=7, account_for_loss_in_pipeline_split=True, **{VPP: 2}),
    {LAYOUT: "Et*4|t*4L"},
    {LAYOUT: "Et*2|t*2|t*2|t*2L"},
    {LAYOUT: "Et|(t|)*7L"},
    {LAYOUT: "Et|(t|)*6L"},
    {LAYOUT: "t*4|Et*4L"},
    {LAYOUT: "Et*4|t*4"},
    {LAYOUT: "Et*3|t*4L"},
    {LAYOUT: "Et*4|t*2|t*2L"},
    {LAYOUT: "Et*4|xt*4L"},
    {LAYOUT: "Et*4|t*4mL"},
    {LAYOUT: "Et*4|t*4mL", "mtp_num_layers": 1},
    {LAYOUT: "Et*4|t*4L", "mtp_num_layers": 1},
    {LAYOUT: "Et*2|t*2|t*2|t*2mmL", "mtp_num_layers": 2},
    {LAYOUT: "Et*2|t*2|t*2|mt*2mL", "mtp_num_layers": 2},
    {LAYOUT: "Et*2|t*2m|t*2|t*2L", "mtp_num_layers": 1},
    {LAYOUT: "Et*2|t*2|t*4m|L", "mtp_num_layers": 1},
    {LAYOUT: "Et*2|t*6|m|L", "mtp_num_layers": 1},
    dict(mtp_num_layers=1),
    dict(mtp_num_layers=1, **{VPP: 2}),
)
ON_FOUR = [changes for changes in PIPELINES if changes.get(LAYOUT, "|||").count("|") == 3]


@pytest.mark.parametrize("text", ["t*" + "9" * 5000, "(t*65536)*65536", "((t", "t**", "*", "|" * 9])
def test_a_layout_that_is_none(text):
    args = arguments(**ONE, pipeline_model_parallel_layout=text)
    assert [fault for _, _, fault in pipeline.rules(args) if fault]
    assert sum(map(len, pipeline.stages(text))) < 1 << 20


@pytest.mark.parametrize(
    "pp, changes", [*((2, c) for c in PIPELINES), *((4, c) for c in ON_FOUR)], ids=str
)
def test_megatron_takes_the_pipelines_that_fit_and_no_other(pp, changes):
    """Its own validation, on as many processes, and its count of layers as a stage is built."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.training.arguments import core_transformer_config_from_args
    from support.plans import BESIDE, SMALL

    from megatron_tst.checks import dry_run

    changes = dict(num_layers=8) | changes
    base = ONE | dict(gpus=pp, pipeline_model_parallel_size=pp, micro_batch_size=1)
    args = arguments(**base | dict(global_batch_size=64) | changes)
    faults = [fault for _, _, fault in pipeline.rules(args) if fault]
    flags = [*SMALL, *BESIDE, "--pipeline-model-parallel-size", str(pp)]
    flags += ["--micro-batch-size", "1", "--max-position-embeddings", "1024"]
    flags += ["--position-embedding-type", "rope", "--no-rope-fusion"]
    for name, value in changes.items():
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    try:
        found = dry_run.validate(flags, pp, "h100")
        virtual = found.virtual_pipeline_model_parallel_size or 1
        if LAYOUT not in changes:
            config = core_transformer_config_from_args(found)
            stages = [(stage, rank) for rank in range(pp) for stage in range(virtual)]
            counts = [get_num_layers_to_build(config, *stage) for stage in stages]
            assert min(counts) >= 0 and sum(counts) == found.num_layers
    except (dry_run.Refused, AssertionError) as refused:
        assert faults, refused
        return
    assert not faults
    if LAYOUT in changes:
        assert len(pipeline.stages(changes[LAYOUT])) == pp * virtual


@pytest.mark.parametrize(
    "batch, fault",
    [
        (6, ""),
        (
            8,
            "micro-batches of a rank, with virtual stages: expected a multiple of PP = 3, got 8. "
            "Change one of them.",
        ),
    ],
)
def test_micro_batches_of_virtual_stages(batch, fault):
    base = ONE | dict(gpus=3, pipeline_model_parallel_size=3, micro_batch_size=1)
    args = arguments(**base | dict(global_batch_size=batch, num_virtual_stages_per_pipeline_rank=2))
    *_, last = pipeline.rules(args)
    assert last[1:] == ("a multiple of PP = 3", fault)


def test_virtual_stages_of_one_stage():
    args = arguments(**ONE, num_virtual_stages_per_pipeline_rank=2)
    what = "--pipeline-model-parallel-size"
    rule = "2 or more, with virtual stages"
    assert (what, rule, f"{what}: expected {rule}, got 1. Raise it.") in [*pipeline.rules(args)]


@pytest.mark.parametrize("pp, fits", [(1, True), (2, True), (3, False), (4, True)])
def test_segments_of_a_hybrid_model(pp, fits):
    base = ONE | dict(gpus=pp, pipeline_model_parallel_size=pp)
    args = arguments(**base | dict(hybrid_layer_pattern="*-|*-|*-|*-/*-", global_batch_size=24))
    what, rule, fault = next(pipeline.rules(args))
    assert (what, rule) == ("--hybrid-layer-pattern: segments 4", f"a multiple of PP = {pp}")
    assert (fault == "") is fits


LATENT = dict(
    multi_latent_attention=True,
    q_lora_rank=None,
    kv_lora_rank=16,
    qk_head_dim=8,
    qk_pos_emb_head_dim=4,
    v_head_dim=8,
)


@pytest.mark.parametrize("groups", [False, True])
def test_latent_attention_has_no_groups(groups):
    rules, _ = asked(**LATENT, group_query_attention=groups)
    rule = "none with --multi-latent-attention"
    fault = f"--group-query-attention: expected {rule}, got it. Leave it out."
    assert ("--group-query-attention", rule, fault if groups else "") in rules


def test_the_rules_of_a_mixed_model():
    """Dense layers and a shared expert are cut by TP, experts by their own."""
    mixed = dict(moe_layer_freq=[0] + [1] * 5, moe_shared_expert_intermediate_size=1025)
    rules, _ = asked(**EXPERTS, **mixed, moe_router_topk=2)
    assert ("--ffn-hidden-size 1024", "a multiple of TP = 2", "") in rules
    what, rule = "--moe-shared-expert-intermediate-size", "a multiple of TP = 2"
    fault = f"{what}: expected {rule}, got 1025. Change one of them."
    assert (f"{what} 1025", rule, fault) in rules
    assert not [what for what, *_ in asked(**EXPERTS)[0] if what.startswith("--ffn-hidden")]


@pytest.mark.parametrize(
    "changes, faults",
    [
        (dict(moe_router_num_groups=4, moe_router_group_topk=2), []),
        (dict(moe_router_group_topk=2), ["--moe-router-group-topk: expected --moe-router-num-gro"]),
        (
            dict(moe_router_num_groups=3, moe_router_group_topk=2),
            ["--num-experts: expected a multiple of router groups = 3, got 8. Change one of them."],
        ),
        (
            dict(moe_router_num_groups=2, moe_router_group_topk=4),
            ["--moe-router-group-topk: expected at most --moe-router-num-groups = 2, got 4."],
        ),
        (
            dict(moe_router_num_groups=4, moe_router_group_topk=4, moe_router_topk=6),
            ["--moe-router-topk: expected a multiple of groups of a token = 4, got 6."],
        ),
    ],
    ids=str,
)
def test_groups_of_experts(changes, faults):
    rules, _ = asked(**EXPERTS | dict(moe_router_topk=4) | changes)
    found = [fault for *_, fault in rules if fault]
    assert len(found) == len(faults), found
    for fault, start in zip(found, faults, strict=True):
        assert fault.startswith(start)
