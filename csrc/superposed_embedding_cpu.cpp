// Superposed embedding on CPU: positions (forward) and distinct tokens (backward) over threads,
// columns over vector lanes. The sums of a block of columns stay in the first-level cache, and the
// result is written once.

#include "cpu.h"
#include "superposed_embedding.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <vector>

namespace megatron_tst::cpu {
namespace {

constexpr int64_t kBlock = 1024;  // columns whose sums are held at once
constexpr int64_t kAtOnce = 4;    // rows that are added in one pass over the sums

// sum[i] += rows[0][i], then += rows[1][i], ...: `count` rows, in their order
template <typename T>
TST_INLINE void add_rows(const T* const* rows, int64_t count, int64_t n, float* sum) {
  int64_t k = 0;
  for (; k + kAtOnce <= count; k += kAtOnce) {
    const T *a = rows[k], *b = rows[k + 1], *c = rows[k + 2], *d = rows[k + 3];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      sum[i] = (((sum[i] + static_cast<float>(a[i])) + static_cast<float>(b[i])) +
                   static_cast<float>(c[i])) + static_cast<float>(d[i]);
    }
  }
  for (; k < count; ++k) {
    const T* a = rows[k];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] += static_cast<float>(a[i]);
  }
}

// Columns first..first+n of one position. `rows` holds the owned rows' first columns.
template <typename T, typename Out>
TST_INLINE void pool_block(
    const T* const* rows, int64_t count, int64_t n, int64_t bag_size, Out* out) {
  alignas(64) float sum[kBlock];
  std::fill(sum, sum + n, 0.f);
  add_rows(rows, count, n, sum);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = rounded<Out>(mean(sum[i], bag_size));
}

// Columns first..first+n of one token's gradient. `rows` holds the upstream rows of its
// occurrences, the first `head` of them in the window that it begins in.
template <typename T, typename Out>
TST_INLINE void add_block(const T* const* rows, int64_t count, int64_t head, int64_t n,
    int64_t bag_size, Out* gradient) {
  alignas(64) float total[kBlock];
  alignas(64) float of_window[kBlock];
  std::fill(total, total + n, 0.f);
  add_rows(rows, head, n, total);
  for (int64_t k = head; k < count; k += kWindow) {
    std::fill(of_window, of_window + n, 0.f);
    add_rows(rows + k, std::min(kWindow, count - k), n, of_window);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) total[i] += of_window[i];
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    gradient[i] = rounded<Out>(static_cast<float>(gradient[i]) + mean(total[i], bag_size));
  }
}

#define EMBEDDING_VECTORISED(T, Out)                                                         \
  MHCE_EACH_TARGET void pool_block_each_target(                                              \
      const T* const* rows, int64_t count, int64_t n, int64_t bag_size, Out* out) {          \
    pool_block(rows, count, n, bag_size, out);                                               \
  }                                                                                          \
  MHCE_EACH_TARGET void add_block_each_target(const T* const* rows, int64_t count,           \
      int64_t head, int64_t n, int64_t bag_size, Out* gradient) {                            \
    add_block(rows, count, head, n, bag_size, gradient);                                     \
  }
EMBEDDING_VECTORISED(float, float)
EMBEDDING_VECTORISED(c10::BFloat16, c10::BFloat16)
EMBEDDING_VECTORISED(c10::BFloat16, float)
EMBEDDING_VECTORISED(c10::Half, c10::Half)
EMBEDDING_VECTORISED(c10::Half, float)
#undef EMBEDDING_VECTORISED

// The owned places by row, those of one row in order.
struct Sorted {
  std::vector<int64_t> positions;  // of each owned place
  std::vector<int64_t> ends;       // [V]: where in `positions` the places of a row end
};

Sorted sort_places(const Bags& bags) {
  Sorted sorted;
  sorted.ends.assign(bags.rows + 1, 0);
  for (int64_t place = 0; place < bags.places(); ++place) {
    if (bags.owned(place)) ++sorted.ends[bags.row(place) + 1];
  }
  for (int64_t row = 0; row < bags.rows; ++row) sorted.ends[row + 1] += sorted.ends[row];
  sorted.positions.resize(sorted.ends[bags.rows]);
  // until here ends[row] is where the row's places begin
  for (int64_t n = 0; n < bags.positions; ++n) {
    for (int64_t place = n * bags.bag_size; place < (n + 1) * bags.bag_size; ++place) {
      if (bags.owned(place)) sorted.positions[sorted.ends[bags.row(place)]++] = n;
    }
  }
  return sorted;
}

}  // namespace

template <typename T, typename Out>
void pool_bags(const Bags& bags, int64_t vocab_size, const T* table, Out* out) {
  for (int64_t place = 0; place < bags.places(); ++place) {
    TORCH_CHECK_VALUE(
        bags.tokens[place] >= 0 && bags.tokens[place] < vocab_size,
        "superposed_embedding: expected token ids in 0..", vocab_size - 1, ", got ",
        bags.tokens[place], ". Check that the data were tokenised with this vocabulary.");
  }
  at::parallel_for(0, bags.positions, 1, [&](int64_t begin, int64_t end) {
    std::vector<const T*> rows(bags.bag_size);
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t first = 0; first < bags.columns; first += kBlock) {
        int64_t count = 0;
        for (int64_t place = n * bags.bag_size; place < (n + 1) * bags.bag_size; ++place) {
          if (bags.owned(place)) rows[count++] = table + bags.row(place) * bags.columns + first;
        }
        pool_block_each_target(rows.data(), count, std::min(kBlock, bags.columns - first),
            bags.bag_size, out + n * bags.columns + first);
      }
    }
  });
}

template <typename T, typename Out>
void add_gradient(const Bags& bags, const T* upstream, Out* gradient) {
  const Sorted sorted = sort_places(bags);
  const int64_t places = sorted.positions.size();
  // A thread has a range of sorted places, and of these the rows that begin there.
  at::parallel_for(0, places, 1, [&](int64_t begin, int64_t end) {
    std::vector<const T*> occurrences;
    const auto& ends = sorted.ends;
    int64_t row = std::lower_bound(ends.begin(), ends.end() - 1, begin) - ends.begin();
    int64_t i = ends[row];  // the first row that begins at `begin` or later is behind this one
    if (begin == 0) row = -1, i = 0;
    for (++row; i < end; i = ends[row++]) {
      const int64_t count = ends[row] - i;
      if (count == 0) continue;
      const int64_t head = std::min(count, kWindow - i % kWindow);
      for (int64_t first = 0; first < bags.columns; first += kBlock) {
        occurrences.clear();
        for (int64_t k = i; k < i + count; ++k) {
          occurrences.push_back(upstream + sorted.positions[k] * bags.columns + first);
        }
        add_block_each_target(occurrences.data(), count, head,
            std::min(kBlock, bags.columns - first), bags.bag_size,
            gradient + row * bags.columns + first);
      }
    }
  });
}

#define EMBEDDING_INSTANTIATE(T, Out)                                    \
  template void pool_bags<T, Out>(const Bags&, int64_t, const T*, Out*); \
  template void add_gradient<T, Out>(const Bags&, const T*, Out*);
EMBEDDING_INSTANTIATE(float, float)
EMBEDDING_INSTANTIATE(c10::BFloat16, c10::BFloat16)
EMBEDDING_INSTANTIATE(c10::BFloat16, float)
EMBEDDING_INSTANTIATE(c10::Half, c10::Half)
EMBEDDING_INSTANTIATE(c10::Half, float)

}  // namespace megatron_tst::cpu
