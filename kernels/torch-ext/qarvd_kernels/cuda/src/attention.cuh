// Softmax attention on float8 (e4m3) queries, keys and values for Hopper, heads of 128 channels, no mask.
//
// One block holds 192 query rows of a head: a producer warp keeps rings of key and value tiles filled by TMA
// loads, three consumer warpgroups of 64 rows each run both products. A warpgroup takes 64 keys of a tile at a time,
// and issues the weighted sum of a tile together with the scores of the next one's first half. The three are not
// synchronized: while one waits for the tensor cores, the others compute exponentials.
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
#pragma once
#include "attention_common.cuh"
#include "wgmma_fp8.cuh"

namespace qarvd {

constexpr int key_half = 64;  // keys of a tile of keys or values
constexpr int sum_accumulators = channel_sums + 4;  // and sums of weights, [64] and [66]
// Weights are 2^5 at a row's first reference: 64 keys give it, and what comes will mostly exceed it, up to 448 without a
// move. At those that follow they are 2^8: what is small against the largest then keeps most of its bits.
constexpr float first_weight_bits = 5.0f, later_weight_bits = 8.0f;

struct AttentionShared {
    using Block = AttentionBlock<3>;
    static constexpr int stages = 3;
    static constexpr int query_bytes = Block::query_tile * head_dim, key_bytes = key_tile * head_dim;
    static constexpr int value_bytes = key_bytes + 8 * key_tile;  // eight rows of ones after the channels
    static constexpr int sums_bytes = channel_sums * Block::consumers * 128 * 4;
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

// One consumer warpgroup.
class AttentionConsumer : AttentionRows<AttentionShared::Block> {
  public:
    __device__ __forceinline__ AttentionConsumer(const AttentionParameters& p, AttentionShared shared)
        : AttentionRows(p), shared(shared) {}

    // One segment. Returns false when there is none.
    __device__ __forceinline__ bool run() {
        uint32_t weights[2][8];
        barrier_wait(shared.query_full(), query.phase);
        Segment segment = Segment::read(shared.segment(query.phase));
        if (segment.tile < 0) return false;
        const QueryTile<AttentionShared::Block> tile(p, segment.tile);
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
        if (segment.last - segment.first == p.key_tiles || merge(segment, out, out[64], out[66], offset))
            store(segment.tile, out, out[64], out[66]);
        return true;
    }

  private:
    const AttentionShared shared;
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
};

static __global__ void __launch_bounds__(AttentionShared::Block::threads, 1)
    attention_kernel(const __grid_constant__ AttentionMaps maps, const __grid_constant__ AttentionParameters p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const AttentionShared shared{shared_address(memory)};
    const int role = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) prepare_attention(maps, shared);
    constexpr int words = 8 * key_tile / 4;  // of ones, after every tile of values
    for (int i = threadIdx.x; i < AttentionShared::stages * words; i += AttentionShared::Block::threads) {
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
