// What sm_90a's operations do on the CPU: mbarriers, and wgmma over descriptors.
#include "cuda_host/sm90.h"

#include <algorithm>
#include <deque>
#include <map>

namespace fmd::cuda::host {

// ---- mbarriers: arrivals per phase, those still missing, and the phase's number. The poison has the top bit set. ----
namespace {

constexpr int kCountBits = 20;
constexpr uint64_t kCountMask = (uint64_t{1} << kCountBits) - 1;

uint64_t phase_of(const uint64_t* barrier) {
  if (*barrier >> 63 != 0) fail("an mbarrier is used before it is initialised");
  return *barrier >> (2 * kCountBits);
}

}  // namespace

void mbarrier_init(uint64_t* barrier, int arrivals) {
  require_aligned(barrier, 8);
  const auto count = static_cast<uint64_t>(arrivals);
  if (arrivals < 1 || count > kCountMask) fail("mbarrier_init: accepted are 1 to 2^20 - 1 arrivals");
  *barrier = count | count << kCountBits;
}

void mbarrier_arrive(uint64_t* barrier) {
  const uint64_t phase = phase_of(barrier), arrivals = *barrier & kCountMask;
  const uint64_t missing = (*barrier >> kCountBits & kCountMask) - 1;
  *barrier = missing > 0 ? arrivals | missing << kCountBits | phase << (2 * kCountBits)
                         : arrivals | arrivals << kCountBits | (phase + 1) << (2 * kCountBits);
}

bool mbarrier_phase_is_over(const uint64_t* barrier, int parity) {
  return phase_of(barrier) % 2 != static_cast<uint64_t>(parity);
}

// ---- wgmma ----
namespace {

constexpr int kK = 16;

struct Operation {
  WgmmaOperands lanes[kWarpSize];
  bool computed = false;
  bool starts_from_registers = false;  // no operation before it is under way on the same d
  float d[kWarpSize][128];             // what it starts from, or the result where computed
};

struct Queue {
  std::vector<Operation> open;
  std::deque<std::vector<Operation>> groups;
};

std::map<int, Queue> queues;  // by warp

int current_warp() { return current_thread().index / kWarpSize; }

// The fields of a descriptor, and where in shared memory the matrix has its elements: 128-byte rows, in units of eight
// rows that are stride bytes apart, with the 16-byte vectors of row r exchanged by XOR with r % 8. The contiguous
// dimension goes on leading bytes further on every 64 elements.
struct Matrix {
  uint64_t start, leading, stride;
  int64_t proxy_fenced_at;  // of the reader

  Matrix(uint64_t descriptor, int64_t fenced_at) : proxy_fenced_at(fenced_at) {
    const auto field = [&](int bit) { return (descriptor >> bit & 0x3fff) << 4; };
    start = field(0);
    leading = field(16);
    stride = field(32);
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) {
      fail("wgmma: accepted here are descriptors of 128-byte swizzling without a base offset");
    }
  }

  uint16_t element(int contiguous, int row) const {
    const auto memory = reinterpret_cast<uintptr_t>(current_shared_memory());
    // A descriptor holds 18 bits of an address: enough to find the place in this block's memory.
    const uint64_t first = (start - memory) & 0x3ffff;
    uint64_t place = first + contiguous / 64 * leading + contiguous % 64 * 2 + row / 8 * stride + row % 8 * 128;
    place ^= (place >> 7 & 7) << 4;
    if (place + 2 > static_cast<uint64_t>(current_shared_bytes())) fail("wgmma: a descriptor leaves shared memory");
    if (!is_in_async_proxy(place, proxy_fenced_at)) return 0xffff;
    uint16_t bits;
    std::memcpy(&bits, reinterpret_cast<const void*>(memory + place), sizeof(bits));
    return bits;
  }
};

float widen(bool is_bfloat16, uint32_t bits) {
  const auto half = static_cast<uint16_t>(bits);
  return is_bfloat16 ? to_float(BFloat16{half}) : to_float(Float16{half});
}

// The warp's 16 rows of d += a b, in operation.d.
void compute(Operation& operation) {
  const WgmmaOperands& all = operation.lanes[0];
  const bool is_bfloat16 = all.is_bfloat16;
  int64_t fenced_at = all.proxy_fenced_at;  // by all lanes
  for (const WgmmaOperands& lane : operation.lanes) fenced_at = std::min(fenced_at, lane.proxy_fenced_at);
  float a[16][kK];
  static float b[kK][256];
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kK; ++k) {
      uint32_t bits;
      if (all.a_words == nullptr) {
        bits = Matrix(all.a, fenced_at).element(k, current_warp() % 4 * 16 + row);
      } else {
        const int lane = row % 8 * 4 + k % 8 / 2, word = row / 8 + k / 8 * 2;
        bits = operation.lanes[lane].a_words[word] >> (k % 2 * 16);
      }
      a[row][k] = widen(is_bfloat16, bits);
    }
  }
  const Matrix matrix(all.b, fenced_at);
  for (int k = 0; k < kK; ++k) {
    for (int n = 0; n < all.n; ++n) {
      b[k][n] = widen(is_bfloat16, all.a_words == nullptr ? matrix.element(k, n) : matrix.element(n, k));
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sums[256] = {};
    for (int k = 0; k < kK; ++k) {
      for (int n = 0; n < all.n; ++n) sums[n] += a[row][k] * b[k][n];
    }
    for (int n = 0; n < all.n; ++n) {
      float& d = operation.d[row % 8 * 4 + n % 8 / 2][n / 8 * 4 + row / 8 * 2 + n % 2];
      d = (all.accumulate ? d : 0.0f) + sums[n];
    }
  }
  operation.computed = true;
}

// The last operation on the same d that is still under way.
const Operation* before(const Queue& queue, const float* d) {
  for (auto operation = queue.open.rbegin(); operation != queue.open.rend(); ++operation) {
    if (operation->lanes[0].d == d) return &*operation;
  }
  for (auto group = queue.groups.rbegin(); group != queue.groups.rend(); ++group) {
    for (auto operation = group->rbegin(); operation != group->rend(); ++operation) {
      if (operation->lanes[0].d == d) return &*operation;
    }
  }
  return nullptr;
}

void load_registers(Operation& operation) {
  for (int l = 0; l < kWarpSize; ++l) {
    std::memcpy(operation.d[l], operation.lanes[l].d, operation.lanes[l].n / 2 * sizeof(float));
  }
}

}  // namespace

void wgmma_issue(Operands operands) {
  Queue& queue = queues[current_warp()];
  Operation operation;
  for (int l = 0; l < kWarpSize; ++l) {
    operation.lanes[l] = *static_cast<const WgmmaOperands*>(operands[l]);
    const WgmmaOperands &mine = operation.lanes[l], &first = operation.lanes[0];
    if (!mine.fenced) fail("wgmma without a fence after the last wait");
    if (mine.a != first.a || mine.b != first.b) fail("wgmma: lanes give different descriptors");
  }
  const Operation* last = before(queue, operation.lanes[0].d);
  operation.starts_from_registers = last == nullptr;
  if (last == nullptr) load_registers(operation);
  if (settings().seed % 2 == 0) {
    if (last != nullptr) std::memcpy(operation.d, last->d, sizeof(operation.d));
    compute(operation);
  }
  for (const WgmmaOperands& mine : operation.lanes) std::memset(mine.d, 0xff, mine.n / 2 * sizeof(float));
  queue.open.push_back(operation);
}

void wgmma_commit(Operands) {
  Queue& queue = queues[current_warp()];
  queue.groups.push_back(std::move(queue.open));
  queue.open.clear();
}

void wgmma_wait(Operands operands) {
  Queue& queue = queues[current_warp()];
  while (queue.groups.size() > static_cast<size_t>(*static_cast<const int*>(operands[0]))) {
    for (Operation& operation : queue.groups.front()) {
      if (!operation.computed) {
        if (!operation.starts_from_registers) load_registers(operation);
        compute(operation);
      }
      for (int l = 0; l < kWarpSize; ++l) {
        std::memcpy(operation.lanes[l].d, operation.d[l], operation.lanes[l].n / 2 * sizeof(float));
      }
    }
    queue.groups.pop_front();
  }
}

}  // namespace fmd::cuda::host
