// The kernels of one instruction set. Compiled once for each, with FMD_ISA and the compiler flags that belong to it.
#include "cpu/kernels.h"

#include "cpu/isa/append.h"
#include "cpu/isa/branched_decode.h"
#include "cpu/isa/branched_prefill.h"
#include "cpu/isa/merge.h"
#include "cpu/isa/rope_append.h"

#define FMD_STRINGIZE_(name) #name
#define FMD_STRINGIZE(name) FMD_STRINGIZE_(name)

namespace fmd::cpu::FMD_ISA {

extern const KernelTable table;
const KernelTable table = {FMD_STRINGIZE(FMD_ISA), prefill_block_any,  decode_chunk_any, decode_combine,
                           launch_append,          launch_rope_append, launch_merge};

}  // namespace fmd::cpu::FMD_ISA
