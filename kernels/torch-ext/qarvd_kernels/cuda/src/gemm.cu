// Host side of the dual-scale GEMM: tensor maps, choice of the instance, launch. Plain C interface, no torch header.
#include <cuda_runtime.h>

#include <atomic>

#include "gemm.cuh"
#include "launch.h"
#include "tensor_map.h"

namespace {

using namespace qarvd;

bool encode_a(CUtensorMap* map, const char* a, int rows, int channels, long long pitch, int block_k, int box_rows) {
    const cuuint64_t extent[2] = {cuuint64_t(channels), cuuint64_t(rows)}, stride[1] = {cuuint64_t(pitch)};
    const cuuint32_t box[2] = {cuuint32_t(block_k), cuuint32_t(box_rows)};
    return encode(map, a, 2, extent, stride, box);
}

// Row 32 g + 8 q + 2 j + e of the weight goes to row 32 g + 8 j + 2 q + e of the tile: accumulators (j, e) of the threads
// with lane % 4 == q then are eight neighbouring columns.
bool encode_weight(CUtensorMap* map, const char* weight, int rows, int channels, long long pitch, int block_k,
                   int box_rows) {
    const cuuint64_t extent[5] = {cuuint64_t(channels), 2, 4, 4, cuuint64_t(rows / group_columns)};
    const cuuint64_t stride[4] = {cuuint64_t(pitch), cuuint64_t(pitch * own_columns), cuuint64_t(pitch * 2),
                                  cuuint64_t(pitch * group_columns)};
    const cuuint32_t box[5] = {cuuint32_t(block_k), 2, 4, 4, cuuint32_t(box_rows / group_columns)};
    return encode(map, weight, 5, extent, stride, box);
}

struct Operands {
    const char *a, *weight;
    long long a_pitch;
    int k, k1;
};

template <typename L, Output output>
int launch(const Operands& operands, GemmParameters p, int device, cudaStream_t stream) {
    static std::atomic<int> processors[devices_limit];  // 0: not queried yet
    auto kernel = gemm_kernel<L, output>;
    if (processors[device].load() == 0) {
        int count = 0;
        cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
        if (error == cudaSuccess)
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::bytes);
        if (error != cudaSuccess) return error;
        processors[device] = count;
    }

    Maps maps;
    const int k2 = operands.k - operands.k1;
    bool encoded = true;
    for (int group = 0; group < 2; ++group) {
        const int extent = group ? k2 : operands.k1, start = group ? operands.k1 : 0;
        if (extent == 0) continue;
        encoded &= encode_a(&maps.a[group], operands.a + start, p.m, extent, operands.a_pitch, L::block_k, L::rows);
        CUtensorMap* weight = maps.weight[group];
        encoded &= encode_weight(&weight[0], operands.weight + start, p.n, extent, operands.k, L::block_k, L::left);
        if (L::left == L::right)
            weight[1] = weight[0];
        else
            encoded &= encode_weight(&weight[1], operands.weight + start, p.n, extent, operands.k, L::block_k, L::right);
    }
    for (int group = 0; group < 2; ++group)
        if ((group ? k2 : operands.k1) == 0) {  // never used, but the kernel prefetches it
            maps.a[group] = maps.a[!group];
            maps.weight[group][0] = maps.weight[!group][0], maps.weight[group][1] = maps.weight[!group][1];
        }
    if (!encoded) return cudaErrorInvalidValue;

    p.row_tiles = (p.m + L::rows - 1) / L::rows;
    p.tiles = p.row_tiles * ((p.n + L::columns - 1) / L::columns);
    p.blocks_outliers = (operands.k1 + L::block_k - 1) / L::block_k;
    p.blocks = p.blocks_outliers + (k2 + L::block_k - 1) / L::block_k;
    const int pairs = (p.tiles + cluster_blocks - 1) / cluster_blocks, room = processors[device] / cluster_blocks;
    const int blocks = (pairs < room ? pairs : room) * cluster_blocks;
    return launch_early(kernel, blocks, L::threads, L::bytes, stream, maps, p);
}

template <Output output>
int launch(int rows, int columns, int block_k, const Operands& operands, const GemmParameters& p, int device,
           cudaStream_t stream) {
    switch (rows * 1000000 + columns * 1000 + block_k) {
        case 128128128: return launch<Layout<128, 128, 128>, output>(operands, p, device, stream);
        case 128160128: return launch<Layout<128, 160, 128>, output>(operands, p, device, stream);
        case 128224128: return launch<Layout<128, 224, 128>, output>(operands, p, device, stream);
        case 128256064: return launch<Layout<128, 256, 64>, output>(operands, p, device, stream);
        case 128256128: return launch<Layout<128, 256, 128>, output>(operands, p, device, stream);
        case 192192128: return launch<Layout<192, 192, 128>, output>(operands, p, device, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace

// Returns 0 or a CUDA error. Pointers are device pointers: a int8 [m, k] with rows a_pitch bytes apart, weight int8
// [n, k], ratio, scale and bias float32 [n], out [m, n] in `format`; the rest as in GemmParameters.
extern "C" int qarvd_gemm(const void* a, long long a_pitch, const void* weight, int m, int n, int k, int k1,
                          const float* ratio, const float* scale, const float* bias, const int* row_sums,
                          const float* row_sum_scale, const float* row_scale, void* out, int format, const float* out_scale,
                          const int* out_zero_point, int out_outliers, const void* residual, const float* gate,
                          int gate_rows, int tile_rows, int tile_columns, int block_k, int device, void* stream) {
    if (encoder() == nullptr) return cudaErrorNotSupported;
    if (device < 0 || device >= devices_limit) return cudaErrorInvalidDevice;
    const void* aligned[] = {a, weight, ratio, scale, bias, row_sums, row_sum_scale, out, residual, gate};
    for (const void* pointer : aligned)
        if (reinterpret_cast<uintptr_t>(pointer) % 16) return cudaErrorMisalignedAddress;
    const OnDevice current(device);
    if (current.error != cudaSuccess) return current.error;
    GemmParameters p{};
    p.m = m, p.n = n, p.ratio = ratio, p.scale = scale, p.bias = bias, p.row_sums = row_sums;
    p.row_sum_scale = row_sum_scale, p.row_scale = row_scale, p.residual = residual, p.gate = gate, p.gate_rows = gate_rows;
    p.out_scale = out_scale, p.out_zero_point = out_zero_point, p.out_outliers = out_outliers;
    p.out = out, p.format = static_cast<Format>(format);
    const Operands operands{static_cast<const char*>(a), static_cast<const char*>(weight), a_pitch, k, k1};
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (p.format == Format::int8)
        return launch<Output::gelu_int8>(tile_rows, tile_columns, block_k, operands, p, device, queue);
    if (p.format == Format::float32 || p.format == Format::int32)
        return launch<Output::full_precision>(tile_rows, tile_columns, block_k, operands, p, device, queue);
    return launch<Output::half_precision>(tile_rows, tile_columns, block_k, operands, p, device, queue);
}

extern "C" const char* qarvd_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
