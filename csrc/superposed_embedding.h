// Superposed embedding: the arithmetic that the CPU and the CUDA kernels share, and what each of
// them provides.
//
//   forward    out[n]      = (sum over the places k of table[id[n, k]]) / S
//   backward   gradient[v] += (sum over the places (n, k) that hold v of upstream[n]) / S
//
// A rank holds rows start..start+rows of the table. A place whose id the rank does not own is
// skipped, never multiplied by zero: a NaN or an infinity in some row must not spread.
//
// Shapes: N positions, S places in a bag, V rows of the table that this rank holds, H columns.
// All arithmetic is fp32, with a true division and one rounding to the type of the result.
//
// The order of additions is fixed, and so are the bits, on both devices and with any number of
// threads. Forward adds in the order of the places. Backward sorts all places by id, those of one
// id in the order of (n, k), and cuts the sorted places into windows of kWindow. What lies of an id
// in one window is added in order; the sums of an id's windows are added in order. So a frequent
// token's thousands of occurrences can be shared out, and their fp32 sum loses less than one after
// the other.
#pragma once

#include "device.h"

#include <cstdint>

namespace megatron_tst {

constexpr int64_t kWindow = 32;  // sorted places

// The ids of N bags, seen from the rank that holds rows start..start+rows of the table.
struct Bags {
  const int64_t* tokens;  // [N, S]
  int64_t positions, bag_size, start, rows, columns;

  TST_INLINE int64_t places() const { return positions * bag_size; }
  // the row of a token, `rows` where this rank does not own it: that sorts last
  TST_INLINE int64_t row_of(int64_t token) const {
    const int64_t row = token - start;
    return token >= start && row < rows ? row : rows;
  }
  TST_INLINE int64_t row(int64_t place) const { return row_of(tokens[place]); }
  TST_INLINE bool owned(int64_t place) const { return row(place) < rows; }
};

TST_INLINE float mean(float sum, int64_t bag_size) {
  return sum / static_cast<float>(bag_size);
}

// What each device provides. `table` is [V, H], `out` [N, H]; T, Out: the table's type and fp32.
#define EMBEDDING_DECLARE_FORWARD          \
  template <typename T, typename Out>      \
  void pool_bags(const Bags& bags, int64_t vocab_size, const T* table, Out* out);

namespace cpu {
EMBEDDING_DECLARE_FORWARD

// upstream [N, H] -> added to gradient [V, H]
template <typename T, typename Out>
void add_gradient(const Bags& bags, const T* upstream, Out* gradient);
}  // namespace cpu

namespace cuda {
EMBEDDING_DECLARE_FORWARD

// -> keys [places]: the row of each place, as Bags::row
void rows_of_places(const Bags& bags, int32_t* keys);

// Columns that are worked on at once, and the fp32 numbers of scratch that this takes.
int64_t columns_at_once(const Bags& bags);
int64_t scratch_size(const Bags& bags);

// upstream [N, H] -> added to gradient [V, H]. `sorted` are the keys in rising order and `order` the
// place that each was at, both [places], stable.
template <typename T, typename Out>
void add_gradient(const Bags& bags, const int32_t* sorted, const int64_t* order, const T* upstream,
    float* scratch, Out* gradient);
}  // namespace cuda
#undef EMBEDDING_DECLARE_FORWARD

}  // namespace megatron_tst
