// Multi-hot cross entropy on CUDA: three passes over the logits (read; read and write), 16 bytes a
// load, several loads in flight.
//
// A row is worked on by one block, or by several where there are few rows, each with its own
// segment of columns; their results are combined in a fixed order: no atomics, the same bits in
// every run.

#include "multi_hot_ce.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace megatron_tst::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;             // 16-byte loads of one thread before the first is used
constexpr int64_t kEnoughBlocks = 2048;  // several for each of the largest GPU's multiprocessors
constexpr int64_t kShortestSegment = 8192;

template <typename T>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(T);
  T lane[size];
};

template <typename T>
__device__ __forceinline__ Vector<T> load_streaming(const Vector<T>* from) {
  const int4 bits = __ldcs(reinterpret_cast<const int4*>(from));
  return *reinterpret_cast<const Vector<T>*>(&bits);
}

template <typename T>
__device__ __forceinline__ void store_streaming(Vector<T>* to, const Vector<T>& vector) {
  __stcs(reinterpret_cast<int4*>(to), *reinterpret_cast<const int4*>(&vector));
}

// Columns first..last of a row. 16-byte accesses reach body..tail of them, the others are accessed
// one by one.
struct Segment {
  int64_t first, body, tail, last;
};

template <typename T>
__device__ __forceinline__ Segment segment_of_block(const T* row, int64_t columns) {
  constexpr int64_t kLanes = Vector<T>::size;
  const int64_t length = ((columns + gridDim.y - 1) / gridDim.y + kLanes - 1) / kLanes * kLanes;
  const int64_t first = min(columns, length * blockIdx.y), last = min(columns, first + length);
  const int64_t unaligned = (reinterpret_cast<uintptr_t>(row + first) & 15) / sizeof(T);
  const int64_t body = min(last, first + (unaligned ? kLanes - unaligned : 0));
  return {first, body, body + (last - body) / kLanes * kLanes, last};
}

__device__ __forceinline__ SoftmaxSum combine_block(SoftmaxSum mine) {
  __shared__ SoftmaxSum of_warp[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    mine = combine(
        mine, {__shfl_xor_sync(~0u, mine.peak, offset), __shfl_xor_sync(~0u, mine.sum, offset)});
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  SoftmaxSum all;
  if (threadIdx.x == 0) {
    for (const SoftmaxSum& warp : of_warp) all = combine(all, warp);
  }
  return all;  // in thread 0
}

// One rescaling for all the elements of `count` vectors.
template <typename T, int count>
__device__ __forceinline__ SoftmaxSum include(SoftmaxSum sum, const Vector<T> (&vectors)[count]) {
  float peak = sum.peak;
#pragma unroll
  for (int i = 0; i < count; ++i) {
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j) {
      peak = fmaxf(peak, static_cast<float>(vectors[i].lane[j]));
    }
  }
  SoftmaxSum all = {peak, sum.sum * exp_nonpositive(sum.peak - peak)};
#pragma unroll
  for (int i = 0; i < count; ++i) {
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j) {
      all.sum += exp_nonpositive(static_cast<float>(vectors[i].lane[j]) - peak);
    }
  }
  return all;
}

// -> sums_SN [segment][row]
template <typename T>
__global__ void __launch_bounds__(kThreads)
    softmax_sums(Problem<const T> problem, SoftmaxSum* sums_SN) {
  const int64_t n = blockIdx.x;
  const T* z = problem.row(n);
  const Segment segment = segment_of_block(z, problem.columns);
  SoftmaxSum sum;
  auto include_one = [&](int64_t v) { sum = combine(sum, {static_cast<float>(z[v]), 1.f}); };
  if (segment.first + threadIdx.x < segment.body) include_one(segment.first + threadIdx.x);
  if (segment.tail + threadIdx.x < segment.last) include_one(segment.tail + threadIdx.x);

  const Vector<T>* vectors = reinterpret_cast<const Vector<T>*>(z + segment.body);
  const int64_t count = (segment.tail - segment.body) / Vector<T>::size;
  int64_t i = threadIdx.x;
  for (; i + (kInFlight - 1) * kThreads < count; i += kInFlight * kThreads) {
    Vector<T> batch[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) batch[j] = load_streaming(vectors + i + j * kThreads);
    sum = include(sum, batch);
  }
  for (; i < count; i += kThreads) {
    const Vector<T> batch[1] = {load_streaming(vectors + i)};
    sum = include(sum, batch);
  }
  sum = combine_block(sum);
  if (threadIdx.x == 0) sums_SN[blockIdx.y * problem.rows + n] = sum;
}

// One thread a row: its segments, its labels.
template <typename T>
__global__ void row_statistics(Problem<const T> problem, int64_t vocab_size,
    const SoftmaxSum* sums_SN, int64_t segments, float* statistics_4N) {
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= problem.rows) return;
  SoftmaxSum softmax;
  for (int64_t s = 0; s < segments; ++s) softmax = combine(softmax, sums_SN[s * problem.rows + n]);
  const Bag bag = problem.bag(n);
  for (int64_t k = 0; k < bag.size; ++k) {
    // a label outside the vocabulary: check that the data were tokenised with this vocabulary
    CUDA_KERNEL_ASSERT(
        bag.labels[k] == kIgnore || (bag.labels[k] >= 0 && bag.labels[k] < vocab_size));
  }
  const Target target = bag_target(bag, problem.row(n), softmax.peak);
  statistics_4N[n] = softmax.peak;
  statistics_4N[problem.rows + n] = softmax.sum;
  statistics_4N[2 * problem.rows + n] = target.value;
  statistics_4N[3 * problem.rows + n] = target.held;
}

__global__ void row_losses(Problem<const float> problem, int64_t ranks, const float* statistics_R4N,
    float* loss_N, float* saved_3N) {
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= problem.rows) return;
  const RowStatistics row = combine_ranks(statistics_R4N, ranks, problem.rows, n, problem.alt);
  loss_N[n] = row_loss(problem.bag(n), row);
  save_row(row, saved_3N, problem.rows, n);
}

// `out` may be the logits: every block reads its labels' columns first and writes them last, and
// touches its segment alone.
template <typename T>
__global__ void __launch_bounds__(kThreads) row_gradients(Problem<const T> problem,
    const float* saved_3N, const float* upstream_N, T* out_NV, int64_t out_stride) {
  extern __shared__ float labelled[];  // [S]
  const int64_t n = blockIdx.x;
  const Bag bag = problem.bag(n);
  const T* z = problem.row(n);
  T* out = out_NV + n * out_stride;
  const Segment segment = segment_of_block(z, problem.columns);
  const RowGradient gradient(bag, saved_row(saved_3N, problem.rows, n), upstream_N[n]);
  auto mine = [&](int64_t k) {
    return bag.owned(k) && bag.column(k) >= segment.first && bag.column(k) < segment.last;
  };
  for (int64_t k = threadIdx.x; k < bag.size; k += kThreads) {
    if (!mine(k)) continue;
    const float logit = static_cast<float>(z[bag.column(k)]);
    labelled[k] = gradient.zero() ? 0.f : gradient.labelled(bag, k, logit);
  }
  __syncthreads();

  auto one = [&](int64_t v) {
    out[v] = static_cast<T>(gradient.zero() ? 0.f : gradient.element(static_cast<float>(z[v])));
  };
  auto all = [&](const Vector<T>& logits) {
    Vector<T> result;
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j) {
      result.lane[j] = static_cast<T>(gradient.element(static_cast<float>(logits.lane[j])));
    }
    return result;
  };
  const auto apart = reinterpret_cast<uintptr_t>(z) ^ reinterpret_cast<uintptr_t>(out);
  if (gradient.zero() || (apart & 15)) {
    for (int64_t v = segment.first + threadIdx.x; v < segment.last; v += kThreads) one(v);
  } else {
    if (segment.first + threadIdx.x < segment.body) one(segment.first + threadIdx.x);
    if (segment.tail + threadIdx.x < segment.last) one(segment.tail + threadIdx.x);
    const Vector<T>* from = reinterpret_cast<const Vector<T>*>(z + segment.body);
    Vector<T>* to = reinterpret_cast<Vector<T>*>(out + segment.body);
    const int64_t count = (segment.tail - segment.body) / Vector<T>::size;
    int64_t i = threadIdx.x;
    for (; i + (kInFlight - 1) * kThreads < count; i += kInFlight * kThreads) {
      Vector<T> batch[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) batch[j] = load_streaming(from + i + j * kThreads);
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) store_streaming(to + i + j * kThreads, all(batch[j]));
    }
    for (; i < count; i += kThreads) store_streaming(to + i, all(load_streaming(from + i)));
  }
  __syncthreads();
  for (int64_t k = threadIdx.x; k < bag.size; k += kThreads) {
    // occurrences of one token write the same value
    if (mine(k)) out[bag.column(k)] = static_cast<T>(labelled[k]);
  }
}

// Depends on the shape alone, so that the order of additions does too.
int64_t segments_of_row(int64_t rows, int64_t columns) {
  const int64_t wanted = (kEnoughBlocks + rows - 1) / rows;
  return std::max<int64_t>(1, std::min(wanted, columns / kShortestSegment));
}

dim3 blocks_of_one_thread_a_row(int64_t rows) { return dim3((rows + 127) / 128); }

}  // namespace

template <typename T>
void statistics(const Problem<const T>& problem, int64_t vocab_size, float* statistics_4N) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t segments = segments_of_row(problem.rows, problem.columns);
  // from torch's allocator, like everything: the sums of segments [segments, N]
  const at::Tensor sums =
      at::empty({segments, problem.rows, 2}, at::TensorOptions(at::kCUDA).dtype(at::kFloat));
  auto* sums_SN = reinterpret_cast<SoftmaxSum*>(sums.mutable_data_ptr<float>());
  softmax_sums<T><<<dim3(problem.rows, segments), kThreads, 0, stream>>>(problem, sums_SN);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  row_statistics<T><<<blocks_of_one_thread_a_row(problem.rows), 128, 0, stream>>>(
      problem, vocab_size, sums_SN, segments, statistics_4N);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void loss(const Problem<const float>& problem, int64_t ranks, const float* statistics_R4N,
    float* loss_N, float* saved_3N) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  row_losses<<<blocks_of_one_thread_a_row(problem.rows), 128, 0, stream>>>(
      problem, ranks, statistics_R4N, loss_N, saved_3N);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void gradient(const Problem<const T>& problem, const float* saved_3N, const float* upstream_N,
    T* out, int64_t out_stride) {
  const int64_t segments = segments_of_row(problem.rows, problem.columns);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const size_t shared_bytes = problem.bag_size * sizeof(float);
  row_gradients<T><<<dim3(problem.rows, segments), kThreads, shared_bytes, stream>>>(
      problem, saved_3N, upstream_N, out, out_stride);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

#define MHCE_INSTANTIATE(T)                                              \
  template void statistics<T>(const Problem<const T>&, int64_t, float*); \
  template void gradient<T>(const Problem<const T>&, const float*, const float*, T*, int64_t);
MHCE_INSTANTIATE(float)
MHCE_INSTANTIATE(c10::BFloat16)
MHCE_INSTANTIATE(c10::Half)

}  // namespace megatron_tst::cuda
