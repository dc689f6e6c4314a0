#include "emulator.h"

#include <link.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "fiber.h"

#if defined(__x86_64__)
asm(R"(
  .text
  .globl edm2_emulation_switch
  .hidden edm2_emulation_switch
  .type edm2_emulation_switch, @function
edm2_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size edm2_emulation_switch, .-edm2_emulation_switch
)");
#endif

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace edm2::cuda {
alignas(128) thread_local unsigned char dynamic_shared[emulation::kDynamicSharedMost];
}  // namespace edm2::cuda

namespace emulation {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kMaxThreads = 1024;
constexpr int kInterleavedBlocks = 3;
constexpr int kNaNByte = 0xff;  // all ones is a NaN in every floating-point type

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Copy {
  void* target;
  const void* source;
  size_t bytes;
  unsigned group;
};

struct Thread {
  Fiber fiber{kStackBytes};
  uint3 index = {};
  State state = State::kDone;
  std::source_location where;  // of the barrier or collective it waits in
  unsigned mask = 0;
  void* operand = nullptr;
  std::deque<Copy> copies;   // that it has not waited for
  unsigned copy_groups = 0;  // ended so far
};

struct Warp {
  unsigned alive = 0;    // lanes that have not exited
  unsigned waiting = 0;  // lanes in a collective
};

struct Block {
  uint3 index = {};
  std::deque<Thread> threads;
  Warp warps[kMaxThreads / kWarpSize];
  unsigned size = 0;  // threads in use
  unsigned done = 0;
  unsigned at_barrier = 0;
  std::source_location barrier;           // where those at a barrier are
  uint64_t ready[kMaxThreads / 64] = {};  // one bit per thread
  std::vector<unsigned char> shared;      // its shared memory while another block runs

  unsigned number_of(const Thread& t) const { return t.index.x + blockDim.x * (t.index.y + blockDim.y * t.index.z); }
  void set_state(Thread& t, State state) {
    const unsigned number = number_of(t);
    const uint64_t bit = uint64_t{1} << number % 64;
    t.state = state;
    ready[number / 64] = state == State::kReady ? ready[number / 64] | bit : ready[number / 64] & ~bit;
  }
};

// Not thread_local: that would make it shared memory.
Options settings;
int64_t launches = 0;
int64_t dynamic_shared_bytes = 0;
std::string message;
Fiber scheduler;
Block resident[kInterleavedBlocks];
Block* block = nullptr;
Thread* thread = nullptr;
const std::function<void()>* kernel = nullptr;
uint64_t random_state = 0;

uint64_t next_random() {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

// ---- shared memory ----

struct Memory {
  unsigned char* begin = nullptr;
  size_t bytes = 0;
};

/// The calling thread's thread-local storage of this module, which is all of the kernels' shared memory.
Memory find_shared_memory() {
  edm2::cuda::dynamic_shared[0] = kNaNByte;  // makes the run-time linker allocate the storage
  Memory found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        auto* memory = static_cast<Memory*>(result);
        auto* begin = static_cast<unsigned char*>(info->dlpi_tls_data);
        for (int i = 0; begin != nullptr && i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          const auto* end = begin + segment.p_memsz;
          if (segment.p_type == PT_TLS && edm2::cuda::dynamic_shared >= begin && edm2::cuda::dynamic_shared < end) {
            *memory = {begin, segment.p_memsz};
          }
        }
        return 0;
      },
      &found);
  return found;
}

Memory shared_memory() {
  static const Memory memory = find_shared_memory();
  return memory;
}

/// Lets AddressSanitizer report access beyond the dynamic shared memory of a launch.
void poison_dynamic_shared([[maybe_unused]] size_t bytes_in_use, [[maybe_unused]] bool poison) {
#if defined(__SANITIZE_ADDRESS__)
  const auto* begin = edm2::cuda::dynamic_shared + bytes_in_use;
  const size_t size = kDynamicSharedMost - bytes_in_use;
  poison ? __asan_poison_memory_region(begin, size) : __asan_unpoison_memory_region(begin, size);
#endif
}

// ---- faults ----

bool same_place(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() && a.column() == b.column() && strcmp(a.file_name(), b.file_name()) == 0;
}

std::string describe(const std::source_location& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

std::string describe(const Thread& t) {
  const std::string name =
      "thread " + std::to_string(block->number_of(t)) + " of block " + std::to_string(block->index.x);
  switch (t.state) {
    case State::kAtBarrier:
      return name + " (at the barrier at " + describe(t.where) + ")";
    case State::kInWarp:
      return name + " (in the warp function at " + describe(t.where) + ")";
    case State::kDone:
      return name + " (exited)";
    default:
      return name;
  }
}

/// Back to the scheduler until the thread is resumed.
void yield() { thread->fiber.switch_to(scheduler); }

/// Ends the launch. Called from a thread, it does not come back: a failed launch resumes none.
void fail(const std::string& text) {
  message = text;
  if (thread != nullptr) yield();
}

// ---- threads ----

const Thread* waiting_at_barrier() {
  return &*std::find_if(block->threads.begin(), block->threads.end(),
                        [](const Thread& t) { return t.state == State::kAtBarrier; });
}

void thread_main() {
  Fiber::arrived_from(scheduler);
  (*kernel)();
  block->set_state(*thread, State::kDone);
  ++block->done;
  if (block->at_barrier > 0)
    fail(describe(*thread) + " never reaches the barrier of " + describe(*waiting_at_barrier()));
  const unsigned number = block->number_of(*thread);
  Warp& warp = block->warps[number / kWarpSize];
  warp.alive &= ~(1u << number % kWarpSize);
  for (unsigned waiting = warp.waiting; waiting != 0; waiting &= waiting - 1) {
    const Thread& other =
        block->threads[number / kWarpSize * kWarpSize + static_cast<unsigned>(std::countr_zero(waiting))];
    if ((other.mask >> number % kWarpSize & 1) != 0) fail(describe(*thread) + " is in the mask of " + describe(other));
  }
  yield();
}

void start(Block& b, int64_t number) {
  block = &b;
  b.index = {static_cast<unsigned>(number % gridDim.x), static_cast<unsigned>(number / gridDim.x % gridDim.y),
             static_cast<unsigned>(number / gridDim.x / gridDim.y)};
  b.size = blockDim.x * blockDim.y * blockDim.z;
  b.done = 0;
  b.at_barrier = 0;
  std::fill(std::begin(b.ready), std::end(b.ready), 0);
  std::fill(std::begin(b.warps), std::end(b.warps), Warp{});
  for (Thread& left_over : b.threads) left_over.state = State::kDone;
  while (b.threads.size() < b.size) b.threads.emplace_back();
  for (unsigned i = 0; i < b.size; ++i) {
    Thread& t = b.threads[i];
    t.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    b.set_state(t, State::kReady);
    b.warps[i / kWarpSize].alive |= 1u << i % kWarpSize;
    t.copies.clear();
    t.copy_groups = 0;
    t.fiber.start(thread_main);
  }
  b.shared.assign(shared_memory().bytes, kNaNByte);
}

/// The ready thread to run next, or -1. The lowest or the highest number runs as far as it can, so that warps drift far
/// apart.
int choose_ready(const Block& b) {
  const auto lowest_from = [&](unsigned from) {
    for (unsigned i = from; i < b.size; i = (i / 64 + 1) * 64) {
      if (const uint64_t word = b.ready[i / 64] >> i % 64; word != 0)
        return static_cast<int>(i) + std::countr_zero(word);
    }
    return -1;
  };
  switch (settings.threads) {
    case ThreadOrder::kForward:
      return lowest_from(0);
    case ThreadOrder::kReverse:
      for (int word = kMaxThreads / 64 - 1; word >= 0; --word) {
        if (b.ready[word] != 0) return word * 64 + 63 - std::countl_zero(b.ready[word]);
      }
      return -1;
    default:
      const int after = lowest_from(static_cast<unsigned>(next_random() % b.size));
      return after >= 0 ? after : lowest_from(0);
  }
}

/// Resumes threads of the block until it has finished, or so many times. False after a fault.
bool run_some(Block& b, int64_t resumptions) {
  block = &b;
  blockIdx = b.index;
  for (; b.done < b.size && resumptions > 0; --resumptions) {
    const int chosen = choose_ready(b);
    if (chosen < 0) {
      const auto stuck =
          std::find_if(b.threads.begin(), b.threads.end(), [](const Thread& t) { return t.state != State::kDone; });
      fail("deadlock: " + describe(*stuck) + " waits for threads that wait elsewhere");
      return false;
    }
    thread = &b.threads[static_cast<unsigned>(chosen)];
    threadIdx = thread->index;
    scheduler.switch_to(thread->fiber);
    thread = nullptr;
    if (!message.empty()) return false;
  }
  return true;
}

/// Runs all blocks, `count` of them at a time in turn.
bool run_blocks(int64_t blocks, int count, size_t bytes_in_use) {
  const Memory shared = shared_memory();
  int64_t next = 0;
  const auto start_next = [&](Block& b) {
    start(b, settings.blocks == BlockOrder::kReverse ? blocks - 1 - next : next);
    ++next;
  };
  std::vector<Block*> active;
  for (int i = 0; i < count && next < blocks; ++i) {
    start_next(resident[i]);
    active.push_back(&resident[i]);
  }
  while (!active.empty()) {
    for (size_t i = 0; i < active.size();) {
      Block& b = *active[i];
      poison_dynamic_shared(0, false);
      memcpy(shared.begin, b.shared.data(), shared.bytes);
      poison_dynamic_shared(bytes_in_use, true);
      if (!run_some(b, count == 1 ? INT64_MAX : b.size)) return false;
      poison_dynamic_shared(0, false);
      memcpy(b.shared.data(), shared.begin, shared.bytes);
      if (b.done < b.size) {
        ++i;
        continue;
      }
      const auto beyond = std::find_if(edm2::cuda::dynamic_shared + bytes_in_use, std::end(edm2::cuda::dynamic_shared),
                                       [](unsigned char byte) { return byte != kNaNByte; });
      if (beyond != std::end(edm2::cuda::dynamic_shared)) {
        fail("block " + std::to_string(b.index.x) + " wrote beyond its dynamic shared memory");
        return false;
      }
      if (next < blocks) {
        start_next(b);
      } else {
        active.erase(active.begin() + static_cast<std::ptrdiff_t>(i));
      }
    }
  }
  return true;
}

/// Why a GPU would refuse the launch; empty if it would not.
std::string refusal(dim3 grid, dim3 b, size_t dynamic_shared_bytes, size_t granted) {
  const auto sizes = [](dim3 d) {
    return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
  };
  const uint64_t threads = uint64_t{b.x} * b.y * b.z;
  if (threads == 0 || threads > kMaxThreads || b.z > 64) return "no GPU runs blocks of " + sizes(b) + " threads";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return "no GPU runs a grid of " + sizes(grid) + " blocks";
  }
  if (dynamic_shared_bytes > granted) {
    return std::to_string(dynamic_shared_bytes) + " bytes of dynamic shared memory exceed the limit of " +
           std::to_string(granted);
  }
  return "";
}

}  // namespace

Options& options() { return settings; }
int lane_index() { return static_cast<int>(block->number_of(*thread) % kWarpSize); }

void block_barrier(std::source_location where) {
  block->set_state(*thread, State::kAtBarrier);
  thread->where = where;
  if (block->at_barrier++ == 0) block->barrier = where;
  if (block->done > 0) fail(describe(*thread) + " waits for threads that have exited");
  if (!same_place(where, block->barrier))
    fail("divergent barrier: " + describe(*thread) + ", but others at " + describe(block->barrier));
  if (block->at_barrier == block->size) {
    block->at_barrier = 0;
    for (unsigned i = 0; i < block->size; ++i) block->set_state(block->threads[i], State::kReady);
  }
  yield();
}

void warp_collective(unsigned mask, void* operand, void (*combine)(unsigned, void**), std::source_location where) {
  const unsigned number = block->number_of(*thread);
  const unsigned lane = number % kWarpSize;
  Warp& warp = block->warps[number / kWarpSize];
  block->set_state(*thread, State::kInWarp);
  thread->where = where;
  thread->mask = mask;
  thread->operand = operand;
  warp.waiting |= 1u << lane;
  if ((mask >> lane & 1) == 0) fail(describe(*thread) + " is not in its own mask");
  if (const unsigned missing = mask & ~warp.alive; missing != 0) {
    fail(describe(*thread) + " has lane " + std::to_string(std::countr_zero(missing)) +
         " in its mask, which has exited or never was");
  }
  if ((mask & ~warp.waiting) != 0) {
    yield();
    return;
  }
  void* operands[kWarpSize] = {};
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if ((mask >> i & 1) == 0) continue;
    Thread& other = block->threads[number - lane + i];
    if (other.mask != mask || !same_place(other.where, where)) {
      fail("divergent warp: " + describe(*thread) + ", but " + describe(other));
    }
    operands[i] = other.operand;
  }
  combine(mask, operands);
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if ((mask >> i & 1) != 0) block->set_state(block->threads[number - lane + i], State::kReady);
  }
  warp.waiting &= ~mask;
}

void start_copy(void* target, const void* source, size_t bytes) {
  const auto from = reinterpret_cast<uintptr_t>(source);
  const auto to = reinterpret_cast<uintptr_t>(target);
  if (from % bytes != 0 || to % bytes != 0) fail("misaligned copy by " + describe(*thread));
  memset(target, kNaNByte, bytes);
  thread->copies.push_back({target, source, bytes, thread->copy_groups});
}

void end_copy_group() { ++thread->copy_groups; }

void await_copy_groups(unsigned in_flight) {
  std::deque<Copy>& copies = thread->copies;
  while (!copies.empty() && copies.front().group + in_flight < thread->copy_groups) {
    const Copy& copy = copies.front();
    copy.source == nullptr ? memset(copy.target, 0, copy.bytes) : memcpy(copy.target, copy.source, copy.bytes);
    copies.pop_front();
  }
}

Outcome run(dim3 grid, dim3 threads, size_t shared, size_t granted, const std::function<void()>& body) {
  ++launches;
  dynamic_shared_bytes = static_cast<int64_t>(shared);
  message = refusal(grid, threads, shared, granted);
  if (!message.empty()) return Outcome::kRefused;
  gridDim = grid;
  blockDim = threads;
  kernel = &body;
  random_state = settings.seed;
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  const int at_a_time = settings.blocks == BlockOrder::kInterleaved ? kInterleavedBlocks : 1;
  return run_blocks(blocks, at_a_time, shared) ? Outcome::kDone : Outcome::kFailed;
}

}  // namespace emulation

// ---- misaligned access, and indices beyond an array ----
// Code compiled with -fsanitize=alignment,bounds calls these. What they get begins with this structure of the
// compiler's.

#if !defined(__SANITIZE_ADDRESS__)
struct Place {
  const char* file;
  uint32_t line;
  uint32_t column;
};

extern "C" void __ubsan_handle_type_mismatch_v1_abort(const Place* where, uintptr_t) {
  emulation::fail("misaligned access at " + std::string(where->file) + ":" + std::to_string(where->line));
  abort();
}

extern "C" void __ubsan_handle_out_of_bounds_abort(const Place* where, uintptr_t index) {
  emulation::fail("index " + std::to_string(static_cast<intptr_t>(index)) + " is beyond the array at " +
                  std::string(where->file) + ":" + std::to_string(where->line));
  abort();
}
#endif

extern "C" {
void emulation_configure(int thread_order, int block_order, uint64_t seed, int multiprocessors) {
  emulation::settings = {static_cast<emulation::ThreadOrder>(thread_order),
                         static_cast<emulation::BlockOrder>(block_order), seed, multiprocessors};
}
const char* emulation_message() { return emulation::message.c_str(); }
int64_t emulation_launches() { return emulation::launches; }
int64_t emulation_dynamic_shared() { return emulation::dynamic_shared_bytes; }
}
