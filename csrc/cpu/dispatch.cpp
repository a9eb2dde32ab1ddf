// Which instruction set the CPU kernels use, and the scratch memory of their threads.
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "fmd/library.h"

#if defined(FMD_HAVE_AVX2) || defined(FMD_HAVE_AVX512)
#include <cpuid.h>
#endif

namespace fmd::cpu {

namespace baseline {
extern const KernelTable table;
}
#ifdef FMD_HAVE_AVX2
namespace avx2 {
extern const KernelTable table;
}
#endif
#ifdef FMD_HAVE_AVX512
namespace avx512 {
extern const KernelTable table;
}
#endif

namespace {

struct Variant {
  const char* name;
  const KernelTable* table;  // null: not in this build
  bool supported;            // by this CPU and its operating system
};

#if defined(FMD_HAVE_AVX2) || defined(FMD_HAVE_AVX512)
bool has_avx2() {
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  // Not every compiler knows "f16c" as a name for __builtin_cpu_supports.
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Slowest first.
const std::vector<Variant>& variants() {
  static const std::vector<Variant> all = {
      {"baseline", &baseline::table, true},
#ifdef FMD_HAVE_AVX2
      {"avx2", &avx2::table, has_avx2()},
#else
      {"avx2", nullptr, false},
#endif
#ifdef FMD_HAVE_AVX512
      {"avx512", &avx512::table, has_avx512()},
#else
      {"avx512", nullptr, false},
#endif
  };
  return all;
}

std::string supported_names() {
  std::string names;
  for (const Variant& variant : variants()) {
    if (variant.supported) names += (names.empty() ? "" : " ") + std::string(variant.name);
  }
  return names;
}

const KernelTable* best() {
  const KernelTable* table = nullptr;
  for (const Variant& variant : variants()) {
    if (variant.supported) table = variant.table;
  }
  return table;
}

std::atomic<const KernelTable*>& chosen() {
  static std::atomic<const KernelTable*> table{best()};
  return table;
}

constexpr size_t kAlignment = 64;

struct FreeAligned {
  void operator()(float* memory) const { std::free(memory); }
};

struct Scratch {
  std::unique_ptr<float, FreeAligned> memory;
  int64_t size = 0;
};

}  // namespace

const KernelTable& kernels() { return *chosen().load(std::memory_order_relaxed); }

float* thread_scratch(ScratchUse use, int64_t num_floats) {
  static thread_local Scratch scratch_of[2];
  Scratch& scratch = scratch_of[use == ScratchUse::kWorker ? 0 : 1];
  if (scratch.size < num_floats) {
    const size_t bytes = (num_floats * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment;
    scratch.memory.reset();
    scratch.size = 0;
    scratch.memory.reset(static_cast<float*>(std::aligned_alloc(kAlignment, bytes)));
    if (scratch.memory == nullptr) throw std::bad_alloc();
    scratch.size = num_floats;
  }
  return scratch.memory.get();
}

}  // namespace fmd::cpu

extern "C" {

const char* fmd_ext_select_cpu_isa(const char* name) {
  using namespace fmd::cpu;
  static thread_local std::string reason;
  if (std::string(name) == "auto") {
    chosen() = best();
    return nullptr;
  }
  for (const Variant& variant : variants()) {
    if (std::string(name) != variant.name) continue;
    if (variant.supported) {
      chosen() = variant.table;
      return nullptr;
    }
    reason = variant.table == nullptr ? "this build has no kernels for the instruction set '"
                                      : "this CPU cannot run the instruction set '";
    reason += std::string(name) + "'; accepted: " + supported_names();
    return reason.c_str();
  }
  reason = "unknown CPU instruction set '" + std::string(name) + "'; accepted: auto";
  for (const Variant& variant : variants()) reason += std::string(", ") + variant.name;
  return reason.c_str();
}

const char* fmd_ext_cpu_isa() { return fmd::cpu::kernels().name; }

const char* fmd_ext_cpu_isas() {
  static const std::string names = fmd::cpu::supported_names();
  return names.c_str();
}
}
