"""Every refusal: the flag, what was expected, what was got, what to do; and the warnings."""

import argparse
import re
import warnings

import pytest
import torch

from megatron_tst.checkpoint.phases import store
from megatron_tst.checks import conflicts, refusals
from megatron_tst.checks.megatron_faults import warn_of_faults
from megatron_tst.checks.refusals import check_arguments
from megatron_tst.config import TSTConfig, add_tst_arguments
from megatron_tst.errors import TSTError
from megatron_tst.loop.resume import check_resume


def arguments(**changes):
    """Megatron's arguments as far as TST looks at them, for a run that is fine."""
    fine = dict(
        train_iters=1000,
        train_samples=None,
        global_batch_size=8,
        seq_length=128,
        save="somewhere",
        dataloader_type="single",
        mtp_num_layers=None,
        sft=False,
        reset_position_ids=False,
        reset_attention_mask=False,
        rampup_batch_size=None,
        cross_entropy_loss_fusion=False,
        cross_entropy_fusion_impl="native",
        cuda_graph_impl="none",
        tensor_model_parallel_size=1,
        expert_tensor_parallel_size=1,
        tensor_parallel_num_weight_shards=None,
        expert_tensor_parallel_num_weight_shards=None,
    )
    return argparse.Namespace(**(fine | changes))


FINE = TSTConfig(bag_size=6, step_ratio=0.3)
LAYOUT = dict(
    micro_batch_size=2,
    global_batch_size=16,
    world_size=16,
    tensor_model_parallel_size=2,
    pipeline_model_parallel_size=2,
    context_parallel_size=2,
)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            dict(bag_size=0),
            r"--tst-bag-size: expected a whole number >= 1, got 0\. The paper found 4 to 8",
        ),
        (dict(bag_size=-3), "--tst-bag-size: .* got -3"),
        (dict(bag_size=2.5), "--tst-bag-size: .* got 2.5"),
        (dict(bag_size="six"), "--tst-bag-size: .* got six"),
        (
            dict(bag_size=4, step_ratio=1.0),
            r"--tst-step-ratio: expected a number in \[0, 1\), got 1.0\. The paper found 0.2 to "
            r"0.4",
        ),
        (dict(bag_size=4, step_ratio=-0.1), "--tst-step-ratio: .* got -0.1"),
        (dict(bag_size=4, step_ratio="half"), "--tst-step-ratio: .* got half"),
        (dict(bag_size=4, iters=-1), "--tst-iters: expected a whole number >= 0, got -1"),
        (dict(bag_size=4, iters=1.5), "--tst-iters: .* got 1.5"),
        (
            dict(bag_size=4, step_ratio=0.3, iters=5),
            "--tst-step-ratio and --tst-iters: expected one of the two, got 0.3 and 5. Leave one "
            "out",
        ),
        (
            dict(target_weighting="linear"),
            "--tst-target-weighting: expected one of uniform, .*fitted-power-law, got 'linear'",
        ),
        (dict(superpose="all"), "--tst-superpose: expected one of both, input, output, got 'all'"),
        (dict(loss="mse"), "--tst-loss: expected one of mce, mce-alt, bce, hinge, got 'mse'"),
        (
            dict(kernel="triton"),
            "--tst-kernel: expected one of auto, extension, torch, got 'triton'",
        ),
        (
            dict(bag_size=(16, 8, 1)),
            "--tst-bag-size: expected bags of 2 and more in a list, got 16,8,1. The recovery "
            "phase follows",
        ),
        (
            dict(bag_size=(16, 8), iters=5),
            "--tst-iters: expected one for each of the bag sizes 16,8, got 5. Separate them by "
            "commas",
        ),
        (
            dict(bag_size=8, step_ratio=(0.1, 0.2)),
            "--tst-step-ratio: expected one for each of the bag sizes 8, got 0.1,0.2",
        ),
        (dict(bag_size=(16, 8), step_ratio=(0.1, 1.2)), "--tst-step-ratio: .* got 1.2"),
        (dict(bag_size=(16, "x"), step_ratio=(0.1, 0.2)), "--tst-bag-size: .* got x"),
        (dict(switch="soon"), "--tst-switch: expected one of fixed, auto, got 'soon'"),
        (dict(max_epochs=0), "--tst-max-epochs: expected a number > 0, got 0"),
        (dict(max_epochs=float("nan")), "--tst-max-epochs: expected a number > 0, got nan"),
        (dict(max_epochs="often"), "--tst-max-epochs: expected a number > 0, got often"),
        (dict(switch="auto", switch_slope=0), "--tst-switch-slope: expected a number > 0, got 0"),
        (
            dict(switch="auto", switch_window=0.5),
            "--tst-switch-window: expected a number > 0, at most 0.1, got 0.5",
        ),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(TSTError, match=message):
        TSTConfig(**settings)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(seq_length=132, context_parallel_size=4),
            "--seq-length with --context-parallel-size 4: expected a multiple of 8, got 132. It "
            "counts positions",
        ),
        (
            dict(seq_length=126, tensor_model_parallel_size=4, sequence_parallel=True),
            "--seq-length with --tensor-model-parallel-size 4 --sequence-parallel: expected a "
            "multiple of 4, got 126",
        ),
        (
            dict(seq_length=127, tensor_model_parallel_size=2, sequence_parallel=True),
            "--seq-length with --tensor-model-parallel-size 2 --sequence-parallel: expected a "
            "multiple of 2, got 127",
        ),
        (
            dict(
                seq_length=24,
                context_parallel_size=2,
                tensor_model_parallel_size=8,
                sequence_parallel=True,
            ),
            "--context-parallel-size 2 and --tensor-model-parallel-size 8 --sequence-parallel: "
            "expected a multiple of 16, got 24",
        ),
        (dict(sft=True), "--sft with TST: expected plain pre-training data, got packed sequences"),
        (
            dict(reset_position_ids=True),
            "--reset-position-ids with TST: expected unset, got set. Bags would mix documents",
        ),
        (dict(reset_attention_mask=True), "--reset-attention-mask with TST"),
        (
            dict(dataloader_inter_document_masking=True),
            "--dataloader-inter-document-masking with TST",
        ),
        (
            dict(rampup_batch_size=[2, 2, 100]),
            r"--rampup-batch-size with TST: expected none, got \[2, 2, 100\]. .* constant "
            r"--global-batch-size",
        ),
        (dict(step_batch_size_schedule="0:2 100:4"), "--step-batch-size-schedule with TST"),
        (dict(decrease_batch_size_if_needed=True), "--decrease-batch-size-if-needed with TST"),
        (
            dict(cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="linear"),
            "--cross-entropy-fusion-impl with TST: expected native, got linear",
        ),
        (
            dict(cuda_graph_impl="full_iteration", cuda_graph_warmup_steps=0),
            "--cuda-graph-warmup-steps of --cuda-graph-impl full_iteration with TST: expected at "
            "least 1, got 0. .* Leave it at Megatron's 3",
        ),
        (dict(dataloader_type="cyclic"), "--dataloader-type with TST: expected single, got cyclic"),
        (
            dict(dataloader_type="external"),
            "--dataloader-type with TST: expected single, got external",
        ),
        (dict(hybrid_context_parallel=True), "--hybrid-context-parallel with TST"),
        (dict(fim_data=True), "--fim-data with TST"),
        (dict(perform_rl_step=True), "--perform-rl-step with TST"),
        (dict(logits_load_dir="teacher"), "--logits-load-dir with TST"),
        (dict(modelopt_enabled=True), "ModelOpt with TST"),
        (
            dict(tensor_parallel_num_weight_shards=4, tensor_model_parallel_size=2),
            r"--tensor-parallel-num-weight-shards with TST: expected 2 "
            r"\(--tensor-model-parallel-size\), got 4",
        ),
        (
            dict(expert_tensor_parallel_num_weight_shards=2),
            r"--expert-tensor-parallel-num-weight-shards with TST: expected 1 "
            r"\(--expert-tensor-parallel-size\), got 2",
        ),
        (dict(phase_transition_iterations=[5]), "--phase-transition-iterations with TST"),
        (
            dict(fp8="hybrid", fp8_recipe="tensorwise"),
            "--fp8-recipe tensorwise: expected an NVIDIA GPU and Transformer Engine",
        ),
        (dict(fp4="e2m1"), "--fp4-format: expected an NVIDIA GPU and Transformer Engine"),
    ],
)
def test_what_tst_does_not_work_with(changes, message):
    check_arguments(FINE, arguments())
    with pytest.raises(TSTError, match=message):
        check_arguments(FINE, arguments(**changes))
    check_arguments(TSTConfig(), arguments(**changes))  # without TST it is Megatron's business


@pytest.mark.parametrize("impl", ["none", "local", "transformer_engine", "full_iteration"])
def test_every_kind_of_cuda_graphs_is_taken(impl):
    steps = 3 if impl == "full_iteration" else 0
    check_arguments(FINE, arguments(cuda_graph_impl=impl, cuda_graph_warmup_steps=steps))
    check_arguments(FINE, arguments(cuda_graph_impl=impl))  # a Megatron without that flag


@pytest.mark.parametrize("loss", ["bce", "hinge"])
def test_ablations_are_in_torch_alone(loss):
    for kernel in ("auto", "torch"):
        check_arguments(TSTConfig(6, 0.3, loss=loss, kernel=kernel), arguments())
    for changes, flag in (
        (dict(kernel="extension"), "--tst-kernel extension"),
        (dict(fused_linear_loss=True), "--tst-fused-linear-loss"),
    ):
        message = (
            f"{flag} with --tst-loss {loss}: expected --tst-loss mce or mce-alt, got "
            f"{loss}. It is an ablation"
        )
        with pytest.raises(TSTError, match=message):
            check_arguments(TSTConfig(6, 0.3, loss=loss, **changes), arguments())


def test_sequences_of_nothing():
    with pytest.raises(
        TSTError, match="--seq-length: expected at least 1 position, got 0. Correct it."
    ):
        check_arguments(FINE, arguments(seq_length=0))
    check_arguments(FINE, arguments(seq_length=1))
    none, nothing = arguments(**LAYOUT, seq_length=None), arguments(**LAYOUT, seq_length=0)
    refusals.check_sizes(FINE, none)  # before Megatron asks for one
    refusals.check_sizes(TSTConfig(6), nothing)
    with pytest.raises(TSTError, match="--seq-length: expected at least 1 position, got 0"):
        refusals.check_sizes(FINE, nothing)


def test_runs_of_no_iteration_and_of_few():
    with pytest.raises(
        TSTError, match="--train-iters or --train-samples: expected at least 1, got 0. Correct it."
    ):
        check_arguments(TSTConfig(6, iters=3), arguments(train_iters=0))
    check_arguments(TSTConfig(6, iters=1), arguments(train_iters=3))
    one_sample = arguments(train_iters=2, global_batch_size=1)
    assert warned(TSTConfig(6, iters=1), **vars(one_sample)) == [
        "megatron_tst: step ratio 0.500: the paper found 0.2 to 0.4 robust"
    ]


def test_layouts_that_divide_are_let_through():
    for changes in (
        dict(seq_length=136, context_parallel_size=4),
        dict(seq_length=127),
        dict(seq_length=126, tensor_model_parallel_size=4),
        dict(
            seq_length=16,
            context_parallel_size=2,
            tensor_model_parallel_size=8,
            sequence_parallel=True,
        ),
        dict(mtp_num_layers=2),
    ):
        check_arguments(FINE, arguments(**changes))


CP2, TP2 = dict(context_parallel_size=2), dict(tensor_model_parallel_size=2)
MASKED, PER_TOKEN = dict(eod_mask_loss=True), dict(calculate_per_token_loss=True)
ADD_PER_TOKEN = "weighs a label by how many its rank has. Add --calculate-per-token-loss to weigh "
NO_FLAG_HELPS = (
    "averages the heads' losses over each rank's own labels, .* weigh up to 0.008 more, .* "
    "--calculate-per-token-loss does not change that, fewer context-parallel ranks do"
)
HEADS = dict(mtp_num_layers=1)
TIED = dict(untie_embeddings_and_output_weights=False, pipeline_model_parallel_size=2)


@pytest.mark.parametrize(
    "changes, messages",
    [
        (CP2 | MASKED, [f"{ADD_PER_TOKEN}all alike$"]),
        (CP2 | MASKED | PER_TOKEN, []),
        (CP2 | PER_TOKEN, []),
        (CP2, []),
        (CP2 | HEADS, [NO_FLAG_HELPS]),
        (CP2 | HEADS | PER_TOKEN, [NO_FLAG_HELPS]),
        (CP2 | HEADS | MASKED, [f"{ADD_PER_TOKEN}all alike, those of the heads", NO_FLAG_HELPS]),
        (CP2 | HEADS | MASKED | PER_TOKEN, [NO_FLAG_HELPS]),
        (dict(context_parallel_size=4, mtp_num_layers=2), ["weigh up to 0.05 more"]),
        (HEADS | MASKED, []),
        (MASKED, []),
        (TIED | HEADS, ["tied embeddings: Megatron .* Add --untie-embeddings-and-output-weights$"]),
        (TIED, []),
        (HEADS | dict(pipeline_model_parallel_size=2), []),
        (TIED | HEADS | dict(pipeline_model_parallel_size=1), []),
        (TP2 | dict(multi_latent_attention=True), ["rotary part, .* Add --sequence-parallel"]),
        (TP2 | dict(multi_latent_attention=True, sequence_parallel=True), []),
        (dict(multi_latent_attention=True), []),
        (TP2 | dict(experimental_attention_variant="gated_delta_net"), ["gated delta net .* Add"]),
        (TP2 | dict(hybrid_layer_pattern="G-*-"), ["gated delta net .* Add --sequence-parallel"]),
        (TP2 | dict(experimental_attention_variant="dsa", hybrid_layer_pattern="M-*-"), []),
        (TP2, []),
    ],
)
def test_what_megatron_computes_otherwise_in_this_layout(changes, messages):
    """tests/distributed/test_megatron_faults.py measures it, and that each remedy helps."""
    got = warned(FINE, **vars(arguments(**changes)))
    assert len(got) == len(messages), got
    for text, message in zip(got, messages):
        assert re.search(message, text), text


def test_a_layout_that_nobody_names_is_one_process():
    faults = dict(multi_latent_attention=True, untie_embeddings_and_output_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_faults(argparse.Namespace(**HEADS, **MASKED, **faults))


@pytest.mark.parametrize("size", [4, 8])
def test_bags_of_the_output_as_long_as_the_sample(size):
    check_arguments(TSTConfig(size, 0.3, superpose="output"), arguments(seq_length=8))


@pytest.mark.parametrize("impl", ["native", "te"])
def test_fusions_and_graphs_that_work_are_let_through(impl):
    """Those that are computed inside compute_language_model_loss, which bags do not reach."""
    check_arguments(
        FINE,
        arguments(
            cross_entropy_loss_fusion=True, cross_entropy_fusion_impl=impl, cuda_graph_impl="local"
        ),
    )
    # the name alone fuses nothing
    check_arguments(FINE, arguments(cross_entropy_fusion_impl="linear"))


def test_shards_as_many_as_tensor_parallel_ranks_are_let_through():
    """Megatron's validation sets them so where nobody gave them."""
    check_arguments(
        FINE,
        arguments(
            tensor_model_parallel_size=2,
            tensor_parallel_num_weight_shards=2,
            expert_tensor_parallel_num_weight_shards=None,
        ),
    )


class Asked:
    """Arguments that have nothing set, and note what they are asked for."""

    def __init__(self):
        self.names = set()

    def __getattr__(self, name):
        self.names.add(name)


# Looked at, though the installed Megatron's parser does not have it: why
NOT_OF_EVERY_PARSER = {
    "dataloader_inter_document_masking": "from 0.19 on",
    "logits_load_dir": "from 0.19 on",
    "tensor_parallel_num_weight_shards": "from 0.19 on",
    "expert_tensor_parallel_num_weight_shards": "from 0.19 on",
    "logit_dtype": "from 0.20 on (--output-logit-dtype)",
    "params_dtype": "set by the validation, from --bf16 and --fp16",
    "modelopt_enabled": "a flag of Megatron-LM's scripts (megatron/post_training/arguments.py)",
}


def test_no_refusal_is_dead():
    """Every name that checks/conflicts.py looks at can be set by a user of some Megatron of the
    pin: it is a destination of the installed parser, or is listed with the one that has it.
    """
    from megatron.training.arguments import add_megatron_arguments

    asked = Asked()
    conflicts.check_conflicts(asked)
    conflicts.check_fused_linear_loss(asked)
    conflicts.captures_whole_steps(asked)
    conflicts.routers_in_graphs(asked)
    asked.cross_entropy_loss_fusion, asked.cuda_graph_impl = True, "local"
    conflicts.check_conflicts(asked)
    conflicts.routers_in_graphs(asked)
    assert {"cross_entropy_fusion_impl", "cuda_graph_modules", "use_mup"} < asked.names
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = {action.dest for action in parser._actions}
    assert asked.names - known - set(NOT_OF_EVERY_PARSER) == set()
    assert set(NOT_OF_EVERY_PARSER) <= asked.names


def test_bag_size_without_a_length_of_the_phase():
    with pytest.raises(
        TSTError, match="--tst-bag-size: expected --tst-step-ratio or --tst-iters beside it, got 6"
    ):
        check_arguments(TSTConfig(bag_size=6), arguments())


def test_recovery_must_have_iterations():
    for iters in (1000, 1001):
        with pytest.raises(
            TSTError,
            match=f"--tst-iters: expected fewer than the 1000 training iterations, got {iters}",
        ):
            check_arguments(TSTConfig(bag_size=6, iters=iters), arguments())
    with pytest.raises(
        TSTError, match="--tst-step-ratio: expected at least half an iteration of 10, got 0.01"
    ):
        check_arguments(TSTConfig(bag_size=6, step_ratio=0.01), arguments(train_iters=10))


def test_exit_at_boundary_needs_a_checkpoint():
    with pytest.raises(
        TSTError, match="--tst-exit-at-boundary: expected --save beside it, got none"
    ):
        check_arguments(
            TSTConfig(bag_size=6, iters=300, exit_at_boundary=True), arguments(save=None)
        )


def warned(config, **changes):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_arguments(config, arguments(**changes))
    return [str(w.message) for w in caught]


def test_a_schedule_must_leave_room_and_have_no_empty_phase():
    with pytest.raises(
        TSTError, match="--tst-iters: expected fewer than the 1000 training iterations, got 1100"
    ):
        check_arguments(TSTConfig(bag_size=(8, 4), iters=(500, 600)), arguments())
    with pytest.raises(
        TSTError, match="--tst-iters: expected at least one iteration of each bag size, got 5,0"
    ):
        check_arguments(TSTConfig(bag_size=(8, 4), iters=(5, 0)), arguments())
    with pytest.raises(
        TSTError,
        match="--tst-step-ratio: expected at least half an iteration of 1000, got 0.3,0.0001",
    ):
        check_arguments(TSTConfig(bag_size=(8, 4), step_ratio=(0.3, 0.0001)), arguments())


@pytest.mark.parametrize(
    "ratios, iterations",
    [
        ((0.29,), [29]),  # 28.999999999999996 in floating point
        ((0.58, 0.07), [58, 7]),  # 57.99999999999999, 7.000000000000001
        ((0.296, 0.294), [30, 29]),
        ((0.006,), [1]),
    ],
)
def test_a_ratio_is_rounded_to_whole_iterations(ratios, iterations):
    sizes = (8, 4)[: len(ratios)]
    plan = TSTConfig(sizes, step_ratio=ratios).schedule(arguments(train_iters=100))
    assert plan.samples == (*[8 * n for n in iterations], 8 * (100 - sum(iterations)))


def test_a_boundary_that_megatron_would_pass_by():
    at_boundary = TSTConfig(bag_size=6, step_ratio=0.3, exit_at_boundary=True)
    check_arguments(at_boundary, arguments(iterations_to_skip=[299, 301]))
    with pytest.raises(
        TSTError,
        match="--iterations-to-skip with --tst-exit-at-boundary: expected other iterations .* got "
        r"300\. Megatron",
    ):
        check_arguments(at_boundary, arguments(iterations_to_skip=[300]))
    with pytest.raises(
        TSTError, match="--tst-exit-at-boundary: expected --save beside it, got none"
    ):
        check_arguments(at_boundary, arguments(save=None))


def test_warnings_outside_the_papers_range():
    assert (
        warned(FINE)
        == warned(TSTConfig(bag_size=8, step_ratio=0.4))
        == warned(TSTConfig(bag_size=4, iters=200))
        == []
    )
    assert (
        "bag size 16: the paper found 4 to 8 robust, and up to 16 at 10B"
        in warned(TSTConfig(bag_size=16, step_ratio=0.3))[0]
    )
    for size in (2, 3, 9, 64):
        (said,) = warned(TSTConfig(bag_size=size, step_ratio=0.3))
        assert f"bag size {size}: the paper found 4 to 8 robust, and up to 16 at 10B" in said
    assert len(warned(TSTConfig(bag_size=65, step_ratio=0.3))) == 2  # and long samples
    for iters, shown in ((195, None), (405, None), (194, "0.194"), (406, "0.406")):
        said = warned(TSTConfig(bag_size=6, iters=iters))
        assert len(said) == bool(shown) and all(
            f"step ratio {shown}: the paper found 0.2 to 0.4 robust" in one for one in said
        )
    assert "step ratio 0.500" in warned(TSTConfig(bag_size=6, iters=500))[0]
    with pytest.raises(TSTError, match="expected --tst-bag-size of 2 or more beside it, got 1"):
        warned(TSTConfig(step_ratio=0.3))
    with pytest.raises(TSTError, match="--tst-iters: expected more than 0, got 0"):
        warned(TSTConfig(bag_size=6, iters=0))
    assert warned(TSTConfig(bag_size=(8, 4), step_ratio=(0.2, 0.2))) == []
    assert (
        "bag sizes 4, 8: expected to fall"
        in warned(TSTConfig(bag_size=(4, 8), step_ratio=(0.2, 0.2)))[0]
    )
    assert (
        "least common multiple is 210: each sample is cut from 26880 tokens"
        in warned(TSTConfig((7, 6, 5), (0.1, 0.1, 0.1)))[0]
    )


def test_flags():
    parse = add_tst_arguments(argparse.ArgumentParser()).parse_args
    assert TSTConfig.from_args(parse([])) == TSTConfig() and not TSTConfig().enabled
    given = (
        "--tst-bag-size 6 --tst-step-ratio 0.3 --tst-target-weighting power-law "
        "--tst-superpose input --tst-loss mce-alt --tst-exit-at-boundary"
    )
    assert TSTConfig.from_args(parse(given.split())) == TSTConfig(
        6, 0.3, None, "power-law", "input", "mce-alt", True
    )
    assert TSTConfig.from_args(parse(["--tst-bag-size", "4", "--tst-iters", "7"])).iters == 7
    assert TSTConfig.from_args(argparse.Namespace()) == TSTConfig()  # a script without the flags
    several = TSTConfig.from_args(
        parse(
            "--tst-bag-size 16,8,4 --tst-step-ratio 0.1,0.1,0.05 --tst-switch auto "
            "--tst-switch-slope 1e-3".split()
        )
    )
    assert (
        several == TSTConfig((16, 8, 4), (0.1, 0.1, 0.05), switch="auto", switch_slope=0.001)
        and several.enabled
    )
    with pytest.raises(TSTError, match="got six"):  # and not a page of usage
        TSTConfig.from_args(parse(["--tst-bag-size", "six"]))


def recorded(config, consumed=0, **changes):
    """Arguments as a run of this config stores them in a checkpoint after `consumed` samples."""
    args = arguments(**changes)
    for name, value in vars(config).items():
        setattr(args, f"tst_{name}", value)
    if config.enabled:
        plan = config.schedule(args)
        store(args, plan, planned=plan)
    args.consumed_train_samples = consumed
    return args


@pytest.mark.parametrize(
    "config, changes, setting",
    [
        (TSTConfig(8, step_ratio=0.3), {}, "another tst_bag_size: expected 6"),
        (
            TSTConfig(6, step_ratio=0.2),
            {},
            "other phases: expected bag size 6 for 300 iterations, recovery for 700, got bag size "
            "6 for 200 iterations, recovery for 800",
        ),
        (
            FINE,
            dict(train_iters=2000),
            "other phases: .* got bag size 6 for 600 iterations, recovery for 1400",
        ),
        (
            TSTConfig(6, iters=300),
            dict(train_iters=2000),
            "other phases: .* recovery for 1700. Give the first run's --tst-iters .* or "
            "--tst-override",
        ),
        (
            FINE,
            dict(global_batch_size=16),
            "another global_batch_size: expected 8 as in the checkpoint, got 16",
        ),
        (FINE, dict(seq_length=64), "another seq_length"),
        (TSTConfig(6, 0.3, superpose="input"), {}, "another tst_superpose"),
        (TSTConfig(6, 0.3, target_weighting="power-law"), {}, "another tst_target_weighting"),
        (TSTConfig(6, 0.3, loss="mce-alt"), {}, "another tst_loss"),
        (TSTConfig(6, 0.3, switch="auto"), {}, "another tst_switch: expected fixed"),
    ],
)
def test_resume_with_other_settings(config, changes, setting):
    assert check_resume(recorded(FINE), recorded(FINE)) == FINE.schedule(arguments())
    with pytest.raises(TSTError, match=f"resuming with {setting}"):
        check_resume(recorded(config, **changes), recorded(FINE))


def test_resume_across_having_tst_at_all():
    stock = arguments()
    assert check_resume(stock, stock) is None
    with pytest.raises(
        TSTError, match="resuming with TST: expected a checkpoint of a TST run, .*--finetune"
    ):
        check_resume(recorded(FINE), stock)
    with pytest.raises(TSTError, match="resuming without TST: .* Add --tst-bag-size 6"):
        check_resume(stock, recorded(FINE))


def overridden(bag_size=6, iters=300, before=FINE, at=0, then=None, **changes):
    """The phases of a run that goes on from iteration `at` of the run `before` (or of its phases
    `then`) with --tst-override.
    """
    checkpoint = recorded(before, at * 8)
    if then:
        store(checkpoint, then)
    plan = check_resume(
        recorded(TSTConfig(bag_size, iters=iters, override=True), **changes), checkpoint
    )
    return plan.bag_sizes, tuple(n // 8 for n in plan.samples)


SEVERAL = TSTConfig((16, 8, 4), iters=(100, 100, 100))


def test_override_moves_the_boundary():
    assert (
        overridden(iters=200, at=200) == overridden(iters=200, at=100) == ((6, 1), (200, 800))
    )  # now, and soon
    assert (
        overridden(iters=400, at=299) == overridden(iters=400, at=300) == ((6, 1), (400, 600))
    )  # later, from the boundary itself too
    assert overridden(iters=300, at=100, train_iters=2000) == ((6, 1), (300, 1700))
    assert overridden((6, 3, 2), (250, 50, 10), at=250) == (
        (6, 3, 2, 1),
        (250, 50, 10, 690),
    )  # a schedule ahead
    for places in ((100, 60, 20), (100, 60, 100)):
        assert overridden((16, 8, 4), places, before=SEVERAL, at=150) == (
            (16, 8, 4, 1),
            (*places, 1000 - sum(places)),
        )
    assert overridden((16, 8, 2), (100, 100, 50), before=SEVERAL, at=200) == (
        (16, 8, 2, 1),
        (100, 100, 50, 750),
    )


def test_override_in_recovery_changes_its_length():
    assert overridden(at=400, train_iters=900) == (
        (6, 1),
        (300, 700),
    )  # shorter: the same text in the same order, and an earlier end
    assert overridden(at=400, train_iters=1200) == (
        (6, 1, 1),
        (300, 700, 200),
    )  # longer: more text at the end
    early = FINE.schedule(arguments()).ending(
        FINE.schedule(arguments()).phases[0], 200 * 8
    )  # --tst-switch auto ended it at 200
    assert overridden(at=400, then=early, train_iters=1200) == ((6, 1, 1), (200, 800, 200))
    assert overridden(at=400, then=early) == ((6, 1), (200, 800))  # the flags are the first run's


@pytest.mark.parametrize(
    "message, given",
    [
        (
            "--tst-override: expected bag size 6 from iteration 1 to 250 as in the checkpoint, "
            "got bag size 6 for 200",
            dict(iters=200, at=250),
        ),
        (
            "--tst-override: .* The run is in recovery: superposition cannot be taken up again",
            dict(iters=400, at=301),
        ),
        (
            "--tst-bag-size with --tst-override: expected divisors of 6, got 6,4",
            dict(bag_size=(6, 4), iters=(250, 50), at=250),
        ),
        (
            "--tst-override: expected bag size 6 from iteration 1 to 250",
            dict(bag_size=3, iters=300, at=250),
        ),
        (
            r"--tst-override: expected bag size 8 from iteration 101 to 151 as in the checkpoint, "
            r"to its end after iteration 100 \+ a multiple of 2, "
            "got bag size 16 for 100 iterations, bag size 8 for 51",
            dict(bag_size=(16, 8, 4), iters=(100, 51, 100), before=SEVERAL, at=151),
        ),
        (
            "--tst-override: expected bag size 8 from",
            dict(bag_size=(16, 8, 4), iters=(90, 100, 100), before=SEVERAL, at=150),
        ),
        ("another global_batch_size", dict(global_batch_size=16, at=100)),
    ],
)
def test_override_cannot_change_what_lies_behind(message, given):
    with pytest.raises(TSTError, match=message):
        overridden(**given)


def test_kernels_that_are_not_there_are_refused_before_training(monkeypatch):
    from megatron_tst import extension

    def settings(**changes):
        return TSTConfig(bag_size=6, step_ratio=0.3, **changes)

    for there, device in (
        (False, "1"),
        (True, "0"),
    ):  # no extension; an extension without CUDA kernels, on a GPU
        monkeypatch.setenv("MEGATRON_TST_CPU", device)
        monkeypatch.setattr(
            extension, "load", lambda there=there: extension.Extension(there, False, "without CUDA")
        )
        check_arguments(settings(), arguments())
        for asked in (dict(kernel="extension"), dict(kernel_in_recovery=True)):
            with pytest.raises(
                TSTError,
                match="--tst-kernel.*: expected the extension's c.* kernels, got an extension "
                "that is",
            ):
                check_arguments(settings(**asked), arguments())
    with pytest.raises(
        TSTError,
        match="--tst-kernel-in-recovery: expected the extension's .* got --tst-kernel torch",
    ):
        check_arguments(settings(kernel="torch", kernel_in_recovery=True), arguments())


def test_a_resume_whose_optimizer_state_megatron_would_not_restore(monkeypatch, tmp_path):
    """The distributed optimizer with torch's Adam, on a GPU; on CPU cpu.py mends it."""
    from megatron.core.optimizer import distrib_optimizer

    from megatron_tst import cpu
    from megatron_tst.loop.resume import check_restorable

    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    (tmp_path / "iter_0000004").mkdir()  # of another format
    args = arguments(load=str(tmp_path), use_distributed_optimizer=True, ckpt_step=None)
    check_restorable(args)  # cpu.py
    monkeypatch.setattr(cpu, "asked_for", lambda: False)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", False)
    with pytest.raises(
        TSTError,
        match="--load with --use-distributed-optimizer: expected the Adam of Transformer Engine "
        "or Apex, got torch's",
    ):
        check_restorable(args)
    for changes in (
        dict(no_load_optim=True),
        dict(finetune=True),
        dict(load=str(tmp_path / "new")),
        dict(use_distributed_optimizer=False),
    ):
        check_restorable(argparse.Namespace(**vars(args) | changes))
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    check_restorable(args)


def test_the_gpu_is_asked_for_where_there_is_one(monkeypatch):
    monkeypatch.setattr(refusals.cpu, "asked_for", lambda: True)
    assert refusals.this_gpu() is None
    monkeypatch.setattr(refusals.cpu, "asked_for", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert refusals.this_gpu() == ((9, 0), "13.0")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(micro_batch_size=0), "--micro-batch-size: expected at least 1, got 0."),
        (dict(global_batch_size=0), "--global-batch-size: expected at least 1, got 0."),
        (dict(global_batch_size=-8), "--global-batch-size: expected at least 1, got -8."),
        (
            dict(pipeline_model_parallel_size=0),
            "--pipeline-model-parallel-size: expected at least 1, got 0.",
        ),
        (
            dict(global_batch_size=18),
            "--global-batch-size: expected a multiple of micro-batch size x data-parallel ranks = "
            "2 x 2 = 4, got 18. Change one of them.",
        ),
        (dict(context_parallel_size=1, global_batch_size=20), "= 2 x 4 = 8, got 20"),
    ],
)
def test_batch_sizes_that_megatron_asserts(changes, message):
    with pytest.raises(TSTError) as refused:
        refusals.check_sizes(FINE, arguments(**LAYOUT | changes))
    assert message in str(refused.value)


def test_batch_sizes_that_megatron_takes_or_completes():
    for changes in (
        dict(global_batch_size=4),
        dict(micro_batch_size=1, global_batch_size=2),
        dict(micro_batch_size=1, global_batch_size=1, world_size=8),
        dict(global_batch_size=None),
        dict(micro_batch_size=None),  # Megatron says that itself
        dict(global_batch_size=18, decrease_batch_size_if_needed=True),
        dict(world_size=4),  # too few processes: Megatron names the layout
    ):
        refusals.check_sizes(FINE, arguments(**LAYOUT | changes))
    wrong = arguments(**LAYOUT | dict(micro_batch_size=0, global_batch_size=-1))
    refusals.check_sizes(TSTConfig(), wrong)  # a run without TST is Megatron's own
