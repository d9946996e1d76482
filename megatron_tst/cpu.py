"""Megatron without a GPU: on CPU with gloo, for the demo and the tests, never active unless
MEGATRON_TST_CPU=1 (or yes, true, on) asks for it; and answers for a GPU that is not here, for the
dry run.

Megatron's training loop assumes CUDA in some forty places. Each shim below says which assumption it
answers; line numbers are megatron-core 0.19.2's. Nothing of TST is in here, and nothing here
changes a number: only where it is computed.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import sys
import types
from collections.abc import Iterator
from importlib.util import find_spec

from megatron_tst import cpu_torch

SWITCH = "MEGATRON_TST_CPU"
# Where Transformer Engine and apex are not: layers of torch alone.
TORCH_LAYERS = (
    "--transformer-impl local --no-persist-layer-norm --no-masked-softmax-fusion --no-rope-fusion"
)
DATA = "--no-create-attention-mask-in-dataloader --num-workers 0"
# What Megatron needs to be told on CPU: no fused CUDA kernels. gloo it chooses by itself
# (loop/entry.py).
FLAGS = (
    f"{TORCH_LAYERS} --no-gradient-accumulation-fusion --no-bias-swiglu-fusion "
    f"--no-bias-dropout-fusion --use-cpu-initialization {DATA}"
)


@contextlib.contextmanager
def assumed_gpu(
    capability: tuple[int, int], transformer_engine: str | None = None
) -> Iterator[None]:
    """Until the block ends, Megatron is told of a GPU that is not here, so that it validates a
    command as on that GPU. Nothing can be computed meanwhile.

    Args:
        capability: compute capability.
        transformer_engine: the version to be told of where there is none; None: as it is here.
    """
    import torch
    from megatron.core import utils
    from megatron.core.models.common.embeddings import rope_utils
    from packaging.version import Version

    major, minor = capability
    properties = types.SimpleNamespace(major=major, minor=minor)
    answers = [
        (torch.cuda, "get_device_capability", lambda *device: (major, minor)),
        (torch.cuda, "get_device_properties", lambda *device: properties),
    ]
    if transformer_engine:
        utils.get_te_version()  # which fills _te_version on its first call
        answers += [
            (utils, "_te_version", Version(transformer_engine)),
            # only asked for: is it there?
            (rope_utils, "fused_apply_rotary_pos_emb", "Transformer Engine's"),
        ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in answers]
    for owner, name, answer in answers:
        setattr(owner, name, answer)
    try:
        yield
    finally:
        for owner, name, answer in before:
            setattr(owner, name, answer)


_YES, _NO = ("1", "yes", "true", "on"), ("", "0", "no", "false", "off")


def asked_for() -> bool:
    """Whether the environment asks for CPU training."""
    return os.environ.get(SWITCH, "").strip().lower() in _YES


def enabled() -> bool:
    """Whether the shims are installed in this process: torch's and Megatron's functions are not
    their own.
    """
    return _enabled


_enabled = False


def enable_if_asked() -> None:
    """Install the shims if the environment asks for them; call before the first import of megatron.

    Raises:
        SystemExit: there is a GPU here, which the shims would hide, or the environment says neither
            yes nor no.
    """
    value = os.environ.get(SWITCH, "").strip()
    if value.lower() not in (*_YES, *_NO):
        print(
            f"megatron_tst: error: {SWITCH}: expected one of {', '.join(_YES)} to train on CPU, or "
            f"one of {', '.join(filter(None, _NO))}, got {value}. Set it to 1, or unset it.",
            file=sys.stderr,
        )
        sys.exit(2)
    if not asked_for():
        return
    import torch

    if torch.cuda.is_available():
        print(
            f"megatron_tst: error: {SWITCH}: expected a machine without a GPU, got one. Unset it "
            "to train on the GPU.",
            file=sys.stderr,
        )
        sys.exit(2)
    global _enabled
    if not _enabled:
        _enabled = True
        _before_megatron()
        cpu_torch.install(torch)
        _after_megatron(torch)


# These modules need a GPU, and with Transformer Engine importable Megatron picks its optimizer
# kernels.
_HIDDEN = (
    "transformer_engine",
    "transformer_engine_torch",
    "apex",
    "flash_attn",
    "nvidia_resiliency_ext",
)


def _before_megatron() -> None:
    sys.modules.update(dict.fromkeys(_HIDDEN))
    # arguments.py demands it for tensor parallelism
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # compiling the fused elementwise functions takes 20 s and gains nothing here
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def _saves_asynchronously() -> bool:
    from megatron.training.global_vars import get_args

    try:
        return bool(get_args().async_save)
    except AssertionError:  # a save outside of the training loop
        return False


def _preload_tensors(write_buckets, non_blocking=True):
    """FileSystemWriterAsync's, for tensors that are on the host already: a process that writes
    while training goes on needs copies.
    """
    if multiprocessing.parent_process() is None:
        return write_buckets
    return [
        (name, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
        for name, key, (data, tensors) in write_buckets
    ]


def _after_megatron(torch) -> None:
    import queue

    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
    import megatron.core.models.hybrid.hybrid_block as hybrid_block
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
    import megatron.core.transformer.multi_token_prediction as multi_token_prediction
    import megatron.core.transformer.torch_norm as torch_norm

    # random.py sets the CUDA generator through torch._C
    def get_cuda_rng_state(device="cuda", clone=False, graph_safe=False):
        return torch.get_rng_state()

    def set_cuda_rng_state(state, device=-1, graph_safe=False):
        torch.set_rng_state(state)

    random._get_cuda_rng_state = get_cuda_rng_state
    random._set_cuda_rng_state = set_cuda_rng_state
    # a save would spawn a manager process that imports the main script again, 5 s each: needless
    # where it is synchronous
    here, manager_queue = queue.Queue(), filesystem_async.get_write_results_queue
    filesystem_async.get_write_results_queue = lambda mp_mode="spawn": (
        manager_queue(mp_mode) if _saves_asynchronously() else here
    )
    filesystem_async.FileSystemWriterAsync.preload_tensors = staticmethod(_preload_tensors)
    # the all-to-all dispatcher waits for a copy to the host that never happens
    # (token_dispatcher.py:946)
    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    wait = dispatcher._maybe_dtoh_and_synchronize

    def wait_for_nothing(self, *args, **kwargs):
        if getattr(self, "d2h_event", None) is None:
            self.d2h_event = torch.cuda.Event()
        return wait(self, *args, **kwargs)

    dispatcher._maybe_dtoh_and_synchronize = wait_for_nothing

    # ... and moves split sizes to the host only from CUDA (token_dispatcher.py:927,
    # moe_utils.py:1184)
    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
    # torch's norm refuses sequence parallelism (torch_norm.py:50): build it, and mark its weights
    # as the other norms mark theirs, so that finalize_model_grads sums their gradients over the
    # tensor-parallel ranks
    build = torch_norm.WrappedTorchNorm.__new__

    def build_marked(cls, config, *args, **kwargs):
        sequence_parallel, config.sequence_parallel = config.sequence_parallel, False
        try:
            norm = build(cls, config, *args, **kwargs)
        finally:
            config.sequence_parallel = sequence_parallel
        for parameter in norm.parameters():
            parameter.sequence_parallel = sequence_parallel
        return norm

    torch_norm.WrappedTorchNorm.__new__ = build_marked
    # HybridModel's last norm is Transformer Engine's whatever the layer spec says
    # (hybrid_block.py:215)
    hybrid_block.TENorm = torch_norm.WrappedTorchNorm
    # without Transformer Engine the classes that it looks for are mocks (0.20,
    # inference_layers.py:564)
    if hasattr(multi_token_prediction, "is_inference_column_parallel_linear"):
        multi_token_prediction.is_inference_column_parallel_linear = lambda module: False
    _distributed_optimizer(torch)
    if find_spec("megatron.training"):  # absent beside a loop of one's own (examples/own_loop.py)
        import megatron.training.training as loop

        # pretrain() does not hand allow_no_cuda on (training.py:1091)
        loop.initialize_megatron = functools.partial(loop.initialize_megatron, allow_no_cuda=True)


def _distributed_optimizer(torch) -> None:
    """Megatron's distributed optimizer does not restore the state of torch's Adam, which it falls
    back to without Transformer Engine and Apex (loop/resume.py refuses such a resume on a GPU).
    Three faults of distrib_optimizer.py are mended here.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_dict = DistributedOptimizer.state_dict
    load = DistributedOptimizer.load_state_dict
    restore = DistributedOptimizer._set_main_param_and_optimizer_states

    # :837 reads the step of an Adam that has not stepped yet
    def state_dict_of_a_fresh_optimizer_too(self):
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state.get(parameter):
                    self.optimizer.state[parameter] = {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return state_dict(self)

    # :1223 wants a step, which is stored elsewhere, or gets a wrong one
    @torch.no_grad()  # it writes into parameters
    def restore_without_step(self, model_param, tensors):
        return restore(self, model_param, {**tensors, "step": None})

    # :1032 gives all parameters one step tensor, which each of them increments
    def load_and_unshare_steps(self, *args, **kwargs):
        result = load(self, *args, **kwargs)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()
        return result

    DistributedOptimizer.state_dict = state_dict_of_a_fresh_optimizer_too
    DistributedOptimizer._set_main_param_and_optimizer_states = restore_without_step
    DistributedOptimizer.load_state_dict = load_and_unshare_steps
