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

#include "device.h"

namespace megatron_tst {

constexpr int64_t kIgnore = -100;

// A NaN must not hide behind a comparison: sums meet every element, so they carry it, and the
// maximum may drop it.
TST_INLINE float larger(float a, float b) { return a > b ? a : b; }

// Sum over some columns of exp(z), relative to a reference: about their maximum, kLowest where all
// are -inf (device.h).
struct SoftmaxSum {
  float peak = kLowest;
  float sum = 0.f;
};

TST_INLINE SoftmaxSum combine(SoftmaxSum a, SoftmaxSum b) {
  const float peak = larger(a.peak, b.peak);
  return {peak, a.sum * exp_nonpositive(a.peak - peak) + b.sum * exp_nonpositive(b.peak - peak)};
}

// The labels of one row, seen from the rank that holds columns start..start+columns.
struct Bag {
  const int64_t* labels;
  const float* weights;
  int size, columns;
  int64_t start;
  bool alt;

  TST_INLINE bool valid(int k) const { return labels[k] != kIgnore; }
  TST_INLINE int64_t column(int k) const { return labels[k] - start; }
  TST_INLINE bool owned(int k) const {
    return valid(k) && column(k) >= 0 && column(k) < columns;
  }

  // Whether the row has a loss: a valid label of positive weight.
  TST_INLINE bool carries_loss() const {
    for (int k = 0; k < size; ++k) {
      if (valid(k) && weights[k] > 0.f) return true;
    }
    return false;
  }

  TST_INLINE bool first_occurrence(int k) const {
    for (int j = 0; j < k; ++j) {
      if (labels[j] == labels[k]) return false;
    }
    return true;
  }

  // Weight of the token labels[k] in the bag.
  //   mce      its occurrences' over the valid labels'
  //   mce-alt  its largest over the largest of the valid labels
  TST_INLINE float token_weight(int k) const {
    float token = 0.f, total = 0.f;
    for (int j = 0; j < size; ++j) {
      if (!valid(j)) continue;
      total = alt ? larger(total, weights[j]) : total + weights[j];
      if (labels[j] == labels[k]) token = alt ? larger(token, weights[j]) : token + weights[j];
    }
    return total > 0.f ? token / total : 0.f;
  }
};

// What the owned labels contribute, `reference` being the row's.
//   mce      sum of w_k (z[y_k] - reference)
//   mce-alt  log sum of w_v exp(z_v - reference) over distinct tokens
struct Target {
  float value;
  float held;  // weight of the owned labels: `value` falls by held * d as the reference rises by d
};

// The target of some of a row's labels, as sums that add up.
struct TargetSum {
  float value = 0.f, held = 0.f, total = 0.f;  // mce; total: of all valid labels
  SoftmaxSum tokens;                           // mce-alt

  template <typename T>
  TST_INLINE void include(const Bag& bag, int k, const T* z, float reference) {
    if (bag.alt) {
      if (!bag.owned(k) || !bag.first_occurrence(k)) return;
      const float weight = bag.token_weight(k);
      if (!(weight > 0.f)) return;
      tokens = combine(tokens, {above(static_cast<float>(z[bag.column(k)]), reference), weight});
      return;
    }
    // a weight of 0 must not meet a logit of -inf
    if (!bag.valid(k) || !(bag.weights[k] > 0.f)) return;
    total += bag.weights[k];
    if (!bag.owned(k)) return;
    value += bag.weights[k] * above(static_cast<float>(z[bag.column(k)]), reference);
    held += bag.weights[k];
  }

  TST_INLINE Target target(bool alt) const {
    if (alt) return {tokens.peak + log_positive(tokens.sum), 0.f};
    return total > 0.f ? Target{value / total, held / total} : Target{0.f, 0.f};
  }
};

// Statistics of a row over the whole vocabulary, from those of R ranks at [rank][what][row].
struct RowStatistics {
  SoftmaxSum softmax;
  float target;
};

TST_INLINE RowStatistics combine_ranks(
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
  if (alt) all.target = alt_sum.peak + log_positive(alt_sum.sum);
  return all;
}

// A row without loss is kept for backward as one whose sum of exponentials is kNoLoss.
constexpr float kNoLoss = -1.f;

TST_INLINE void save_row(
    const RowStatistics& all, bool carries_loss, float* saved_3N, int64_t rows, int64_t row) {
  saved_3N[row] = all.softmax.peak;
  saved_3N[rows + row] = carries_loss ? all.softmax.sum : kNoLoss;
  saved_3N[2 * rows + row] = all.target;
}

TST_INLINE RowStatistics saved_row(const float* saved_3N, int64_t rows, int64_t row) {
  return {{saved_3N[row], saved_3N[rows + row]}, saved_3N[2 * rows + row]};
}

// nats
TST_INLINE float row_loss(const RowStatistics& row) {
  return (log_positive(row.softmax.sum) - row.target) * kNats;
}

// Gradient of one row: element v is exp(z_v - peak) * factor, less what the bag takes off in the
// columns that it names.
struct RowGradient {
  float peak, factor, scale, target;

  TST_INLINE RowGradient(const RowStatistics& row, float upstream)
      : peak(row.softmax.peak), factor(0.f), scale(0.f), target(row.target) {
    if (row.softmax.sum != kNoLoss && upstream != 0.f) {
      scale = upstream;
      factor = upstream / row.softmax.sum;
    }
  }

  // Rows that carry no loss get exact zeros, whatever their logits are.
  TST_INLINE bool zero() const { return scale == 0.f; }

  TST_INLINE float element(float z) const { return exp_nonpositive(above(z, peak)) * factor; }

  TST_INLINE float labelled(const Bag& bag, int k, float z) const {
    float off = bag.token_weight(k);
    if (bag.alt && off > 0.f) off = exp_nonpositive(above(z, peak) - target + log_positive(off));
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
  int64_t rows;
  int columns, bag_size;
  int64_t start;
  bool alt;

  TST_INLINE Bag bag(int64_t n) const {
    return {labels + n * bag_size, weights, bag_size, columns, start, alt};
  }
  TST_INLINE const T* row(int64_t n) const { return logits + n * stride; }
};

// What each device provides; ops.cpp says what the arrays hold.
#define MHCE_DECLARE_KERNELS                                                                     \
  /* fp32 numbers of scratch memory */                                                           \
  int64_t statistics_scratch(int64_t rows, int64_t columns);                                     \
  int64_t gradient_scratch(int64_t rows, int64_t bag_size);                                      \
  template <typename T>                                                                          \
  void statistics(const Problem<const T>& problem, int64_t vocab_size, float* scratch,           \
      float* statistics_4N);                                                                     \
  void loss(const Problem<const float>& problem, int64_t ranks, const float* statistics_R4N,     \
      float* loss_N, float* saved_3N);                                                           \
  template <typename T>                                                                          \
  void gradient(const Problem<const T>& problem, const float* saved_3N, const float* upstream_N, \
      float* scratch, T* out, int64_t out_stride);

namespace cpu {
MHCE_DECLARE_KERNELS
}
namespace cuda {
MHCE_DECLARE_KERNELS
}
#undef MHCE_DECLARE_KERNELS

}  // namespace megatron_tst
