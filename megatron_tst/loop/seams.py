"""The seams: functions of Megatron that megatron_tst replaces, and the signatures that it relies
on. The table in docs/patch_points.md says why each is there.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Seam:
    """A Megatron function that megatron_tst replaces.

    Args:
        module: where it lives.
        name: "Class.method", or a function that Megatron looks up in that module at each call.
        parameters: the parameter names that we rely on, in order; further ones may follow.
    """

    module: str
    name: str
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def owner(self) -> object:
        """The class or module that holds the attribute.

        Raises:
            ImportError: no such module.
            AttributeError: no such class in it.
        """
        found = importlib.import_module(self.module)
        for part in self.name.split(".")[:-1]:
            found = getattr(found, part)
        return found

    @property
    def attribute(self) -> str:
        """The name under which the owner holds the function."""
        return self.name.split(".")[-1]

    @property
    def exists(self) -> bool:
        """Whether the installed Megatron has it; for a function of a module."""
        return hasattr(importlib.import_module(self.module), self.attribute)

    def function(self) -> Callable:
        """What stands there now: Megatron's function, ours, or somebody else's.

        Raises:
            ImportError, AttributeError, KeyError: there is none.
        """
        return vars(self.owner())[self.attribute]

    def problem(self) -> str | None:
        """What is wrong with this seam in the installed Megatron, or None."""
        return _problem(self)


@dataclass(frozen=True, eq=False)
class ScriptSeam:
    """A name by which a user's script calls a function of Megatron: the script has imported it, so
    that a patch of Megatron's own module would not reach the script.

    Args:
        namespace: the globals of the script's module.
        attribute: the name in it.
        parameters: as Seam's.
    """

    namespace: dict
    attribute: str
    parameters: tuple[str, ...]

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, ScriptSeam) and self.attribute == other.attribute
        return same and self.namespace is other.namespace

    def __hash__(self) -> int:
        return hash((id(self.namespace), self.attribute))

    def __str__(self) -> str:
        return f"{self.namespace.get('__name__')}.{self.attribute}"

    def function(self) -> Callable:
        """What stands there now.

        Raises:
            KeyError: the script has no such name.
        """
        return self.namespace[self.attribute]

    def problem(self) -> str | None:
        """What is wrong with this seam in the script, or None."""
        return _problem(self)


def _problem(seam: Seam | ScriptSeam) -> str | None:
    try:
        function = seam.function()
    except (ImportError, AttributeError, KeyError) as error:
        return f"{seam}: expected to exist, got {type(error).__name__}: {error}"
    got = tuple(inspect.signature(function).parameters)
    if got[: len(seam.parameters)] != seam.parameters:
        return f"{seam}: expected parameters {seam.parameters}, got {got}"
    return None


# In the model, in every supported version.
EMBEDDING = Seam(
    "megatron.core.tensor_parallel.layers",
    "VocabParallelEmbedding.forward",
    ("self", "input_"),
)
LOSS = Seam(
    "megatron.core.models.common.language_module.language_module",
    "LanguageModule.compute_language_model_loss",
    ("self", "labels", "logits"),
)
# Multi-token prediction: functions that Megatron's module of that name looks up in itself at every
# call.
_MTP = "megatron.core.transformer.multi_token_prediction"
MTP_ROLL = Seam(_MTP, "roll_tensor", ("tensor", "shifts", "dims", "cp_group", "packed_seq_params"))
MTP_ACCEPTANCE = Seam(  # from 0.19
    _MTP,
    "_compute_mtp_acceptance_counts",
    ("mtp_logits", "mtp_labels", "loss_mask", "output_layer", "runtime_gather_output", "tp_group"),
)
MODEL_SEAMS = (EMBEDDING, LOSS, MTP_ROLL)
# For --tst-fused-linear-loss alone.
_FORWARD = ("self", "input_ids", "position_ids", "attention_mask", "decoder_input", "labels")
GPT_FORWARD = Seam("megatron.core.models.gpt.gpt_model", "GPTModel.forward", _FORWARD)
HYBRID_FORWARD = Seam("megatron.core.models.hybrid.hybrid_model", "HybridModel.forward", _FORWARD)

# Functions of the training loop, each looked up as a module global at every call (0.18 and 0.19).
_LOOP = "megatron.training.training"
TRAINING_LOG = Seam(
    _LOOP, "training_log", ("loss_dict", "total_loss_dict", "learning_rate", "iteration")
)
DECIDE_EXIT = Seam(
    _LOOP, "checkpoint_and_decide_exit", ("model", "optimizer", "opt_param_scheduler", "iteration")
)
EVALUATE = Seam(_LOOP, "evaluate", ("forward_step_func", "data_iterator", "model"))
SAVE = Seam(
    _LOOP, "save_checkpoint_and_time", ("iteration", "model", "optimizer", "opt_param_scheduler")
)
SKIPPED_BATCH = Seam(_LOOP, "get_batch_on_this_tp_rank", ("batch",))
CHECK_CHECKPOINT = Seam(
    "megatron.training.checkpointing", "check_checkpoint_args", ("checkpoint_args",)
)
BUILDER = Seam(
    "megatron.core.datasets.blended_megatron_dataset_builder",
    "BlendedMegatronDatasetBuilder.__init__",
    ("self", "cls", "sizes", "is_built_on_rank", "config"),
)
BUILD_HELPERS = Seam("megatron.core.datasets.utils", "compile_helpers", ())

# How an unmodified script is reached: names that it imports from megatron.training.
ADD_ARGUMENTS = Seam("megatron.training.arguments", "add_megatron_arguments", ("parser",))
VALIDATE_ARGUMENTS = Seam("megatron.training.arguments", "validate_args", ("args",))
PRETRAIN = Seam(
    "megatron.training", "pretrain", ("cfg_container", "train_valid_test_dataset_provider")
)


def batches_of(script: dict) -> ScriptSeam:
    """The function with which a script brings a micro-batch to its tensor-parallel ranks.

    Args:
        script: the globals of the module of its forward_step.
    """
    return ScriptSeam(script, SKIPPED_BATCH.attribute, SKIPPED_BATCH.parameters)
