// Multi-hot cross entropy on CUDA: three passes over the logits (read; read and write), 16 bytes a
// load, several loads in flight.
//
// A row is worked on by one block, or by several where there are few rows, each with its own
// segment of columns; their results are combined in a fixed order: no atomics, the same bits in
// every run.
//
// Compile-time choices, to be measured:
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
constexpr int kBlocks = 8;                    // of a multiprocessor
constexpr int kRowsOfBlock = 4;               // where a warp works on a row
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

// A thread's part of kBatch vectors: from, from + kThreads, ... The thread's vectors end `left`
// behind `from`; of fewer than kBatch only those before the end are touched.
struct Batch {
  uint4 vector[kInFlight];

  template <bool plain>
  __device__ __forceinline__ void load(const uint4* from) {
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      vector[j] = plain ? load_plain(from + j * kThreads) : load_streaming(from + j * kThreads);
    }
  }

  template <bool plain>
  __device__ __forceinline__ void load(const uint4* from, int left, uint32_t filler) {
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      vector[j] = make_uint4(filler, filler, filler, filler);
      if (j * kThreads >= left) continue;
      vector[j] = plain ? load_plain(from + j * kThreads) : load_streaming(from + j * kThreads);
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

// One rescaling for all the elements of the batch; behind its end they are -inf.
template <typename T>
__device__ __forceinline__ void include(SoftmaxSum& sum, const Batch& batch, int left) {
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
    if (j * kThreads >= left) break;
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
__global__ void __launch_bounds__(kThreads, kBlocks) softmax_sums(
    const T* logits, int64_t stride, int columns, int length, SoftmaxSum* sums_SN) {
  const T* z = logits + blockIdx.x * stride;
  const Segment segment = segment_of_block(z, columns, length);
  const uint4* from = reinterpret_cast<const uint4*>(z + segment.body) + threadIdx.x;
  int left = segment.vectors - static_cast<int>(threadIdx.x);
  SoftmaxSum sum;
  const int head = segment.first + threadIdx.x, tail = segment.tail + threadIdx.x;
  if (head < segment.body) include_one(sum, z[head]);
  if (tail < segment.last) include_one(sum, z[tail]);
  Batch batch;
  for (; left >= kBatch; left -= kBatch, from += kBatch) {
    batch.load<kPlainForward>(from);
    include<T>(sum, batch, kBatch);
  }
  if (left > 0) {
    batch.load<kPlainForward>(from, left, Word<T>::kMinusInfinity);
    include<T>(sum, batch, left);
  }

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
  for (int k = lane; k < bag.size; k += 32) {
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
    const Batch& batch, int left) {
#pragma unroll
  for (int j = 0; j < kInFlight; ++j) {
    if (j * kThreads >= left) break;
    const uint4 result = gradient_of<T>(gradient, batch.vector[j]);
    if (kPlainStore) {
      store_plain(to + j * kThreads, result);
    } else {
      store_streaming(to + j * kThreads, result);
    }
  }
}

// A label's column and the gradient there.
struct alignas(8) Labelled {
  int column;  // kElsewhere: another rank's, or none's
  float value;
};
constexpr int kElsewhere = -1;

// One warp a row. -> labelled_NS
template <typename T>
__global__ void __launch_bounds__(32 * kRowsOfBlock) label_gradients(Problem<const T> problem,
    const float* saved_3N, const float* upstream_N, Labelled* labelled_NS) {
  const int64_t n = int64_t(blockIdx.x) * kRowsOfBlock + threadIdx.x / 32;
  if (n >= problem.rows) return;
  const Bag bag = problem.bag(n);
  const RowGradient gradient(saved_row(saved_3N, problem.rows, n), upstream_N[n]);
  for (int k = threadIdx.x % 32; k < bag.size; k += 32) {
    Labelled label = {kElsewhere, 0.f};
    if (bag.owned(k)) {
      label.column = static_cast<int>(bag.column(k));
      const float logit = static_cast<float>(problem.row(n)[label.column]);
      if (!gradient.zero()) label.value = gradient.labelled(bag, k, logit);
    }
    labelled_NS[n * bag.size + k] = label;
  }
}

// `out_NV` may be the logits: what the labels' columns held has been read by label_gradients. Every
// block touches its segment alone and writes the labels' columns last.
template <typename T>
__global__ void __launch_bounds__(kThreads, 8) row_gradients(const T* logits, int64_t stride,
    int columns, int length, const float* saved_3N, const float* upstream_N,
    const Labelled* labelled_NS, int bag_size, T* out_NV, int64_t out_stride) {
  const int64_t rows = gridDim.x;
  const int64_t n = kPlainForward ? rows - 1 - blockIdx.x : blockIdx.x;
  const T* z = logits + n * stride;
  T* out = out_NV + n * out_stride;
  const Segment segment = segment_of_block(z, columns, length);
  const RowGradient gradient(saved_row(saved_3N, rows, n), upstream_N[n]);
  const auto apart = reinterpret_cast<uintptr_t>(z) ^ reinterpret_cast<uintptr_t>(out);
  auto one = [&](int v) {
    out[v] = static_cast<T>(gradient.zero() ? 0.f : gradient.element(static_cast<float>(z[v])));
  };
  if (gradient.zero() || (apart & 15)) {
    for (int v = segment.first + threadIdx.x; v < segment.last; v += kThreads) one(v);
  } else {
    const uint4* from = reinterpret_cast<const uint4*>(z + segment.body) + threadIdx.x;
    uint4* to = reinterpret_cast<uint4*>(out + segment.body) + threadIdx.x;
    int left = segment.vectors - static_cast<int>(threadIdx.x);
    Batch batch;
#pragma unroll 2
    for (; left >= kBatch; left -= kBatch, from += kBatch, to += kBatch) {
      batch.load<false>(from);
      store_gradient<T>(to, gradient, batch, kBatch);
    }
    if (left > 0) {
      batch.load<false>(from, left, 0u);
      store_gradient<T>(to, gradient, batch, left);
    }
    const int head = segment.first + threadIdx.x, tail = segment.tail + threadIdx.x;
    if (head < segment.body) one(head);
    if (tail < segment.last) one(tail);
  }
  __syncthreads();
  for (int k = threadIdx.x; k < bag_size; k += kThreads) {
    const Labelled label = labelled_NS[n * bag_size + k];
    // occurrences of one token write the same value
    if (label.column >= segment.first && label.column < segment.last) {
      out[label.column] = static_cast<T>(label.value);
    }
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

int64_t statistics_scratch(int64_t rows, int64_t columns) {
  return rows * segments_of_row(rows, columns) * sizeof(SoftmaxSum) / sizeof(float);
}

int64_t gradient_scratch(int64_t rows, int64_t bag_size) {
  return rows * bag_size * sizeof(Labelled) / sizeof(float);
}

template <typename T>
void statistics(const Problem<const T>& problem, int64_t vocab_size, float* scratch,
    float* statistics_4N) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int segments = static_cast<int>(segments_of_row(problem.rows, problem.columns));
  auto* sums_SN = reinterpret_cast<SoftmaxSum*>(scratch);
  softmax_sums<T><<<dim3(problem.rows, segments), kThreads, 0, stream>>>(problem.logits,
      problem.stride, problem.columns,
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
    float* scratch, T* out, int64_t out_stride) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t segments = segments_of_row(problem.rows, problem.columns);
  auto* labelled_NS = reinterpret_cast<Labelled*>(scratch);
  label_gradients<T><<<blocks(problem.rows, kRowsOfBlock), 32 * kRowsOfBlock, 0, stream>>>(
      problem, saved_3N, upstream_N, labelled_NS);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  row_gradients<T><<<dim3(problem.rows, segments), kThreads, 0, stream>>>(problem.logits,
      problem.stride, problem.columns, segment_length<T>(problem.columns, segments), saved_3N,
      upstream_N, labelled_NS, problem.bag_size, out, out_stride);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

#define MHCE_INSTANTIATE(T)                                                      \
  template void statistics<T>(const Problem<const T>&, int64_t, float*, float*); \
  template void gradient<T>(                                                     \
      const Problem<const T>&, const float*, const float*, float*, T*, int64_t);
MHCE_INSTANTIATE(float)
MHCE_INSTANTIATE(c10::BFloat16)
MHCE_INSTANTIATE(c10::Half)

}  // namespace megatron_tst::cuda
