// What tests call of csrc/superposed_embedding.cu (tests/support/cuda_on_cpu/README.md).
#include "superposed_embedding.cu"

using namespace megatron_tst;

#define EXPORT_FOR(T, Out, name)                                                                \
  extern "C" void pool_##name(const int64_t* tokens, int64_t positions, int64_t bag_size,       \
      int64_t start, int64_t rows, int64_t columns, int64_t vocab_size, const T* table,         \
      Out* out) {                                                                               \
    cuda::pool_bags<T, Out>(                                                                    \
        {tokens, positions, bag_size, start, rows, columns}, vocab_size, table, out);           \
  }                                                                                             \
  extern "C" void add_gradient_##name(const int64_t* tokens, int64_t positions,                 \
      int64_t bag_size, int64_t start, int64_t rows, int64_t columns, const int32_t* sorted,    \
      const int64_t* order, const T* upstream, float* scratch, Out* gradient) {                 \
    cuda::add_gradient<T, Out>({tokens, positions, bag_size, start, rows, columns}, sorted,     \
        order, upstream, scratch, gradient);                                                    \
  }
EXPORT_FOR(float, float, float32_float32)
EXPORT_FOR(c10::BFloat16, c10::BFloat16, bfloat16_bfloat16)
EXPORT_FOR(c10::BFloat16, float, bfloat16_float32)
EXPORT_FOR(c10::Half, c10::Half, float16_float16)
EXPORT_FOR(c10::Half, float, float16_float32)

extern "C" void rows_of_places(const int64_t* tokens, int64_t positions, int64_t bag_size,
    int64_t start, int64_t rows, int32_t* keys) {
  cuda::rows_of_places({tokens, positions, bag_size, start, rows, 0}, keys);
}

extern "C" int64_t scratch_size(
    const int64_t* tokens, int64_t positions, int64_t bag_size, int64_t rows, int64_t columns) {
  return cuda::scratch_size({tokens, positions, bag_size, 0, rows, columns});
}
