"""Two tensor-parallel ranks on one GPU, over gloo (NCCL refuses two ranks on a device): the CUDA
kernels on halves of the vocabulary.
"""

import pytest
import torch
import torch.distributed as dist
from support.close import close

from megatron_tst.ops import reference
from megatron_tst.ops.loss import multi_hot_cross_entropy, target_weights
from megatron_tst.ops.names import LOSSES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="NOT RUN: two tensor-parallel ranks on a GPU: no GPU"
    ),
]


def rank_compares_its_shard(n, v, s, loss, dtype_name, device):
    """One rank: the loss of all its rows, and the gradient of its half of the columns, against the
    fp64 reference on the whole.
    """
    rank, size, dtype = dist.get_rank(), dist.get_world_size(), getattr(torch, dtype_name)
    generator = torch.Generator().manual_seed(n + v)
    whole = (3 * torch.randn(n, v, generator=generator)).to(dtype)
    labels = torch.randint(0, v, (n, s), generator=generator)
    labels[torch.rand(n, s, generator=generator) < 0.2] = -100
    upstream = torch.randn(n, generator=generator)
    shard = whole.chunk(size, -1)[rank].to(device).requires_grad_()
    got = multi_hot_cross_entropy(
        shard,
        labels.to(device),
        target_weights("power-law", s),
        tp_group=dist.group.WORLD,
        loss=loss,
        kernel="extension",
    )
    (grad,) = torch.autograd.grad((got * upstream.to(device)).sum(), shard)
    exact = whole.double().requires_grad_()
    want = reference.multi_hot_cross_entropy(
        exact, labels, reference.target_weights("power-law", s), loss
    )
    (want_grad,) = torch.autograd.grad((want * upstream).sum(), exact)
    want_grad = want_grad.nan_to_num().chunk(size, -1)[rank]
    close(got, want, 1e-5, terms=1 + whole.float().abs().amax(-1))
    terms = upstream.abs().unsqueeze(-1)
    close(grad, want_grad, 4e-6, terms=terms, rounded=dtype)
    everywhere = [torch.empty_like(got) for _ in range(size)]
    dist.all_gather(everywhere, got.detach())
    assert all(torch.equal(got, other) for other in everywhere)  # the same bits on both ranks


def rank_sweep(device="cuda"):
    for loss in LOSSES:
        for dtype in ("float32", "bfloat16"):
            for n, v, s in ((1, 64, 1), (33, 4098, 5), (40, 50258, 16)):
                rank_compares_its_shard(n, v, s, loss, dtype, device)


def test_halves_of_the_vocabulary_equal_the_reference(fork_server):
    fork_server.call(rank_sweep, nproc=2)
