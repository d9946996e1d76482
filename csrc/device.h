// What differs between processors: exp, the unit of a row's reference, and (CUDA) 32-bit words of
// logits and 16-byte accesses. All inline PTX of the kernels stands here.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define TST_INLINE __host__ __device__ __forceinline__
#define TST_DEVICE __device__ __forceinline__
#else
#define TST_INLINE inline __attribute__((always_inline))
#endif

namespace megatron_tst {

constexpr float kLowest = -std::numeric_limits<float>::max();

// A row's logits are taken relative to a reference that is about their maximum, so that no exp
// overflows. `above` is a logit's distance from it, `exp_nonpositive` the exponential of such a
// distance (or of the distance of two references), `log_positive` its inverse. On CPU distances are
// in nats. On CUDA they are in powers of two, so that `above` is one FMA and the exponential one
// instruction; the rounding of the reference itself then cancels, for logits of magnitude below 1e9.
#if defined(__CUDA_ARCH__)

constexpr float kNats = 0.693147181f;  // in one unit of distance
constexpr float kUnits = 1.44269504f;  // in one nat

// Not below -2^30: of a larger one the rounding is so many powers of two that columns which somebody
// has filled with -1e20 would seem to lie far above it.
TST_INLINE float reference_of(float z) { return fmaxf(z * kUnits, -0x1p30f); }

TST_INLINE float above(float z, float reference) { return fmaf(z, kUnits, -reference); }

// Within 2 ulp. A result that would be subnormal is 0. NaN stays.
TST_INLINE float exp_nonpositive(float distance) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(distance));
  return result;
}

TST_INLINE float log_positive(float x) { return log2f(x); }

#else

constexpr float kNats = 1.f;

TST_INLINE float reference_of(float z) { return z; }

TST_INLINE float above(float z, float reference) { return z - reference; }

// Within 1 ulp. Below -87, where the result would be subnormal, it is 0. NaN stays.
TST_INLINE float exp_nonpositive(float x) {
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
}

TST_INLINE float log_positive(float x) { return logf(x); }

#endif

#if defined(__CUDACC__)

// A 32-bit word of logits: two of 16 bits or one of 32. `unpack` gives them as fp32, `pack` rounds
// to nearest even, `larger_word` takes the maximum of each and drops a NaN.
template <typename T>
struct Word;

template <>
struct Word<float> {
  static constexpr int size = 1;
  static constexpr uint32_t kMinusInfinity = 0xff800000u;
  static TST_DEVICE void unpack(uint32_t word, float (&z)[1]) { z[0] = __uint_as_float(word); }
  static TST_DEVICE uint32_t pack(const float (&z)[1]) { return __float_as_uint(z[0]); }
  static TST_DEVICE uint32_t larger(uint32_t a, uint32_t b) {
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  }
};

template <>
struct Word<c10::BFloat16> {
  static constexpr int size = 2;
  static constexpr uint32_t kMinusInfinity = 0xff80ff80u;
  static TST_DEVICE void unpack(uint32_t word, float (&z)[2]) {
    z[0] = __uint_as_float(word << 16);
    z[1] = __uint_as_float(word & 0xffff0000u);
  }
  static TST_DEVICE uint32_t pack(const float (&z)[2]) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(z[1]), "f"(z[0]));
    return word;
  }
  static TST_DEVICE uint32_t larger(uint32_t a, uint32_t b) {
    uint32_t word;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
  }
};

template <>
struct Word<c10::Half> {
  static constexpr int size = 2;
  static constexpr uint32_t kMinusInfinity = 0xfc00fc00u;
  static TST_DEVICE void unpack(uint32_t word, float (&z)[2]) {
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, "
        "high;}"
        : "=f"(z[0]), "=f"(z[1])
        : "r"(word));
  }
  static TST_DEVICE uint32_t pack(const float (&z)[2]) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(z[1]), "f"(z[0]));
    return word;
  }
  static TST_DEVICE uint32_t larger(uint32_t a, uint32_t b) {
    uint32_t word;
    asm("max.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
  }
};

// 16-byte accesses. Streaming: the bytes are not wanted again soon, so other lines stay in L2.
TST_DEVICE uint4 load_plain(const uint4* from) { return *from; }
TST_DEVICE uint4 load_streaming(const uint4* from) { return __ldcs(from); }
TST_DEVICE void store_plain(uint4* to, uint4 vector) { *to = vector; }
TST_DEVICE void store_streaming(uint4* to, uint4 vector) { __stcs(to, vector); }

#endif

}  // namespace megatron_tst
