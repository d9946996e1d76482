"""Megatron without a GPU: on CPU with gloo, for the demo and the tests, never active unless
MEGATRON_TST_CPU=1 asks for it; and answers for a GPU that is not here, for the dry run.

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

SWITCH = "MEGATRON_TST_CPU"


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


def asked_for() -> bool:
    return os.environ.get(SWITCH) == "1"


def enable_if_asked() -> None:
    """Install the shims if the environment asks for them; call before the first import of megatron.

    Raises:
        SystemExit: there is a GPU here, which the shims would hide.
    """
    if not asked_for():
        return
    import torch

    if torch.cuda.is_available():
        print(
            f"megatron_tst: error: {SWITCH}: expected a machine without a GPU, got one. Unset it "
            f"to train on the GPU.",
            file=sys.stderr,
        )
        sys.exit(2)
    if not getattr(torch, "_megatron_tst_cpu", False):
        torch._megatron_tst_cpu = True
        _before_megatron(torch)
        _after_megatron(torch)


def _before_megatron(torch) -> None:
    # Their modules need a GPU, and with Transformer Engine importable Megatron picks its optimizer
    # kernels.
    for name in (
        "transformer_engine",
        "transformer_engine_torch",
        "apex",
        "flash_attn",
        "nvidia_resiliency_ext",
    ):
        sys.modules[name] = None
    os.environ.setdefault(
        "CUDA_DEVICE_MAX_CONNECTIONS", "1"
    )  # arguments.py demands it for tensor parallelism
    os.environ.setdefault(
        "TORCHDYNAMO_DISABLE", "1"
    )  # compiling the fused elementwise functions takes 20 s and gains nothing here
    _devices(torch)
    _streams(torch)
    _random_state(torch)
    _memory_queries(torch)
    _uneven_collectives(torch)


def _devices(torch) -> None:
    cpu = torch.device("cpu")

    def is_cuda(device):
        return (isinstance(device, int) and not isinstance(device, bool)) or str(device).startswith(
            "cuda"
        )

    def on_cpu(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            if kwargs.get("device") is not None and is_cuda(kwargs["device"]):
                kwargs["device"] = cpu
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return function(*args, **kwargs)

        return call

    # torch.zeros(..., device="cuda") and the like, all over the loop
    for name in (
        "tensor as_tensor zeros ones empty full rand randn randint arange linspace eye zeros_like "
        "ones_like empty_like full_like "
        "rand_like randn_like"
    ).split():
        setattr(torch, name, on_cpu(getattr(torch, name)))
    to = torch.Tensor.to
    torch.Tensor.to = on_cpu(
        lambda self, *a, **k: to(self, *((cpu, *a[1:]) if a and is_cuda(a[0]) else a), **k)
    )
    for name in (
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "new_tensor",
    ):  # mappings.py:444, MoE
        setattr(torch.Tensor, name, on_cpu(getattr(torch.Tensor, name)))
    # batches, rotary caches, embedding masks: x.cuda()
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *a, **k: self
    torch.Tensor.pin_memory = lambda self, *a, **k: self
    torch.Tensor.record_stream = lambda self, stream: None
    torch.cuda.device_count = lambda: (
        1
    )  # initialize.py:270 skips model parallelism without a device
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda *a: None
    torch.cuda.get_device_capability = lambda *a: (8, 0)
    torch.cuda.get_device_properties = lambda *a: types.SimpleNamespace(
        major=8, minor=0, multi_processor_count=1, total_memory=1 << 34, name="cpu"
    )
    type_ = torch.Tensor.type

    def type_as_on_cuda(self, *args, **kwargs):
        answer = type_(self, *args, **kwargs)
        # clip_grads.py:174 and the mixed-precision optimizers compare with "torch.cuda.FloatTensor"
        if (
            isinstance(answer, str)
            and f"megatron{os.sep}core{os.sep}optimizer" in sys._getframe(1).f_code.co_filename
        ):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_as_on_cuda


def _streams(torch) -> None:
    class Stream:
        """One order of execution: every wait is over already. Also stands for an event."""

        cuda_stream = 0

        def __init__(self, *args, **kwargs):
            pass

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            return False

        def record_event(self, event=None):
            return event or Stream()

        def query(self):
            return True

        def elapsed_time(self, other):
            return 0.0

    only = Stream()
    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *a, **k: only
    torch.cuda.stream = lambda *a, **k: contextlib.nullcontext()
    torch.cuda.set_stream = torch.cuda.synchronize = torch.cuda.empty_cache = lambda *a, **k: None
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *a, **k: None


def _random_state(torch) -> None:
    # The CUDA generator is the CPU's: Megatron's tracker of tensor-parallel generators then works
    # as it is.
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *a, **k: (
        torch.get_rng_state()
    )
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = lambda state, *a, **k: (
        torch.set_rng_state(state)
    )


def _memory_queries(torch) -> None:
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
        "device_memory_used",
    ):
        setattr(torch.cuda, name, lambda *a, **k: 0)
    torch.cuda.memory_stats = lambda *a, **k: dict.fromkeys(
        (
            "reserved_bytes.all.current",
            "allocated_bytes.all.current",
            "allocated_bytes.all.peak",
            "allocation.all.current",
        ),
        0,
    )
    torch.cuda.reset_peak_memory_stats = lambda *a, **k: None


def _uneven_collectives(torch) -> None:
    """gloo has no all_gather or reduce_scatter of unequal parts
    (core/tensor_parallel/mappings.py:154 and :197, MoE).
    """
    dist = torch.distributed
    gather, scatter = dist.all_gather, dist.reduce_scatter

    def uneven(tensors):
        return len({t.shape[0] for t in tensors if t.dim()}) > 1

    def all_gather(outputs, tensor, group=None, async_op=False):
        if async_op or not uneven(outputs):
            return gather(outputs, tensor, group=group, async_op=async_op)
        padded = tensor.new_zeros(max(o.shape[0] for o in outputs), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in outputs]
        gather(parts, padded, group=group)
        for output, part in zip(outputs, parts):
            output.copy_(part[: len(output)])

    def reduce_scatter(output, inputs, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if async_op or not uneven(inputs):
            return scatter(output, inputs, op=op, group=group, async_op=async_op)
        whole = torch.cat(list(inputs))
        dist.all_reduce(whole, op=op, group=group)
        output.copy_(whole.split([len(t) for t in inputs])[dist.get_rank(group)])

    dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter


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
    import megatron.core.transformer.torch_norm as torch_norm
    import megatron.training.training as loop

    # random.py sets the CUDA generator through torch._C
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(
        state
    )
    # pretrain() does not hand allow_no_cuda on (training.py:1091)
    loop.initialize_megatron = functools.partial(loop.initialize_megatron, allow_no_cuda=True)
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
    def move_nothing(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = move_nothing
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
    _distributed_optimizer(torch)


def _distributed_optimizer(torch) -> None:
    """Megatron's distributed optimizer does not restore the state of torch's Adam, which it falls
    back to without Transformer Engine and Apex (config.py refuses such a resume on a GPU). Three
    faults of distrib_optimizer.py, mended here:
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_dict, load, restore = (
        getattr(DistributedOptimizer, name)
        for name in ("state_dict", "load_state_dict", "_set_main_param_and_optimizer_states")
    )

    def state_dict_of_a_fresh_optimizer_too(
        self,
    ):  # :837 reads the step of an Adam that has not stepped yet
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state.get(parameter):
                    self.optimizer.state[parameter] = {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return state_dict(self)

    @torch.no_grad()  # it writes into parameters
    def restore_without_step(
        self, model_param, tensors
    ):  # :1223 wants a step, which is stored elsewhere, or gets a wrong one
        return restore(self, model_param, {**tensors, "step": None})

    def load_and_unshare_steps(
        self, *args, **kwargs
    ):  # :1032 gives all parameters one step tensor, which each of them increments
        result = load(self, *args, **kwargs)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()
        return result

    DistributedOptimizer.state_dict = state_dict_of_a_fresh_optimizer_too
    DistributedOptimizer._set_main_param_and_optimizer_states = restore_without_step
    DistributedOptimizer.load_state_dict = load_and_unshare_steps
