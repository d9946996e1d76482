// Messages for what the kernels cannot take: what was expected, what was got. Python's ValueError.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace megatron_tst {

inline void check_logits(const at::Tensor& logits) {
  const at::ScalarType type = logits.scalar_type();
  TORCH_CHECK_VALUE(
      logits.dim() == 2 && (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf),
      "multi_hot_ce: expected logits [N, V] in fp32, bf16 or fp16, got ", type, " ",
      logits.sym_sizes(), ".");
  const c10::SymInt rows = logits.sym_size(0), columns = logits.sym_size(1);
  TORCH_CHECK_VALUE(
      (columns <= 1 || logits.sym_stride(1) == 1) &&
          (rows <= 1 || logits.sym_stride(0) >= columns),
      "multi_hot_ce: expected the columns of a row side by side and no row over another, "
      "got strides ", logits.sym_strides(), " for sizes ", logits.sym_sizes(),
      ". Use logits.contiguous().");
}

inline void check_labels(const at::Tensor& labels, const at::Tensor& weights,
    const c10::SymInt& rows, c10::Device device) {
  TORCH_CHECK_VALUE(
      labels.dim() == 2 && labels.sym_size(0) == rows && labels.sym_size(1) >= 1 &&
          labels.scalar_type() == at::kLong && labels.is_contiguous(),
      "multi_hot_ce: expected labels [", rows, ", S >= 1], int64 and contiguous, got ",
      labels.scalar_type(), " ", labels.sym_sizes(), ", strides ", labels.sym_strides(), ".");
  TORCH_CHECK_VALUE(
      weights.dim() == 1 && weights.sym_size(0) == labels.sym_size(1) &&
          weights.scalar_type() == at::kFloat && weights.is_contiguous(),
      "multi_hot_ce: expected weights [", labels.sym_size(1), "], fp32, got ",
      weights.scalar_type(), " ", weights.sym_sizes(), ".");
  TORCH_CHECK_VALUE(
      labels.device() == device && weights.device() == device,
      "multi_hot_ce: expected labels and weights on ", device, ", got ", labels.device(), " and ",
      weights.device(), ".");
}

// A [..., N] fp32 tensor that a former step of the op made, or the upstream gradient.
inline void check_rows(const at::Tensor& tensor, const char* name, int64_t dim,
    const c10::SymInt& rows, c10::Device device) {
  TORCH_CHECK_VALUE(
      tensor.dim() == dim && tensor.sym_size(-1) == rows && tensor.scalar_type() == at::kFloat &&
          tensor.is_contiguous() && tensor.device() == device,
      "multi_hot_ce: expected ", name, " of ", dim, " dimensions, the last ", rows,
      ", fp32, contiguous, on ", device, "; got ", tensor.scalar_type(), " ", tensor.sym_sizes(),
      " on ", tensor.device(), ".");
}

}  // namespace megatron_tst
