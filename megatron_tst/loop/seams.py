"""The seams: functions of Megatron that megatron_tst replaces, and the signatures that it relies
on.
"""

from __future__ import annotations

import importlib
import inspect
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

    def owner(self):
        """The class or module that holds the attribute."""
        found = importlib.import_module(self.module)
        for part in self.name.split(".")[:-1]:
            found = getattr(found, part)
        return found

    @property
    def attribute(self) -> str:
        return self.name.split(".")[-1]

    @property
    def exists(self) -> bool:
        return hasattr(importlib.import_module(self.module), self.attribute)

    def problem(self) -> str | None:
        """What is wrong with this seam in the installed Megatron, or None."""
        try:
            function = vars(self.owner())[self.attribute]
        except (ImportError, AttributeError, KeyError) as error:
            return f"{self}: expected to exist, got {type(error).__name__}: {error}"
        got = tuple(inspect.signature(function).parameters)
        if got[: len(self.parameters)] != self.parameters:
            return f"{self}: expected parameters {self.parameters}, got {got}"
        return None


EMBEDDING = Seam(
    "megatron.core.tensor_parallel.layers", "VocabParallelEmbedding.forward", ("self", "input_")
)
LOSS = Seam(
    "megatron.core.models.common.language_module.language_module",
    "LanguageModule.compute_language_model_loss",
    ("self", "labels", "logits"),
)
# multi-token prediction: functions that Megatron's module of that name looks up in itself at every
# call
_MTP = "megatron.core.transformer.multi_token_prediction"
MTP_ROLL = Seam(_MTP, "roll_tensor", ("tensor", "shifts", "dims", "cp_group", "packed_seq_params"))
MTP_ACCEPTANCE = Seam(  # from 0.19
    _MTP,
    "_compute_mtp_acceptance_counts",
    ("mtp_logits", "mtp_labels", "loss_mask", "output_layer", "runtime_gather_output", "tp_group"),
)
MODEL_SEAMS = (EMBEDDING, LOSS, MTP_ROLL)  # in every supported version
# for --tst-fused-linear-loss alone
_FORWARD = ("self", "input_ids", "position_ids", "attention_mask", "decoder_input", "labels")
GPT_FORWARD = Seam("megatron.core.models.gpt.gpt_model", "GPTModel.forward", _FORWARD)
HYBRID_FORWARD = Seam("megatron.core.models.hybrid.hybrid_model", "HybridModel.forward", _FORWARD)

# Functions of the training loop, each looked up as a module global at every call (0.18 and 0.19).
TRAINING_LOG = Seam(
    "megatron.training.training",
    "training_log",
    ("loss_dict", "total_loss_dict", "learning_rate", "iteration"),
)
DECIDE_EXIT = Seam(
    "megatron.training.training",
    "checkpoint_and_decide_exit",
    ("model", "optimizer", "opt_param_scheduler", "iteration"),
)
EVALUATE = Seam(
    "megatron.training.training", "evaluate", ("forward_step_func", "data_iterator", "model")
)
SAVE = Seam(
    "megatron.training.training",
    "save_checkpoint_and_time",
    ("iteration", "model", "optimizer", "opt_param_scheduler"),
)
SKIPPED_BATCH = Seam("megatron.training.training", "get_batch_on_this_tp_rank", ("batch",))
CHECK_CHECKPOINT = Seam(
    "megatron.training.checkpointing", "check_checkpoint_args", ("checkpoint_args",)
)
BUILD_HELPERS = Seam("megatron.core.datasets.utils", "compile_helpers", ())

# How an unmodified script is reached: names that it imports from megatron.training.
ADD_ARGUMENTS = Seam("megatron.training.arguments", "add_megatron_arguments", ("parser",))
VALIDATE_ARGUMENTS = Seam("megatron.training.arguments", "validate_args", ("args",))
PRETRAIN = Seam(
    "megatron.training", "pretrain", ("cfg_container", "train_valid_test_dataset_provider")
)
