// A thread of control with a stack of its own, for the host execution of kernels.
#pragma once

#include <cstddef>

namespace fmd::cuda::host {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Begins anew: the next resume() calls entry(argument), which must end in suspend() and not be resumed after that.
  void start(void (*entry)(void*), void* argument);
  // Runs the fiber until it suspends. Called from outside any fiber.
  void resume();
  // Called in the running fiber: back to resume().
  void suspend();

 private:
  struct State;
  State* state_;
};

}  // namespace fmd::cuda::host
