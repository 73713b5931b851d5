// The warpgroup matrix instruction m64 x n128 x k32 on unsigned bytes in registers, signed ones in shared memory.
#pragma once
#include "wgmma.cuh"

namespace qarvd {

template <int count>
__device__ __forceinline__ void wgmma_pin(int (&accumulators)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) asm volatile("" : "+r"(accumulators[i])::"memory");
}

#define QARVD_4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define QARVD_16(i) QARVD_4(i), QARVD_4(i + 4), QARVD_4(i + 8), QARVD_4(i + 12)
#define QARVD_64 QARVD_16(0), QARVD_16(16), QARVD_16(32), QARVD_16(48)
#define QARVD_NAMES_64                                                                                            \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
    "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,"  \
    "%57,%58,%59,%60,%61,%62,%63"
// d[64 x 128] = a * b + (accumulate ? d : 0); a is unsigned.
__device__ __forceinline__ void wgmma_unsigned(int (&d)[64], const uint32_t* a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred keep;\nsetp.ne.b32 keep, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 {" QARVD_NAMES_64
        "}, {%64, %65, %66, %67}, %68, keep;\n}\n"
        : QARVD_64
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

#undef QARVD_4
#undef QARVD_16
#undef QARVD_64
#undef QARVD_NAMES_64

}  // namespace qarvd
