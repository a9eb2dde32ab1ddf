// Runs grids on the CPU: the scheduler of fibers.
#include "cuda/device/intrinsics.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "cuda_host/fiber.h"
#include "cuda_host/grid.h"

namespace fmd::cuda::host {
namespace {

enum class Waiting { kNot, kForWarp, kForBlock, kForGroup, kForMbarrier, kForKernelAhead, kEnded };

// What a warp waits for beside Waiting: the id and threads of a group's barrier, or an mbarrier and a parity.
struct Awaited {
  const void* barrier = nullptr;
  int id = 0, count = 0;
  bool (*is_over)(const uint64_t* barrier, int parity) = nullptr;

  bool operator==(const Awaited& other) const {
    return barrier == other.barrier && id == other.id && count == other.count && is_over == other.is_over;
  }
};

struct Lane {
  Fiber fiber;
  Thread thread;
  Waiting waiting = Waiting::kNot;
  void (*execute)(Operands) = nullptr;
  void* operands = nullptr;
  Awaited awaited;
};

// The last copy into 16 bytes of shared memory.
struct Written {
  int64_t at = 0;
  int thread = -1;
};

struct Block {
  const char* name = "";
  int64_t index = 0;
  unsigned char* shared_memory = nullptr;
  int shared_bytes = 0;
  const std::function<void()>* kernel = nullptr;
  int64_t time = 0;
  std::vector<Written> written;  // [shared_bytes / 16]
  std::vector<int> tracking;     // threads with tracked copies, once per arrival
  bool is_behind = false;        // launched by launch_behind()
  bool has_waited = false;       // for the kernel ahead
  int arrived[16] = {};          // [id of a group's barrier]: threads that do not wait there
};

Settings the_settings;
Block block;
Lane* lane = nullptr;
std::vector<std::unique_ptr<Lane>> lanes;
std::function<void()> kernel_ahead;  // that has not run yet
bool blocks_behind_are_allowed = false;

// Runs the kernel ahead, if it has not run, while a block waits for it.
void run_kernel_ahead();

// A small generator of its own, so that a seed means the same everywhere.
class Shuffle {
 public:
  Shuffle(uint64_t seed, int64_t block_index) : state_(seed * 0x9e3779b97f4a7c15u + block_index), on_(seed != 0) {}

  int below(int count) {
    if (!on_) return 0;
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<int>((state_ >> 33) % static_cast<uint64_t>(count));
  }

  void order(std::vector<int>& values) {
    if (!on_) return;
    for (int i = static_cast<int>(values.size()) - 1; i > 0; --i) std::swap(values[i], values[below(i + 1)]);
  }

  // Operations that a warp executes before another warp's turn.
  int burst() { return on_ ? 1 << below(9) : 1 << 30; }

 private:
  uint64_t state_;
  bool on_;
};

void run_lane(void*) {
  (*block.kernel)();
  lane->waiting = Waiting::kEnded;
  lane->fiber.suspend();
}

// Runs all lanes of a warp to where they wait next, and executes what they meet in. Returns what they wait for then.
Waiting step_warp(int first, std::vector<int>& order, Shuffle& shuffle) {
  shuffle.order(order);
  for (const int i : order) {
    lane = lanes[first + i].get();
    lane->waiting = Waiting::kNot;
    lane->fiber.resume();
  }
  void* operands[kWarpSize];
  const Lane& leader = *lanes[first];
  for (int i = 0; i < kWarpSize; ++i) {
    const Lane& other = *lanes[first + i];
    lane = lanes[first + i].get();
    if (other.waiting != leader.waiting) fail("lanes of a warp wait for different things");
    if (other.waiting == Waiting::kForWarp && other.execute != leader.execute) {
      fail("lanes of a warp execute different operations");
    }
    if (other.waiting != Waiting::kEnded && !(other.awaited == leader.awaited)) {
      fail("lanes of a warp wait at different barriers");
    }
    if (other.waiting == Waiting::kEnded) {
      if (!other.thread.tracked.empty()) fail("a thread ends with copies under way");
      for (const auto& group : other.thread.groups) {
        if (!group.empty()) fail("a thread ends with copies under way");
      }
    }
    operands[i] = other.operands;
  }
  if (leader.waiting == Waiting::kForWarp) leader.execute(operands);
  return leader.waiting;
}

void run_block(int threads) {
  Shuffle shuffle(the_settings.seed, block.index);
  const int num_warps = threads / kWarpSize;
  block.time = 0;
  block.written.assign(block.shared_bytes / 16 + 1, Written{});
  block.tracking.clear();
  std::fill(std::begin(block.arrived), std::end(block.arrived), 0);
  for (int i = 0; i < threads; ++i) {
    lanes[i]->thread = Thread{};
    lanes[i]->thread.index = i;
    lanes[i]->thread.groups.emplace_back();
    lanes[i]->awaited = {};
    lanes[i]->waiting = Waiting::kNot;
    lanes[i]->fiber.start(run_lane, nullptr);
  }
  std::vector<Waiting> warps(num_warps, Waiting::kNot);
  std::vector<int> order(kWarpSize), ready;
  for (int i = 0; i < kWarpSize; ++i) order[i] = i;
  // Warps that stand at a group's barrier with all the others of the group.
  const auto group_is_complete = [&](const Awaited& awaited) {
    int count = 0;
    for (int warp = 0; warp < num_warps; ++warp) {
      if (warps[warp] == Waiting::kForGroup && lanes[warp * kWarpSize]->awaited == awaited) count += kWarpSize;
    }
    return count + block.arrived[awaited.id] == awaited.count;
  };
  // Copies that an mbarrier tracks: in one order of four as late as can be, in the others at any time.
  const bool late = the_settings.seed % 4 == 0;
  const auto complete_one = [&] {
    complete_tracked(lanes[block.tracking[shuffle.below(static_cast<int>(block.tracking.size()))]]->thread);
  };
  for (;;) {
    if (!late) {
      for (int count = shuffle.below(64); count > 0 && !block.tracking.empty(); --count) complete_one();
    }
    ready.clear();
    for (int warp = 0; warp < num_warps; ++warp) {
      const Awaited awaited = lanes[warp * kWarpSize]->awaited;
      if (warps[warp] == Waiting::kForGroup && group_is_complete(awaited)) {
        for (int other = warp; other < num_warps; ++other) {
          if (warps[other] == Waiting::kForGroup && lanes[other * kWarpSize]->awaited == awaited) {
            warps[other] = Waiting::kNot;
          }
        }
        block.arrived[awaited.id] = 0;
      }
      if (warps[warp] == Waiting::kForMbarrier &&
          awaited.is_over(static_cast<const uint64_t*>(awaited.barrier), awaited.count)) {
        warps[warp] = Waiting::kNot;
      }
      if (warps[warp] == Waiting::kNot || warps[warp] == Waiting::kForWarp) ready.push_back(warp);
    }
    if (ready.empty() && !block.tracking.empty()) {
      complete_one();
      continue;
    }
    if (ready.empty()) {
      // All that have not ended stand at the same barrier.
      Waiting common = Waiting::kEnded;
      for (Waiting& warp : warps) {
        if (warp == Waiting::kEnded) continue;
        if (warp != Waiting::kForBlock && warp != Waiting::kForKernelAhead) {
          fail("all warps wait, some for what nobody is left to bring");
        }
        if (common != Waiting::kEnded && warp != common) fail("some warps wait for the block, some for a kernel");
        common = warp;
      }
      if (common == Waiting::kForKernelAhead) {
        run_kernel_ahead();
        block.has_waited = true;
      }
      if (common == Waiting::kEnded) {
        if (block.is_behind && !block.has_waited) fail("a block ends without having waited for the kernel ahead");
        for (const int arrived : block.arrived) {
          if (arrived != 0) fail("a block ends with arrivals at a group's barrier that nobody has waited for");
        }
        return;
      }
      for (Waiting& warp : warps) {
        if (warp != Waiting::kEnded) warp = Waiting::kNot;
      }
      continue;
    }
    const int warp = ready[shuffle.below(static_cast<int>(ready.size()))];
    for (int steps = shuffle.burst(); steps > 0; --steps) {
      warps[warp] = step_warp(warp * kWarpSize, order, shuffle);
      if (warps[warp] != Waiting::kForWarp) break;
    }
  }
}

}  // namespace

Settings& settings() { return the_settings; }
Thread& current_thread() { return lane->thread; }
int64_t current_block() { return block.index; }
unsigned char* current_shared_memory() { return block.shared_memory; }
int current_shared_bytes() { return block.shared_bytes; }

void fail(const char* what) {
  std::fprintf(stderr, "host execution of %s, block %lld, thread %d: %s\n", block.name,
               static_cast<long long>(block.index), lane == nullptr ? -1 : lane->thread.index, what);
  std::abort();
}

int64_t tick() { return ++block.time; }

namespace {

void bring(const PendingCopy& copy, int thread) {
  copy.from == nullptr ? std::memset(copy.to, 0, 16) : std::memcpy(copy.to, copy.from, 16);
  const auto place = static_cast<const unsigned char*>(copy.to) - block.shared_memory;
  block.written[place / 16] = {tick(), thread};
}

void check_group(int id, int threads) {
  if (id < 1 || id > 15 || threads < kWarpSize || threads % kWarpSize != 0) {
    fail("group_barrier: accepted are ids 1 to 15 and whole warps");
  }
}

}  // namespace

void deliver(Thread& thread) {
  for (const PendingCopy& copy : thread.waited_for) bring(copy, thread.index);
  thread.waited_for.clear();
}

void track_copies(uint64_t* barrier, void (*arrive)(uint64_t* barrier)) {
  Thread& thread = current_thread();
  TrackedCopies tracked{{}, barrier, arrive};
  for (auto& group : thread.groups) {
    tracked.copies.insert(tracked.copies.end(), group.begin(), group.end());
    group.clear();
  }
  thread.tracked.push_back(std::move(tracked));
  block.tracking.push_back(thread.index);
}

void complete_tracked(Thread& thread) {
  for (const PendingCopy& copy : thread.tracked.front().copies) bring(copy, thread.index);
  thread.tracked.front().arrive(thread.tracked.front().barrier);
  thread.tracked.pop_front();
  block.tracking.erase(std::find(block.tracking.begin(), block.tracking.end(), thread.index));
}

bool is_in_async_proxy(uint64_t place, int64_t fenced_at) {
  const Written& written = block.written[place / 16];
  return written.at <= fenced_at || written.at <= lanes[written.thread]->thread.proxy_fenced_at;
}

void arrive_at_group_barrier(int id, int threads) {
  check_group(id, threads);
  if (++block.arrived[id] >= threads) fail("group_barrier_arrive: nobody is left to wait");
}

void wait_at_group_barrier(int id, int threads) {
  check_group(id, threads);
  lane->awaited = {nullptr, id, threads, nullptr};
  lane->waiting = Waiting::kForGroup;
  lane->fiber.suspend();
}

void wait_at_mbarrier(const uint64_t* barrier, int parity, bool (*is_over)(const uint64_t* barrier, int parity)) {
  lane->awaited = {barrier, 0, parity, is_over};
  lane->waiting = Waiting::kForMbarrier;
  lane->fiber.suspend();
}

void wait_at_block_barrier() {
  lane->awaited = {};
  lane->waiting = Waiting::kForBlock;
  lane->fiber.suspend();
}

void meet(void (*execute)(Operands), void* operands) {
  lane->awaited = {};
  lane->waiting = Waiting::kForWarp;
  lane->execute = execute;
  lane->operands = operands;
  lane->fiber.suspend();
}

namespace {

void run_grid(const char* name, int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel,
              bool is_behind) {
  block = Block{};
  block.name = name;
  block.is_behind = is_behind;
  if (threads < kWarpSize || threads > 1024 || threads % kWarpSize != 0) fail("accepted are 32, 64 … 1024 threads");
  if (blocks < 1 || blocks > std::numeric_limits<int32_t>::max()) fail("accepted are 1 to 2^31 - 1 blocks");
  if (shared_bytes > 227 * 1024) fail("more shared memory than a block can have");
  while (lanes.size() < static_cast<size_t>(threads)) lanes.push_back(std::make_unique<Lane>());
  block.kernel = &kernel;
  // Of a kernel behind another, another block comes first with another seed.
  const int64_t first = is_behind ? static_cast<int64_t>(the_settings.seed % static_cast<uint64_t>(blocks)) : 0;
  for (int64_t i = 0; i < blocks; ++i) {
    block.index = (first + i) % blocks;
    block.has_waited = false;
    // Not aligned_alloc: it may round the size up, and the first byte beyond must be out of bounds.
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, static_cast<size_t>(shared_bytes)) != 0) fail("no memory");
    std::memset(memory, 0xff, static_cast<size_t>(shared_bytes));
    block.shared_memory = static_cast<unsigned char*>(memory);
    block.shared_bytes = shared_bytes;
    run_block(threads);
    std::free(memory);
  }
  lane = nullptr;
}

void run_kernel_ahead() {
  if (kernel_ahead == nullptr) return;
  const std::function<void()> run_ahead = std::move(kernel_ahead);
  kernel_ahead = nullptr;
  // The waiting block's threads stay as they are: other ones run the kernel ahead.
  Block waiting = std::move(block);
  std::vector<std::unique_ptr<Lane>> waiting_lanes = std::move(lanes);
  lanes.clear();
  run_ahead();
  if (!blocks_behind_are_allowed) fail("no block of the kernel ahead allows those behind it");
  block = std::move(waiting);
  lanes = std::move(waiting_lanes);
}

}  // namespace

void run(const char* name, int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
  if (kernel_ahead != nullptr) fail("another kernel is launched between one ahead and the one behind it");
  run_grid(name, blocks, threads, shared_bytes, kernel, false);
}

void run_behind(const char* name, int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
  if (kernel_ahead == nullptr) fail("a kernel is launched behind none");
  run_grid(name, blocks, threads, shared_bytes, kernel, true);
}

void keep_ahead(std::function<void()> run_ahead) {
  if (kernel_ahead != nullptr) fail("two kernels are launched ahead");
  blocks_behind_are_allowed = false;
  kernel_ahead = std::move(run_ahead);
}

void allow_blocks_behind() { blocks_behind_are_allowed = true; }

void wait_for_kernel_ahead() {
  if (!block.is_behind) fail("there is no kernel ahead to wait for");
  lane->awaited = {};
  lane->waiting = Waiting::kForKernelAhead;
  lane->fiber.suspend();
}

}  // namespace fmd::cuda::host
