// Runs the threads of a launch one after the other, in a random order that a seed gives.
//
// A thread of the kernel is a fiber: a stack of its own in this process's only thread. It goes on
// until it waits for others (`together`), until it ends, or until a random number of accesses is
// over. Then any other that is ready goes on, of the up to three blocks at work.
//
// Every access to memory is seen: kernels are compiled with -fsanitize=thread, which puts a call of
// __tsan_read4 and the like before each, and these functions are here, not in the sanitizer's
// library. What is checked of an access:
//   - it lies in one row of a buffer that the test handed over, or in the block's shared memory;
//   - its address is a multiple of its size;
//   - it does not write where the test allows no writing;
//   - it does not read what nobody has written;
//   - no other thread accesses the same bytes, unless both read, or a barrier is between them, or
//     both write the same value.
//
// The first fault ends the call: the message waits for `cuda_on_cpu_error`.

#include "emulator.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#include <dlfcn.h>
#include <execinfo.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cfloat>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace cuda_on_cpu {

Place place;

namespace {

constexpr size_t kStackBytes = 128 << 10, kPage = 4096;
constexpr size_t kMaxThreads = 1024, kMaxSharedBytes = 48 << 10, kMaxBlocksAtWork = 3;
constexpr uint64_t kEndless = 1ull << 32;  // accesses of one launch
constexpr size_t kGranule = 2;             // bytes that races are looked for in: those of bf16
constexpr size_t kGuarded = 32;            // bytes before and behind a tensor, of its margin
constexpr uint32_t kHost = 1;              // the number of no block
constexpr unsigned char kPoison = 0xff;    // of fresh shared memory: a NaN in all types

// ---- memory

// Who touched some bytes last. Blocks are numbered through all launches, from 2.
struct Access {
  uint32_t block = 0;     // 0: nobody has
  uint32_t barriers = 0;  // that the block had behind it
  uint16_t thread = 0, warp_barriers = 0;
  bool several_threads = false;  // read since the barrier
};

struct Cell {
  Access written, read;
};

struct Buffer {
  std::string name;
  uintptr_t base;
  size_t rows, width, stride;  // bytes
  bool writable;
  std::vector<Cell> cells;
  std::vector<unsigned char> memory;  // of shared arrays

  void watch(bool initialised) {
    cells.resize((rows * width + kGranule - 1) / kGranule);
    for (Cell& cell : cells) cell.written.block = initialised ? kHost : 0;
  }
};

// ---- threads and blocks

enum class State { ready, waits, ended };

struct Block;

struct Thread {
  char* stack = nullptr;
  ucontext_t beginning;
  jmp_buf position;
  bool begun = false;

  Block* block;
  unsigned index;
  State state;
  uint16_t warp_barriers;

  // what it waits for; `bits` becomes the result
  Together what;
  int line, source;
  uint32_t mask;
  uint64_t bits;

  int lane() const { return index % 32; }
};

struct Block {
  uint32_t number;
  dim3 index;
  uint32_t barriers = 0;
  size_t at_barrier = 0, ended = 0;
  int barrier_line = 0;
  std::vector<Thread*> threads;
  std::map<int, std::unique_ptr<Buffer>> shared;  // by line
};

// Two threads wrote the same bytes: forgiven if the second changes nothing.
struct SecondWrite {
  const void* address = nullptr;
  size_t size = 0;
  unsigned char before[16];
  unsigned first_thread;
  std::string calls;
};

struct Emulator {
  uint64_t random = 1, exp_seed = 0;
  std::vector<std::unique_ptr<Buffer>> buffers;
  uint32_t blocks_so_far = kHost;
  std::string error;

  // of the launch
  const char* kernel = "";
  void (*thread)(const void*) = nullptr;
  const void* data = nullptr;
  size_t shared_bytes = 0;
  uint32_t first_block = 0;
  std::vector<Thread*> ready;
  uint64_t accesses = 0, until_switch = 0;
  SecondWrite second_write;
} now;

Thread* running = nullptr;  // none: the host's code
jmp_buf scheduler;

uint64_t draw(uint64_t below) {  // splitmix64
  uint64_t z = now.random += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return (z ^ (z >> 31)) % below;
}

// ---- fibers

void life_of_a_fiber() {
  for (;;) {
    now.thread(now.data);
    running->state = State::ended;
    ++running->block->ended;
    if (_setjmp(running->position) == 0) _longjmp(scheduler, 1);
  }
}

void begin_again(Thread& thread) {
  if (!thread.stack) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(memory, kPage, PROT_NONE);  // the end of a stack that grows too far
    thread.stack = static_cast<char*>(memory);
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(thread.stack + kPage, kStackBytes - kPage);  // of frames left
#endif
  getcontext(&thread.beginning);
  thread.beginning.uc_stack.ss_sp = thread.stack;
  thread.beginning.uc_stack.ss_size = kStackBytes;
  thread.beginning.uc_link = nullptr;
  makecontext(&thread.beginning, life_of_a_fiber, 0);
  thread.begun = false;
}

void check_second_write();

void go_on(Thread& thread) {
  running = &thread;
  const dim3 size = place.threads;
  place.block = thread.block->index;
  place.thread = dim3(thread.index % size.x, thread.index / size.x % size.y,
      thread.index / (size.x * size.y));
  if (_setjmp(scheduler) == 0) {
    if (thread.begun) _longjmp(thread.position, 1);
    thread.begun = true;
    setcontext(&thread.beginning);
  }
  if (now.error.empty()) check_second_write();
  running = nullptr;
}

void stop_here() {
  if (_setjmp(running->position) == 0) _longjmp(scheduler, 1);
}

void let_go(Thread& thread) {
  thread.state = State::ready;
  now.ready.push_back(&thread);
}

// ---- errors

// The calls that led here: addresses in this library.
std::string calls() {
  void* frames[24];
  const int count = backtrace(frames, 24);
  Dl_info library;
  dladdr(reinterpret_cast<void*>(&calls), &library);
  std::string result;
  for (int i = 0; i < count; ++i) {
    char text[40];
    const long inside = static_cast<char*>(frames[i]) - static_cast<char*>(library.dli_fbase) - 1;
    std::snprintf(text, sizeof text, " %#lx", inside);
    result += text;
  }
  return result;
}

// What is wrong, where, and on a second line the calls that led there.
void note_error(const std::string& what, const std::string& from = calls()) {
  now.error = std::string("kernel ") + now.kernel;
  if (running) {
    char text[100];
    std::snprintf(text, sizeof text, ", block (%u, %u, %u), thread %u", place.block.x,
        place.block.y, place.block.z, running->index);
    now.error += text;
  }
  now.error += ": " + what + "\n" + from;
}

std::string format(const char* text, va_list arguments) {
  char result[400];
  std::vsnprintf(result, sizeof result, text, arguments);
  return result;
}

}  // namespace

void fail(const char* text, ...) {
  va_list arguments;
  va_start(arguments, text);
  note_error(format(text, arguments));
  va_end(arguments);
  _longjmp(scheduler, 1);
}

// ---- what threads do together

namespace {

const char* name_of(Together what) {
  switch (what) {
    case Together::barrier: return "__syncthreads";
    case Together::warp_barrier: return "__syncwarp";
    case Together::shuffle: return "a shuffle";
    default: return "a ballot";
  }
}

void arrive_at_barrier(Block& block, Thread& me) {
  if (block.at_barrier == 0) block.barrier_line = me.line;
  if (block.barrier_line != me.line) {
    fail("at __syncthreads of line %d, while others of the block are at that of line %d", me.line,
        block.barrier_line);
  }
  if (++block.at_barrier < block.threads.size()) return;
  block.at_barrier = 0;
  ++block.barriers;
  for (Thread* thread : block.threads) let_go(*thread);
}

void arrive_in_warp(Block& block, Thread& me) {
  const unsigned first = me.index - me.lane();
  if (!(me.mask >> me.lane() & 1)) fail("lane %d is not in its own mask %x", me.lane(), me.mask);
  Thread* lanes[32] = {};
  bool all_here = true;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(me.mask >> lane & 1)) continue;
    Thread* other = first + lane < block.threads.size() ? block.threads[first + lane] : nullptr;
    if (!other || other->state == State::ended) {
      fail("%s waits for lane %d, which %s", name_of(me.what), lane,
          other ? "has ended" : "the block does not have");
    }
    if (other->state == State::waits &&
        (other->what != me.what || other->line != me.line || other->mask != me.mask)) {
      fail("%s of line %d with mask %x, while lane %d is at %s of line %d with mask %x",
          name_of(me.what), me.line, me.mask, lane, name_of(other->what), other->line,
          other->mask);
    }
    all_here &= other->state == State::waits;
    lanes[lane] = other;
  }
  if (!all_here) return;

  uint64_t given[32] = {};
  uint32_t voted = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (!lanes[lane]) continue;
    given[lane] = lanes[lane]->bits;
    voted |= static_cast<uint32_t>(given[lane] != 0) << lane;
  }
  for (Thread* thread : lanes) {
    if (!thread) continue;
    if (me.what == Together::warp_barrier) ++thread->warp_barriers;
    if (me.what == Together::ballot) thread->bits = voted;
    if (me.what == Together::shuffle) {
      if (thread->source < 0 || thread->source > 31 || !lanes[thread->source]) {
        fail("lane %d shuffles from lane %d, which is not in mask %x", thread->lane(),
            thread->source, me.mask);
      }
      thread->bits = given[thread->source];
    }
    let_go(*thread);
  }
}

}  // namespace

uint64_t together(Together what, int line, uint32_t mask, uint64_t bits, int source) {
  Thread& me = *running;
  me.what = what;
  me.line = line;
  me.mask = mask;
  me.bits = bits;
  me.source = source;
  me.state = State::waits;
  if (what == Together::barrier) {
    arrive_at_barrier(*me.block, me);
  } else {
    arrive_in_warp(*me.block, me);
  }
  stop_here();
  return me.bits;
}

int lane() { return running->lane(); }

// ---- accesses

namespace {

Buffer* find(Buffer& buffer, uintptr_t address, size_t size, size_t* offset) {
  const size_t distance = address - buffer.base;
  if (distance >= (buffer.rows - 1) * buffer.stride + buffer.width) return nullptr;
  const size_t row = distance / buffer.stride, inside = distance - row * buffer.stride;
  if (inside + size > buffer.width) return nullptr;
  *offset = row * buffer.width + inside;
  return &buffer;
}

Buffer* find(uintptr_t address, size_t size, size_t* offset) {
  for (const auto& buffer : now.buffers) {
    if (find(*buffer, address, size, offset)) return buffer.get();
  }
  for (const auto& [line, buffer] : running->block->shared) {
    if (find(*buffer, address, size, offset)) return buffer.get();
  }
  return nullptr;
}

// What is near an address that no buffer has.
std::string nearest(uintptr_t address) {
  for (const auto& buffer : now.buffers) {
    const intptr_t distance = address - buffer->base;
    const intptr_t end = (buffer->rows - 1) * buffer->stride + buffer->width;
    if (distance < -4096 || distance > end + 4096) continue;
    char text[200];
    const auto row = std::clamp<intptr_t>(
        distance / static_cast<intptr_t>(buffer->stride), 0, buffer->rows - 1);
    std::snprintf(text, sizeof text, "byte %ld of row %ld of %s [%zu rows of %zu bytes]",
        long(distance - row * static_cast<intptr_t>(buffer->stride)), long(row),
        buffer->name.c_str(), buffer->rows, buffer->width);
    return text;
  }
  return "near no buffer";
}

// Whether nothing orders a former access before this thread's next.
bool unordered(const Access& before, const Thread& me) {
  if (before.block < now.first_block) return false;  // of a former launch, the host's, or none
  if (before.block != me.block->number) return true;
  if (before.barriers != me.block->barriers) return false;
  if (before.several_threads) return true;
  if (before.thread == me.index) return false;
  return before.thread / 32 != static_cast<int>(me.index / 32) ||
         before.warp_barriers == me.warp_barriers;
}

void note(Access& access, const Thread& me) {
  const bool others = access.several_threads || access.thread != me.index;
  const bool several = others && unordered(access, me);
  access = {me.block->number, me.block->barriers, static_cast<uint16_t>(me.index),
      me.warp_barriers, several};
}

void check_second_write() {
  SecondWrite& write = now.second_write;
  if (!write.address) return;
  const void* address = write.address;
  write.address = nullptr;
  if (std::memcmp(address, write.before, write.size) == 0) return;
  note_error("a race: writes another value where thread " + std::to_string(write.first_thread) +
             " of this or another block wrote, with no barrier between them", write.calls);
}

void access(uintptr_t address, size_t size, bool write) {
  if (!running) return;
  Thread& me = *running;
  const auto stack = reinterpret_cast<uintptr_t>(me.stack);
  if (address - stack < kStackBytes) return;
  if (address - reinterpret_cast<uintptr_t>(&place) < sizeof place) return;
  if (now.second_write.address) {
    check_second_write();
    if (!now.error.empty()) _longjmp(scheduler, 1);
  }
  if (++now.accesses > kEndless) fail("does not end");
  if (--now.until_switch == 0) {
    now.until_switch = 1 + draw(200);
    let_go(me);
    stop_here();
  }

  const char* verb = write ? "writes" : "reads";
  size_t offset = 0;
  Buffer* buffer = find(address, size, &offset);
  if (!buffer) fail("%s %zu bytes outside: %s", verb, size, nearest(address).c_str());
  if (!buffer->writable) {
    if (write) fail("writes to %s, which is an input", buffer->name.c_str());
    return;
  }
  const size_t first = offset / kGranule, last = (offset + size - 1) / kGranule;
  for (size_t i = first; i <= last; ++i) {
    Cell& cell = buffer->cells[i];
    if (!write && cell.written.block == 0) {
      fail("reads element at byte %zu of %s, which nobody has written", offset,
          buffer->name.c_str());
    }
    if (write && unordered(cell.read, me)) {
      fail("a race: writes %s at byte %zu, which thread %u of block number %u reads, with no "
           "barrier between them", buffer->name.c_str(), offset, cell.read.thread,
          cell.read.block - now.first_block);
    }
    if (unordered(cell.written, me)) {
      if (!write || size > sizeof now.second_write.before) {
        fail("a race: %s %s at byte %zu, which thread %u of block number %u writes, with no "
             "barrier between them", verb, buffer->name.c_str(), offset, cell.written.thread,
            cell.written.block - now.first_block);
      }
      SecondWrite& second = now.second_write;
      second.address = reinterpret_cast<void*>(address);
      second.size = size;
      second.first_thread = cell.written.thread;
      second.calls = calls();
      std::memcpy(second.before, second.address, size);
    }
    note(write ? cell.written : cell.read, me);
  }
}

}  // namespace

void touch(const void* address, size_t size, bool write) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (at % size != 0) {
    fail("%s %zu bytes at an address that is no multiple of it: %s", write ? "writes" : "reads",
        size, nearest(at).c_str());
  }
  access(at, size, write);
}

// An array that is aligned as its type says, and no better.
void* shared_memory(int line, size_t bytes, size_t alignment) {
  auto& array = running->block->shared[line];
  if (!array) {
    if (line == 0) bytes = now.shared_bytes;
    array = std::make_unique<Buffer>();
    array->memory.resize(bytes + 4 * alignment, kPoison);
    auto base = reinterpret_cast<uintptr_t>(array->memory.data());
    base = (base / (2 * alignment) + 1) * 2 * alignment + alignment;
    array->name = line ? "the shared array of line " + std::to_string(line) : "shared memory";
    array->base = base;
    array->rows = 1;
    array->width = array->stride = std::max<size_t>(bytes, 1);
    array->writable = true;
    array->watch(false);
    if (bytes == 0) array->width = 0;
    size_t all = 0;
    for (const auto& [_, other] : running->block->shared) all += other->width;
    if (all > kMaxSharedBytes) fail("%zu bytes of shared memory, more than 48 KiB", all);
  }
  return reinterpret_cast<void*>(array->base);
}

// ---- launches

namespace {

// With AddressSanitizer the compiler cannot call `access`. Then the bytes around each row are
// forbidden while kernels run.
void guard([[maybe_unused]] bool on) {
#if defined(__SANITIZE_ADDRESS__)
  for (const auto& buffer : now.buffers) {
    const auto set = on ? __asan_poison_memory_region : __asan_unpoison_memory_region;
    const auto* row = reinterpret_cast<const char*>(buffer->base);
    set(row - kGuarded, kGuarded);
    for (size_t i = 1; i < buffer->rows; ++i, row += buffer->stride) {
      set(row + buffer->width, buffer->stride - buffer->width);
    }
    set(row + buffer->width, kGuarded);
  }
#endif
}

std::vector<std::vector<Thread>> fibers;  // of each block at work, kept from launch to launch

std::unique_ptr<Block> start_block(dim3 blocks, uint64_t which, size_t threads, size_t slot) {
  auto block = std::make_unique<Block>();
  block->number = now.first_block + which;
  block->index = dim3(which % blocks.x, which / blocks.x % blocks.y,
      which / (uint64_t(blocks.x) * blocks.y));
  for (size_t i = 0; i < threads; ++i) {
    Thread& thread = fibers[slot][i];
    if (!thread.stack) begin_again(thread);
    thread.block = block.get();
    thread.index = i;
    thread.warp_barriers = 0;
    block->threads.push_back(&thread);
    let_go(thread);
  }
  return block;
}

std::string why_stuck(const std::vector<std::unique_ptr<Block>>& at_work) {
  for (const auto& block : at_work) {
    for (const Thread* thread : block ? block->threads : std::vector<Thread*>()) {
      if (thread->state != State::waits) continue;
      char text[200];
      std::snprintf(text, sizeof text,
          "thread %u of block (%u, %u, %u) waits for ever at %s of line %d, mask %x: %zu of the "
          "block's %zu threads are at __syncthreads, %zu have ended", thread->index,
          block->index.x, block->index.y, block->index.z, name_of(thread->what), thread->line,
          thread->mask, block->at_barrier, block->threads.size(), block->ended);
      return text;
    }
  }
  return "";
}

}  // namespace

void run(const char* name, dim3 blocks, dim3 threads, size_t shared_bytes,
    void (*thread)(const void*), const void* data) {
  if (!now.error.empty()) return;
  now.kernel = name;
  now.thread = thread;
  now.data = data;
  now.shared_bytes = shared_bytes;
  const size_t block_size = size_t(threads.x) * threads.y * threads.z;
  const uint64_t count = uint64_t(blocks.x) * blocks.y * blocks.z;
  if (count == 0 || blocks.x > 0x7fffffffu || blocks.y > 65535 || blocks.z > 65535 ||
      block_size == 0 || block_size > kMaxThreads || shared_bytes > kMaxSharedBytes) {
    return note_error("launched with more than a GPU takes, or nothing: " +
                      std::to_string(count) + " blocks of " + std::to_string(block_size));
  }
  now.first_block = now.blocks_so_far + 1;
  now.blocks_so_far += count;
  now.accesses = 0;
  now.until_switch = 1 + draw(200);
  place.threads = threads;
  place.blocks = blocks;
  std::vector<uint64_t> order(count);
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t j = draw(i + 1);
    order[i] = order[j];
    order[j] = i;
  }
  const uint64_t most = std::min<uint64_t>(count, kMaxBlocksAtWork);
  std::vector<std::unique_ptr<Block>> at_work(1 + draw(most));
  if (fibers.size() < at_work.size()) fibers.resize(at_work.size());
  for (auto& of_block : fibers) {
    if (of_block.size() < block_size) of_block.resize(block_size);
  }
  guard(true);
  uint64_t started = 0;
  for (size_t slot = 0; slot < at_work.size(); ++slot) {
    at_work[slot] = start_block(blocks, order[started++], block_size, slot);
  }
  while (!now.ready.empty()) {
    const size_t which = draw(now.ready.size());
    Thread& next = *now.ready[which];
    now.ready[which] = now.ready.back();
    now.ready.pop_back();
    go_on(next);
    if (!now.error.empty()) break;
    if (next.block->ended < block_size) continue;
    for (size_t slot = 0; slot < at_work.size(); ++slot) {
      if (!at_work[slot] || at_work[slot].get() != next.block) continue;
      at_work[slot].reset();
      if (started < count) at_work[slot] = start_block(blocks, order[started++], block_size, slot);
      break;
    }
  }
  if (now.error.empty()) {
    const std::string stuck = why_stuck(at_work);
    if (!stuck.empty()) note_error(stuck);
  }
  guard(false);
  running = nullptr;
  now.ready.clear();
  if (now.error.empty()) return;
  for (auto& of_block : fibers) {
    for (Thread& thread : of_block) begin_again(thread);
  }
}

// ---- arithmetic

// ex2.approx.ftz: 2 to the power of x within 2 ulp, a subnormal result is 0. With a seed the error
// is drawn, always the same for the same x; else the result is rounded to nearest.
float approximate_exp2(float x) {
  if (std::isnan(x)) return x;
  double result = std::exp2(static_cast<double>(x));
  if (now.exp_seed && std::fabs(x) >= FLT_MIN) {
    uint64_t z = (now.exp_seed << 32 ^ __builtin_bit_cast(uint32_t, x)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 29)) * 0x94d049bb133111eb;
    const double error = static_cast<double>(z >> 11) / double(1ull << 52) - 1;  // -1..1
    result *= 1 + error * 0x1p-22;
  }
  const float rounded = static_cast<float>(result);
  return rounded < FLT_MIN ? 0.f : rounded;
}

}  // namespace cuda_on_cpu

// ---- what Python calls

using cuda_on_cpu::now;

extern "C" {

// A new device: no buffers, no error.
void cuda_on_cpu_start(uint64_t seed, uint64_t exp_seed) {
  now.buffers.clear();
  now.error.clear();
  now.random = seed;
  now.exp_seed = exp_seed;
  now.blocks_so_far = cuda_on_cpu::kHost;
  now.second_write.address = nullptr;
}

// Memory that kernels may access: rows of `width` bytes, `stride` apart.
void cuda_on_cpu_register(const char* name, void* base, size_t rows, size_t width, size_t stride,
    int writable, int initialised) {
  auto buffer = std::make_unique<cuda_on_cpu::Buffer>();
  buffer->name = name;
  buffer->base = reinterpret_cast<uintptr_t>(base);
  buffer->rows = rows;
  buffer->width = width;
  buffer->stride = stride;
  buffer->writable = writable;
  if (writable) buffer->watch(initialised);
  now.buffers.push_back(std::move(buffer));
}

void cuda_on_cpu_allow_writing(void* base) {
  for (auto& buffer : now.buffers) {
    if (buffer->base != reinterpret_cast<uintptr_t>(base) || buffer->writable) continue;
    buffer->writable = true;
    buffer->watch(true);
  }
}

// The first fault, and on a second line addresses in this library. Empty: none.
const char* cuda_on_cpu_error() { return now.error.c_str(); }

float cuda_on_cpu_exp2(float x) { return cuda_on_cpu::approximate_exp2(x); }

}  // extern "C"

// ---- what the compiler calls before each access (-fsanitize=thread)

#define ACCESSES(size)                                                                         \
  extern "C" void __tsan_read##size(void* p) { cuda_on_cpu::touch(p, size, false); }           \
  extern "C" void __tsan_write##size(void* p) { cuda_on_cpu::touch(p, size, true); }           \
  extern "C" void __tsan_unaligned_read##size(void* p) {                                       \
    cuda_on_cpu::access(reinterpret_cast<uintptr_t>(p), size, false);                          \
  }                                                                                            \
  extern "C" void __tsan_unaligned_write##size(void* p) {                                      \
    cuda_on_cpu::access(reinterpret_cast<uintptr_t>(p), size, true);                           \
  }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

extern "C" {
void __tsan_read_range(void* p, size_t size) {
  cuda_on_cpu::access(reinterpret_cast<uintptr_t>(p), size, false);
}
void __tsan_write_range(void* p, size_t size) {
  cuda_on_cpu::access(reinterpret_cast<uintptr_t>(p), size, true);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
}
