// What the CPU kernels share.
#pragma once

#include "device.h"

#include <cstdint>

// One binary for every x86-64: the widest version that the machine has is chosen when the module is
// loaded. Levels, not "arch=skylake-avx512" or "arch=haswell": those ask for that very processor,
// and all others would run the slowest version.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(MHCE_ONE_TARGET)
#define MHCE_EACH_TARGET \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MHCE_EACH_TARGET
#endif

namespace megatron_tst::cpu {

// Round to nearest even, as c10 does, in a form that compilers vectorise.
template <typename T>
TST_INLINE T rounded(float x) {
  return static_cast<T>(x);
}

template <>
TST_INLINE c10::BFloat16 rounded(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return c10::BFloat16(
      static_cast<unsigned short>(x != x ? 0x7fc0u : nearest), c10::BFloat16::from_bits());
}

}  // namespace megatron_tst::cpu
