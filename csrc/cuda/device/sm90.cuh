// sm_90a's operations for nvcc. See sm90.h for what each name means.
#pragma once

#include "cuda/device/sm90.h"

namespace fmd::cuda {

FMD_DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

FMD_DEVICE void group_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

FMD_DEVICE void group_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

FMD_DEVICE void copy_async_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
FMD_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
FMD_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(shared_address(barrier))
               : "memory");
}
FMD_DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
  const SharedAddress address = shared_address(barrier);
  uint32_t done = 0;
  while (done == 0) {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(address), "r"(parity)
                 : "memory");
  }
}

template <int kRegisters>
FMD_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FMD_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kCount>
FMD_DEVICE void wgmma_fence_operand(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
FMD_DEVICE void wgmma_fence_operand(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}
FMD_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FMD_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPendingGroups>
FMD_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPendingGroups) : "memory");
}

// Names of the operands, and the operands: all 32 or 64 registers of d.
#define FMD_WGMMA_NAMES_32                                                  \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define FMD_WGMMA_NAMES_64                                                           \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
#define FMD_WGMMA_D8(i)                                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FMD_WGMMA_D32(i) FMD_WGMMA_D8(i), FMD_WGMMA_D8(i + 8), FMD_WGMMA_D8(i + 16), FMD_WGMMA_D8(i + 24)

template <typename T, int kN>
FMD_DEVICE void wgmma_shared(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate);
template <typename T, int kN>
FMD_DEVICE void wgmma_registers(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b);

// What accumulates is p; then the signs of a and b, and which of them has its rows along the contiguous dimension.
#define FMD_WGMMA_SHARED_128(T, kType)                                                                          \
  template <>                                                                                                   \
  FMD_DEVICE void wgmma_shared<T, 128>(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {               \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." kType \
                 "." kType " " FMD_WGMMA_NAMES_64 "%64, %65, p, 1, 1, 0, 0;\n}"                                 \
                 : FMD_WGMMA_D32(0), FMD_WGMMA_D32(32)                                                          \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                          \
  }
#define FMD_WGMMA_REGISTERS_128(T, kType)                                                              \
  template <>                                                                                          \
  FMD_DEVICE void wgmma_registers<T, 128>(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." kType "." kType " " FMD_WGMMA_NAMES_64 \
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                              \
                 : FMD_WGMMA_D32(0), FMD_WGMMA_D32(32)                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                \
  }
#define FMD_WGMMA_REGISTERS_64(T, kType)                                                              \
  template <>                                                                                         \
  FMD_DEVICE void wgmma_registers<T, 64>(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." kType "." kType " " FMD_WGMMA_NAMES_32 \
                 "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                             \
                 : FMD_WGMMA_D32(0)                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                               \
  }
FMD_WGMMA_SHARED_128(BFloat16, "bf16")
FMD_WGMMA_SHARED_128(Float16, "f16")
FMD_WGMMA_REGISTERS_128(BFloat16, "bf16")
FMD_WGMMA_REGISTERS_128(Float16, "f16")
FMD_WGMMA_REGISTERS_64(BFloat16, "bf16")
FMD_WGMMA_REGISTERS_64(Float16, "f16")

#undef FMD_WGMMA_SHARED_128
#undef FMD_WGMMA_REGISTERS_128
#undef FMD_WGMMA_REGISTERS_64
#undef FMD_WGMMA_NAMES_32
#undef FMD_WGMMA_NAMES_64
#undef FMD_WGMMA_D8
#undef FMD_WGMMA_D32

}  // namespace fmd::cuda
