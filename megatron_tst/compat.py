"""Tested Megatron versions, the seams and their signatures, and what stands between an install and an import."""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from dataclasses import dataclass

TESTED_MEGATRON = ("0.18.2", "0.19.2")


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


EMBEDDING = Seam("megatron.core.tensor_parallel.layers", "VocabParallelEmbedding.forward", ("self", "input_"))
LOSS = Seam(
    "megatron.core.models.common.language_module.language_module",
    "LanguageModule.compute_language_model_loss",
    ("self", "labels", "logits"),
)
# multi-token prediction: functions that Megatron's module of that name looks up in itself at every call
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
TRAINING_LOG = Seam("megatron.training.training", "training_log", ("loss_dict", "total_loss_dict", "learning_rate", "iteration"))
DECIDE_EXIT = Seam(
    "megatron.training.training", "checkpoint_and_decide_exit", ("model", "optimizer", "opt_param_scheduler", "iteration")
)
EVALUATE = Seam("megatron.training.training", "evaluate", ("forward_step_func", "data_iterator", "model"))
SAVE = Seam("megatron.training.training", "save_checkpoint_and_time", ("iteration", "model", "optimizer", "opt_param_scheduler"))
SKIPPED_BATCH = Seam("megatron.training.training", "get_batch_on_this_tp_rank", ("batch",))
CHECK_CHECKPOINT = Seam("megatron.training.checkpointing", "check_checkpoint_args", ("checkpoint_args",))
BUILD_HELPERS = Seam("megatron.core.datasets.utils", "compile_helpers", ())

# How an unmodified script is reached: names that it imports from megatron.training.
ADD_ARGUMENTS = Seam("megatron.training.arguments", "add_megatron_arguments", ("parser",))
VALIDATE_ARGUMENTS = Seam("megatron.training.arguments", "validate_args", ("args",))
PRETRAIN = Seam("megatron.training", "pretrain", ("cfg_container", "train_valid_test_dataset_provider"))


def megatron_version() -> str:
    """Megatron-Core's version, without the commit that it adds where its environment lies in a git checkout."""
    from megatron.core import __version__

    return __version__.split("+")[0]


def hide_broken_transformer_engine() -> None:
    """Let Megatron be imported beside a half-installed Transformer Engine.

    Without its torch part Transformer Engine raises AssertionError on import; Megatron catches ImportError alone
    (megatron/core/utils.py), so `import megatron.core` dies. A whole one, or none, is left as it is.
    """
    if "transformer_engine" in sys.modules:
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ImportError:
        pass
    except Exception as error:  # whatever a broken install raises
        for name in [m for m in sys.modules if m.split(".")[0] == "transformer_engine"]:
            del sys.modules[name]
        sys.modules["transformer_engine"] = None  # `import transformer_engine` is now a ModuleNotFoundError
        reason = str(error).strip().splitlines() or [""]
        warnings.warn(
            f"megatron_tst: transformer_engine is installed but cannot be imported ({type(error).__name__}: {reason[0]}); "
            "going on without it. Install transformer-engine, its core and its torch part in one version, or none of them.",
            stacklevel=2,
        )
