// Two ways to switch stacks: a few instructions on x86-64, and the C library's ucontext elsewhere, which asks the
// kernel for the signal mask at every switch and so takes fifty times as long.
#include "cuda_host/fiber.h"

#include <cstdint>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fmd::cuda::host {
namespace {

constexpr size_t kStackBytes = 128 * 1024;  // AddressSanitizer makes frames several times larger

}  // namespace

#if defined(__x86_64__)

// Saves the registers that a call preserves and the stack pointer in *from, and takes those of `to`.
extern "C" void fmd_host_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.type fmd_host_switch, @function
fmd_host_switch:
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
.size fmd_host_switch, .-fmd_host_switch
)");

struct Fiber::State {
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  void* own = nullptr;
  void* caller = nullptr;
  void (*entry)(void*) = nullptr;
  void* argument = nullptr;
};

namespace {
thread_local void (*starting_entry)(void*);
thread_local void* starting_argument;
void begin() {
  starting_entry(starting_argument);
  __builtin_trap();  // entry() must not return
}
}  // namespace

void Fiber::start(void (*entry)(void*), void* argument) {
  state_->entry = entry;
  state_->argument = argument;
  // What fmd_host_switch pops: six registers, then the address to return to; then the stack is as after a call.
  auto top = reinterpret_cast<uintptr_t>(state_->stack.get() + kStackBytes) & ~uintptr_t{15};
  void** frame = reinterpret_cast<void**>(top) - 8;
  for (int i = 0; i < 8; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(&begin);
  state_->own = frame;
}

void Fiber::resume() {
  starting_entry = state_->entry;
  starting_argument = state_->argument;
  fmd_host_switch(&state_->caller, state_->own);
}

void Fiber::suspend() { fmd_host_switch(&state_->own, state_->caller); }

#else

struct Fiber::State {
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  ucontext_t own{};
  ucontext_t caller{};
  void (*entry)(void*) = nullptr;
  void* argument = nullptr;
};

namespace {
thread_local void (*starting_entry)(void*);
thread_local void* starting_argument;
void begin() {
  starting_entry(starting_argument);
  __builtin_trap();
}
}  // namespace

void Fiber::start(void (*entry)(void*), void* argument) {
  state_->entry = entry;
  state_->argument = argument;
  getcontext(&state_->own);
  state_->own.uc_stack.ss_sp = state_->stack.get();
  state_->own.uc_stack.ss_size = kStackBytes;
  makecontext(&state_->own, begin, 0);
}

void Fiber::resume() {
  starting_entry = state_->entry;
  starting_argument = state_->argument;
  swapcontext(&state_->caller, &state_->own);
}

void Fiber::suspend() { swapcontext(&state_->own, &state_->caller); }

#endif

Fiber::Fiber() : state_(new State) {}
Fiber::~Fiber() { delete state_; }

}  // namespace fmd::cuda::host
