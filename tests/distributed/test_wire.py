"""What crosses the wire for the embedding and the loss, counted: the formulas of
docs/parallelism.md.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytestmark = pytest.mark.numeric

B, L, H, V = 2, 8, 32, 96


class Wire(TorchDispatchMode):
    """Bytes that this rank sends, by ring algorithms: an all-reduce of P bytes over R ranks
    2(R-1)/R P, all-gather and reduce-scatter of P bytes in all (R-1)/R P, point to point P."""

    def __init__(self, ranks):
        super().__init__()
        self.sent, self.ranks = 0.0, ranks

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::").strip("_")
            groups = [sum(t.nbytes for t in tree_leaves(arg) if torch.is_tensor(t)) for arg in args]
            share = (self.ranks - 1) / self.ranks
            times = {
                "allreduce": 2 * share,
                "allgather": share,
                "allgather_base": share,
                "reduce_scatter_base": share,
                "send": 1,
            }
            if name not in ("recv", "barrier"):
                self.sent += times[name] * max(groups)
        return function(*args, **(kwargs or {}))


def sent_by(ranks, function):
    with Wire(ranks) as wire:
        function()
    return wire.sent


def start(dtype):
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    import megatron_tst

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    megatron_tst.apply()
    torch.manual_seed(0)
    return dist.get_world_size(), {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def rank_counts_embedding(dtype, scatter):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import VocabParallelEmbedding
    from support.models import config

    ranks, dtype = start(dtype)
    table = VocabParallelEmbedding(
        V,
        H,
        init_method=torch.nn.init.normal_,
        reduce_scatter_embeddings=scatter,
        config=config(
            params_dtype=dtype, sequence_parallel=scatter, tensor_model_parallel_size=ranks
        ),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    ).to(dtype)

    def forward_and_backward(tokens):
        out = []
        forward = sent_by(ranks, lambda: out.append(table(tokens)))
        return forward, sent_by(ranks, lambda: out[0].sum().backward())

    share, element = (ranks - 1) / ranks, dtype.itemsize
    once = share if scatter else 2 * share
    back = share * element * B * L * H if scatter else 0
    assert forward_and_backward(torch.randint(0, V, (B, L))) == (
        once * element * B * L * H,
        back,
    )  # stock
    for s in (2, 4, 16):
        tokens = torch.randint(0, V, (B, L, s))
        assert forward_and_backward(tokens) == (once * 4 * B * L * H, back), s
        # averaging after the reduction would move the whole lookup
        assert forward_and_backward(tokens.view(B, L * s)) == (
            once * element * B * L * s * H,
            back * s,
        )


def rank_counts_loss(dtype):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megatron_tst.ops.loss import multi_hot_cross_entropy

    ranks, dtype = start(dtype)
    group = parallel_state.get_tensor_model_parallel_group()
    logits = torch.randn(L, B, V // ranks).to(dtype).requires_grad_()
    out = []
    stock = sent_by(
        ranks, lambda: vocab_parallel_cross_entropy(logits.clone(), torch.randint(0, V, (L, B)))
    )
    assert stock == 3 * 4 * L * B * 2 * (ranks - 1) / ranks
    for s in (1, 4, 16):
        labels = torch.randint(0, V, (L, B, s))
        forward = sent_by(
            ranks, lambda: out.append(multi_hot_cross_entropy(logits, labels, tp_group=group))
        )
        assert forward == 4 * 4 * L * B * (ranks - 1), s
        assert sent_by(ranks, lambda: out.pop().sum().backward()) == 0


def rank_counts_model(sequence_parallel):
    """A superposed step of a whole model sends what an ordinary one does, but for the loss's
    statistics.
    """
    from support.models import batch, gpt

    ranks, _ = start("float32")
    model = gpt(vocab=V, tensor_model_parallel_size=ranks, sequence_parallel=sequence_parallel)

    def step(s):
        arguments = batch(torch.randint(0, V, (B, L * (s or 1) + 1)), s)
        return sent_by(ranks, lambda: model(**arguments).sum().backward())

    ordinary = step(None)
    extra = 4 * 4 * L * B * (ranks - 1) - 3 * 4 * L * B * 2 * (ranks - 1) / ranks
    for s in (2, 8):
        assert step(s) == pytest.approx(ordinary + extra, abs=0.5), s


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_embedding(fork_server, ranks, dtype, scatter):
    fork_server.call(rank_counts_embedding, dtype, scatter, nproc=ranks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_loss(fork_server, ranks, dtype):
    fork_server.call(rank_counts_loss, dtype, nproc=ranks)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_whole_step(fork_server, sequence_parallel):
    fork_server.call(rank_counts_model, sequence_parallel, nproc=2)
