// Softmax attention on float8 (e4m3) queries, keys and values for Hopper, heads of 128 channels, no mask.
//
// One block holds 192 query rows of a head: a producer warp keeps rings of key and value tiles filled by TMA
// loads, three consumer warpgroups of 64 rows each run both products. A warpgroup takes 64 keys of a tile at a time,
// and issues the weighted sum of a tile together with the scores of the next one's first half. The three are not
// synchronized: while one waits for the tensor cores, the others compute exponentials.
//
// Values are stored with tokens innermost, [D, tokens], because 8-bit operands must have the summed dimension
// innermost. The accumulator fragment of the scores becomes the register operand of the weighted sum without a
// shuffle: of every 16 keys, those that one thread holds are made neighbours by the order in which the tensor map
// loads key rows. The rows of the values are ordered in the same way, so that a thread holds eight neighbouring
// channels of the result.
//
// Exponentials have a reference per row, a power of two, that follows the true maximum lazily: weights are computed
// with the old reference. Only if one of them leaves the range of e4m3, the reference moves and the sums are rescaled
// (the idea of FlashAttention-4). The sum of the weights is one more column of the product (rows of ones after
// the values): it sums exactly what is multiplied.
//
// Accumulators of 8-bit products keep 13 bits below their largest term and truncate the rest, which over 32760 keys
// makes the result a fifth too small if the values have a mean. So they restart with every tile, and the total is kept in
// float32 in shared memory. They are added to it along with the exponentials of a tile's second half, when no product that
// writes accumulators is in flight.
//
// Blocks are persistent. Tiles of queries that fill whole waves of blocks are computed whole; the keys of the
// remaining ones are split evenly over all blocks, and the last one to finish a tile merges its pieces.
#pragma once
#include <cuda_bf16.h>

#include "ptx.cuh"
#include "ring.cuh"
#include "wgmma_fp8.cuh"

namespace qarvd {

constexpr int head_dim = 128, query_tile = 192;
constexpr int key_tile = 128, key_half = 64;  // keys of a tile of keys or values
constexpr int attention_consumers = 3, attention_threads = (attention_consumers + 1) * 128;
constexpr int attention_warps = attention_consumers * 4;    // that consume
constexpr int channel_sums = head_dim / 2;                  // of a thread: two rows, a quarter of the channels
constexpr int sum_accumulators = channel_sums + 4;          // and sums of weights, [64] and [66]
constexpr int piece_floats = (sum_accumulators + 4) * 128;  // of one warpgroup: accumulators, sums and offsets
// Weights are 2^5 at a row's first reference: 64 keys give it, and what comes will mostly exceed it, up to 448 without a
// move. At those that follow they are 2^8: what is small against the largest then keeps most of its bits.
constexpr float first_weight_bits = 5.0f, later_weight_bits = 8.0f;

struct AttentionParameters {
    int queries, keys, heads;
    int row_tiles, key_tiles;                            // of one sequence
    int whole_waves, split_tiles;                        // tiles of queries: waves of one per block; what is left
    int key_groups_of_batch;                             // groups of 16 key rows between sequences
    const float *query_scale, *key_scale, *value_scale;  // [heads], [batch][heads], [batch][heads]
    float softmax_scale;                                 // log2(e) / sqrt(D)
    __nv_bfloat16* out;                                  // [batch, queries, heads, D]
    float* pieces;                                       // [blocks][2][consumers][piece_floats]
    int* finished;                                       // [split_tiles][consumer warps], zero
};

struct AttentionMaps {
    CUtensorMap query, key, value;
};

struct AttentionShared {
    static constexpr int stages = 3;
    static constexpr int query_bytes = query_tile * head_dim, key_bytes = key_tile * head_dim;
    static constexpr int value_bytes = key_bytes + 8 * key_tile;  // eight rows of ones after the channels
    static constexpr int sums_bytes = channel_sums * attention_consumers * 128 * 4;
    static constexpr int segment_bytes = 16;
    static constexpr int bytes = query_bytes + stages * (key_bytes + value_bytes) + sums_bytes +
                                 (4 * stages + 2) * int(sizeof(uint64_t)) + 2 * segment_bytes;

    uint32_t base;
    __device__ __forceinline__ uint32_t query() const { return base; }
    __device__ __forceinline__ uint32_t key(int stage) const { return base + query_bytes + stage * key_bytes; }
    __device__ __forceinline__ uint32_t value(int stage) const { return key(stages) + stage * value_bytes; }
    __device__ __forceinline__ uint32_t sums() const { return value(stages); }
    __device__ __forceinline__ uint32_t key_full(int stage) const { return sums() + sums_bytes + stage * 8; }
    __device__ __forceinline__ uint32_t key_empty(int stage) const { return key_full(stages + stage); }
    __device__ __forceinline__ uint32_t value_full(int stage) const { return key_full(2 * stages + stage); }
    __device__ __forceinline__ uint32_t value_empty(int stage) const { return key_full(3 * stages + stage); }
    __device__ __forceinline__ uint32_t query_full() const { return key_full(4 * stages); }
    __device__ __forceinline__ uint32_t query_empty() const { return key_full(4 * stages + 1); }
    __device__ __forceinline__ uint32_t segment(int slot) const {
        return key_full(4 * stages + 2) + slot * segment_bytes;
    }
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
struct QueryTile {
    int row, head, sequence;
    __device__ __forceinline__ QueryTile(const AttentionParameters& p, int tile)
        : row(tile % p.row_tiles * query_tile), head(tile / p.row_tiles % p.heads),
          sequence(tile / p.row_tiles / p.heads) {}
};

// The producer: one thread. Key tiles run backwards, so that the ragged one comes first.
__device__ __forceinline__ void produce(
    const AttentionMaps& maps, const AttentionParameters& p, AttentionShared shared) {
    Ring<1> query;
    Ring<AttentionShared::stages> ring;
    Schedule schedule(p);
    for (Segment segment; schedule.take(segment);) {
        const QueryTile tile(p, segment.tile);
        barrier_wait(shared.query_empty(), query.phase ^ 1);  // nobody is at the segment before the last one any more
        segment.write(shared.segment(query.phase));
        barrier_expect(shared.query_full(), AttentionShared::query_bytes);
        load_tile(shared.query(), &maps.query, tile.head * head_dim, tile.sequence * p.queries + tile.row,
                  shared.query_full());
        query.advance();
        const int key_group = tile.sequence * p.key_groups_of_batch;
        const int value_group = (tile.sequence * p.heads + tile.head) * (head_dim / 32);
        for (int keys = segment.last - 1; keys >= segment.first; --keys) {
            const uint32_t key_full = shared.key_full(ring.index), value_full = shared.value_full(ring.index);
            barrier_wait(shared.key_empty(ring.index), ring.phase ^ 1);
            barrier_expect(key_full, AttentionShared::key_bytes);
            load_groups(shared.key(ring.index), &maps.key, tile.head * head_dim, key_group + keys * (key_tile / 16),
                        key_full);
            barrier_wait(shared.value_empty(ring.index), ring.phase ^ 1);
            barrier_expect(value_full, AttentionShared::key_bytes);
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

// Four weights as e4m3, the first one in the lowest byte. What is too large becomes 448 = 0x7E.
__device__ __forceinline__ uint32_t pack_fp8(float a, float b, float c, float d) {
    uint32_t packed;
    asm("{\n.reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}\n"
        : "=r"(packed)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return packed;
}

// Four e4m3, as above, times a power of two. Only subnormal results are rounded.
__device__ __forceinline__ uint32_t scale_fp8(uint32_t packed, float factor) {
    asm("{\n.reg .b16 low, high, f;\n.reg .b32 a, b, ff;\n"
        "mov.b32 {low, high}, %0;\n"
        "cvt.rn.f16x2.e4m3x2 a, low;\n"
        "cvt.rn.f16x2.e4m3x2 b, high;\n"
        "cvt.rn.f16.f32 f, %1;\n"
        "mov.b32 ff, {f, f};\n"
        "mul.rn.f16x2 a, a, ff;\n"
        "mul.rn.f16x2 b, b, ff;\n"
        "cvt.rn.satfinite.e4m3x2.f16x2 low, a;\n"
        "cvt.rn.satfinite.e4m3x2.f16x2 high, b;\n"
        "mov.b32 %0, {low, high};\n}\n"
        : "+r"(packed)
        : "f"(factor));
    return packed;
}

// Weights of half a tile, as the register operand of two products; beside(word) is done after every eighth of them.
// Returns whether a weight is out of range.
template <class Beside>
__device__ __forceinline__ bool weigh(
    const float (&scores)[32], uint32_t (&weights)[8], float scale, const float (&offset)[2], Beside beside) {
    uint32_t over = 0;
#pragma unroll
    for (int word = 0; word < 8; ++word) {
        const int half = word % 2, first = word / 2 * 8 + half * 2;
        float y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            y[i] = power_of_two(fmaf(scores[first + i / 2 * 4 + i % 2], scale, offset[half]));
        weights[word] = pack_fp8(y[0], y[1], y[2], y[3]);
        over |= weights[word] + 0x02020202u;  // the top bit of a byte from 0x7E on
        beside(word);
    }
    return over & 0x80808080u;
}
__device__ __forceinline__ bool weigh(
    const float (&scores)[32], uint32_t (&weights)[8], float scale, const float (&offset)[2]) {
    return weigh(scores, weights, scale, offset, [](int) {});
}

__device__ __forceinline__ void row_maxima(const float (&scores)[32], float (&largest)[2]) {
    largest[0] = largest[1] = -INFINITY;
#pragma unroll
    for (int i = 0; i < 32; ++i) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], scores[i]);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2)
            largest[half] = fmaxf(largest[half], __shfl_xor_sync(0xFFFFFFFF, largest[half], lanes));
}

// One consumer warpgroup: 64 rows of every tile. In arrays of two, element h belongs to row lane / 4 + 8 h of a warp.
class AttentionConsumer {
  public:
    __device__ __forceinline__ AttentionConsumer(const AttentionParameters& p, AttentionShared shared)
        : p(p), shared(shared), consumer(threadIdx.x / 128 - 1), warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32) {}

    // One segment. Returns false when there is none.
    __device__ __forceinline__ bool run() {
        uint32_t weights[2][8];
        barrier_wait(shared.query_full(), query.phase);
        Segment segment = Segment::read(shared.segment(query.phase));
        if (segment.tile < 0) return false;
        const QueryTile tile(p, segment.tile);
        scale = __ldg(p.query_scale + tile.head) * __ldg(p.key_scale + tile.sequence * p.heads + tile.head) *
                p.softmax_scale;
        load_queries();
        const int valid = p.keys - (segment.last - 1) * key_tile;
        {
            float scores[32];
            issue_scores<0>(scores);
            wgmma_wait<0>();
            wgmma_pin(scores);
            if (valid < key_tile) hide<0>(scores, valid);
            offset[0] = offset[1] = INFINITY;
            refer_to_maxima(scores, first_weight_bits);
            weigh(scores, weights[0], scale, offset);
        }
        clear_sums();
        second_half(weights, valid);
        for (int left = segment.last - segment.first - 1; left > 0; --left) {
            first_half(weights);
            second_half(weights, key_tile);
        }
        issue_sums<0>(weights[0]);
        issue_sums<1>(weights[1]);
        wgmma_wait<0>();
        wgmma_pin(out);
        release_values();
        add_total();
        segment = Segment::read(shared.segment(query.phase));
        query.advance();
        if (segment.last - segment.first == p.key_tiles || merge(segment)) store(segment.tile);
        return true;
    }

  private:
    const AttentionParameters& p;
    const AttentionShared shared;
    const int consumer, warp, lane;
    Ring<AttentionShared::stages> keys, values;
    Ring<1> query;
    uint32_t queries[16];         // 64 rows of the warpgroup, as the register operand of four products
    float out[sum_accumulators];  // weighted sums of a tile, at last of all of them
    float scale, offset[2];       // a weight is 2^(score * scale + offset)
    float weights_total[2];       // sums of the weights of the tiles before; those of the channels are in shared memory
    float total_factor[2];        // by which either is to be multiplied

    __device__ __forceinline__ void load_queries() {
        int lane;  // asked again, so that addresses made from it do not occupy registers from segment to segment
        asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
        const int row = consumer * 64 + warp * 16 + lane / 4;
        const uint32_t from = shared.query() + row * head_dim + lane % 4 * 4;
#pragma unroll
        for (int chunk = 0; chunk < head_dim / 16; ++chunk)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                asm volatile("ld.shared.u32 %0, [%1];"
                             : "=r"(queries[chunk * 2 + half])
                             : "r"(from + half * 8 * head_dim + ((chunk ^ row % 8) * 16)));
        barrier_arrive(shared.query_empty());
    }
    // Masks the keys of a tile after the first `valid` ones.
    template <int half>
    __device__ __forceinline__ void hide(float (&scores)[32], int valid) const {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const int key = half * key_half + i / 8 * 16 + lane % 4 * 4 + i / 4 % 2 * 2 + i % 2;
            if (key >= valid) scores[i] = -INFINITY;
        }
    }
    template <int half>
    __device__ __forceinline__ void issue_scores(float (&scores)[32]) {
        if (half == 0) barrier_wait(shared.key_full(keys.index), keys.phase);
        const uint64_t b = wgmma_operand<128>(shared.key(keys.index)) + half * (key_half * head_dim / 16);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < head_dim / 32; ++step) wgmma_fp8(scores, queries + step * 4, b + step * 2, step > 0);
        wgmma_commit();
    }
    template <int half>
    __device__ __forceinline__ void issue_sums(const uint32_t (&weights)[8]) {
        if (half == 0) barrier_wait(shared.value_full(values.index), values.phase);
        const uint64_t b = wgmma_operand<128>(shared.value(values.index)) + half * (key_half / 16);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < key_half / 32; ++step)
            wgmma_fp8(out, weights + step * 4, b + step * 2, half > 0 || step > 0);
        wgmma_commit();
    }
    __device__ __forceinline__ void release_keys() {
        if (lane == 0) barrier_arrive(shared.key_empty(keys.index));
        keys.advance();
    }
    __device__ __forceinline__ void release_values() {
        if (lane == 0) barrier_arrive(shared.value_empty(values.index));
        values.advance();
    }
    // An integer: what was summed is then rescaled by powers of two, without an error.
    __device__ __forceinline__ void refer_to_maxima(const float (&scores)[32], float weight_bits) {
        float largest[2];
        row_maxima(scores, largest);
#pragma unroll
        for (int half = 0; half < 2; ++half)
            offset[half] = fminf(offset[half], weight_bits - ceilf(largest[half] * scale));
    }

    // Moves the reference and recomputes the weights. Earlier weights must be multiplied by `keep`; the total will be.
    __device__ __forceinline__ void weigh_anew(const float (&scores)[32], uint32_t (&weights)[8], float (&keep)[2]) {
        const float old[2] = {offset[0], offset[1]};
        refer_to_maxima(scores, later_weight_bits);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            keep[half] = power_of_two(offset[half] - old[half]);
            total_factor[half] *= keep[half];
        }
        weigh(scores, weights, scale, offset);
    }
    // Sums of a tile; scores and weights of the first half of the next one.
    __device__ __forceinline__ void first_half(uint32_t (&weights)[2][8]) {
        float scores[32], keep[2];
        issue_sums<0>(weights[0]);
        issue_scores<0>(scores);
        issue_sums<1>(weights[1]);
        wgmma_wait<1>();
        wgmma_pin(scores);
        const bool over = __any_sync(0xFFFFFFFF, weigh(scores, weights[0], scale, offset));
        if (over) weigh_anew(scores, weights[0], keep);
        wgmma_wait<0>();
        wgmma_pin(out);
        release_values();
        if (over) {
#pragma unroll
            for (int i = 0; i < sum_accumulators; ++i) out[i] *= keep[i / 2 % 2];
        }
    }
    // Scores and weights of the second half of a tile, of which `valid` keys are visible; the sums of the tile before go
    // to the total.
    __device__ __forceinline__ void second_half(uint32_t (&weights)[2][8], int valid) {
        float scores[32];
        issue_scores<1>(scores);
        wgmma_wait<0>();
        wgmma_pin(scores);
        release_keys();
        if (valid < key_tile) hide<1>(scores, valid);
        const bool over = weigh(scores, weights[1], scale, offset, [&](int eighth) {
            add_to_total(eighth * 2), add_to_total(eighth * 2 + 1);
        });
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            weights_total[half] = fmaf(weights_total[half], total_factor[half], out[channel_sums + half * 2]);
            total_factor[half] = 1.0f;
        }
        if (__any_sync(0xFFFFFFFF, over)) {
            float keep[2];
            weigh_anew(scores, weights[1], keep);
#pragma unroll
            for (int word = 0; word < 8; ++word) weights[0][word] = scale_fp8(weights[0][word], keep[word % 2]);
        }
    }

    __device__ __forceinline__ uint32_t total(int i) const {
        return shared.sums() + ((consumer * (channel_sums / 4) + i) * 128 + threadIdx.x % 128) * 16;
    }
    __device__ __forceinline__ void load_total(int i, float (&v)[4]) const {
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                     : "r"(total(i)));
    }
    __device__ __forceinline__ void store_total(int i, const float (&v)[4]) const {
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(total(i)), "f"(v[0]), "f"(v[1]), "f"(v[2]),
                     "f"(v[3]));
    }
    __device__ __forceinline__ void clear_sums() {
        constexpr float zeros[4] = {};
#pragma unroll
        for (int i = 0; i < channel_sums / 4; ++i) store_total(i, zeros);
#pragma unroll
        for (int i = 0; i < sum_accumulators; ++i) out[i] = 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) weights_total[half] = 0.0f, total_factor[half] = 1.0f;
    }
    // total += out, four channels of them
    __device__ __forceinline__ void add_to_total(int i) const {
        float v[4];
        load_total(i, v);
#pragma unroll
        for (int k = 0; k < 4; ++k) v[k] = fmaf(v[k], total_factor[k / 2], out[4 * i + k]);
        store_total(i, v);
    }
    // out += total
    __device__ __forceinline__ void add_total() {
#pragma unroll
        for (int i = 0; i < channel_sums / 4; ++i) {
            float v[4];
            load_total(i, v);
#pragma unroll
            for (int k = 0; k < 4; ++k) out[4 * i + k] = fmaf(v[k], total_factor[k / 2], out[4 * i + k]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float& sum = out[channel_sums + half * 2];
            sum = fmaf(weights_total[half], total_factor[half], sum);
        }
    }

    // A block's share of the split tiles is at most one tile's worth of keys: it touches two at most.
    __device__ __forceinline__ float4* piece(int block, bool second) const {
        const long long index = (static_cast<long long>(block) * 2 + second) * attention_consumers + consumer;
        return reinterpret_cast<float4*>(p.pieces + index * piece_floats) + threadIdx.x % 128;
    }

    // Hands over a piece of a tile. The last warp to do so gets the sum of all of them and returns true.
    __device__ __forceinline__ bool merge(const Segment& segment) {
        const Schedule schedule(p);
        const int split = segment.tile - p.whole_waves * int(gridDim.x);
        const int begin = split * p.key_tiles, end = begin + p.key_tiles;
        float4* own = piece(blockIdx.x, schedule.share(blockIdx.x) < begin);
#pragma unroll
        for (int i = 0; i < 16; ++i)
            __stcg(own + i * 128, make_float4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]));
        __stcg(own + 16 * 128, make_float4(out[64], out[66], offset[0], offset[1]));

        int first = blockIdx.x, last = blockIdx.x, pieces = 0;
        while (first > 0 && schedule.share(first) > begin) --first;
        while (last + 1 < int(gridDim.x) && schedule.share(last + 1) < end) ++last;
        for (int block = first; block <= last; ++block) pieces += schedule.share(block) < schedule.share(block + 1);
        __threadfence();
        __syncwarp();
        int before = 0;
        if (lane == 0) before = atomicAdd(p.finished + split * attention_warps + consumer * 4 + warp, 1);
        if (__shfl_sync(0xFFFFFFFF, before, 0) + 1 < pieces) return false;
        __threadfence();

        offset[0] = offset[1] = INFINITY;
#pragma unroll 1
        for (int block = first; block <= last; ++block) {
            if (schedule.share(block) == schedule.share(block + 1)) continue;
            const float4 facts = __ldcg(piece(block, schedule.share(block) < begin) + 16 * 128);
            offset[0] = fminf(offset[0], facts.z), offset[1] = fminf(offset[1], facts.w);
        }
#pragma unroll
        for (int i = 0; i < sum_accumulators; ++i) out[i] = 0.0f;
#pragma unroll 1
        for (int block = first; block <= last; ++block) {
            if (schedule.share(block) == schedule.share(block + 1)) continue;
            const float4* other = piece(block, schedule.share(block) < begin);
            const float4 facts = __ldcg(other + 16 * 128);
            const float keep[2] = {power_of_two(offset[0] - facts.z), power_of_two(offset[1] - facts.w)};
            out[64] = fmaf(facts.x, keep[0], out[64]), out[66] = fmaf(facts.y, keep[1], out[66]);
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const float4 v = __ldcg(other + i * 128);
                out[4 * i] = fmaf(v.x, keep[0], out[4 * i]);
                out[4 * i + 1] = fmaf(v.y, keep[0], out[4 * i + 1]);
                out[4 * i + 2] = fmaf(v.z, keep[1], out[4 * i + 2]);
                out[4 * i + 3] = fmaf(v.w, keep[1], out[4 * i + 3]);
            }
        }
        return true;
    }

    // Thread `lane` holds channels 8 (lane % 4) to + 7 of every 32, of two rows.
    __device__ __forceinline__ void store(int index) const {
        const QueryTile tile(p, index);
        const float value_scale = __ldg(p.value_scale + tile.sequence * p.heads + tile.head);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = tile.row + consumer * 64 + warp * 16 + half * 8 + lane / 4;
            if (row >= p.queries) continue;
            const float factor = value_scale / out[64 + half * 2];
            const long long token = static_cast<long long>(tile.sequence) * p.queries + row;
            __nv_bfloat16* to = p.out + (token * p.heads + tile.head) * head_dim + lane % 4 * 8;
#pragma unroll
            for (int group = 0; group < head_dim / 32; ++group) {
                uint32_t packed[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int at = group * 16 + i * 4 + half * 2;
                    const __nv_bfloat162 pair = __floats2bfloat162_rn(out[at] * factor, out[at + 1] * factor);
                    packed[i] = reinterpret_cast<const uint32_t&>(pair);
                }
                *reinterpret_cast<uint4*>(to + group * 32) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
            }
        }
    }
};

static __global__ void __launch_bounds__(attention_threads, 1)
    attention_kernel(const __grid_constant__ AttentionMaps maps, const __grid_constant__ AttentionParameters p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const AttentionShared shared{shared_address(memory)};
    const int role = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
        if (shared.base % 1024) __trap();  // the swizzles count on it
        prefetch_map(&maps.query), prefetch_map(&maps.key), prefetch_map(&maps.value);
        for (int stage = 0; stage < AttentionShared::stages; ++stage) {
            barrier_init(shared.key_full(stage), 1), barrier_init(shared.key_empty(stage), attention_warps);
            barrier_init(shared.value_full(stage), 1), barrier_init(shared.value_empty(stage), attention_warps);
        }
        barrier_init(shared.query_full(), 1);
        barrier_init(shared.query_empty(), attention_consumers * 128);  // every thread reads queries and segments
        barrier_init_fence();
    }
    constexpr int words = 8 * key_tile / 4;  // of ones, after every tile of values
    for (int i = threadIdx.x; i < AttentionShared::stages * words; i += attention_threads) {
        const uint32_t to = shared.value(i / words) + AttentionShared::key_bytes + i % words * 4;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(0x38383838u) : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();

    if (role == 0) {
        registers_decrease<32>();
        if (threadIdx.x == 0) produce(maps, p, shared);
        __syncwarp();
    } else {
        registers_increase<160>();
        AttentionConsumer consumer(p, shared);
        while (consumer.run()) continue;
    }
}

}  // namespace qarvd
