"""The seams: functions of Megatron that megatron_tst replaces, and what it relies on in their
signatures. The tables in docs/patch_points.md say why each is there.
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
        parameters: those that our function takes or hands on by position: the leading ones, in this
            order.
        named: those that our function reads or hands on by name, wherever they stand.
        closed: whether our function leaves what further parameters mean to nobody, so that each
            of them needs a default.
    """

    module: str
    name: str
    parameters: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    closed: bool = False

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
        parameters, named, closed: as Seam's.
    """

    namespace: dict
    attribute: str
    parameters: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    closed: bool = False

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


_BY_POSITION = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
_BY_NAME = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


def _problem(seam: Seam | ScriptSeam) -> str | None:
    try:
        signature = inspect.signature(seam.function())
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        return f"{seam}: expected to exist, got {type(error).__name__}: {error}"
    got = list(signature.parameters.values())
    leading = [p.name for p in got if p.kind in _BY_POSITION]
    lacks = [name for name in seam.named if not _takes(signature, name)]
    further = [p.name for p in got if p.name not in (*seam.parameters, *seam.named)]
    without_default = [name for name in further if _is_required(signature.parameters[name])]
    if leading[: len(seam.parameters)] != [*seam.parameters]:
        expected = f"the parameters ({', '.join(seam.parameters)}) by position"
    elif lacks:
        expected = f"to take {', '.join(lacks)} by name"
    elif seam.closed and without_default:
        expected = f"a default of {', '.join(without_default)}"
    else:
        return None
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in got]
    shown = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
    return f"{seam}: expected {expected}, got {shown}"


def _takes(signature, name):
    return name in signature.parameters and signature.parameters[name].kind in _BY_NAME


def _is_required(parameter):
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return parameter.default is inspect.Parameter.empty and parameter.kind not in variadic


# In the model, in every supported version.
EMBEDDING = Seam(
    "megatron.core.tensor_parallel.layers",
    "VocabParallelEmbedding.forward",
    ("self", "input_"),
    closed=True,
)
LOSS = Seam(
    "megatron.core.models.common.language_module.language_module",
    "LanguageModule.compute_language_model_loss",
    ("self", "labels", "logits"),
    closed=True,
)
# Multi-token prediction: functions that Megatron's module of that name looks up in itself at every
# call.
_MTP = "megatron.core.transformer.multi_token_prediction"
MTP_ROLL = Seam(_MTP, "roll_tensor", named=("tensor", "dims"))
MTP_ACCEPTANCE = Seam(  # from 0.19
    _MTP,
    "_compute_mtp_acceptance_counts",
    named=(
        "mtp_logits",
        "mtp_labels",
        "loss_mask",
        "output_layer",
        "runtime_gather_output",
        "tp_group",
    ),
    closed=True,
)
MODEL_SEAMS = (EMBEDDING, LOSS, MTP_ROLL)
# For --tst-fused-linear-loss alone.
GPT_FORWARD = Seam("megatron.core.models.gpt.gpt_model", "GPTModel.forward", ("self",), ("labels",))
HYBRID_FORWARD = Seam(
    "megatron.core.models.hybrid.hybrid_model", "HybridModel.forward", ("self",), ("labels",)
)

# Functions of the training loop, each looked up as a module global at every call.
_LOOP = "megatron.training.training"
TRAINING_LOG = Seam(
    _LOOP,
    "training_log",
    ("loss_dict", "total_loss_dict", "learning_rate", "iteration"),
    ("is_first_iteration",),
)
DECIDE_EXIT = Seam(_LOOP, "checkpoint_and_decide_exit", ("model", "optimizer"))
EVALUATE = Seam(_LOOP, "evaluate")  # read is what it returns
SAVE = Seam(_LOOP, "save_checkpoint_and_time")
SKIPPED_BATCH = Seam(
    _LOOP,
    "get_batch_on_this_tp_rank",
    ("batch",),
    (  # what batches.broadcast_bags takes
        "tp_rank",
        "broadcast_src_rank",
        "broadcast_group",
        "micro_batch_size",
        "seq_length",
        "create_attention_mask_in_dataloader",
        "mtp_on_this_rank",
        "pipeline_model_parallel_size",
        "is_pipeline_first_stage",
        "is_pipeline_last_stage",
    ),
)
CHECK_CHECKPOINT = Seam(
    "megatron.training.checkpointing", "check_checkpoint_args", ("checkpoint_args",)
)
BUILDER = Seam(
    "megatron.core.datasets.blended_megatron_dataset_builder",
    "BlendedMegatronDatasetBuilder.__init__",
    ("self", "cls", "sizes", "is_built_on_rank", "config"),
    closed=True,
)
BUILD_HELPERS = Seam("megatron.core.datasets.utils", "compile_helpers", closed=True)

# For --cuda-graph-impl full_iteration alone.
FULL_GRAPH = Seam("megatron.core.full_cuda_graph", "FullCudaGraphWrapper.__call__", ("self",))

# How an unmodified script is reached: names that it imports from megatron.training.
ADD_ARGUMENTS = Seam(
    "megatron.training.arguments", "add_megatron_arguments", ("parser",), closed=True
)
VALIDATE_ARGUMENTS = Seam("megatron.training.arguments", "validate_args", ("args",))
PRETRAIN = Seam(
    "megatron.training",
    "pretrain",
    named=("train_valid_test_dataset_provider", "forward_step_func"),
)


def batches_of(script: dict) -> ScriptSeam:
    """The function with which a script brings a micro-batch to its tensor-parallel ranks.

    Args:
        script: the globals of the module of its forward_step.
    """
    seam = SKIPPED_BATCH
    return ScriptSeam(script, seam.attribute, seam.parameters, seam.named)
