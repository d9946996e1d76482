"""The emulator itself (tests/support/cuda_on_cpu): each fault of a kernel is seen, what is right
passes, and the text pass.
"""

import ctypes
import re

import pytest
import torch
from support import cuda_on_cpu
from support.cuda_on_cpu import Fault, Gpu, build, translate

pytestmark = pytest.mark.skipif(
    cuda_on_cpu.NOT_RUN is not None, reason=f"{cuda_on_cpu.NOT_RUN}: the emulator"
)

KERNELS = """
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include "emulator.h"
namespace {

// What one thread does in each of several ways.
__global__ void try_it(int what, const float* in, float* out, int n) {
  __shared__ float at[64];
  __shared__ float unaligned[8];
  extern __shared__ float more[];
  const int i = threadIdx.x, block = blockIdx.x;
  switch (what) {
    // ---- right
    case 0: out[block * n + i] = in[i]; break;
    case 1: at[i] = in[i]; __syncthreads(); out[block * n + i] = at[n - 1 - i]; break;
    case 2: out[block * n + i] = __shfl_down_sync(~0u, in[i], 1); break;
    case 3: out[block * n + i] = __ballot_sync(~0u, i % 3 == 0); break;
    case 4: more[i] = in[i]; __syncwarp(); out[block * n + i] = more[i ^ 1]; break;
    case 5: at[0] = 7.f; __syncthreads(); out[block * n + i] = at[0]; break;
    case 6:
      if (i < 8) out[block * n + i] = __shfl_xor_sync(0xffu, in[i], 4);
      else out[block * n + i] = in[i];
      break;
    case 7: out[block * n + i] = __shfl_sync(~0u, in[i], 3, 8); break;
    case 8:
      if (i % 4 == 0) {
        __stcs(reinterpret_cast<float4*>(out + block * n + i),
            __ldg(reinterpret_cast<const float4*>(in + i)));
      }
      break;
    case 9: out[block * n + i] = __shfl_up_sync(~0u, in[i], 1, 8); break;
    // ---- wrong
    case 20: if (i < 7) __syncthreads(); break;
    case 21:
      if (i < 7) __syncthreads();
      else
        __syncthreads();
      break;
    case 22: if (i < 7) __shfl_xor_sync(~0u, 1.f, 1); break;
    case 23: if (i < 7) __shfl_xor_sync(0x7fu, 1.f, 8); break;
    case 24: __shfl_xor_sync(0x0fu, 1.f, 1); break;
    case 25: if (i < 16) { __syncwarp(); } else { __ballot_sync(~0u, 1); } break;
    case 26: out[0] = in[32]; break;
    case 27: out[-1] = 0.f; break;
    case 28: const_cast<float*>(in)[i] = 0.f; break;
    case 29: __ldcs(reinterpret_cast<const float4*>(in + 1)); break;
    case 30: *reinterpret_cast<volatile double*>(out + 1) = 0.; break;
    case 31: out[i] = out[i + 1]; break;
    case 32: out[i] = at[i]; break;
    case 33: at[i] = in[i]; out[i] = at[n - 1 - i]; break;
    case 34: out[0] = in[i]; break;
    case 35: out[i] = block; break;
    case 36: at[(i + 1) % n] = 0.f; at[i] += 1.f; break;
    case 37: more[n] = 0.f; break;
    case 38: out[block * n + (i ? i : 1)] = in[i ? i : 1]; break;
    case 39: CUDA_KERNEL_ASSERT(i < 5); break;
    case 40: __ldg(reinterpret_cast<float4*>(unaligned)); break;
    case 41: if (i == 3) return; __syncthreads(); break;
  }
}

__global__ void misaligned_copy(const float* in, float* out) {
  *reinterpret_cast<float4*>(out) = *reinterpret_cast<const float4*>(in);
}

template <typename T, int count>
__global__ void larger_block(T* out) { out[threadIdx.x] = count; }

}  // namespace

extern "C" void try_it_of(int64_t what, const float* in, float* out, int64_t blocks) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  try_it<<<dim3(blocks), 32, 32 * sizeof(float), stream>>>(what, in, out, 32);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

extern "C" void misaligned_of(const float* in, float* out) {
  misaligned_copy<<<1, 1>>>(in, out);
}

extern "C" void block_of(float* out, int64_t threads, int64_t shared) {
  larger_block<float, 2 + 1><<<
      1, threads, shared>>>(out);
}
"""
RIGHT = {
    0: lambda x: x,
    1: lambda x: x.flip(0),
    2: lambda x: torch.cat((x[1:], x[-1:])),
    3: lambda x: torch.full((32,), float(sum(1 << i for i in range(0, 32, 3)))),
    4: lambda x: x.view(16, 2).flip(1).flatten(),
    5: lambda x: torch.full((32,), 7.0),
    6: lambda x: torch.cat((x[4:8], x[:4], x[8:])),
    7: lambda x: x.view(4, 8)[:, 3:4].expand(4, 8).flatten(),
    8: lambda x: x,
    9: lambda x: torch.cat((x.view(4, 8)[:, :1], x.view(4, 8)[:, :7]), 1).flatten(),
}
WRONG = {
    20: "waits for ever at __syncthreads of line",
    21: "at __syncthreads of line .* at that of line|waits for ever",
    22: "a shuffle waits for lane|waits for ever at a shuffle",
    23: "shuffles from lane 8, which is not in mask 7f|shuffles from lane",
    24: "is not in its own mask f",
    25: "while lane|waits for ever|has ended",
    26: r"reads 4 bytes outside: byte 128 of row 0 of an input \[1 rows of 128 bytes\]",
    27: "writes 4 bytes outside: byte -4 of row 0 of an output",
    28: "writes to an input, which is an input",
    29: "reads 16 bytes at an address that is no multiple of it",
    30: "writes 8 bytes at an address that is no multiple of it",
    31: "which nobody has written|outside|a race",
    32: "reads element at byte .* of the shared array of line .*, which nobody has written",
    33: "a race: .* the shared array of line|nobody has written",
    34: "a race: writes another value where thread",
    35: "a race: writes another value where thread",
    36: "a race: .* with no barrier between them|nobody has written",
    37: "writes 4 bytes outside",
    38: "1 elements of 32 are not written, the first at .0.",
    39: "device-side assert: i < 5",
    40: "reads 16 bytes at an address that is no multiple",
    41: "waits for ever at __syncthreads",
}
SEEDS = range(1, 9)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "tiny.cu").write_text(KERNELS)
    (folder / "exports.cpp").write_text('#include "tiny.cu"\n')
    return build("tiny", csrc=folder, exports=folder / "exports.cpp", sanitized=False)


def run(kernels, what, blocks, seed):
    gpu = Gpu(kernels, seed)
    x = torch.randn(32)
    out = gpu.output((blocks * 32,), torch.float32)
    gpu.call("try_it_of", what, gpu.input(x), out, blocks)
    return x, gpu.result(out)


@pytest.mark.parametrize("what", RIGHT)
def test_what_is_right_passes(kernels, what):
    for seed in SEEDS:
        x, got = run(kernels, what, 5, seed)
        assert torch.equal(got, RIGHT[what](x).repeat(5))


@pytest.mark.parametrize("what", WRONG)
def test_each_fault_is_seen(kernels, what):
    for seed in SEEDS:
        with pytest.raises(Fault, match=WRONG[what]) as fault:
            run(kernels, what, 2 if what == 35 else 1, seed)
        x, got = run(kernels, 1, 3, seed)  # and the next call is not disturbed
        assert torch.equal(got, x.flip(0).repeat(3))
    if what not in (20, 21, 38, 41):  # seen where no thread is at work any more, or at either line
        number = next(i for i, line in enumerate(KERNELS.split("\n"), 1) if f"case {what}:" in line)
        assert f"at csrc/tiny.cu:{number}" in str(fault.value), fault.value


def test_a_plain_access_must_be_aligned(kernels):
    for start, right in ((0, True), (1, False), (2, False), (4, True)):
        gpu = Gpu(kernels)
        out = gpu.output((4,), torch.float32)
        arguments = gpu.input(torch.arange(4.0), start), out
        if right:
            gpu.call("misaligned_of", *arguments)
            assert gpu.result(out).tolist() == [0, 1, 2, 3]
        else:
            with pytest.raises(Fault, match="reads 16 bytes at an address that is no multiple"):
                gpu.call("misaligned_of", *arguments)


def test_an_access_stays_in_its_row(kernels):
    """Of adjacent rows too."""
    gpu = Gpu(kernels)
    rows = gpu.input(torch.zeros(4, 3), stride=3)
    with pytest.raises(Fault, match=r"byte 0 of row 0 of an input \[4 rows of 12 bytes\]"):
        gpu.call("misaligned_of", rows, gpu.output((4,), torch.float32))


@pytest.mark.parametrize("threads, shared", [(1025, 0), (0, 0), (32, 49153)])
def test_launches_that_a_gpu_refuses(kernels, threads, shared):
    gpu = Gpu(kernels)
    with pytest.raises(Fault, match="more than a GPU takes, or nothing"):
        gpu.call("block_of", gpu.output((2000,), torch.float32), threads, shared)
    gpu = Gpu(kernels)
    out = gpu.output((1024,), torch.float32)
    gpu.call("block_of", out, 1024, 0)
    assert (gpu.result(out) == 3).all()


def test_bytes_around_a_tensor(kernels):
    gpu = Gpu(kernels)
    out = gpu.output((2, 3), torch.bfloat16, stride=5)
    out.fill_(1)
    assert gpu.result(out).tolist() == [[1, 1, 1]] * 2
    gpu.places[out.data_ptr()][0][out.storage_offset() + 3] = 1
    with pytest.raises(Fault, match="bytes around a tensor"):
        gpu.result(out)


def test_threads_run_in_another_order_with_another_seed(kernels):
    """By the first thread that is caught."""
    caught = set()
    for seed in range(20):
        with pytest.raises(Fault) as fault:
            run(kernels, 34, 1, seed)
        caught.add(re.search(r"thread (\d+)", str(fault.value))[1])
    assert len(caught) > 5


def test_the_exponential_errs_by_no_more_than_two_ulp():
    kernels = build("multi_hot_ce", sanitized=False)
    function = kernels.cuda_on_cpu_exp2
    function.restype, function.argtypes = ctypes.c_float, [ctypes.c_float]
    xs = torch.cat((-130 * torch.rand(2000), torch.tensor([0.0, -0.0, -126.0, -126.1, -1e30])))
    want = torch.exp2(xs.double())
    for seed in (0, 1, 2):
        Gpu(kernels, exp_seed=seed)
        got = torch.tensor([function(x) for x in xs.tolist()], dtype=torch.float64)
        assert torch.equal(got, torch.tensor([function(x) for x in xs.tolist()]).double())
        normal = want >= 2.0**-125
        error = ((got - want) / want)[normal].abs().max()
        assert error < 2.0**-24 + (2.0**-22 if seed else 0) and (not seed or error > 2.0**-23)
        assert (got[want < 2.0**-127] == 0).all() and got[2000:2002].tolist() == [1, 1]
    assert torch.tensor(function(float("nan"))).isnan() and function(float("-inf")) == 0


CUDA = """
f<T><<<dim3(a, b), c, 0, s>>>(x);
extern __shared__ float x[];
__shared__ P<a, 3> x[2][k / 3];
__shared__ alignas(16) float x;
asm("max.bf16x2 %0, %2, %1;" : "=r"(w) : "r"(f(a)), "r"(b));
asm volatile("{.reg .f16 x; mov.b32 {x, y}, %1; cvt.f32.f16 %0, x;}" : "=f"(z) : "r"(w) : "memory");
#if defined(__CUDA_ARCH__)
constexpr int kThreads = 256;
"""
CPP = """
EMULATOR::kernel("f<T>", f<T>, dim3(a, b), c, 0, s)(x);
auto* x = EMULATOR::dynamic_shared<float>();
auto& x = EMULATOR::shared_array<P<a, 3>[2][k / 3]>(__LINE__, alignof(P<a, 3>));
auto& x = EMULATOR::shared_array<float>(__LINE__, 16);
ptx::max_bf16x2(w, b, f(a));
ptx::mov_b32_cvt_f32_f16(w, z);
#if 1
constexpr int kThreads = 64;
"""


def test_the_text_pass():
    _, _, *lines = translate(CUDA, {"kThreads": 64}).split("\n")
    assert lines == CPP.replace("EMULATOR", "::cuda_on_cpu").split("\n")
