"""What follows from a run's arguments and losses, on numbers worked out by hand."""

import pytest

from megatron_tst.planning.runs import Run, interpolated

SHAPE = {
    "hidden_size": "16",
    "num_layers": "2",
    "vocab_size": "101",
    "global_batch_size": "4",
    "seq_length": "8",
    "untie_embeddings_and_output_weights": "True",
}
EXPERTS = SHAPE | {"num_experts": "4", "moe_ffn_hidden_size": "8"}


def test_a_run_of_nothing():
    assert (Run().last, Run().nan_from) == (0, None)


def test_nan_begins_behind_the_last_loss():
    assert Run(train={2: 5.0, 8: 4.0}, nan={1, 9, 10}).nan_from == 9
    assert Run(train={2: 5.0, 8: 4.0}, nan={1}).nan_from is None


def test_before_the_first_that_is_known():
    """The line of the first two goes on to the left, that of the last two to the right."""
    assert interpolated({2: 10.0, 3: 20.0, 5: 80.0}, [1, 4, 6]) == [0.0, 50.0, 110.0]


@pytest.mark.parametrize(
    "more, rows",
    [
        ({}, 101),
        ({"make_vocab_size_divisible_by": "64"}, 128),
        ({"make_vocab_size_divisible_by": "64", "pad_vocab_size": "False"}, 101),
        ({"pad_vocab_size": "False", "tensor_model_parallel_size": "4"}, 101),
    ],
)
def test_rows_of_the_vocabulary(more, rows):
    assert Run(arguments=SHAPE | more).model().padded_vocab_size == rows


@pytest.mark.parametrize("every, layers", [("1", 2), ("2", 1), ("[0, 1]", 1), ("[1, 1, 1]", None)])
def test_layers_with_experts(every, layers):
    model = Run(arguments=EXPERTS | {"moe_layer_freq": every}).model()
    assert (model and sum(model.moe_layer_freq)) == layers


def test_what_a_model_is_without_being_told():
    assert Run(arguments=SHAPE).model().num_layers == 0  # none has experts
    assert Run(arguments=EXPERTS).model().moe_router_topk == 2  # Megatron's default


TIED = SHAPE | {"untie_embeddings_and_output_weights": "False"}
STAGES = {(0, 0): 10_000, (0, 1): 9_000}


@pytest.mark.parametrize(
    "arguments, ranks, parameters",
    [
        (SHAPE, STAGES, 19_000),
        (TIED, STAGES, 19_000 - 101 * 16),
        (TIED | {"mtp_num_layers": "1"}, STAGES, 19_000 - 2 * 101 * 16),
        (SHAPE | {"mtp_num_layers": "1"}, STAGES, 19_000 - 101 * 16),
        (SHAPE, {(0, 0, 0): 10, (1, 0, 0): 11}, 21),  # two tensor-parallel ranks
        (SHAPE, {(0, 0): 10, (1, 1): 11}, None),  # two of four
        ({"num_experts": "4"}, {(0, 0): 10}, 10),  # all experts are there
        ({"num_experts": "4", "expert_model_parallel_size": "2"}, {(0, 0): 10}, None),
    ],
)
def test_parameters_of_the_whole_model(arguments, ranks, parameters):
    assert Run(arguments=arguments).whole_model(ranks) == parameters
