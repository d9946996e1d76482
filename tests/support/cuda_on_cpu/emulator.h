// What a .cu file finds here in place of CUDA: the names of the language that the kernels use.
// What they do is in emulator.cpp.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// Of functions below: the compiler reports the accesses of kernels (emulator.cpp), not theirs.
#define OF_THE_EMULATOR __attribute__((no_sanitize("thread"))) inline

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- vectors

struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace cuda_on_cpu {

// ---- launches: the text pass makes these calls of kernel<<<...>>>(...)

struct Place {
  dim3 thread, block, threads, blocks;
};
extern Place place;  // of the thread that runs

// `thread(data)` is what each thread does.
void run(const char* name, dim3 blocks, dim3 threads, size_t shared_bytes,
    void (*thread)(const void*), const void* data);

template <typename... Parameters>
struct Launch {
  const char* name;
  void (*function)(Parameters...);
  dim3 blocks, threads;
  size_t shared_bytes;

  void operator()(Parameters... parameters) const {
    auto thread = [&]() __attribute__((no_sanitize("thread"))) { function(parameters...); };
    auto call = [](const void* data) __attribute__((no_sanitize("thread"))) {
      (*static_cast<const decltype(thread)*>(data))();
    };
    run(name, blocks, threads, shared_bytes, call, &thread);
  }
};

template <typename Stream = int, typename... Parameters>
Launch<Parameters...> kernel(const char* name, void (*function)(Parameters...), dim3 blocks,
    dim3 threads, size_t shared_bytes = 0, Stream = {}) {
  return {name, function, blocks, threads, shared_bytes};
}

// ---- what threads do together. `line` tells two places of the program apart.

enum class Together { barrier, warp_barrier, shuffle, ballot };

// The thread waits for the others: at a barrier all of its block, else the lanes of `mask`.
// -> shuffle: `bits` of the lane `source`; ballot: the lanes whose `bits` are not 0
uint64_t together(Together what, int line, uint32_t mask = 0, uint64_t bits = 0, int source = 0);
int lane();

template <typename T>
OF_THE_EMULATOR T shuffle(int line, uint32_t mask, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA has no shuffle of this type");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = together(Together::shuffle, line, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// ---- memory

// One of the accesses that name their size. Fails where the address is no multiple of it.
void touch(const void* address, size_t size, bool write);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// The block's array that is declared in `line`; 0: the one whose size the launch gives.
void* shared_memory(int line, size_t bytes, size_t alignment);

template <typename Array>
OF_THE_EMULATOR Array& shared_array(int line, size_t alignment) {
  return *static_cast<Array*>(shared_memory(line, sizeof(Array), alignment));
}

template <typename T>
OF_THE_EMULATOR T* dynamic_shared() {
  return static_cast<T*>(shared_memory(0, 0, 16));
}

template <typename T>
OF_THE_EMULATOR T read(const T* from) {
  touch(from, sizeof(T), false);
  return *from;
}

template <typename T>
OF_THE_EMULATOR void write(T* to, const T& value) {
  touch(to, sizeof(T), true);
  *to = value;
}

float approximate_exp2(float x);

}  // namespace cuda_on_cpu

#define threadIdx ::cuda_on_cpu::place.thread
#define blockIdx ::cuda_on_cpu::place.block
#define blockDim ::cuda_on_cpu::place.threads
#define gridDim ::cuda_on_cpu::place.blocks
constexpr int warpSize = 32;

#define TOGETHER ::cuda_on_cpu::together(::cuda_on_cpu::Together::
inline void __syncthreads(int line = __builtin_LINE()) { TOGETHER barrier, line); }

inline void __syncwarp(uint32_t mask = ~0u, int line = __builtin_LINE()) {
  TOGETHER warp_barrier, line, mask);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, int line = __builtin_LINE()) {
  return TOGETHER ballot, line, mask, predicate != 0);
}

inline int __any_sync(uint32_t mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}

inline int __all_sync(uint32_t mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) == mask;
}
#undef TOGETHER

// A lane whose source is outside its group of `width` lanes keeps its own value.
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  const int first = ::cuda_on_cpu::lane() / width * width;
  return ::cuda_on_cpu::shuffle(line, mask, value, first + (source & (width - 1)));
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
  const int lane = ::cuda_on_cpu::lane(), from = lane ^ bits;
  const bool inside = from / width <= lane / width;
  return ::cuda_on_cpu::shuffle(line, mask, value, inside ? from : lane);
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int by, int width = 32, int line = __builtin_LINE()) {
  const int lane = ::cuda_on_cpu::lane();
  const bool inside = lane % width + by < width;
  return ::cuda_on_cpu::shuffle(line, mask, value, inside ? lane + by : lane);
}

template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int by, int width = 32, int line = __builtin_LINE()) {
  const int lane = ::cuda_on_cpu::lane();
  const bool inside = lane % width >= by;
  return ::cuda_on_cpu::shuffle(line, mask, value, inside ? lane - by : lane);
}

// ---- loads and stores with a hint

template <typename T> T __ldg(const T* from) { return ::cuda_on_cpu::read(from); }
template <typename T> T __ldca(const T* from) { return ::cuda_on_cpu::read(from); }
template <typename T> T __ldcg(const T* from) { return ::cuda_on_cpu::read(from); }
template <typename T> T __ldcs(const T* from) { return ::cuda_on_cpu::read(from); }
template <typename T> void __stcg(T* to, T value) { ::cuda_on_cpu::write(to, value); }
template <typename T> void __stcs(T* to, T value) { ::cuda_on_cpu::write(to, value); }
template <typename T> void __stwb(T* to, T value) { ::cuda_on_cpu::write(to, value); }

// ---- assertions

#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition) \
  ((condition) ? void() : ::cuda_on_cpu::fail("device-side assert: %s", #condition))

// ---- arithmetic

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return y < x ? y : x;
}

template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return x < y ? y : x;
}

inline float __uint_as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float __int_as_float(int bits) { return __builtin_bit_cast(float, bits); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
