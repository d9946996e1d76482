// The op's registration: torch.ops.megatron_tst.multi_hot_ce_*, for CPU, CUDA (where built) and
// Meta, and the module itself.
//
// N rows, V columns that this rank holds, S labels a row, R ranks that share the vocabulary.
// Between `statistics` and `loss` the caller gathers the ranks' statistics: the op's only
// collective. Nothing here waits for the GPU.

#include "checks.h"
#include "multi_hot_ce.h"
#include "on_device.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <tuple>

namespace megatron_tst {
namespace {

using at::Tensor;

Tensor empty_like_logits(const Tensor& logits, c10::SymIntArrayRef sizes, at::ScalarType type) {
  return at::empty_symint(sizes, logits.options().dtype(type));
}

// -> fp32 [4, N]: maximum, sum of exponentials, target, weight of the labels that this rank holds
Tensor statistics_meta(const Tensor& logits, const Tensor& labels, const Tensor& weights,
    int64_t vocab_start, int64_t vocab_size, bool alt) {
  check_logits(logits);
  check_labels(labels, weights, logits.sym_size(0), logits.device());
  return empty_like_logits(logits, {4, logits.sym_size(0)}, at::kFloat);
}

// statistics fp32 [R, 4, N] -> loss fp32 [N], and for backward fp32 [3, N]: maximum, sum of
// exponentials, target
std::tuple<Tensor, Tensor> loss_meta(
    const Tensor& statistics, const Tensor& labels, const Tensor& weights, bool alt) {
  const c10::SymInt rows = statistics.sym_size(-1);
  check_rows(statistics, "statistics [R, 4, N]", 3, rows, statistics.device());
  TORCH_CHECK_VALUE(
      statistics.sym_size(1) == 4,
      "multi_hot_ce: expected statistics [R, 4, N], got ", statistics.sym_sizes(), ".");
  check_labels(labels, weights, rows, statistics.device());
  return {
      empty_like_logits(statistics, {rows}, at::kFloat),
      empty_like_logits(statistics, {3, rows}, at::kFloat),
  };
}

void check_gradient(const Tensor& logits, const Tensor& labels, const Tensor& weights,
    const Tensor& saved, const Tensor& upstream) {
  check_logits(logits);
  check_labels(labels, weights, logits.sym_size(0), logits.device());
  check_rows(saved, "saved [3, N]", 2, logits.sym_size(0), logits.device());
  TORCH_CHECK_VALUE(
      saved.sym_size(0) == 3,
      "multi_hot_ce: expected saved [3, N], got ", saved.sym_sizes(), ".");
  check_rows(upstream, "upstream [N]", 1, logits.sym_size(0), logits.device());
}

// -> [N, V] in the logits' dtype
Tensor gradient_meta(const Tensor& logits, const Tensor& labels, const Tensor& weights,
    const Tensor& saved, const Tensor& upstream, int64_t vocab_start, bool alt) {
  check_gradient(logits, labels, weights, saved, upstream);
  return empty_like_logits(logits, logits.sym_sizes(), logits.scalar_type());
}

void gradient_inplace_meta(Tensor& logits, const Tensor& labels, const Tensor& weights,
    const Tensor& saved, const Tensor& upstream, int64_t vocab_start, bool alt) {
  check_gradient(logits, labels, weights, saved, upstream);
}

// Calls work(T()) with the type of the logits, on their device.
template <typename Work>
void dispatch(const Tensor& logits, const Work& work) {
  if (logits.numel() == 0) return;
  const c10::DeviceGuard guard(logits.device());
  switch (logits.scalar_type()) {
    case at::kFloat: return work(float());
    case at::kBFloat16: return work(c10::BFloat16());
    default: return work(c10::Half());
  }
}

// columns and labels of a row, with room for 32-bit sums
constexpr int64_t kMost = std::numeric_limits<int>::max() / 2;

template <typename T>
Problem<const T> problem(const Tensor& logits, const Tensor& labels, const Tensor& weights,
    int64_t vocab_start, bool alt) {
  TORCH_CHECK_VALUE(
      logits.size(1) <= kMost && labels.size(1) <= kMost,
      "multi_hot_ce: expected at most ", kMost, " columns and labels a row, got ", logits.size(1),
      " and ", labels.size(1), ".");
  return {
      /*logits=*/logits.const_data_ptr<T>(),
      /*stride=*/logits.stride(0),
      /*labels=*/labels.const_data_ptr<int64_t>(),
      /*weights=*/weights.const_data_ptr<float>(),
      /*rows=*/logits.size(0),
      /*columns=*/static_cast<int>(logits.size(1)),
      /*bag_size=*/static_cast<int>(labels.size(1)),
      /*start=*/vocab_start,
      /*alt=*/alt,
  };
}

// Memory that a call of a kernel needs, from torch's allocator.
Tensor scratch_of(const Tensor& logits, int64_t floats) {
  return empty_like_logits(logits, {floats}, at::kFloat);
}

Tensor statistics(const Tensor& logits, const Tensor& labels, const Tensor& weights,
    int64_t vocab_start, int64_t vocab_size, bool alt) {
  Tensor out = statistics_meta(logits, labels, weights, vocab_start, vocab_size, alt);
  dispatch(logits, [&](auto zero) {
    const auto rows = problem<decltype(zero)>(logits, labels, weights, vocab_start, alt);
    const Tensor memory =
        scratch_of(logits, TST_ON_DEVICE(logits, statistics_scratch(rows.rows, rows.columns)));
    float* scratch = memory.mutable_data_ptr<float>();
    float* statistics_4N = out.mutable_data_ptr<float>();
    TST_ON_DEVICE(logits, statistics(rows, vocab_size, scratch, statistics_4N));
  });
  return out;
}

std::tuple<Tensor, Tensor> loss(
    const Tensor& statistics, const Tensor& labels, const Tensor& weights, bool alt) {
  auto [out, saved] = loss_meta(statistics, labels, weights, alt);
  if (out.numel() == 0) return {out, saved};
  const c10::DeviceGuard guard(statistics.device());
  const Problem<const float> rows = {  // no logits
      /*logits=*/nullptr,
      /*stride=*/0,
      /*labels=*/labels.const_data_ptr<int64_t>(),
      /*weights=*/weights.const_data_ptr<float>(),
      /*rows=*/labels.size(0),
      /*columns=*/0,
      /*bag_size=*/static_cast<int>(labels.size(1)),
      /*start=*/0,
      /*alt=*/alt,
  };
  const float* statistics_R4N = statistics.const_data_ptr<float>();
  float* loss_N = out.mutable_data_ptr<float>();
  float* saved_3N = saved.mutable_data_ptr<float>();
  TST_ON_DEVICE(statistics, loss(rows, statistics.size(0), statistics_R4N, loss_N, saved_3N));
  return {out, saved};
}

void write_gradient(const Tensor& logits, const Tensor& labels, const Tensor& weights,
    const Tensor& saved, const Tensor& upstream, int64_t vocab_start, bool alt, const Tensor& out) {
  dispatch(logits, [&](auto zero) {
    using T = decltype(zero);
    const auto rows = problem<T>(logits, labels, weights, vocab_start, alt);
    const float* saved_3N = saved.const_data_ptr<float>();
    const float* upstream_N = upstream.const_data_ptr<float>();
    T* out_NV = out.mutable_data_ptr<T>();
    const Tensor memory =
        scratch_of(logits, TST_ON_DEVICE(logits, gradient_scratch(rows.rows, rows.bag_size)));
    float* scratch = memory.mutable_data_ptr<float>();
    TST_ON_DEVICE(logits, gradient(rows, saved_3N, upstream_N, scratch, out_NV, out.stride(0)));
  });
}

Tensor gradient(const Tensor& logits, const Tensor& labels, const Tensor& weights,
    const Tensor& saved, const Tensor& upstream, int64_t vocab_start, bool alt) {
  Tensor out = gradient_meta(logits, labels, weights, saved, upstream, vocab_start, alt);
  write_gradient(logits, labels, weights, saved, upstream, vocab_start, alt, out);
  return out;
}

void gradient_inplace(Tensor& logits, const Tensor& labels, const Tensor& weights,
    const Tensor& saved, const Tensor& upstream, int64_t vocab_start, bool alt) {
  check_gradient(logits, labels, weights, saved, upstream);
  write_gradient(logits, labels, weights, saved, upstream, vocab_start, alt, logits);
}

}  // namespace
}  // namespace megatron_tst

TORCH_LIBRARY(megatron_tst, m) {
  m.def(
      "multi_hot_ce_statistics(Tensor logits, Tensor labels, Tensor weights, "
      "int vocab_start, int vocab_size, bool alt) -> Tensor");
  m.def(
      "multi_hot_ce_loss(Tensor statistics, Tensor labels, Tensor weights, bool alt)"
      " -> (Tensor, Tensor)");
  m.def(
      "multi_hot_ce_gradient(Tensor logits, Tensor labels, Tensor weights, "
      "Tensor saved, Tensor upstream, int vocab_start, bool alt) -> Tensor");
  m.def(
      "multi_hot_ce_gradient_(Tensor(a!) logits, Tensor labels, Tensor weights, "
      "Tensor saved, Tensor upstream, int vocab_start, bool alt) -> ()");
}

#define MHCE_REGISTER(suffix)                                          \
  m.impl("multi_hot_ce_statistics", megatron_tst::statistics##suffix); \
  m.impl("multi_hot_ce_loss", megatron_tst::loss##suffix);             \
  m.impl("multi_hot_ce_gradient", megatron_tst::gradient##suffix);     \
  m.impl("multi_hot_ce_gradient_", megatron_tst::gradient_inplace##suffix);

TORCH_LIBRARY_IMPL(megatron_tst, CPU, m) { MHCE_REGISTER() }
#if defined(MHCE_WITH_CUDA)
TORCH_LIBRARY_IMPL(megatron_tst, CUDA, m) { MHCE_REGISTER() }
#endif
TORCH_LIBRARY_IMPL(megatron_tst, Meta, m) { MHCE_REGISTER(_meta) }

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "The kernels of megatron_tst; importing it registers "
      "torch.ops.megatron_tst.multi_hot_ce_* and superposed_embedding*.";
  m.attr("torch_version") = TORCH_VERSION;
#if defined(MHCE_SOURCES)
  m.attr("sources") = MHCE_SOURCES;
#endif
#if defined(MHCE_WITH_CUDA)
  m.attr("cuda_architectures") = MHCE_CUDA_ARCHITECTURES;
#else
  m.attr("cuda_architectures") = "";
#endif
}
