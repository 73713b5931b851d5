// What the attention kernels share: the work of a block, its loads, and the sum of pieces of one tile of queries.
//
// Blocks are persistent. Tiles of queries that fill whole waves of blocks are computed whole; the keys of the
// remaining ones are split evenly over all blocks, and the last one to finish a tile merges its pieces.
//
// Values are stored with tokens innermost, [D, tokens], because 8-bit operands must have the summed dimension
// innermost. The accumulator fragment of the scores becomes the register operand of the weighted sum without a
// shuffle: of every 16 keys, those that one thread holds are made neighbours by the order in which the tensor map
// loads key rows. The rows of the values are ordered in the same way, so that a thread holds eight neighbouring
// channels of the result.
#pragma once
#include <cuda_bf16.h>

#include "ptx.cuh"
#include "ring.cuh"

namespace qarvd {

constexpr int head_dim = 128, key_tile = 128;
constexpr int channel_sums = head_dim / 2;                // of a thread: two rows, a quarter of the channels
constexpr int piece_floats = (channel_sums + 8) * 128;    // of one warpgroup: sums of channels and weights, offsets

// A block: a producer warpgroup, and consumers of 64 query rows each.
template <int consumers_>
struct AttentionBlock {
    static constexpr int consumers = consumers_, query_tile = consumers * 64;
    static constexpr int threads = (consumers + 1) * 128, warps = consumers * 4;  // warps that consume
};

struct AttentionParameters {
    int queries, keys, heads;
    int row_tiles, key_tiles;                            // of one sequence
    int whole_waves, split_tiles;                        // tiles of queries: waves of one per block; what is left
    int key_groups_of_batch;                             // groups of 16 key rows between sequences
    const __nv_bfloat16* query;                          // [batch, queries, heads, D] of int8 attention
    const float *query_scale, *key_scale, *value_scale;  // [heads] of float8 attention, [batch][heads], [batch][heads]
    float softmax_scale;                                 // log2(e) / sqrt(D)
    __nv_bfloat16* out;                                  // [batch, queries, heads, D]
    float* pieces;                                       // [blocks][2][consumers][piece_floats]
    int* finished;                                       // [split_tiles][consumer warps], zero
};

struct AttentionMaps {
    CUtensorMap query, key, value;
};

// Key tiles [first, last) of one tile of queries. The producer leaves them in shared memory for the consumers, which
// have no register to spare and read them whenever they need them.
struct Segment {
    int tile, first, last;  // a tile of -1 ends the work

    __device__ __forceinline__ void write(uint32_t to) const {
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %3};" ::"r"(to), "r"(tile), "r"(first), "r"(last) : "memory");
    }
    static __device__ __forceinline__ Segment read(uint32_t from) {
        Segment segment;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, _}, [%3];"
                     : "=r"(segment.tile), "=r"(segment.first), "=r"(segment.last)
                     : "r"(from)
                     : "memory");
        return segment;
    }
};

// The work of one block: its share of the split tiles first, then its whole tiles.
struct Schedule {
    const AttentionParameters& p;
    int next, stop, wave = 0;

    __device__ __forceinline__ Schedule(const AttentionParameters& p)
        : p(p), next(share(blockIdx.x)), stop(share(blockIdx.x + 1)) {}
    // Where the share of a block begins, among the key tiles of all split tiles.
    __device__ __forceinline__ int share(int block) const {
        return static_cast<uint32_t>(block) * p.split_tiles * p.key_tiles / gridDim.x;
    }
    __device__ __forceinline__ bool take(Segment& segment) {
        if (next < stop) {
            const int split = next / p.key_tiles, begin = split * p.key_tiles;
            segment = {p.whole_waves * int(gridDim.x) + split, next - begin, min(stop - begin, p.key_tiles)};
            next = begin + segment.last;
            return true;
        }
        if (wave == p.whole_waves) return false;
        segment = {wave++ * int(gridDim.x) + int(blockIdx.x), 0, p.key_tiles};
        return true;
    }
};

// A tile of queries: rows fastest, then heads, then sequences.
template <class Block>
struct QueryTile {
    int row, head, sequence;
    __device__ __forceinline__ QueryTile(const AttentionParameters& p, int tile)
        : row(tile % p.row_tiles * Block::query_tile), head(tile / p.row_tiles % p.heads),
          sequence(tile / p.row_tiles / p.heads) {}
};

// The producer: one thread. Key tiles run backwards, so that the ragged one comes first.
template <class Shared>
__device__ __forceinline__ void produce(const AttentionMaps& maps, const AttentionParameters& p, Shared shared) {
    Ring<1> query;
    Ring<Shared::stages> ring;
    Schedule schedule(p);
    for (Segment segment; schedule.take(segment);) {
        const QueryTile<typename Shared::Block> tile(p, segment.tile);
        barrier_wait(shared.query_empty(), query.phase ^ 1);  // nobody is at the segment before the last one any more
        segment.write(shared.segment(query.phase));
        if (Shared::query_bytes) {
            barrier_expect(shared.query_full(), Shared::query_bytes);
            load_tile(shared.query(), &maps.query, tile.head * head_dim, tile.sequence * p.queries + tile.row,
                      shared.query_full());
        } else {
            barrier_arrive(shared.query_full());
        }
        query.advance();
        const int key_group = tile.sequence * p.key_groups_of_batch;
        const int value_group = (tile.sequence * p.heads + tile.head) * (head_dim / 32);
        for (int keys = segment.last - 1; keys >= segment.first; --keys) {
            const uint32_t key_full = shared.key_full(ring.index), value_full = shared.value_full(ring.index);
            barrier_wait(shared.key_empty(ring.index), ring.phase ^ 1);
            barrier_expect(key_full, Shared::key_bytes);
            load_groups(shared.key(ring.index), &maps.key, tile.head * head_dim, key_group + keys * (key_tile / 16),
                        key_full);
            barrier_wait(shared.value_empty(ring.index), ring.phase ^ 1);
            barrier_expect(value_full, Shared::key_bytes);
            load_groups(shared.value(ring.index), &maps.value, keys * key_tile, value_group, value_full);
            ring.advance();
        }
    }
    barrier_wait(shared.query_empty(), query.phase ^ 1);
    Segment{-1, 0, 0}.write(shared.segment(query.phase));
    barrier_arrive(shared.query_full());
}

__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The rows of one consumer warpgroup: 64 of every tile. In arrays of two, element h belongs to row lane / 4 + 8 h of a
// warp. Sums of channels and of weights are those of weights 2^(score * scale + offset).
template <class Block>
struct AttentionRows {
    const AttentionParameters& p;
    const int consumer, warp, lane;

    __device__ __forceinline__ AttentionRows(const AttentionParameters& p)
        : p(p), consumer(__shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0) - 1), warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32) {}

    // A block's share of the split tiles is at most one tile's worth of keys: it touches two at most.
    __device__ __forceinline__ float4* piece(int block, bool second) const {
        const long long index = (static_cast<long long>(block) * 2 + second) * Block::consumers + consumer;
        return reinterpret_cast<float4*>(p.pieces + index * piece_floats) + threadIdx.x % 128;
    }

    // Hands over a piece of a tile. The last warp to do so gets the sum of all of them and returns true.
    template <int size>
    __device__ __forceinline__ bool merge(
        const Segment& segment, float (&channels)[size], float& first_sum, float& second_sum, float (&offset)[2]) const {
        const Schedule schedule(p);
        const int split = segment.tile - p.whole_waves * int(gridDim.x);
        const int begin = split * p.key_tiles, end = begin + p.key_tiles;
        float4* own = piece(blockIdx.x, schedule.share(blockIdx.x) < begin);
#pragma unroll
        for (int i = 0; i < channel_sums; i += 4)
            __stcg(own + i * 32, make_float4(channels[i], channels[i + 1], channels[i + 2], channels[i + 3]));
        __stcg(own + channel_sums * 32, make_float4(first_sum, second_sum, offset[0], offset[1]));

        int first = blockIdx.x, last = blockIdx.x, pieces = 0;
        while (first > 0 && schedule.share(first) > begin) --first;
        while (last + 1 < int(gridDim.x) && schedule.share(last + 1) < end) ++last;
        for (int block = first; block <= last; ++block) pieces += schedule.share(block) < schedule.share(block + 1);
        __threadfence();
        __syncwarp();
        int before = 0;
        if (lane == 0) before = atomicAdd(p.finished + split * Block::warps + consumer * 4 + warp, 1);
        if (__shfl_sync(0xFFFFFFFF, before, 0) + 1 < pieces) return false;
        __threadfence();

        offset[0] = offset[1] = INFINITY;
#pragma unroll 1
        for (int block = first; block <= last; ++block) {
            if (schedule.share(block) == schedule.share(block + 1)) continue;
            const float4 facts = __ldcg(piece(block, schedule.share(block) < begin) + channel_sums * 32);
            offset[0] = fminf(offset[0], facts.z), offset[1] = fminf(offset[1], facts.w);
        }
#pragma unroll
        for (int i = 0; i < channel_sums; ++i) channels[i] = 0.0f;
        first_sum = second_sum = 0.0f;
#pragma unroll 1
        for (int block = first; block <= last; ++block) {
            if (schedule.share(block) == schedule.share(block + 1)) continue;
            const float4* other = piece(block, schedule.share(block) < begin);
            const float4 facts = __ldcg(other + channel_sums * 32);
            const float keep[2] = {power_of_two(offset[0] - facts.z), power_of_two(offset[1] - facts.w)};
            first_sum = fmaf(facts.x, keep[0], first_sum), second_sum = fmaf(facts.y, keep[1], second_sum);
#pragma unroll
            for (int i = 0; i < channel_sums; i += 4) {
                const float4 v = __ldcg(other + i * 32);
                channels[i] = fmaf(v.x, keep[0], channels[i]);
                channels[i + 1] = fmaf(v.y, keep[0], channels[i + 1]);
                channels[i + 2] = fmaf(v.z, keep[1], channels[i + 2]);
                channels[i + 3] = fmaf(v.w, keep[1], channels[i + 3]);
            }
        }
        return true;
    }

    // Thread `lane` holds channels 8 (lane % 4) to + 7 of every 32, of two rows.
    template <int size>
    __device__ __forceinline__ void store(
        int index, const float (&channels)[size], float first_sum, float second_sum) const {
        const QueryTile<Block> tile(p, index);
        const float value_scale = __ldg(p.value_scale + tile.sequence * p.heads + tile.head);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = tile.row + consumer * 64 + warp * 16 + half * 8 + lane / 4;
            if (row >= p.queries) continue;
            const float factor = value_scale / (half ? second_sum : first_sum);
            const long long token = static_cast<long long>(tile.sequence) * p.queries + row;
            __nv_bfloat16* to = p.out + (token * p.heads + tile.head) * head_dim + lane % 4 * 8;
#pragma unroll
            for (int group = 0; group < head_dim / 32; ++group) {
                uint32_t packed[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int at = group * 16 + i * 4 + half * 2;
                    const __nv_bfloat162 pair =
                        __floats2bfloat162_rn(channels[at] * factor, channels[at + 1] * factor);
                    packed[i] = reinterpret_cast<const uint32_t&>(pair);
                }
                *reinterpret_cast<uint4*>(to + group * 32) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
            }
        }
    }
};

// Initializes the barriers; one thread, before the block synchronizes.
template <class Shared>
__device__ __forceinline__ void prepare_attention(const AttentionMaps& maps, Shared shared) {
    if (shared.base % 1024) __trap();  // the swizzles count on it
    prefetch_map(&maps.key), prefetch_map(&maps.value);
    if (Shared::query_bytes) prefetch_map(&maps.query);
    for (int stage = 0; stage < Shared::stages; ++stage) {
        barrier_init(shared.key_full(stage), 1), barrier_init(shared.key_empty(stage), Shared::Block::warps);
        barrier_init(shared.value_full(stage), 1), barrier_init(shared.value_empty(stage), Shared::Block::warps);
    }
    barrier_init(shared.query_full(), 1);
    barrier_init(shared.query_empty(), Shared::Block::consumers * 128);  // every thread reads queries and segments
    barrier_init_fence();
}

}  // namespace qarvd
