// Multi-hot cross entropy on CUDA: three passes over the logits (read; read and write), 16 bytes a
// load, several loads in flight.
//
// A row is worked on by one block, or by several where there are few rows, each with its own
// segment of columns; their results are combined in a fixed order: no atomics, the same bits in
// every run.
//
// Compile-time choices for measurements (tools/gpu_check.sh --part hints):
//   MHCE_PLAIN_FORWARD  forward leaves the logits in L2, backward begins with the last rows
//   MHCE_PLAIN_STORE    backward leaves the gradient in L2

#include "multi_hot_ce.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

namespace megatron_tst::cuda {
namespace {

#if defined(MHCE_PLAIN_FORWARD)
constexpr bool kPlainForward = true;
#else
constexpr bool kPlainForward = false;
#endif
#if defined(MHCE_PLAIN_STORE)
constexpr bool kPlainStore = true;
#else
constexpr bool kPlainStore = false;
#endif

constexpr int kThreads = 256;
constexpr int kInFlight = 4;                  // 16-byte loads of one thread before the first is used
constexpr int kBatch = kInFlight * kThreads;  // vectors that a block loads at once
constexpr int kWords = 4;                     // 32-bit words of a vector
constexpr int kRowsOfBlock = 4;               // row_statistics: a warp a row
constexpr int64_t kEnoughBlocks = 2048;  // several for each of the largest GPU's multiprocessors
constexpr int64_t kShortestSegment = 8192;

// logits of a vector: 16 bytes
template <typename T>
constexpr int kLanes = 16 / sizeof(T);

// Columns first..last of a row. 16-byte accesses reach body..tail of them, the others are accessed
// one by one.
struct Segment {
  int first, body, tail, last;
  int vectors;  // of body..tail
};

// The block's, `length` columns to a block.
template <typename T>
__device__ __forceinline__ Segment segment_of_block(const T* row, int columns, int length) {
  const int first = min(columns, length * static_cast<int>(blockIdx.y));
  const int last = min(columns, first + length);
  const int unaligned = (reinterpret_cast<uintptr_t>(row + first) & 15) / sizeof(T);
  const int body = min(last, first + (unaligned ? kLanes<T> - unaligned : 0));
  const int vectors = (last - body) / kLanes<T>;
  return {first, body, body + vectors * kLanes<T>, last, vectors};
}

// A thread's part of kBatch vectors.
struct Batch {
  uint4 vector[kInFlight];

  // Vectors i, i + kThreads, ...: all of them, or those below `end`.
  template <bool plain>
  __device__ __forceinline__ void load(const uint4* from, int i) {
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const uint4* at = from + i + j * kThreads;
      vector[j] = plain ? load_plain(at) : load_streaming(at);
    }
  }

  template <bool plain>
  __device__ __forceinline__ void load(const uint4* from, int i, int end, uint32_t filler) {
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const uint4* at = from + i + j * kThreads;
      vector[j] = make_uint4(filler, filler, filler, filler);
      if (i + j * kThreads < end) vector[j] = plain ? load_plain(at) : load_streaming(at);
    }
  }
};

__device__ __forceinline__ const uint32_t* words(const uint4& vector) { return &vector.x; }
__device__ __forceinline__ uint32_t* words(uint4& vector) { return &vector.x; }

template <typename T>
__device__ __forceinline__ void include_one(SoftmaxSum& sum, T logit) {
  const float z = static_cast<float>(logit);
  const float peak = fmaxf(sum.peak, reference_of(z));
  sum = {peak, sum.sum * exp_nonpositive(sum.peak - peak) + exp_nonpositive(above(z, peak))};
}

// One rescaling for all the elements of the batch's vectors i, i + kThreads, ... below `end`;
// behind it they are -inf.
template <typename T>
__device__ __forceinline__ void include(SoftmaxSum& sum, const Batch& batch, int i, int end) {
  uint32_t largest = words(batch.vector[0])[0];
#pragma unroll
  for (int j = 0; j < kInFlight; ++j) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      largest = Word<T>::larger(largest, words(batch.vector[j])[w]);
    }
  }
  float z[Word<T>::size];
  Word<T>::unpack(largest, z);
  float top = z[0];
#pragma unroll
  for (int lane = 1; lane < Word<T>::size; ++lane) top = fmaxf(top, z[lane]);
  const float peak = fmaxf(sum.peak, reference_of(top));

  float total[2] = {sum.sum * exp_nonpositive(sum.peak - peak), 0.f};
#pragma unroll
  for (int j = 0; j < kInFlight; ++j) {
    if (i + j * kThreads >= end) break;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      Word<T>::unpack(words(batch.vector[j])[w], z);
#pragma unroll
      for (int lane = 0; lane < Word<T>::size; ++lane) {
        total[(w + lane) % 2] += exp_nonpositive(above(z[lane], peak));
      }
    }
  }
  sum = {peak, total[0] + total[1]};
}

__device__ __forceinline__ SoftmaxSum combine_lanes(SoftmaxSum mine) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    mine = combine(
        mine, {__shfl_xor_sync(~0u, mine.peak, offset), __shfl_xor_sync(~0u, mine.sum, offset)});
  }
  return mine;
}

__device__ __forceinline__ float sum_lanes(float mine) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) mine += __shfl_xor_sync(~0u, mine, offset);
  return mine;
}

// -> sums_SN [segment][row]
template <typename T>
__global__ void __launch_bounds__(kThreads, 8) softmax_sums(
    const T* logits, int64_t stride, int columns, int length, SoftmaxSum* sums_SN) {
  const T* z = logits + blockIdx.x * stride;
  const Segment segment = segment_of_block(z, columns, length);
  const uint4* vectors = reinterpret_cast<const uint4*>(z + segment.body);
  const int end = segment.vectors;
  SoftmaxSum sum;
  Batch batch;
  int i = threadIdx.x;
  for (int full = end / kBatch; full > 0; --full, i += kBatch) {
    batch.load<kPlainForward>(vectors, i);
    include<T>(sum, batch, 0, kBatch);
  }
  if (i < end) {
    batch.load<kPlainForward>(vectors, i, end, Word<T>::kMinusInfinity);
    include<T>(sum, batch, i, end);
  }
  i = segment.first + threadIdx.x;
  if (i < segment.body) include_one(sum, z[i]);
  i = segment.tail + threadIdx.x;
  if (i < segment.last) include_one(sum, z[i]);

  __shared__ SoftmaxSum of_warp[kThreads / 32];
  sum = combine_lanes(sum);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / 32; ++warp) sum = combine(sum, of_warp[warp]);
    sums_SN[int64_t(blockIdx.y) * gridDim.x + blockIdx.x] = sum;
  }
}

// One warp a row: its segments, its labels.
template <typename T>
__global__ void __launch_bounds__(32 * kRowsOfBlock) row_statistics(Problem<const T> problem,
    int64_t vocab_size, const SoftmaxSum* sums_SN, int segments, float* statistics_4N) {
  const int64_t n = int64_t(blockIdx.x) * kRowsOfBlock + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (n >= problem.rows) return;
  const Bag bag = problem.bag(n);
  SoftmaxSum softmax;
  for (int s = lane; s < segments; s += 32) {
    softmax = combine(softmax, sums_SN[s * problem.rows + n]);
  }
  softmax = combine_lanes(softmax);
  TargetSum sum;
  for (int64_t k = lane; k < bag.size; k += 32) {
    // a label outside the vocabulary: check that the data were tokenised with this vocabulary
    CUDA_KERNEL_ASSERT(
        bag.labels[k] == kIgnore || (bag.labels[k] >= 0 && bag.labels[k] < vocab_size));
    sum.include(bag, k, problem.row(n), softmax.peak);
  }
  if (bag.alt) {
    sum.tokens = combine_lanes(sum.tokens);
  } else {
    sum.value = sum_lanes(sum.value);
    sum.held = sum_lanes(sum.held);
    sum.total = sum_lanes(sum.total);
  }
  if (lane != 0) return;
  const Target target = sum.target(bag.alt);
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
  const bool carries_loss = problem.bag(n).carries_loss();
  loss_N[n] = carries_loss ? row_loss(row) : 0.f;
  save_row(row, carries_loss, saved_3N, problem.rows, n);
}

template <typename T>
__device__ __forceinline__ uint4 gradient_of(const RowGradient& gradient, const uint4& logits) {
  uint4 result;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    float z[Word<T>::size];
    Word<T>::unpack(words(logits)[w], z);
#pragma unroll
    for (int lane = 0; lane < Word<T>::size; ++lane) z[lane] = gradient.element(z[lane]);
    words(result)[w] = Word<T>::pack(z);
  }
  return result;
}

template <typename T>
__device__ __forceinline__ void store_gradient(uint4* to, const RowGradient& gradient,
    const Batch& batch, int i, int end) {
#pragma unroll
  for (int j = 0; j < kInFlight; ++j) {
    if (i + j * kThreads >= end) break;
    const uint4 result = gradient_of<T>(gradient, batch.vector[j]);
    if (kPlainStore) {
      store_plain(to + j * kThreads, result);
    } else {
      store_streaming(to + j * kThreads, result);
    }
  }
}

// `out` may be the logits: every block reads its labels' columns before it writes, writes them
// last, and touches its segment alone.
template <typename T>
__global__ void __launch_bounds__(kThreads) row_gradients(Problem<const T> problem, int length,
    const float* saved_3N, const float* upstream_N, T* out_NV, int64_t out_stride) {
  extern __shared__ float labelled[];  // [S]
  const int64_t n = kPlainForward ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const T* z = problem.row(n);
  T* out = out_NV + n * out_stride;
  const Segment segment = segment_of_block(z, static_cast<int>(problem.columns), length);
  const RowGradient gradient(saved_row(saved_3N, problem.rows, n), upstream_N[n]);
  const auto apart = reinterpret_cast<uintptr_t>(z) ^ reinterpret_cast<uintptr_t>(out);
  const bool one_by_one = gradient.zero() || (apart & 15);

  // the first loads are on their way while the labels' are waited for
  const uint4* from = reinterpret_cast<const uint4*>(z + segment.body);
  uint4* to = reinterpret_cast<uint4*>(out + segment.body);
  const int end = one_by_one ? 0 : segment.vectors;
  int full = end / kBatch;
  int i = threadIdx.x;
  Batch batch;
  auto load_next = [&] {
    if (full > 0) {
      batch.load<false>(from, i);
    } else {
      batch.load<false>(from, i, end, 0u);
    }
  };
  load_next();

  const Bag bag = problem.bag(n);
  auto mine = [&](int64_t k) {
    return bag.owned(k) && bag.column(k) >= segment.first && bag.column(k) < segment.last;
  };
  for (int64_t k = threadIdx.x; k < bag.size; k += kThreads) {
    if (!mine(k)) continue;
    const float logit = static_cast<float>(z[bag.column(k)]);
    labelled[k] = gradient.zero() ? 0.f : gradient.labelled(bag, k, logit);
  }
  __syncthreads();

  while (full > 0) {
    store_gradient<T>(to + i, gradient, batch, 0, kBatch);
    --full;
    i += kBatch;
    load_next();
  }
  store_gradient<T>(to + i, gradient, batch, i, end);
  auto one = [&](int v) {
    out[v] = static_cast<T>(gradient.zero() ? 0.f : gradient.element(static_cast<float>(z[v])));
  };
  const int body = one_by_one ? segment.last : segment.body;
  for (int v = segment.first + threadIdx.x; v < body; v += kThreads) one(v);
  const int tail = segment.tail + threadIdx.x;
  if (!one_by_one && tail < segment.last) one(tail);
  __syncthreads();
  for (int64_t k = threadIdx.x; k < bag.size; k += kThreads) {
    // occurrences of one token write the same value
    if (mine(k)) out[bag.column(k)] = static_cast<T>(labelled[k]);
  }
}

// Both depend on the shape alone, so that the order of additions does too.
int64_t segments_of_row(int64_t rows, int64_t columns) {
  const int64_t wanted = (kEnoughBlocks + rows - 1) / rows;
  return std::max<int64_t>(1, std::min(wanted, columns / kShortestSegment));
}

template <typename T>
int segment_length(int64_t columns, int64_t segments) {
  return ((columns + segments - 1) / segments + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

int blocks(int64_t rows, int64_t rows_of_block) {
  return static_cast<int>((rows + rows_of_block - 1) / rows_of_block);
}

}  // namespace

int64_t scratch_floats(int64_t rows, int64_t columns) {
  return 2 * rows * segments_of_row(rows, columns);  // a SoftmaxSum a segment
}

template <typename T>
void statistics(const Problem<const T>& problem, int64_t vocab_size, float* scratch,
    float* statistics_4N) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int segments = static_cast<int>(segments_of_row(problem.rows, problem.columns));
  auto* sums_SN = reinterpret_cast<SoftmaxSum*>(scratch);
  softmax_sums<T><<<dim3(problem.rows, segments), kThreads, 0, stream>>>(problem.logits,
      problem.stride, static_cast<int>(problem.columns),
      segment_length<T>(problem.columns, segments), sums_SN);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  row_statistics<T><<<blocks(problem.rows, kRowsOfBlock), 32 * kRowsOfBlock, 0, stream>>>(
      problem, vocab_size, sums_SN, segments, statistics_4N);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void loss(const Problem<const float>& problem, int64_t ranks, const float* statistics_R4N,
    float* loss_N, float* saved_3N) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  row_losses<<<blocks(problem.rows, 128), 128, 0, stream>>>(
      problem, ranks, statistics_R4N, loss_N, saved_3N);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void gradient(const Problem<const T>& problem, const float* saved_3N, const float* upstream_N,
    T* out, int64_t out_stride) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t segments = segments_of_row(problem.rows, problem.columns);
  const size_t shared_bytes = problem.bag_size * sizeof(float);
  row_gradients<T><<<dim3(problem.rows, segments), kThreads, shared_bytes, stream>>>(problem,
      segment_length<T>(problem.columns, segments), saved_3N, upstream_N, out, out_stride);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

#define MHCE_INSTANTIATE(T)                                                      \
  template void statistics<T>(const Problem<const T>&, int64_t, float*, float*); \
  template void gradient<T>(const Problem<const T>&, const float*, const float*, T*, int64_t);
MHCE_INSTANTIATE(float)
MHCE_INSTANTIATE(c10::BFloat16)
MHCE_INSTANTIATE(c10::Half)

}  // namespace megatron_tst::cuda
