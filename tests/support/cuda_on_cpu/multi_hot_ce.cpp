// What tests call of csrc/multi_hot_ce.cu (tests/support/cuda_on_cpu/README.md).
#include "multi_hot_ce.cu"

using namespace megatron_tst;

#define EXPORT_FOR(T, name)                                                                     \
  extern "C" void statistics_##name(const T* logits, int64_t stride, const int64_t* labels,     \
      const float* weights, int64_t rows, int64_t columns, int64_t bag_size, int64_t start,     \
      bool alt, int64_t vocab_size, float* scratch, float* statistics_4N) {                     \
    const Problem<const T> problem = {                                                          \
        logits, stride, labels, weights, rows, int(columns), int(bag_size), start, alt};        \
    cuda::statistics<T>(problem, vocab_size, scratch, statistics_4N);                           \
  }                                                                                             \
  extern "C" void gradient_##name(const T* logits, int64_t stride, const int64_t* labels,       \
      const float* weights, int64_t rows, int64_t columns, int64_t bag_size, int64_t start,     \
      bool alt, const float* saved_3N, const float* upstream_N, float* scratch, T* out,         \
      int64_t out_stride) {                                                                     \
    const Problem<const T> problem = {                                                          \
        logits, stride, labels, weights, rows, int(columns), int(bag_size), start, alt};        \
    cuda::gradient<T>(problem, saved_3N, upstream_N, scratch, out, out_stride);                 \
  }
EXPORT_FOR(float, float32)
EXPORT_FOR(c10::BFloat16, bfloat16)
EXPORT_FOR(c10::Half, float16)

extern "C" void loss(const int64_t* labels, const float* weights, int64_t rows, int64_t bag_size,
    bool alt, int64_t ranks, const float* statistics_R4N, float* loss_N, float* saved_3N) {
  const Problem<const float> problem = {  // no logits
      nullptr, 0, labels, weights, rows, 0, int(bag_size), 0, alt};
  cuda::loss(problem, ranks, statistics_R4N, loss_N, saved_3N);
}

// fp32 numbers
extern "C" int64_t statistics_scratch(int64_t rows, int64_t columns) {
  return cuda::statistics_scratch(rows, columns);
}
extern "C" int64_t gradient_scratch(int64_t rows, int64_t bag_size) {
  return cuda::gradient_scratch(rows, bag_size);
}
