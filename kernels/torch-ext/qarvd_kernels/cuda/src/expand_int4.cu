// 4-bit weights to the int8 operand of the matrix product: code minus zero-point.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

// A thread writes 16 channels of one output row; a group of channels ends at a multiple of 16.
__global__ void expand_int4_kernel(const uint2* packed, const int16_t* zero_points, uint4* out, long long pieces,
                                   int pieces_of_row, int outlier_pieces) {
    const long long piece = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
    if (piece >= pieces) return;
    const long long row = piece / pieces_of_row;
    const int group = static_cast<int>(piece - row * pieces_of_row) >= outlier_pieces;
    const uint32_t zero = min(max(static_cast<int>(zero_points[row * 2 + group]), 0), 15) * 0x01010101u;
    const uint2 codes = packed[piece];
    auto spread = [zero](uint32_t four, int half) {  // two of the four bytes hold four codes, the low nibble first
        const uint32_t low = four & 0x0F0F0F0F, high = four >> 4 & 0x0F0F0F0F;
        return __vsub4(__byte_perm(low, high, half ? 0x7362 : 0x5140), zero);
    };
    out[piece] = make_uint4(spread(codes.x, 0), spread(codes.x, 1), spread(codes.y, 0), spread(codes.y, 1));
}

}  // namespace

// weight_packed uint8 [n, k / 2], zero_points int16 [n, 2], out int8 [n, k]; k and num_outliers multiples of 16.
// Returns 0 or a CUDA error.
extern "C" int qarvd_expand_int4(const void* weight_packed, const void* zero_points, void* out, int n, int k,
                                 int num_outliers, int device, void* stream) {
    int current = device;
    cudaError_t error = cudaGetDevice(&current);
    if (error == cudaSuccess && current != device) error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    const long long pieces = static_cast<long long>(n) * (k / 16);
    constexpr int threads = 256;
    expand_int4_kernel<<<static_cast<unsigned>((pieces + threads - 1) / threads), threads, 0,
                         static_cast<cudaStream_t>(stream)>>>(
        static_cast<const uint2*>(weight_packed), static_cast<const int16_t*>(zero_points), static_cast<uint4*>(out),
        pieces, k / 16, num_outliers / 16);
    error = cudaPeekAtLastError();
    if (current != device) cudaSetDevice(current);
    return error;
}
