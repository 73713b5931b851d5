// 4-bit weights to the int8 operand of the matrix product: code minus zero-point, times a factor of each 16 channels.
#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"
#include "ptx.cuh"

namespace {

constexpr int threads = 256, own = 4;  // pieces of a thread: 16 channels of an output row; groups end at multiples of 16
constexpr int line_pieces = 128 / sizeof(uint2);

// The next kernel's prologue and the way of the codes to the cache overlap the end of the kernel before.
// Zero-points are two int16 per row; or, in groups, a byte per piece: zero-point (high nibble), factor less one.
template <bool in_groups>
__global__ void __launch_bounds__(threads) expand_int4_kernel(const uint2* packed, const void* zero_points,
                                                              uint4* out, uint32_t pieces, uint32_t pieces_of_row,
                                                              uint32_t outlier_pieces) {
    qarvd::allow_next_kernel();
    const uint32_t first = blockIdx.x * (threads * own) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < own; ++i)
        if (const uint32_t piece = first + i * threads; piece % line_pieces == 0 && piece < pieces)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(packed + piece));
    qarvd::await_last_kernel();

    uint2 codes[own];
    uint32_t zeros[own], factors[own];
#pragma unroll
    for (int i = 0; i < own; ++i) {
        const uint32_t piece = first + i * threads, row = piece / pieces_of_row;
        if (piece >= pieces) break;
        codes[i] = packed[piece];
        if constexpr (in_groups) {
            const uint32_t byte = static_cast<const uint8_t*>(zero_points)[piece];
            factors[i] = (byte & 15) + 1;
            zeros[i] = (byte >> 4) * factors[i] * 0x01010101u;  // at most 15 * 16
        } else {
            const int group = piece - row * pieces_of_row >= outlier_pieces;
            const int16_t zero = static_cast<const int16_t*>(zero_points)[row * 2 + group];
            zeros[i] = min(max(static_cast<int>(zero), 0), 15) * 0x01010101u;
        }
    }
#pragma unroll
    for (int i = 0; i < own; ++i) {
        const uint32_t piece = first + i * threads;
        if (piece >= pieces) break;
        auto spread = [zero = zeros[i], factor = factors[i]](uint32_t four, int half) {
            // Two of four bytes hold four codes, low nibble first.
            const uint32_t low = four & 0x0F0F0F0F, high = four >> 4 & 0x0F0F0F0F;
            uint32_t levels = __byte_perm(low, high, half ? 0x7362 : 0x5140);
            if constexpr (in_groups) levels *= factor;  // four products at most 15 * 16: no carry
            return __vsub4(levels, zero);
        };
        out[piece] = make_uint4(spread(codes[i].x, 0), spread(codes[i].x, 1), spread(codes[i].y, 0),
                                spread(codes[i].y, 1));
    }
}

}  // namespace

// weight_packed uint8 [n, k / 2], zero_points int16 [n, 2] or (in_groups) uint8 [n, k / 16], out int8 [n, k]; k and
// num_outliers multiples of 16.
// Returns 0 or a CUDA error.
extern "C" int qarvd_expand_int4(const void* weight_packed, const void* zero_points, void* out, int n, int k,
                                 int num_outliers, int in_groups, int device, void* stream) {
    const long long pieces = static_cast<long long>(n) * (k / 16);
    if (pieces > INT32_MAX) return cudaErrorInvalidValue;
    const qarvd::OnDevice current(device);
    if (current.error != cudaSuccess) return current.error;
    const unsigned blocks = static_cast<unsigned>((pieces + threads * own - 1) / (threads * own));
    auto kernel = in_groups ? expand_int4_kernel<true> : expand_int4_kernel<false>;
    return qarvd::launch_early(kernel, blocks, threads, 0, static_cast<cudaStream_t>(stream),
                               static_cast<const uint2*>(weight_packed), zero_points,
                               static_cast<uint4*>(out), static_cast<uint32_t>(pieces), static_cast<uint32_t>(k / 16),
                               static_cast<uint32_t>(num_outliers / 16));
}
