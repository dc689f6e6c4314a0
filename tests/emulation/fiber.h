// A fiber: a stack of its own and a switch to and from it. On x86-64 a switch is a dozen instructions, elsewhere it is
// swapcontext.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
/// Saves the callee-saved registers on this stack, its pointer in *from, and continues where the stack `to` was left.
extern "C" void edm2_emulation_switch(void** from, void* to);
#else
#include <ucontext.h>
#endif

namespace emulation {

class Fiber {
 public:
  /// The stack of the caller.
  Fiber() = default;

  /// A stack on which start() runs functions; its lowest page is inaccessible, so that an overflow faults.
  explicit Fiber(size_t stack_bytes) : bytes_(stack_bytes) {
    void* memory =
        mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, 4096, PROT_NONE) != 0) {
      perror("emulation: no memory for a stack");
      abort();
    }
    stack_ = static_cast<char*>(memory);
    bottom_ = stack_;
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() {
    if (stack_ != nullptr) munmap(stack_, bytes_);
  }

  /// The next switch to this fiber calls entry, which must not return. What ran here before is forgotten.
  void start(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_ + 4096, bytes_ - 4096);
#endif
#if defined(__x86_64__)
    // As if entry had been called: at its first instruction the stack pointer is 8 short of a multiple of 16.
    auto* top = reinterpret_cast<uint64_t*>(stack_ + bytes_);
    top[-1] = 0;
    top[-2] = reinterpret_cast<uint64_t>(entry);
    for (int i = 3; i <= 8; ++i) top[-i] = 0;
    pointer_ = top - 8;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = bytes_;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  /// To be called first by the function a fiber starts with: tells AddressSanitizer where the stack it came from lies.
  static void arrived_from([[maybe_unused]] Fiber& previous) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &previous.bottom_, &previous.bytes_);
#endif
  }

  /// Leaves this fiber, which is the running one, for another.
  void switch_to(Fiber& other) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, other.bottom_, other.bytes_);
#endif
#if defined(__x86_64__)
    edm2_emulation_switch(&pointer_, other.pointer_);
#else
    swapcontext(&context_, &other.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

 private:
  char* stack_ = nullptr;         // to be freed
  const void* bottom_ = nullptr;  // of the stack, whoever owns it
  size_t bytes_ = 0;
#if defined(__x86_64__)
  void* pointer_ = nullptr;
#else
  ucontext_t context_ = {};
#endif
};

}  // namespace emulation
