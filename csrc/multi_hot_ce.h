// Multi-hot cross entropy: the arithmetic that the CPU and the CUDA kernels share, and what each of
// them provides.
//
// For a row with logits z and labels y_1..y_S of weights w_k:
//
//   mce      log sum_v exp z_v - sum_k w_k z[y_k]
//            w_k over the sum of the valid labels' weights
//   mce-alt  log sum_v exp z_v - log sum_{v in bag} w_v exp z_v
//            w_v the largest weight of v over the largest of the bag
//
// A rank holds columns start..start+V of the vocabulary. Shapes: N rows, V columns, S labels a row,
// R ranks. A label is valid if it is not -100, owned if the rank holds its column. All arithmetic
// is fp32. Nothing here reads outside z[0..V) or y[0..S), whatever the labels are.
#pragma once

#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define MHCE_INLINE __host__ __device__ __forceinline__
#else
#define MHCE_INLINE inline __attribute__((always_inline))
#endif

namespace megatron_tst {

constexpr int64_t kIgnore = -100;
constexpr float kLowest = -std::numeric_limits<float>::max();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// exp(x) for x <= 0 (a logit less its row's maximum), within 1 ulp. Below -87, where the result
// would be subnormal, it is 0. NaN stays.
MHCE_INLINE float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  float result;  // __expf spends three more instructions on subnormal results
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504f));
  return result;
#else
  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  constexpr float kRound = 12582912.f;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n ln 2, ln 2 in two parts
  // minimax fit of (exp(r) - 1 - r) / r^2 on |r| <= ln 2 / 2, relative error 4e-9
  float q = 1.381459879e-3f;
  q = q * r + 8.368716575e-3f;
  q = q * r + 4.166838899e-2f;
  q = q * r + 1.666652113e-1f;
  q = q * r + 4.999999404e-1f;
  const float mantissa = (q * r * r + r) + 1.f;
  const uint32_t exponent = (__builtin_bit_cast(uint32_t, shifted) << 23) + 0x3f800000u;
  return x < -87.f ? 0.f : mantissa * __builtin_bit_cast(float, exponent);
#endif
}

// A NaN must not hide behind a comparison: sums meet every element, so they carry it, and the
// maximum may drop it.
MHCE_INLINE float larger(float a, float b) { return a > b ? a : b; }

// sum over some columns of exp(z - peak), peak being their maximum (kLowest where all are -inf)
struct SoftmaxSum {
  float peak = kLowest;
  float sum = 0.f;
};

MHCE_INLINE SoftmaxSum combine(SoftmaxSum a, SoftmaxSum b) {
  const float peak = larger(a.peak, b.peak);
  return {peak, a.sum * exp_nonpositive(a.peak - peak) + b.sum * exp_nonpositive(b.peak - peak)};
}

// The labels of one row, seen from the rank that holds columns start..start+columns.
struct Bag {
  const int64_t* labels;
  const float* weights;
  int64_t size, start, columns;
  bool alt;

  MHCE_INLINE bool valid(int64_t k) const { return labels[k] != kIgnore; }
  MHCE_INLINE int64_t column(int64_t k) const { return labels[k] - start; }
  MHCE_INLINE bool owned(int64_t k) const {
    return valid(k) && column(k) >= 0 && column(k) < columns;
  }

  // mce: sum of the valid labels' weights. mce-alt: the largest of them. 0: the row has no loss.
  MHCE_INLINE float total() const {
    float total = 0.f;
    for (int64_t k = 0; k < size; ++k) {
      if (valid(k)) total = alt ? larger(total, weights[k]) : total + weights[k];
    }
    return total;
  }

  MHCE_INLINE bool first_occurrence(int64_t k) const {
    for (int64_t j = 0; j < k; ++j) {
      if (labels[j] == labels[k]) return false;
    }
    return true;
  }

  // Weight of the token labels[k] over `total`: the sum of its occurrences' (mce) or the largest
  // (mce-alt).
  MHCE_INLINE float token_weight(int64_t k, float total) const {
    float weight = 0.f;
    for (int64_t j = 0; j < size; ++j) {
      if (labels[j] != labels[k]) continue;
      weight = alt ? larger(weight, weights[j]) : weight + weights[j] / total;
    }
    return alt ? weight / total : weight;
  }
};

// What the owned labels contribute.
//   mce      sum of w_k (z[y_k] - peak)
//   mce-alt  log sum of w_v exp(z_v - peak) over distinct tokens
struct Target {
  float value;
  float held;  // weight of the owned labels: `value` falls by held * d when peak rises by d (mce)
};

template <typename T>
MHCE_INLINE Target bag_target(const Bag& bag, const T* z, float peak) {
  const float total = bag.total();
  if (!bag.alt) {
    Target target = {0.f, 0.f};
    for (int64_t k = 0; k < bag.size; ++k) {
      // a weight of 0 must not meet a logit of -inf
      if (!bag.owned(k) || !(bag.weights[k] > 0.f)) continue;
      const float weight = bag.weights[k] / total;
      target.value += weight * (static_cast<float>(z[bag.column(k)]) - peak);
      target.held += weight;
    }
    return target;
  }
  SoftmaxSum sum;  // online, in the order of the labels
  for (int64_t k = 0; k < bag.size; ++k) {
    if (!bag.owned(k) || !bag.first_occurrence(k)) continue;
    const float weight = bag.token_weight(k, total);
    if (weight > 0.f) sum = combine(sum, {static_cast<float>(z[bag.column(k)]) - peak, weight});
  }
  return {sum.peak + logf(sum.sum), 0.f};
}

// Statistics of a row over the whole vocabulary, from those of R ranks at [rank][what][row].
struct RowStatistics {
  SoftmaxSum softmax;
  float target;
};

MHCE_INLINE RowStatistics combine_ranks(
    const float* local, int64_t ranks, int64_t rows, int64_t row, bool alt) {
  auto at = [=](int64_t rank, int what) { return local[(rank * 4 + what) * rows + row]; };
  RowStatistics all = {{kLowest, 0.f}, 0.f};
  for (int64_t r = 0; r < ranks; ++r) all.softmax.peak = larger(all.softmax.peak, at(r, 0));
  SoftmaxSum alt_sum;
  for (int64_t r = 0; r < ranks; ++r) {
    const float shift = at(r, 0) - all.softmax.peak;
    all.softmax.sum += at(r, 1) * exp_nonpositive(shift);
    if (alt) {
      alt_sum = combine(alt_sum, {at(r, 2) + shift, 1.f});
    } else {
      all.target += at(r, 2) + (at(r, 3) > 0.f ? at(r, 3) * shift : 0.f);
    }
  }
  if (alt) all.target = alt_sum.peak + logf(alt_sum.sum);
  return all;
}

MHCE_INLINE void save_row(const RowStatistics& all, float* saved_3N, int64_t rows, int64_t row) {
  saved_3N[row] = all.softmax.peak;
  saved_3N[rows + row] = all.softmax.sum;
  saved_3N[2 * rows + row] = all.target;
}

MHCE_INLINE RowStatistics saved_row(const float* saved_3N, int64_t rows, int64_t row) {
  return {{saved_3N[row], saved_3N[rows + row]}, saved_3N[2 * rows + row]};
}

MHCE_INLINE float row_loss(const Bag& bag, const RowStatistics& row) {
  return bag.total() > 0.f ? logf(row.softmax.sum) - row.target : 0.f;
}

// Gradient of one row: element v is exp(z_v - peak) * factor, less what the bag takes off in the
// columns that it names.
struct RowGradient {
  float peak, factor, scale, target, total;

  MHCE_INLINE RowGradient(const Bag& bag, const RowStatistics& row, float upstream)
      : peak(row.softmax.peak), factor(0.f), scale(0.f), target(row.target), total(bag.total()) {
    if (total > 0.f && upstream != 0.f) {
      scale = upstream;
      factor = upstream / row.softmax.sum;
    }
  }

  // Rows that carry no loss get exact zeros, whatever their logits are.
  MHCE_INLINE bool zero() const { return scale == 0.f; }

  MHCE_INLINE float element(float z) const { return exp_nonpositive(z - peak) * factor; }

  MHCE_INLINE float labelled(const Bag& bag, int64_t k, float z) const {
    float off = bag.token_weight(k, total);
    if (bag.alt && off > 0.f) off = exp_nonpositive(z - peak - target + logf(off));
    return element(z) - scale * off;
  }
};

// One call: what it works on. Rows of `logits` are `stride` elements apart, their columns adjacent.
template <typename T>
struct Problem {
  T* logits;
  int64_t stride;
  const int64_t* labels;
  const float* weights;
  int64_t rows, columns, bag_size, start;
  bool alt;

  MHCE_INLINE Bag bag(int64_t n) const {
    return {labels + n * bag_size, weights, bag_size, start, columns, alt};
  }
  MHCE_INLINE const T* row(int64_t n) const { return logits + n * stride; }
};

// What each device provides; ops.cpp says what the arrays hold.
#define MHCE_DECLARE_KERNELS                                                                     \
  template <typename T>                                                                          \
  void statistics(const Problem<const T>& problem, int64_t vocab_size, float* statistics_4N);    \
  void loss(const Problem<const float>& problem, int64_t ranks, const float* statistics_R4N,     \
      float* loss_N, float* saved_3N);                                                           \
  template <typename T>                                                                          \
  void gradient(const Problem<const T>& problem, const float* saved_3N, const float* upstream_N, \
      T* out, int64_t out_stride);

namespace cpu {
MHCE_DECLARE_KERNELS
}
namespace cuda {
MHCE_DECLARE_KERNELS
}
#undef MHCE_DECLARE_KERNELS

}  // namespace megatron_tst
