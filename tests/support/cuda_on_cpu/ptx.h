// The inline PTX of the kernels. The text pass makes of
//
//     asm("max.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
//
// the call ptx::max_bf16x2(word, a, b): the instructions' names, joined, and the operands in the
// order in which the text names them. What is not here does not compile. Add it with what the PTX
// manual says of its rounding, NaN and subnormal numbers.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>

#include "emulator.h"

namespace ptx {

// Two halves of 16 bits of a word.
template <typename T>
inline T half_of(uint32_t word, int which) {
  return T(static_cast<uint16_t>(word >> (16 * which)), T::from_bits());
}

template <typename T>
inline uint32_t word_of(T low, T high) {
  return low.x | static_cast<uint32_t>(high.x) << 16;
}

// To nearest even. NaN becomes 0x7fff.
template <typename T>
inline T rounded(float x) {
  return std::isnan(x) ? T(0x7fff, T::from_bits()) : T(x);
}

// A NaN is dropped: the result is the other operand. -0 is below +0.
template <typename T>
inline T larger(T a, T b) {
  const float x = a, y = b;
  if (std::isnan(x) && std::isnan(y)) return T(0x7fff, T::from_bits());
  if (std::isnan(x)) return b;
  if (std::isnan(y)) return a;
  if (x == y) return std::signbit(x) ? b : a;
  return x > y ? a : b;
}

template <typename T>
inline uint32_t larger_halves(uint32_t a, uint32_t b) {
  return word_of<T>(
      larger(half_of<T>(a, 0), half_of<T>(b, 0)), larger(half_of<T>(a, 1), half_of<T>(b, 1)));
}

inline void ex2_approx_ftz_f32(float& result, float x) {
  result = ::cuda_on_cpu::approximate_exp2(x);
}

// The first source is the upper half.
inline void cvt_rn_bf16x2_f32(uint32_t& word, float high, float low) {
  word = word_of(rounded<c10::BFloat16>(low), rounded<c10::BFloat16>(high));
}

inline void cvt_rn_f16x2_f32(uint32_t& word, float high, float low) {
  word = word_of(rounded<c10::Half>(low), rounded<c10::Half>(high));
}

inline void max_bf16x2(uint32_t& word, uint32_t a, uint32_t b) {
  word = larger_halves<c10::BFloat16>(a, b);
}

inline void max_f16x2(uint32_t& word, uint32_t a, uint32_t b) {
  word = larger_halves<c10::Half>(a, b);
}

// "mov.b32 {low, high}, word; cvt.f32.f16 z0, low; cvt.f32.f16 z1, high;"
inline void mov_b32_cvt_f32_f16_cvt_f32_f16(uint32_t word, float& z0, float& z1) {
  z0 = half_of<c10::Half>(word, 0);
  z1 = half_of<c10::Half>(word, 1);
}

}  // namespace ptx
