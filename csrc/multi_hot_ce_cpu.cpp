// Multi-hot cross entropy on CPU: rows over threads, columns over vector lanes.

#include "cpu.h"
#include "multi_hot_ce.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <vector>

namespace megatron_tst::cpu {
namespace {

// columns that are converted at once; they stay in the first-level cache
constexpr int64_t kBlock = 2048;

template <typename T>
TST_INLINE SoftmaxSum softmax_sum(const T* z, int64_t columns) {
  alignas(64) float block[kBlock];
  SoftmaxSum all;
  for (int64_t first = 0; first < columns; first += kBlock) {
    const int64_t n = std::min(kBlock, columns - first);
    float peak = all.peak;
#pragma omp simd reduction(max : peak)
    for (int64_t i = 0; i < n; ++i) {
      block[i] = static_cast<float>(z[first + i]);
      peak = larger(block[i], peak);
    }
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += exp_nonpositive(block[i] - peak);
    all = {peak, all.sum * exp_nonpositive(all.peak - peak) + sum};
  }
  return all;
}

template <typename T>
TST_INLINE void row_gradient(const Problem<const T>& problem, const float* saved_3N,
    float upstream, int64_t n, T* out, float* labelled) {
  const Bag bag = problem.bag(n);
  const T* z = problem.row(n);
  const RowGradient gradient(saved_row(saved_3N, problem.rows, n), upstream);
  if (gradient.zero()) {
    std::fill(out, out + problem.columns, static_cast<T>(0.f));
    return;
  }
  // `out` may be the logits: the labels' columns are computed before and written after all others
  for (int k = 0; k < bag.size; ++k) {
    if (bag.owned(k)) labelled[k] = gradient.labelled(bag, k, static_cast<float>(z[bag.column(k)]));
  }
#pragma omp simd
  for (int64_t i = 0; i < problem.columns; ++i) {
    out[i] = rounded<T>(gradient.element(static_cast<float>(z[i])));
  }
  for (int k = 0; k < bag.size; ++k) {
    if (bag.owned(k)) out[bag.column(k)] = rounded<T>(labelled[k]);
  }
}

#define MHCE_VECTORISED(T)                                                           \
  MHCE_EACH_TARGET SoftmaxSum softmax_sum_each_target(const T* z, int64_t columns) { \
    return softmax_sum(z, columns);                                                  \
  }                                                                                  \
  MHCE_EACH_TARGET void row_gradient_each_target(const Problem<const T>& problem,    \
      const float* saved_3N, float upstream, int64_t n, T* out, float* labelled) {   \
    row_gradient(problem, saved_3N, upstream, n, out, labelled);                     \
  }
MHCE_VECTORISED(float)
MHCE_VECTORISED(c10::BFloat16)
MHCE_VECTORISED(c10::Half)
#undef MHCE_VECTORISED

}  // namespace

int64_t statistics_scratch(int64_t, int64_t) { return 0; }

int64_t gradient_scratch(int64_t, int64_t) { return 0; }

template <typename T>
void statistics(const Problem<const T>& problem, int64_t vocab_size, float*,
    float* statistics_4N) {
  for (int64_t i = 0; i < problem.rows * problem.bag_size; ++i) {
    const int64_t label = problem.labels[i];
    TORCH_CHECK_VALUE(
        label == kIgnore || (label >= 0 && label < vocab_size),
        "multi_hot_cross_entropy: expected labels in 0..", vocab_size - 1, " or ", kIgnore,
        ", got ", label, ". Check that the data were tokenised with this vocabulary.");
  }
  at::parallel_for(0, problem.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const SoftmaxSum softmax = softmax_sum_each_target(problem.row(n), problem.columns);
      const Bag bag = problem.bag(n);
      TargetSum sum;
      for (int k = 0; k < bag.size; ++k) sum.include(bag, k, problem.row(n), softmax.peak);
      const Target target = sum.target(bag.alt);
      const float values[4] = {softmax.peak, softmax.sum, target.value, target.held};
      for (int64_t i = 0; i < 4; ++i) statistics_4N[i * problem.rows + n] = values[i];
    }
  });
}

void loss(const Problem<const float>& problem, int64_t ranks, const float* statistics_R4N,
    float* loss_N, float* saved_3N) {
  for (int64_t n = 0; n < problem.rows; ++n) {
    const RowStatistics row = combine_ranks(statistics_R4N, ranks, problem.rows, n, problem.alt);
    const bool carries_loss = problem.bag(n).carries_loss();
    loss_N[n] = carries_loss ? row_loss(row) : 0.f;
    save_row(row, carries_loss, saved_3N, problem.rows, n);
  }
}

template <typename T>
void gradient(const Problem<const T>& problem, const float* saved_3N, const float* upstream_N,
    float*, T* out, int64_t out_stride) {
  at::parallel_for(0, problem.rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> labelled(problem.bag_size);
    for (int64_t n = begin; n < end; ++n) {
      row_gradient_each_target(
          problem, saved_3N, upstream_N[n], n, out + n * out_stride, labelled.data());
    }
  });
}

#define MHCE_INSTANTIATE(T)                                                      \
  template void statistics<T>(const Problem<const T>&, int64_t, float*, float*); \
  template void gradient<T>(                                                     \
      const Problem<const T>&, const float*, const float*, float*, T*, int64_t);
MHCE_INSTANTIATE(float)
MHCE_INSTANTIATE(c10::BFloat16)
MHCE_INSTANTIATE(c10::Half)

}  // namespace megatron_tst::cpu
