// Host side of the attention kernels: tensor maps, schedule, launch. Plain C interface, no torch header.
#include <atomic>

#include "attention.cuh"
#include "attention_int8.cuh"
#include "launch.h"
#include "tensor_map.h"

namespace {

using namespace qarvd;

// [batch, queries, heads, D], the rows of all sequences one below the other.
bool encode_query(CUtensorMap* map, const void* query, long long rows, int columns) {
    const cuuint64_t extent[2] = {cuuint64_t(columns), cuuint64_t(rows)}, stride[1] = {cuuint64_t(columns)};
    const cuuint32_t box[2] = {head_dim, AttentionShared::Block::query_tile};
    return encode(map, query, 2, extent, stride, box);
}

// [batch, room, heads, D]. Key 16 g + 4 q + 2 h + e goes to row 16 g + 8 h + 2 q + e of its tile: the scores of four
// neighbours are then one thread's.
bool encode_key(CUtensorMap* map, const void* key, long long rows, int columns) {
    const cuuint64_t pitch = columns;
    const cuuint64_t extent[5] = {pitch, 2, 4, 2, cuuint64_t(rows / 16)};
    const cuuint64_t stride[4] = {pitch, 4 * pitch, 2 * pitch, 16 * pitch};
    const cuuint32_t box[5] = {head_dim, 2, 4, 2, key_tile / 16};
    return encode(map, key, 5, extent, stride, box);
}

// [batch * heads * D, room], of which the first `keys` are visible; what follows them reads as zero.
// Channel 32 g + 8 q + 2 j + e goes to row 32 g + 8 j + 2 q + e: eight neighbours are results of one thread.
bool encode_value(CUtensorMap* map, const void* value, long long channels, int keys, long long room) {
    const cuuint64_t pitch = room;
    const cuuint64_t extent[5] = {cuuint64_t(keys), 2, 4, 4, cuuint64_t(channels / 32)};
    const cuuint64_t stride[4] = {pitch, 8 * pitch, 2 * pitch, 32 * pitch};
    const cuuint32_t box[5] = {key_tile, 2, 4, 4, head_dim / 32};
    return encode(map, value, 5, extent, stride, box);
}

using Kernel = void (*)(AttentionMaps, AttentionParameters);

// Multiprocessors of a device, after the kernel has been given its shared memory there; 0: not asked yet.
template <class Shared>
std::atomic<int> processors[devices_limit];

template <class Shared>
cudaError_t prepare(Kernel kernel, int device) {
    if (processors<Shared>[device].load()) return cudaSuccess;
    int count = 0;
    cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shared::bytes);
    if (error == cudaSuccess) processors<Shared>[device] = count;
    return error;
}

constexpr int most_warps = AttentionShared::Block::warps, most_consumers = AttentionShared::Block::consumers;
static_assert(Int8AttentionShared::Block::warps <= most_warps, "the workspace is made for the larger block");
size_t counter_bytes(int blocks) { return (blocks * most_warps * sizeof(int) + 255) / 256 * 256; }

// `batch` is that of the keys; p holds everything but the schedule and the workspace.
template <class Shared>
int run(Kernel kernel, AttentionMaps& maps, AttentionParameters p, const void* key, const void* value, int batch,
        int room, void* workspace, int device, void* stream) {
    if (room % 16 || p.keys < 1 || p.keys > room) return cudaErrorInvalidValue;
    const void* aligned[] = {key, value, p.out, workspace};
    for (const void* pointer : aligned)
        if (reinterpret_cast<uintptr_t>(pointer) % 16) return cudaErrorMisalignedAddress;
    const int columns = p.heads * head_dim;
    if (!encode_key(&maps.key, key, (batch - 1LL) * room + (p.keys + 15) / 16 * 16, columns) ||
        !encode_value(&maps.value, value, static_cast<long long>(batch) * columns, p.keys, room))
        return cudaErrorInvalidValue;
    const OnDevice current(device);
    cudaError_t error = current.error == cudaSuccess ? prepare<Shared>(kernel, device) : current.error;
    if (error != cudaSuccess) return error;

    using Block = typename Shared::Block;
    const int blocks = processors<Shared>[device];
    p.key_groups_of_batch = room / 16;
    p.row_tiles = (p.queries + Block::query_tile - 1) / Block::query_tile;
    p.key_tiles = (p.keys + key_tile - 1) / key_tile;
    const int tiles = p.row_tiles * p.heads * batch;
    p.whole_waves = tiles / blocks, p.split_tiles = tiles % blocks;
    p.finished = static_cast<int*>(workspace);
    p.pieces = reinterpret_cast<float*>(static_cast<char*>(workspace) + counter_bytes(blocks));
    if (p.split_tiles) {
        error = cudaMemsetAsync(p.finished, 0, counter_bytes(blocks), static_cast<cudaStream_t>(stream));
        if (error != cudaSuccess) return error;
    }
    kernel<<<blocks, Block::threads, Shared::bytes, static_cast<cudaStream_t>(stream)>>>(maps, p);
    return cudaGetLastError();
}

}  // namespace

// Bytes that attention needs beside its results on a GPU of so many multiprocessors; any content.
extern "C" long long qarvd_attention_workspace(int multiprocessors) {
    return counter_bytes(multiprocessors) +
           2LL * multiprocessors * most_consumers * piece_floats * static_cast<long long>(sizeof(float));
}

// Returns 0 or a CUDA error. Device pointers: query e4m3 [batch, queries, heads, 128], key e4m3 [batch, room, heads,
// 128], value e4m3 [batch, heads, 128, room], query_scale float32 [heads], key_scale and value_scale float32
// [batch, heads], out bfloat16 [batch, queries, heads, 128]. The first `keys` tokens are visible. `room` is a multiple
// of 16.
extern "C" int qarvd_attention_fp8(const void* query, const void* key, const void* value, int batch, int queries,
                                   int keys, int room, int heads, const float* query_scale, const float* key_scale,
                                   const float* value_scale, float softmax_scale, void* out, void* workspace,
                                   int device, void* stream) {
    if (encoder() == nullptr) return cudaErrorNotSupported;
    if (device < 0 || device >= devices_limit) return cudaErrorInvalidDevice;
    if (reinterpret_cast<uintptr_t>(query) % 16) return cudaErrorMisalignedAddress;
    AttentionMaps maps;
    if (!encode_query(&maps.query, query, static_cast<long long>(batch) * queries, heads * head_dim))
        return cudaErrorInvalidValue;
    AttentionParameters p{};
    p.queries = queries, p.keys = keys, p.heads = heads;
    p.query_scale = query_scale, p.key_scale = key_scale, p.value_scale = value_scale;
    p.softmax_scale = softmax_scale, p.out = static_cast<__nv_bfloat16*>(out);
    return run<AttentionShared>(attention_kernel, maps, p, key, value, batch, room, workspace, device, stream);
}

// The same on int8 keys and values, and bfloat16 queries, which have no scale.
extern "C" int qarvd_attention_int8(const void* query, const void* key, const void* value, int batch, int queries,
                                    int keys, int room, int heads, const float* key_scale, const float* value_scale,
                                    float softmax_scale, void* out, void* workspace, int device, void* stream) {
    if (encoder() == nullptr) return cudaErrorNotSupported;
    if (device < 0 || device >= devices_limit) return cudaErrorInvalidDevice;
    if (reinterpret_cast<uintptr_t>(query) % 8) return cudaErrorMisalignedAddress;
    AttentionMaps maps{};
    AttentionParameters p{};
    p.queries = queries, p.keys = keys, p.heads = heads, p.query = static_cast<const __nv_bfloat16*>(query);
    p.key_scale = key_scale, p.value_scale = value_scale;
    p.softmax_scale = softmax_scale, p.out = static_cast<__nv_bfloat16*>(out);
    return run<Int8AttentionShared>(int8_attention_kernel, maps, p, key, value, batch, room, workspace, device, stream);
}
