// The warpgroup matrix instruction m64 x N x k32 on signed bytes, both operands in shared memory, int32 accumulators.
#pragma once
#include <cstdint>

namespace qarvd {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from moving arithmetic on accumulators across an asynchronous product that still writes them.
template <int first, int count>
__device__ __forceinline__ void wgmma_pin(int* accumulators) {
#pragma unroll
    for (int i = first; i < first + count; ++i) asm volatile("" : "+r"(accumulators[i])::"memory");
}

// Descriptor of a K-major operand with rows of `width` bytes, 64 or 128, in the swizzle of that width.
template <int width>
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t address) {
    constexpr uint64_t swizzle = uint64_t(width == 128 ? 1 : 2) << 62, eight_rows = uint64_t(8 * width >> 4) << 32;
    constexpr uint64_t unused = uint64_t(1) << 16;
    return swizzle | eight_rows | unused | ((address & 0x3FFFF) >> 4);
}

// d = a * b + (accumulate ? d : 0). N columns take N / 2 accumulators of every thread.
template <int N>
__device__ __forceinline__ void wgmma(int* d, uint64_t a, uint64_t b, int accumulate);

#define QARVD_16(i)                                                                                               \
    "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]),   \
        "+r"(d[i + 7]), "+r"(d[i + 8]), "+r"(d[i + 9]), "+r"(d[i + 10]), "+r"(d[i + 11]), "+r"(d[i + 12]),        \
        "+r"(d[i + 13]), "+r"(d[i + 14]), "+r"(d[i + 15])
#define QARVD_64 QARVD_16(0), QARVD_16(16), QARVD_16(32), QARVD_16(48)

#define QARVD_NAMES_32                                                                                            \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"   \
    "%29,%30,%31"
#define QARVD_NAMES_48 QARVD_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define QARVD_NAMES_64 QARVD_NAMES_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define QARVD_NAMES_80 QARVD_NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define QARVD_NAMES_96 QARVD_NAMES_80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define QARVD_NAMES_112 QARVD_NAMES_96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define QARVD_NAMES_128                                                                                           \
    QARVD_NAMES_112 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

#define QARVD_WGMMA(columns, names, a_name, b_name, flag_name, ...)                                               \
    template <>                                                                                                   \
    __device__ __forceinline__ void wgmma<columns>(int* d, uint64_t a, uint64_t b, int accumulate) {               \
        asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " flag_name ", 0;\n"                                 \
                     "wgmma.mma_async.sync.aligned.m64n" #columns "k32.s32.s8.s8 {" names "}, " a_name ", " b_name \
                     ", keep;\n}\n"                                                                               \
                     : __VA_ARGS__                                                                                \
                     : "l"(a), "l"(b), "r"(accumulate));                                                          \
    }

QARVD_WGMMA(64, QARVD_NAMES_32, "%32", "%33", "%34", QARVD_16(0), QARVD_16(16))
QARVD_WGMMA(96, QARVD_NAMES_48, "%48", "%49", "%50", QARVD_16(0), QARVD_16(16), QARVD_16(32))
QARVD_WGMMA(128, QARVD_NAMES_64, "%64", "%65", "%66", QARVD_64)
QARVD_WGMMA(160, QARVD_NAMES_80, "%80", "%81", "%82", QARVD_64, QARVD_16(64))
QARVD_WGMMA(192, QARVD_NAMES_96, "%96", "%97", "%98", QARVD_64, QARVD_16(64), QARVD_16(80))
QARVD_WGMMA(224, QARVD_NAMES_112, "%112", "%113", "%114", QARVD_64, QARVD_16(64), QARVD_16(80), QARVD_16(96))
QARVD_WGMMA(256, QARVD_NAMES_128, "%128", "%129", "%130", QARVD_64, QARVD_16(64), QARVD_16(80), QARVD_16(96),
            QARVD_16(112))

#undef QARVD_WGMMA
#undef QARVD_NAMES_32
#undef QARVD_NAMES_48
#undef QARVD_NAMES_64
#undef QARVD_NAMES_80
#undef QARVD_NAMES_96
#undef QARVD_NAMES_112
#undef QARVD_NAMES_128
#undef QARVD_16
#undef QARVD_64

}  // namespace qarvd
