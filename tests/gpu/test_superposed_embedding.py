"""The embedding's CUDA kernels against the fp64 reference and the C++ kernel, and what only a GPU
can show: streams, graphs, synchronisation, 64-bit addresses.
"""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from check_kernels import in_a_graph
from support.close import close

from megatron_tst import extension
from megatron_tst.ops import embedding, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="NOT RUN: the embedding's CUDA kernels against the reference: no GPU",
    ),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def built():
    assert extension.load().cuda, f"the extension is {extension.load().description}"


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def draw(vocab, columns, positions, bag_size, dtype):
    """Zipf-distributed tokens. -> table, tokens, upstream"""
    generator = torch.Generator("cuda").manual_seed(0)
    normal = dict(device="cuda", generator=generator)
    odds = 1 / torch.arange(1, vocab + 1, device="cuda").double()
    tokens = torch.multinomial(odds, positions * bag_size, True, generator=generator)
    upstream = torch.randn(positions, columns, **normal).to(dtype)
    return (
        torch.randn(vocab, columns, **normal).to(dtype),
        tokens.view(positions, bag_size),
        upstream,
    )


def module_of(table, main_grad=True):
    if main_grad:
        table.main_grad = torch.zeros(table.shape, device=table.device)
        table.grad_added_to_main_grad = False
    return SimpleNamespace(
        weight=table,
        vocab_start_index=0,
        num_embeddings=len(table),
        tp_group=dist.group.WORLD,
        reduce_scatter_embeddings=False,
    )


def exact_gradient(vocab, tokens, upstream):
    exact = torch.zeros(vocab, upstream.shape[1], dtype=torch.float64, device=upstream.device)
    for place in range(tokens.shape[1]):
        exact.index_add_(0, tokens[:, place], upstream.double() / tokens.shape[1])
    return exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 64, 1028, 4096])
def test_equals_the_reference_and_the_cpu_kernel(dtype, columns):
    vocab, ops = 3000, embedding.KERNELS["extension"]()
    for positions, bag_size in ((1, 1), (70, 3), (500, 16), (33, 100)):
        table, tokens, upstream = draw(vocab, columns, positions, bag_size, dtype)
        want = reference.superposed_embedding(table, tokens[None])[0]
        exact = exact_gradient(vocab, tokens, upstream)
        for first, last in ((0, vocab), (5, 900)):
            for out in {dtype, torch.float32}:
                mean = ops[0](table[first:last], tokens, first, vocab, out)
                assert torch.equal(
                    mean.cpu(), ops[0](table[first:last].cpu(), tokens.cpu(), first, vocab, out)
                )
                if last == vocab:
                    close(mean, want, 1e-6, terms=table.double().abs().max(), rounded=out)
                added = torch.ones(last - first, columns, dtype=out, device="cuda")
                on_cpu = torch.ones(last - first, columns, dtype=out)
                ops[1](added, upstream, tokens, first, vocab)
                ops[1](on_cpu, upstream.cpu(), tokens.cpu(), first, vocab)
                assert torch.equal(added.cpu(), on_cpu)
                close(added, 1 + exact[first:last], 1e-6, terms=upstream.abs().max(), rounded=out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_is_the_torch_kernels(dtype):
    table, tokens, _ = draw(3000, 1000, 300, 6, dtype)
    with torch.no_grad():
        got, want = (
            embedding.superposed_embedding(module_of(table, False), tokens[None], kernel)
            for kernel in ("extension", "torch")
        )
    assert torch.equal(got, want)


def test_same_bits_in_every_run():
    table, tokens, upstream = draw(32000, 1024, 4096, 16, torch.bfloat16)
    ops, results = embedding.KERNELS["extension"](), []
    for _ in range(10):
        gradient = torch.zeros(table.shape, device="cuda")
        ops[1](gradient, upstream, tokens, 0, len(table))
        results.append((ops[0](table, tokens, 0, len(table), table.dtype), gradient))
    assert all(torch.equal(x, y) for again in results for x, y in zip(again, results[0]))


def test_the_gradient_of_frequent_tokens():
    """The hottest token has thousands of occurrences. torch's own sum in bf16 loses most of it."""
    table, tokens, upstream = draw(128256, 64, 8192, 16, torch.bfloat16)
    upstream += 0.1
    exact = exact_gradient(len(table), tokens, upstream)
    gradient = torch.zeros(table.shape, device="cuda")
    embedding.KERNELS["extension"]()[1](gradient, upstream, tokens, 0, len(table))
    leaf = table.requires_grad_()
    stock = torch.nn.functional.embedding(tokens, leaf).mean(1)
    (stock,) = torch.autograd.grad(stock, leaf, upstream)
    error = {
        name: ((x.double() - exact).norm() / exact.norm()).item()
        for name, x in (("ours", gradient), ("torch bf16", stock))
    }
    print("relative error of the embedding's gradient:", error)
    assert error["ours"] < 1e-6


@pytest.mark.parametrize("main_grad", [True, False])
def test_never_waits_for_the_gpu_and_can_be_captured(main_grad):
    table, tokens, upstream = draw(5000, 512, 256, 16, torch.bfloat16)
    module = module_of(table.requires_grad_(), main_grad)

    def step():
        if main_grad:
            table.main_grad.zero_()
        out = embedding.superposed_embedding(module, tokens[None], "extension")
        (gradient,) = torch.autograd.grad(out, table, upstream[None])
        return out, table.main_grad if main_grad else gradient

    want = [tensor.detach().clone() for tensor in step()]
    assert all(torch.equal(x, y) for x, y in zip(in_a_graph(step), want, strict=True))


def test_more_than_2_to_the_31_elements():
    rows, columns = 2**20 + 2**10, 2048  # 2.15e9 elements: 4.3 GB, and 8.6 GB of fp32 gradient
    if torch.cuda.mem_get_info()[0] < 15e9:
        pytest.skip("NOT RUN: needs 15 GB of GPU memory")
    ops = embedding.KERNELS["extension"]()
    table = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    table[-9:] = torch.randn(9, columns, device="cuda")
    tokens = torch.randint(rows - 9, rows, (100, 4), device="cuda")
    mean = ops[0](table, tokens, 0, rows, torch.float32)
    assert torch.equal(mean, ops[0](table[-9:], tokens, rows - 9, rows, torch.float32))
    gradient, upstream = torch.zeros(rows, columns, device="cuda"), mean.bfloat16()
    ops[1](gradient, upstream, tokens, 0, rows)
    ops[1](last := torch.zeros(9, columns, device="cuda"), upstream, tokens, rows - 9, rows)
    assert torch.equal(gradient[-9:], last) and not gradient[: 2**20].any()


def test_memory_of_a_step():
    """No fp32 copy of the table or of the positions: the result, its gradient's scratch."""
    table, tokens, upstream = draw(100_000, 1024, 2048, 8, torch.bfloat16)
    module = module_of(table.requires_grad_())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    out = embedding.superposed_embedding(module, tokens[None], "extension")
    torch.autograd.grad(out, table, upstream[None])
    peak = torch.cuda.max_memory_allocated() - start
    # the empty tensor that stands for the gradient is of the table's size
    assert peak < table.nbytes + out.nbytes + 20 * tokens.nbytes + 16e6


def test_a_token_outside_the_vocabulary_stops_the_process():
    code = (
        "import torch; from megatron_tst import extension; extension.load()\n"
        "torch.ops.megatron_tst.superposed_embedding(torch.zeros(8, 4, device='cuda'), "
        "torch.full((4, 2), 8, device='cuda'), 0, 8, torch.float32); torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "device-side assert" in done.stderr, done.stderr[-500:]
