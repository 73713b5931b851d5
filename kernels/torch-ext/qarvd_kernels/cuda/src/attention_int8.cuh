// Softmax attention on int8 queries, keys and values for Hopper, heads of 128 channels, no mask: see `attention_int8`
// in ops/attention.py, which defines it.
//
// One block holds 128 query rows of a head: a producer warp keeps rings of key and value tiles filled by TMA loads,
// two consumer warpgroups of 64 rows each run both products. They take turns: while one computes exponentials, the
// other has the tensor cores (the ping-pong schedule of FlashAttention-3). Within a warpgroup the weighted sum of a tile
// is issued together with the scores of the next one.
//
// Scores and sums are exact integers. A score less the largest one of its tile becomes a float in the same addition: an
// integer below 2^22, added to the bits of 1.5 * 2^23, is that float plus the integer. Weights refer to the largest
// score of their own tile, so that the codes of a tile always use the whole range; a tile's sums are added to a float32
// total, which has a reference of its own and follows the row's maximum lazily.
#pragma once
#include "attention_common.cuh"
#include "wgmma_int8.cuh"

namespace qarvd {

constexpr float largest_query_code = 127.0f, log2_of_255 = 7.99435344f;
constexpr int magic = 0x4B400000;
constexpr float magic_float = 12582912.0f;
constexpr float slack_bits = 16.0f;  // by which a tile may exceed the reference of the total

struct Int8AttentionShared {
    using Block = AttentionBlock<2>;
    static constexpr int stages = 6;
    static constexpr int query_bytes = 0, key_bytes = key_tile * head_dim;  // queries are not loaded by TMA
    static constexpr int code_bytes = Block::query_tile * head_dim;
    static constexpr int segment_bytes = 16;
    static constexpr int bytes =
        code_bytes + 2 * stages * key_bytes + (4 * stages + 2) * int(sizeof(uint64_t)) + 2 * segment_bytes;

    uint32_t base;
    __device__ __forceinline__ uint32_t query() const { return base; }
    __device__ __forceinline__ uint32_t key(int stage) const { return base + code_bytes + stage * key_bytes; }
    __device__ __forceinline__ uint32_t value(int stage) const { return key(stages + stage); }
    __device__ __forceinline__ uint32_t key_full(int stage) const { return key(2 * stages) + stage * 8; }
    __device__ __forceinline__ uint32_t key_empty(int stage) const { return key_full(stages + stage); }
    __device__ __forceinline__ uint32_t value_full(int stage) const { return key_full(2 * stages + stage); }
    __device__ __forceinline__ uint32_t value_empty(int stage) const { return key_full(3 * stages + stage); }
    __device__ __forceinline__ uint32_t query_full() const { return key_full(4 * stages); }
    __device__ __forceinline__ uint32_t query_empty() const { return key_full(4 * stages + 1); }
    __device__ __forceinline__ uint32_t segment(int slot) const {
        return key_full(4 * stages + 2) + slot * segment_bytes;
    }
};

// Two warpgroups take turns: one waits at its own barrier until the other one has arrived there.
__device__ __forceinline__ void await_turn(int consumer) {
    asm volatile("bar.sync %0, 256;" ::"r"(1 + consumer) : "memory");
}
__device__ __forceinline__ void give_turn(int consumer) {
    asm volatile("bar.arrive %0, 256;" ::"r"(2 - consumer) : "memory");
}

// Four floats as rounded bytes, the first one lowest. Two take one instruction (F2IP).
template <bool is_signed>
__device__ __forceinline__ uint32_t pack_bytes(float a, float b, float c, float d) {
    uint32_t high, packed;
    if (is_signed) {
        asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;" : "=r"(high) : "r"(__float2int_rn(d)), "r"(__float2int_rn(c)));
        asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;"
            : "=r"(packed)
            : "r"(__float2int_rn(b)), "r"(__float2int_rn(a)), "r"(high));
    } else {
        asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, 0;" : "=r"(high) : "r"(__float2int_rn(d)), "r"(__float2int_rn(c)));
        asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, %3;"
            : "=r"(packed)
            : "r"(__float2int_rn(b)), "r"(__float2int_rn(a)), "r"(high));
    }
    return packed;
}

// Maximum, or sum, over the four threads that share a row.
__device__ __forceinline__ float row_maximum(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}
__device__ __forceinline__ int row_maximum(int x) {
    x = max(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
    return max(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFF, x, 2);
}

// One consumer warpgroup.
class Int8AttentionConsumer : AttentionRows<Int8AttentionShared::Block> {
  public:
    __device__ __forceinline__ Int8AttentionConsumer(const AttentionParameters& p, Int8AttentionShared shared)
        : AttentionRows(p), shared(shared) {
        if (consumer == 1) give_turn(consumer);
    }

    // One segment. Returns false when there is none.
    __device__ __forceinline__ bool run() {
        barrier_wait(shared.query_full(), query.phase);
        Segment segment = Segment::read(shared.segment(query.phase));
        if (segment.tile < 0) return false;
        load_queries(segment.tile);
        const int valid = p.keys - (segment.last - 1) * key_tile;
        uint32_t weights[16];
        {
            int scores[64];
            await_turn(consumer);
            issue_scores(scores);
            give_turn(consumer);
            wgmma_wait<0>();
            wgmma_pin(scores);
            release_keys();
            if (valid < key_tile) hide(scores, valid);
            int largest[2];
            row_maxima(scores, largest);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                offset[half] = -static_cast<float>(largest[half]) * scale[half];
                factor[half] = 1.0f, sums[half] = 0.0f;
            }
            weigh(scores, largest, weights, [](int) {});
            if (valid < key_tile) hide(weights, valid);
            add_weights(weights);
        }
#pragma unroll
        for (int i = 0; i < channel_sums; ++i) total[i] = 0.0f;
        for (int left = segment.last - segment.first - 1; left > 0; --left) next_tile(weights);
        int out[64];
        await_turn(consumer);
        issue_sums(out, weights);
        give_turn(consumer);
        wgmma_wait<0>();
        wgmma_pin(out);
        release_values();
#pragma unroll
        for (int i = 0; i < channel_sums; ++i) add_to_total(i, out);
#pragma unroll
        for (int half = 0; half < 2; ++half) sums[half] = row_sum(sums[half]);
        segment = Segment::read(shared.segment(query.phase));
        query.advance();
        if (segment.last - segment.first == p.key_tiles || merge(segment, total, sums[0], sums[1], offset))
            store(segment.tile, total, sums[0], sums[1]);
        return true;
    }

  private:
    const Int8AttentionShared shared;
    Ring<Int8AttentionShared::stages> keys, values;
    Ring<1> query;
    float total[channel_sums];
    float sums[2];    // of weights; of the keys that this thread holds until the end of a segment
    float scale[2];   // of scores, to exponents of 2
    float offset[2];  // the reference of the total is -offset
    float factor[2];  // of the last tile's weights to that reference

    // Quantizes the rows: each thread has channels 4 (lane % 4) to + 3 of every 16, of two rows.
    __device__ __forceinline__ void load_queries(int index) {
        const QueryTile<Int8AttentionShared::Block> tile(p, index);
        const float key_scale = __ldg(p.key_scale + tile.sequence * p.heads + tile.head) * p.softmax_scale;
        sync_warpgroup();  // nobody reads the last rows any more
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int own = consumer * 64 + warp * 16 + half * 8 + lane / 4;
            const long long token =
                static_cast<long long>(tile.sequence) * p.queries + min(tile.row + own, p.queries - 1);
            const __nv_bfloat16* from = p.query + (token * p.heads + tile.head) * head_dim + lane % 4 * 4;
            uint2 packed[head_dim / 16];
            float largest = 0.0f;
#pragma unroll
            for (int i = 0; i < head_dim / 16; ++i) {
                packed[i] = __ldg(reinterpret_cast<const uint2*>(from + i * 16));
#pragma unroll
                for (int k = 0; k < 4; ++k) largest = fmaxf(largest, fabsf(channel(packed[i], k)));
            }
            const float step = row_maximum(largest) / largest_query_code;
            const float divisor = step < 1.17549435e-38f ? 1.0f : step, inverse = __frcp_rn(divisor);
            scale[half] = divisor * key_scale;
            const uint32_t to = shared.query() + own * head_dim + lane % 4 * 4;
#pragma unroll
            for (int i = 0; i < head_dim / 16; ++i) {
                const uint32_t codes =
                    pack_bytes<true>(quotient(packed[i], 0, divisor, inverse), quotient(packed[i], 1, divisor, inverse),
                                     quotient(packed[i], 2, divisor, inverse), quotient(packed[i], 3, divisor, inverse));
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(to + (i ^ own % 8) * 16), "r"(codes) : "memory");
            }
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        sync_warpgroup();
        barrier_arrive(shared.query_empty());
    }
    __device__ __forceinline__ void sync_warpgroup() const {
        asm volatile("bar.sync %0, 128;" ::"r"(3 + consumer) : "memory");
    }
    static __device__ __forceinline__ float channel(const uint2& packed, int k) {
        const uint32_t word = k < 2 ? packed.x : packed.y;
        return __uint_as_float(k % 2 ? word & 0xFFFF0000u : word << 16);
    }
    // A channel divided and correctly rounded: bfloat16 values are often half way between two codes.
    static __device__ __forceinline__ float quotient(const uint2& packed, int k, float divisor, float inverse) {
        const float x = channel(packed, k), estimate = x * inverse;
        return fmaf(fmaf(-estimate, divisor, x), inverse, estimate);
    }

    // The key of a tile that score i of this thread belongs to.
    __device__ __forceinline__ int key_of(int i) const {
        return i / 8 * 16 + lane % 4 * 4 + i / 4 % 2 * 2 + i % 2;
    }
    // Keeps keys from `valid` on from the maximum, and then from the sums.
    __device__ __forceinline__ void hide(int (&scores)[64], int valid) const {
#pragma unroll
        for (int i = 0; i < 64; ++i)
            if (key_of(i) >= valid) scores[i] = -(1 << 22);
    }
    __device__ __forceinline__ void hide(uint32_t (&weights)[16], int valid) const {
#pragma unroll
        for (int word = 0; word < 16; ++word) {
            const int visible = min(max(valid - key_of(word / 2 * 8), 0), 4);
            weights[word] &= visible == 4 ? 0xFFFFFFFFu : (1u << visible * 8) - 1;
        }
    }

    __device__ __forceinline__ void issue_scores(int (&scores)[64]) {
        barrier_wait(shared.key_full(keys.index), keys.phase);
        const uint64_t a = wgmma_operand<128>(shared.query() + consumer * 64 * head_dim);
        const uint64_t b = wgmma_operand<128>(shared.key(keys.index));
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < head_dim / 32; ++step) wgmma<key_tile>(scores, a + step * 2, b + step * 2, step > 0);
        wgmma_commit();
    }
    __device__ __forceinline__ void issue_sums(int (&out)[64], const uint32_t (&weights)[16]) {
        barrier_wait(shared.value_full(values.index), values.phase);
        const uint64_t b = wgmma_operand<128>(shared.value(values.index));
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < key_tile / 32; ++step)
            wgmma_unsigned(out, weights + step * 4, b + step * 2, step > 0);
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

    static __device__ __forceinline__ void row_maxima(const int (&scores)[64], int (&largest)[2]) {
        int parts[2][4];  // chains of their own: a maximum takes several cycles
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            int& part = parts[i / 2 % 2][i / 4 % 2 * 2 + i % 2];
            part = i < 8 ? scores[i] : max(part, scores[i]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half)
            largest[half] = row_maximum(
                max(max(parts[half][0], parts[half][1]), max(parts[half][2], parts[half][3])));
    }
    // Weights of a tile, 255 for its largest score, as the register operand of four products; beside(word) is done after
    // every sixteenth of them.
    template <class Beside>
    __device__ __forceinline__ void weigh(
        const int (&scores)[64], const int (&largest)[2], uint32_t (&weights)[16], Beside beside) const {
        // Rounded down: no weight may exceed 255. The error is the same for all tiles of a row.
        const float shift[2] = {__fmaf_rd(-magic_float, scale[0], log2_of_255),
                                __fmaf_rd(-magic_float, scale[1], log2_of_255)};
        const int raise[2] = {magic - largest[0], magic - largest[1]};
#pragma unroll
        for (int word = 0; word < 16; ++word) {
            const int half = word % 2, first = word / 2 * 8 + half * 2;
            float y[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float score = __int_as_float(scores[first + i / 2 * 4 + i % 2] + raise[half]);
                y[i] = power_of_two(fmaf(score, scale[half], shift[half]));
            }
            weights[word] = pack_bytes<false>(y[0], y[1], y[2], y[3]);
            beside(word);
        }
    }
    __device__ __forceinline__ void add_weights(const uint32_t (&weights)[16]) {
        uint32_t sum[2] = {0, 0};  // at most 255 * 32
#pragma unroll
        for (int word = 0; word < 16; ++word) sum[word % 2] = __dp4a(weights[word], 0x01010101u, sum[word % 2]);
#pragma unroll
        for (int half = 0; half < 2; ++half)
            sums[half] = fmaf(static_cast<float>(int(sum[half])), factor[half], sums[half]);
    }
    __device__ __forceinline__ void add_to_total(int i, const int (&out)[64]) {
        total[i] = fmaf(static_cast<float>(out[i]), factor[i / 2 % 2], total[i]);
    }

    // How far the maxima are above the reference of the total, which moves if that is too much.
    __device__ __forceinline__ void follow(const int (&largest)[2], float (&above)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            above[half] = fmaf(static_cast<float>(largest[half]), scale[half], offset[half]);
        if (__any_sync(0xFFFFFFFF, fmaxf(above[0], above[1]) > slack_bits)) {
            float keep[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float move = fmaxf(above[half], 0.0f);
                keep[half] = power_of_two(-move);
                offset[half] -= move, above[half] -= move, sums[half] *= keep[half], factor[half] *= keep[half];
            }
#pragma unroll
            for (int i = 0; i < channel_sums; ++i) total[i] *= keep[i / 2 % 2];
        }
    }

    // Sums of a tile; scores and weights of the next one.
    __device__ __forceinline__ void next_tile(uint32_t (&weights)[16]) {
        int scores[64], out[64], largest[2];
        await_turn(consumer);
        issue_scores(scores);
        issue_sums(out, weights);
        give_turn(consumer);
        wgmma_wait<1>();
        wgmma_pin(scores);
        release_keys();
        row_maxima(scores, largest);
        float above[2];
        follow(largest, above);  // its branch also keeps the maxima before the wait
        wgmma_wait<0>();
        wgmma_pin(out);
        release_values();
        weigh(scores, largest, weights, [&](int word) {
#pragma unroll
            for (int i = word * 4; i < word * 4 + 4; ++i) add_to_total(i, out);
        });
        factor[0] = power_of_two(above[0]), factor[1] = power_of_two(above[1]);
        add_weights(weights);
    }
};

static __global__ void __launch_bounds__(Int8AttentionShared::Block::threads, 1)
    int8_attention_kernel(const __grid_constant__ AttentionMaps maps, const __grid_constant__ AttentionParameters p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const Int8AttentionShared shared{shared_address(memory)};
    const int role = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) prepare_attention(maps, shared);
    __syncthreads();
    if (role == 0) {
        registers_decrease<40>();
        if (threadIdx.x == 0) produce(maps, p, shared);
        __syncwarp();
    } else {
        registers_increase<232>();
        Int8AttentionConsumer consumer(p, shared);
        while (consumer.run()) continue;
    }
}

}  // namespace qarvd
