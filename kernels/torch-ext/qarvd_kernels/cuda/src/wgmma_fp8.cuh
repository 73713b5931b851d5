// The warpgroup matrix instruction m64 x N x k32 on float8 (e4m3), a in registers, float32 accumulators.
#pragma once
#include "wgmma.cuh"

namespace qarvd {

template <int count>
__device__ __forceinline__ void wgmma_pin(float (&accumulators)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) asm volatile("" : "+f"(accumulators[i])::"memory");
}

#define QARVD_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define QARVD_16(i) QARVD_4(i), QARVD_4(i + 4), QARVD_4(i + 8), QARVD_4(i + 12)
#define QARVD_32 QARVD_16(0), QARVD_16(16)
#define QARVD_64 QARVD_32, QARVD_16(32), QARVD_16(48)
#define QARVD_NAMES_32                                                                                            \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
    "%30,%31"
#define QARVD_NAMES_64                                                                                            \
    QARVD_NAMES_32                                                                                                \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
    "%59,%60,%61,%62,%63"

// d[64 x 64] = a * b + (accumulate ? d : 0)
__device__ __forceinline__ void wgmma_fp8(float (&d)[32], const uint32_t* a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred keep;\nsetp.ne.b32 keep, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" QARVD_NAMES_32
        "}, {%32, %33, %34, %35}, %36, keep, 1, 1;\n}\n"
        : QARVD_32
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

// d[64 x 136] = a * b + (accumulate ? d : 0)
__device__ __forceinline__ void wgmma_fp8(float (&d)[68], const uint32_t* a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred keep;\nsetp.ne.b32 keep, %73, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n136k32.f32.e4m3.e4m3 {" QARVD_NAMES_64
        ",%64,%65,%66,%67}, {%68, %69, %70, %71}, %72, keep, 1, 1;\n}\n"
        : QARVD_64, QARVD_4(64)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

#undef QARVD_4
#undef QARVD_16
#undef QARVD_32
#undef QARVD_64
#undef QARVD_NAMES_32
#undef QARVD_NAMES_64

}  // namespace qarvd
