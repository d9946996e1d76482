"""A block that fails on whatever would make the host wait for a GPU, on a machine without one.

The tensors in it lie on "meta": they have no content, so that reading one fails by itself, and code
that asks whether it is on CPU takes the GPU's way. What torch would do on "meta" all the same, and
a GPU only by waiting, is refused here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_tst import cpu_torch

DEVICE = "meta"
# their results' sizes, or they themselves, are known to the host alone
_READ = (
    "_local_scalar_dense is_nonzero equal nonzero nonzero_static masked_select argwhere unique_dim "
    "unique_consecutive _unique _unique2 bincount"
).split()
_COPIES = "tensor as_tensor from_numpy asarray".split()
_TO_HOST = "cpu numpy tolist item __bool__ __int__ __float__ __index__ __len__".split()


class Waits(AssertionError):
    """Something would wait for the GPU."""


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation._overloadpacket.__name__
        if DEVICE not in _devices((args, kwargs)):  # the host's own affairs, or a copy from it
            results = operation(*args, **kwargs)
            if DEVICE in _devices(results) and _devices((args, kwargs)):
                raise Waits(f"{operation} from host to GPU")
            return results
        if name in _READ:
            raise Waits(f"{operation} reads a tensor's content")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise Waits(f"{operation} without output_size")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            _indexed(operation, args)
        results = operation(*args, **kwargs)
        # a scalar of the host is handed over with the kernel's arguments
        hosts = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x) and x.is_cpu]
        if any(x.dim() or name == "copy_" for x in hosts) or "cpu" in _devices(results):
            raise Waits(f"{operation} between host and GPU")
        return results


def _devices(leaves):
    return {tensor.device.type for tensor in tree_leaves(leaves) if torch.is_tensor(tensor)}


def _indexed(operation, args):
    masks = [x for x in tree_leaves(args[1]) if torch.is_tensor(x) and x.dtype == torch.bool]
    # a mask and one number are a masked_fill
    if masks and (operation._overloadpacket.__name__ == "index" or args[2].numel() != 1):
        raise Waits(f"{operation} with a mask")


class _Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        there = str(kwargs.get("device", "cpu")).startswith((DEVICE, "cuda"))
        if (name in _COPIES and there) or name == "new_tensor":
            raise Waits(f"torch.{name} copies from the host")
        if name in _TO_HOST and args and torch.is_tensor(args[0]) and name != "__len__":
            if args[0].device.type == DEVICE:
                raise Waits(f"Tensor.{name}")
        return function(*args, **kwargs)


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    """Until the block ends, nothing may wait."""

    def wait(*args, **named):
        raise Waits("torch.cuda.synchronize")

    with mock.patch.object(torch.cuda, "synchronize", wait), _Operations(), _Functions():
        yield


@contextlib.contextmanager
def gpu_without_content() -> Iterator[None]:
    """Until the block ends, what Megatron makes on "cuda", the current device, lies on DEVICE."""
    from megatron.core.transformer.utils import get_default_causal_mask

    def there(make):
        def call(*args, **kwargs):
            device = kwargs.get("device")
            if isinstance(device, int) or str(device).startswith("cuda"):
                kwargs["device"] = DEVICE
            return make(*args, **kwargs)

        return call

    # kept between calls in some versions
    forget = getattr(get_default_causal_mask, "cache_clear", lambda: None)
    forget()
    with contextlib.ExitStack() as stack:
        for name in cpu_torch._MAKERS:
            stack.enter_context(mock.patch.object(torch, name, there(getattr(torch, name))))
        current = mock.patch.object(torch.cuda, "current_device", lambda: torch.device(DEVICE))
        stack.enter_context(current)
        stack.callback(forget)
        yield


@contextlib.contextmanager
def silent_collectives() -> Iterator[None]:
    """Until the block ends, torch's collectives leave their tensors as they are: process groups do
    not take tensors without content. Megatron has some under names of its own.
    """
    from megatron.core.tensor_parallel import mappings, utils

    names = "all_reduce broadcast all_gather_into_tensor reduce_scatter_tensor".split()
    own = "dist_all_gather_func dist_reduce_scatter_func".split()
    with contextlib.ExitStack() as stack:
        for owner, attributes in ((torch.distributed, names), (mappings, own), (utils, own)):
            for name in attributes:
                if hasattr(owner, name):
                    stack.enter_context(mock.patch.object(owner, name, lambda *a, **k: None))
        yield
