// Superposed embedding on CUDA. A thread has four neighbouring columns (8 or 16 bytes of a row), or
// one where rows are not aligned to that, and loads several rows before it adds the first. No
// atomics: superposed_embedding.h gives the order of additions.
//
// Forward: a block has a position and some columns. Backward, for a few columns at a time, so that
// what all windows read of `upstream` stays in L2:
//   add_windows  a block has a window of the sorted places. What of an id lies in this window alone
//                is added to the gradient. What goes on in other windows is left as a partial sum.
//   add_across   a block has an id that several windows share: their sums, then the gradient.

#include "superposed_embedding.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/macros/Macros.h>

#include <algorithm>
#include <type_traits>

namespace megatron_tst::cuda {
namespace {

constexpr int kPoolThreads = 256;
constexpr int kAddThreads = 128;
constexpr int kPartialsAtOnce = 16;  // the hottest token has hundreds, one after the other
constexpr int kLanes = 4;            // columns of a thread
constexpr int kPlacesAtOnce = 64;    // of a bag, a multiple of rows at once
constexpr int kSliceStep = kAddThreads * kLanes;
constexpr int64_t kScratch = 16 << 20;  // fp32 numbers: 64 MiB

// rows that a thread loads before it adds the first: 64 bytes of its columns
template <typename T>
constexpr int kRowsAtOnce = 16 / sizeof(T);

// Neighbouring numbers of a row, by one access.
template <typename T, int lanes>
struct Vector {
  static constexpr int kWords = lanes * sizeof(T) / 4;
  using Access = std::conditional_t<kWords == 4, uint4, uint2>;
  static_assert(kWords == 2 || kWords == 4);
  Access access;

  __device__ __forceinline__ void zero() { access = Access{}; }
  __device__ __forceinline__ void load_constant(const T* from) {
    access = __ldg(reinterpret_cast<const Access*>(from));
  }
  __device__ __forceinline__ void load(const T* from) {
    access = *reinterpret_cast<const Access*>(from);
  }
  __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<Access*>(to) = access; }

  __device__ __forceinline__ void unpack(float (&x)[lanes]) const {
    constexpr int size = Word<T>::size;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      float of_word[size];
      Word<T>::unpack((&access.x)[w], of_word);
#pragma unroll
      for (int i = 0; i < size; ++i) x[w * size + i] = of_word[i];
    }
  }
  __device__ __forceinline__ void pack(const float (&x)[lanes]) {
    constexpr int size = Word<T>::size;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      float of_word[size];
#pragma unroll
      for (int i = 0; i < size; ++i) of_word[i] = x[w * size + i];
      (&access.x)[w] = Word<T>::pack(of_word);
    }
  }
};

template <typename T>
struct Vector<T, 1> {
  T number;

  __device__ __forceinline__ void zero() { number = static_cast<T>(0.f); }
  __device__ __forceinline__ void load_constant(const T* from) { number = *from; }
  __device__ __forceinline__ void load(const T* from) { number = *from; }
  __device__ __forceinline__ void store(T* to) const { *to = number; }
  __device__ __forceinline__ void unpack(float (&x)[1]) const { x[0] = static_cast<float>(number); }
  __device__ __forceinline__ void pack(const float (&x)[1]) { number = static_cast<T>(x[0]); }
};

template <typename T, int lanes>
__device__ __forceinline__ void add(float (&sum)[lanes], const Vector<T, lanes>& vector) {
  float x[lanes];
  vector.unpack(x);
#pragma unroll
  for (int i = 0; i < lanes; ++i) sum[i] += x[i];
}

template <int lanes>
__device__ __forceinline__ int64_t column_of_thread() {
  return (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * lanes;
}

template <typename T, typename Out, int lanes>
__global__ void __launch_bounds__(kPoolThreads)
    pool(Bags bags, int64_t vocab_size, const T* table, Out* out) {
  __shared__ int row_of[kPlacesAtOnce];  // of places, -1 where there is nothing to add
  const int64_t n = blockIdx.x;
  const int64_t* tokens = bags.tokens + n * bags.bag_size;
  const int64_t column = column_of_thread<lanes>();
  const T* columns = table + column;
  float sum[lanes] = {};
  for (int64_t first = 0; first < bags.bag_size; first += kPlacesAtOnce) {
    const int count = static_cast<int>(min(int64_t(kPlacesAtOnce), bags.bag_size - first));
    if (first > 0) __syncthreads();  // the places before are done with
    for (int k = threadIdx.x; k < kPlacesAtOnce; k += blockDim.x) {
      const int64_t token = k < count ? tokens[first + k] : 0;
      // a token outside the vocabulary: check that the data were tokenised with this vocabulary
      CUDA_KERNEL_ASSERT(token >= 0 && token < vocab_size);
      const int64_t row = bags.row_of(token);
      row_of[k] = k < count && row < bags.rows ? static_cast<int>(row) : -1;
    }
    __syncthreads();
    if (column >= bags.columns) continue;
    for (int k = 0; k < count; k += kRowsAtOnce<T>) {
      Vector<T, lanes> rows[kRowsAtOnce<T>];
#pragma unroll
      for (int j = 0; j < kRowsAtOnce<T>; ++j) {
        const int row = row_of[k + j];
        rows[j].zero();  // a sum is never -0, so that adding this changes nothing
        if (row >= 0) rows[j].load_constant(columns + row * bags.columns);
      }
#pragma unroll
      for (int j = 0; j < kRowsAtOnce<T>; ++j) add(sum, rows[j]);
    }
  }
  if (column >= bags.columns) return;
#pragma unroll
  for (int i = 0; i < lanes; ++i) sum[i] = mean(sum[i], bags.bag_size);
  Vector<Out, lanes> result;
  result.pack(sum);
  result.store(out + n * bags.columns + column);
}

__global__ void write_keys(Bags bags, int32_t* keys) {
  const int64_t place = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (place < bags.places()) keys[place] = static_cast<int32_t>(bags.row(place));
}

// What add_windows and add_across work on.
struct Slice {
  const int32_t* sorted;  // [places] rows; bags.rows where the rank does not own the place
  const int64_t* order;   // [places]
  int64_t windows;
  int64_t first, width;  // columns
  float* scratch;        // [windows, 2, width]

  // What window w has of the row that it begins with, if that goes on from the window before
  // (which = 0), or of the row that begins in it and goes on in the next (which = 1).
  __device__ __forceinline__ float* partial(int64_t w, int which, int64_t column) const {
    return scratch + (w * 2 + which) * width + column;
  }
};

template <typename Out, int lanes>
__device__ __forceinline__ void add_to_gradient(
    Out* to, const float (&sum)[lanes], int64_t bag_size) {
  Vector<Out, lanes> vector;
  vector.load(to);
  float x[lanes];
  vector.unpack(x);
#pragma unroll
  for (int i = 0; i < lanes; ++i) x[i] += mean(sum[i], bag_size);
  vector.pack(x);
  vector.store(to);
}

template <typename T, typename Out, int lanes>
__global__ void __launch_bounds__(kAddThreads)
    add_windows(Bags bags, Slice slice, const T* upstream, Out* gradient) {
  __shared__ int row_of[kWindow + 2];   // of the places, with one before and one behind
  __shared__ int position_of[kWindow];  // -1 where there is nothing to add
  const int64_t w = blockIdx.x;
  const int count = static_cast<int>(min(int64_t(kWindow), bags.places() - w * kWindow));
  const int unowned = static_cast<int>(bags.rows);
  for (int i = threadIdx.x; i < kWindow + 2; i += blockDim.x) {
    const int64_t place = w * kWindow + i - 1;
    const int row = place >= 0 && place < bags.places() ? slice.sorted[place] : -1;
    row_of[i] = row;
    if (i < 1 || i > kWindow) continue;
    const bool held = i <= count && row != unowned;
    position_of[i - 1] = held ? static_cast<int>(slice.order[place] / bags.bag_size) : -1;
  }
  __syncthreads();
  const int64_t column = column_of_thread<lanes>();
  if (column >= slice.width) return;
  const T* columns = upstream + slice.first + column;
  float sum[lanes] = {};
  for (int first = 0; first < count; first += kRowsAtOnce<T>) {
    Vector<T, lanes> rows[kRowsAtOnce<T>];
#pragma unroll
    for (int j = 0; j < kRowsAtOnce<T>; ++j) {
      const int position = position_of[first + j];
      if (position >= 0) rows[j].load_constant(columns + position * bags.columns);
    }
#pragma unroll
    for (int j = 0; j < kRowsAtOnce<T>; ++j) {
      const int i = first + j;
      if (position_of[i] < 0) break;
      add(sum, rows[j]);
      const int row = row_of[i + 1];
      const bool ends_here = row_of[i + 2] != row;
      if (!ends_here && i + 1 < count) continue;
      const bool from_before = row_of[0] == row;
      if (ends_here && !from_before) {
        Out* to = gradient + row * bags.columns + slice.first + column;
        add_to_gradient(to, sum, bags.bag_size);
      } else {
        Vector<float, lanes> partial;
        partial.pack(sum);
        partial.store(slice.partial(w, from_before ? 0 : 1, column));
      }
#pragma unroll
      for (int l = 0; l < lanes; ++l) sum[l] = 0.f;
    }
  }
}

// Of the window in which the row begins: the last window that the row reaches.
__device__ __forceinline__ int64_t last_window(const Slice& slice, int64_t w, int row) {
  auto reaches = [&](int64_t x) { return x < slice.windows && slice.sorted[x * kWindow] == row; };
  int64_t step = 1;
  for (; reaches(w + step); step *= 2) w += step;  // most rows end with the second
  for (; step > 0; step /= 2) {
    if (reaches(w + step)) w += step;
  }
  return w;
}

template <typename Out, int lanes>
__global__ void __launch_bounds__(kAddThreads) add_across(Bags bags, Slice slice, Out* gradient) {
  const int64_t w = blockIdx.x;
  const int64_t next = (w + 1) * kWindow;
  if (next >= bags.places()) return;
  const int row = slice.sorted[next];
  if (row == bags.rows || slice.sorted[next - 1] != row) return;
  if (w > 0 && slice.sorted[w * kWindow - 1] == row) return;  // begins in a window before
  const int64_t column = column_of_thread<lanes>();
  if (column >= slice.width) return;
  const int64_t last = last_window(slice, w, row);
  float sum[lanes] = {};
  Vector<float, lanes> begin;
  begin.load(slice.partial(w, 1, column));
  add(sum, begin);
  for (int64_t x = w + 1; x <= last; x += kPartialsAtOnce) {
    Vector<float, lanes> partials[kPartialsAtOnce];
#pragma unroll
    for (int j = 0; j < kPartialsAtOnce; ++j) {
      partials[j].zero();
      if (x + j <= last) partials[j].load(slice.partial(x + j, 0, column));
    }
#pragma unroll
    for (int j = 0; j < kPartialsAtOnce; ++j) add(sum, partials[j]);
  }
  add_to_gradient(gradient + row * bags.columns + slice.first + column, sum, bags.bag_size);
}

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t windows_of(const Bags& bags) { return divided_up(bags.places(), kWindow); }

// Whether every row may be accessed kLanes numbers at a time.
template <typename T>
bool aligned(const T* rows, int64_t columns) {
  return columns % kLanes == 0 && reinterpret_cast<uintptr_t>(rows) % (kLanes * sizeof(T)) == 0;
}

struct Shape {
  dim3 blocks;
  int threads;
};

Shape shape_of(int64_t rows, int64_t columns, int lanes, int most_threads) {
  const int64_t warps = divided_up(divided_up(columns, lanes), 32);
  const int threads = static_cast<int>(std::min<int64_t>(most_threads, warps * 32));
  return {dim3(rows, divided_up(columns, int64_t(threads) * lanes)), threads};
}

template <typename T, typename Out, int lanes>
void launch_pool(const Bags& bags, int64_t vocab_size, const T* table, Out* out) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Shape shape = shape_of(bags.positions, bags.columns, lanes, kPoolThreads);
  pool<T, Out, lanes><<<shape.blocks, shape.threads, 0, stream>>>(bags, vocab_size, table, out);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T, typename Out, int lanes>
void launch_add(const Bags& bags, Slice slice, const T* upstream, Out* gradient) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t step = columns_at_once(bags);
  for (slice.first = 0; slice.first < bags.columns; slice.first += step) {
    slice.width = std::min(step, bags.columns - slice.first);
    const Shape shape = shape_of(slice.windows, slice.width, lanes, kAddThreads);
    add_windows<T, Out, lanes><<<shape.blocks, shape.threads, 0, stream>>>(
        bags, slice, upstream, gradient);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    add_across<Out, lanes><<<shape.blocks, shape.threads, 0, stream>>>(bags, slice, gradient);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

}  // namespace

template <typename T, typename Out>
void pool_bags(const Bags& bags, int64_t vocab_size, const T* table, Out* out) {
  if (aligned(table, bags.columns) && aligned(out, bags.columns)) {
    launch_pool<T, Out, kLanes>(bags, vocab_size, table, out);
  } else {
    launch_pool<T, Out, 1>(bags, vocab_size, table, out);
  }
}

void rows_of_places(const Bags& bags, int32_t* keys) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const dim3 blocks(divided_up(bags.places(), 256));
  write_keys<<<blocks, 256, 0, stream>>>(bags, keys);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

int64_t columns_at_once(const Bags& bags) {
  const int64_t steps = kScratch / (2 * windows_of(bags)) / kSliceStep;
  return std::min(bags.columns, std::max<int64_t>(1, steps) * kSliceStep);
}

int64_t scratch_size(const Bags& bags) { return 2 * windows_of(bags) * columns_at_once(bags); }

template <typename T, typename Out>
void add_gradient(const Bags& bags, const int32_t* sorted, const int64_t* order, const T* upstream,
    float* scratch, Out* gradient) {
  const Slice slice = {sorted, order, windows_of(bags), /*first=*/0, /*width=*/0, scratch};
  if (aligned(upstream, bags.columns) && aligned(gradient, bags.columns)) {
    launch_add<T, Out, kLanes>(bags, slice, upstream, gradient);
  } else {
    launch_add<T, Out, 1>(bags, slice, upstream, gradient);
  }
}

#define EMBEDDING_INSTANTIATE(T, Out)                                     \
  template void pool_bags<T, Out>(const Bags&, int64_t, const T*, Out*);  \
  template void add_gradient<T, Out>(                                     \
      const Bags&, const int32_t*, const int64_t*, const T*, float*, Out*);
EMBEDDING_INSTANTIATE(float, float)
EMBEDDING_INSTANTIATE(c10::BFloat16, c10::BFloat16)
EMBEDDING_INSTANTIATE(c10::BFloat16, float)
EMBEDDING_INSTANTIATE(c10::Half, c10::Half)
EMBEDDING_INSTANTIATE(c10::Half, float)

}  // namespace megatron_tst::cuda
