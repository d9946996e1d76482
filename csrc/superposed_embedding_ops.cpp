// The registration of torch.ops.megatron_tst.superposed_embedding*, for CPU, CUDA (where built) and
// Meta.
//
// N positions, S places in a bag, V rows of the table that this rank holds, H columns. Nothing here
// waits for the GPU.

#include "checks.h"
#include "on_device.h"
#include "superposed_embedding.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <limits>
#include <type_traits>

namespace megatron_tst {
namespace {

using at::Tensor;

bool is_float(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

void check_tokens(const Tensor& tokens, c10::Device device) {
  TORCH_CHECK_VALUE(
      tokens.dim() == 2 && tokens.sym_size(1) >= 1 && tokens.scalar_type() == at::kLong &&
          tokens.is_contiguous(),
      "superposed_embedding: expected tokens [N, S >= 1], int64 and contiguous, got ",
      tokens.scalar_type(), " ", tokens.sym_sizes(), ", strides ", tokens.sym_strides(), ".");
  TORCH_CHECK_VALUE(
      tokens.device() == device,
      "superposed_embedding: expected tokens on ", device, ", got ", tokens.device(), ".");
}

// A [rows, H] matrix: the table, its gradient, or the upstream gradient.
void check_matrix(const Tensor& matrix, const char* name) {
  TORCH_CHECK_VALUE(
      matrix.dim() == 2 && is_float(matrix.scalar_type()) && matrix.is_contiguous(),
      "superposed_embedding: expected ", name, " in fp32, bf16 or fp16 and contiguous, got ",
      matrix.scalar_type(), " ", matrix.sym_sizes(), ", strides ", matrix.sym_strides(), ".");
}

void check_range(const Tensor& table, int64_t vocab_start, int64_t vocab_size) {
  TORCH_CHECK_VALUE(
      vocab_start >= 0 && table.sym_size(0) + vocab_start <= vocab_size,
      "superposed_embedding: expected the rank's rows within 0..", vocab_size - 1, ", got ",
      table.sym_size(0), " from ", vocab_start, " on.");
  // what the CUDA kernels sort
  TORCH_CHECK_VALUE(
      table.sym_size(0) < std::numeric_limits<int32_t>::max(),
      "superposed_embedding: expected fewer than 2^31 - 1 rows on a rank, got ", table.sym_size(0),
      ".");
}

void check_fp32_or(at::ScalarType type, const char* name, at::ScalarType other) {
  TORCH_CHECK_VALUE(
      type == at::kFloat || type == other,
      "superposed_embedding: expected ", name, " in fp32 or ", other, ", got ", type, ".");
}

// -> [N, H]
Tensor pool_meta(const Tensor& table, const Tensor& tokens, int64_t vocab_start, int64_t vocab_size,
    at::ScalarType dtype) {
  check_matrix(table, "table [V, H]");
  check_range(table, vocab_start, vocab_size);
  check_tokens(tokens, table.device());
  check_fp32_or(dtype, "a result", table.scalar_type());
  return at::empty_symint({tokens.sym_size(0), table.sym_size(1)}, table.options().dtype(dtype));
}

void add_gradient_meta(Tensor& gradient, const Tensor& upstream, const Tensor& tokens,
    int64_t vocab_start, int64_t vocab_size) {
  check_matrix(gradient, "gradient [V, H]");
  check_range(gradient, vocab_start, vocab_size);
  check_matrix(upstream, "upstream [N, H]");
  check_tokens(tokens, gradient.device());
  check_fp32_or(gradient.scalar_type(), "gradient", upstream.scalar_type());
  TORCH_CHECK_VALUE(
      upstream.sym_size(0) == tokens.sym_size(0) && upstream.sym_size(1) == gradient.sym_size(1) &&
          upstream.device() == gradient.device(),
      "superposed_embedding: expected upstream [", tokens.sym_size(0), ", ", gradient.sym_size(1),
      "] on ", gradient.device(), ", got ", upstream.sym_sizes(), " on ", upstream.device(), ".");
}

// Calls work(T(), Out()) with the type of `from` and that of `to`: the same, or fp32.
template <typename Work>
void dispatch(const Tensor& from, const Tensor& to, const Work& work) {
  auto with = [&](auto t) {
    if (to.scalar_type() == at::kFloat) return work(t, float());
    if constexpr (!std::is_same_v<decltype(t), float>) work(t, t);
  };
  switch (from.scalar_type()) {
    case at::kFloat: return with(float());
    case at::kBFloat16: return with(c10::BFloat16());
    default: return with(c10::Half());
  }
}

Bags bags_of(const Tensor& tokens, int64_t vocab_start, const Tensor& table) {
  return {
      /*tokens=*/tokens.const_data_ptr<int64_t>(),
      /*positions=*/tokens.size(0),
      /*bag_size=*/tokens.size(1),
      /*start=*/vocab_start,
      /*rows=*/table.size(0),
      /*columns=*/table.size(1),
  };
}

Tensor pool(const Tensor& table, const Tensor& tokens, int64_t vocab_start, int64_t vocab_size,
    at::ScalarType dtype) {
  Tensor out = pool_meta(table, tokens, vocab_start, vocab_size, dtype);
  if (out.numel() == 0) return out;
  const c10::DeviceGuard guard(table.device());
  const Bags bags = bags_of(tokens, vocab_start, table);
  dispatch(table, out, [&](auto t, auto o) {
    using T = decltype(t);
    using Out = decltype(o);
    const T* rows = table.const_data_ptr<T>();
    Out* means = out.mutable_data_ptr<Out>();
    TST_ON_DEVICE(table, pool_bags(bags, vocab_size, rows, means));
  });
  return out;
}

void add_gradient_cpu(Tensor& gradient, const Tensor& upstream, const Tensor& tokens,
    int64_t vocab_start, int64_t vocab_size) {
  add_gradient_meta(gradient, upstream, tokens, vocab_start, vocab_size);
  dispatch(upstream, gradient, [&](auto t, auto o) {
    using T = decltype(t);
    using Out = decltype(o);
    cpu::add_gradient(bags_of(tokens, vocab_start, gradient), upstream.const_data_ptr<T>(),
        gradient.mutable_data_ptr<Out>());
  });
}

#if defined(MHCE_WITH_CUDA)
void add_gradient_cuda(Tensor& gradient, const Tensor& upstream, const Tensor& tokens,
    int64_t vocab_start, int64_t vocab_size) {
  add_gradient_meta(gradient, upstream, tokens, vocab_start, vocab_size);
  if (gradient.numel() == 0 || tokens.numel() == 0) return;
  const c10::DeviceGuard guard(gradient.device());
  const Bags bags = bags_of(tokens, vocab_start, gradient);
  // half the passes of a sort of int64
  const Tensor keys = at::empty({bags.places()}, tokens.options().dtype(at::kInt));
  cuda::rows_of_places(bags, keys.mutable_data_ptr<int32_t>());
  const auto [sorted, order] = at::sort(keys, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const Tensor scratch =
      at::empty({cuda::scratch_size(bags)}, tokens.options().dtype(at::kFloat));
  const int32_t* rows = sorted.const_data_ptr<int32_t>();
  const int64_t* places = order.const_data_ptr<int64_t>();
  dispatch(upstream, gradient, [&](auto t, auto o) {
    using T = decltype(t);
    using Out = decltype(o);
    cuda::add_gradient(bags, rows, places, upstream.const_data_ptr<T>(),
        scratch.mutable_data_ptr<float>(), gradient.mutable_data_ptr<Out>());
  });
}
#endif

}  // namespace
}  // namespace megatron_tst

TORCH_LIBRARY_FRAGMENT(megatron_tst, m) {
  m.def(
      "superposed_embedding(Tensor table, Tensor tokens, int vocab_start, int vocab_size, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "superposed_embedding_gradient_(Tensor(a!) gradient, Tensor upstream, Tensor tokens, "
      "int vocab_start, int vocab_size) -> ()");
}

#define EMBEDDING_REGISTER(pool, add_gradient)         \
  m.impl("superposed_embedding", megatron_tst::pool);  \
  m.impl("superposed_embedding_gradient_", megatron_tst::add_gradient);

TORCH_LIBRARY_IMPL(megatron_tst, CPU, m) { EMBEDDING_REGISTER(pool, add_gradient_cpu) }
#if defined(MHCE_WITH_CUDA)
TORCH_LIBRARY_IMPL(megatron_tst, CUDA, m) { EMBEDDING_REGISTER(pool, add_gradient_cuda) }
#endif
TORCH_LIBRARY_IMPL(megatron_tst, Meta, m) { EMBEDDING_REGISTER(pool_meta, add_gradient_meta) }
