// Rows of activations to int8 codes: gated residual sum, LayerNorm, modulation, quantization; static in stored channel
// order, or with a scale of each row after channels were scaled and blocks of 128 of them rotated.
//
// A block takes neighbouring rows that share their tables, and its threads eight channels each: the data of a channel
// (gate, scale, shift, place in the stored order) are read once and stay in registers. Statistics are merged pairwise
// (Chan, Golub, LeVeque 1979), so that one pass over a row gives the variance about its mean. The permutation goes through
// shared memory byte by byte, after quantization; stored order is nearly ascending, so the bytes of a warp are neighbours.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <type_traits>

#include "launch.h"
#include "ptx.cuh"

namespace {

using namespace qarvd;

constexpr int own = 8, warp = 32, most_warps = 20;  // channels of a thread
constexpr int warp_channels = own * warp, turn = 2;  // rows in flight
constexpr int rotation_channels = 128;               // of a block of the rotation
constexpr float rotation_factor = 0.08838834764831845f;  // 128^-0.5
constexpr float magic = 12582912.0f;                 // 1.5 * 2^23; adding it rounds and leaves the integer in the low bits

struct Parameters {
    const void *x, *y;  // [rows, channels]; y only for a sum
    const float *gate, *weight, *bias, *scale, *shift;  // null, or [channels], or a row of channels per group of rows
    const int* order;
    const float* input_scale;
    const int* input_zero_point;
    const float* channel_scale;  // of rows with a scale of their own; order and input quantizer otherwise
    void* total;
    int8_t* codes;
    float* row_scale;
    int channels, outliers, rotation, rows_per_gate, rows_per_scale;
    int segment_rows, segment_blocks, block_rows;  // rows with the same tables; blocks that share them; rows of a block
    float eps;
};

enum class Kind { quantize, norm, add_norm };

__device__ __forceinline__ float2 unpack(uint32_t word, __nv_bfloat16) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000));
}
__device__ __forceinline__ float2 unpack(uint32_t word, __half) {
    return __half22float2(reinterpret_cast<const __half2&>(word));
}
__device__ __forceinline__ uint32_t pack(float x, float y, __nv_bfloat16) {
    const __nv_bfloat162 packed = __floats2bfloat162_rn(x, y);
    return reinterpret_cast<const uint32_t&>(packed);
}
__device__ __forceinline__ uint32_t pack(float x, float y, __half) {
    const __half2 packed = __floats2half2_rn(x, y);
    return reinterpret_cast<const uint32_t&>(packed);
}

template <typename T>
__device__ __forceinline__ void unpack(const uint4& words, float* values) {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < own; i += 2) {
        const float2 pair = unpack(word[i / 2], T());
        values[i] = pair.x, values[i + 1] = pair.y;
    }
}

__device__ __forceinline__ void load_table(const float* table, float* values) {
    const float4 low = __ldcg(reinterpret_cast<const float4*>(table));
    const float4 high = __ldcg(reinterpret_cast<const float4*>(table) + 1);
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

// Place of each of a thread's channels in the stored order, two to a word. Clamped: an order that is no permutation gives
// wrong codes, and no access outside of the row.
__device__ __forceinline__ void find_places(const int* order, int first, int channels, unsigned char* memory,
                                            uint32_t* places) {
    const uint32_t last = channels - 1, last_pair = last << 16 | last;
    uint16_t* inverse = reinterpret_cast<uint16_t*>(memory);
    const int4 low = __ldg(reinterpret_cast<const int4*>(order + first));
    const int4 high = __ldg(reinterpret_cast<const int4*>(order + first) + 1);
    const int channel[own] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < own; ++i) inverse[min(static_cast<uint32_t>(channel[i]), last)] = static_cast<uint16_t>(first + i);
    __syncthreads();
    const uint4 words = *reinterpret_cast<const uint4*>(inverse + first);
    places[0] = __vminu2(words.x, last_pair), places[1] = __vminu2(words.y, last_pair);
    places[2] = __vminu2(words.z, last_pair), places[3] = __vminu2(words.w, last_pair);
    __syncthreads();
}

__device__ __forceinline__ int place(const uint32_t* places, int i) {
    return i % 2 ? places[i / 2] >> 16 : places[i / 2] & 0xFFFF;
}

// Mean and sum of squares about it, of one warp's part of a row.
__device__ __forceinline__ float2 statistics(const float* values) {
    float mean = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < own; ++i) mean += values[i];
    mean *= 1.0f / own;
#pragma unroll
    for (int i = 0; i < own; ++i) squares = fmaf(values[i] - mean, values[i] - mean, squares);
    float half_count = own / 2;
#pragma unroll
    for (int distance = 1; distance < warp; distance *= 2, half_count *= 2) {
        const float other = __shfl_xor_sync(0xFFFFFFFF, mean, distance), difference = other - mean;
        squares += __shfl_xor_sync(0xFFFFFFFF, squares, distance) + difference * difference * half_count;
        mean = (mean + other) * 0.5f;
    }
    return make_float2(mean, squares);
}

// Mean and 1 / deviation of a row, from those of its warps.
__device__ __forceinline__ float2 merge(const float2* parts, int warps, float eps) {
    float mean = 0.0f, squares = 0.0f;
    for (int i = 0; i < warps; ++i) mean += parts[i].x;
    mean /= warps;
    for (int i = 0; i < warps; ++i) {
        const float difference = parts[i].x - mean;
        squares += parts[i].y + difference * difference * warp_channels;
    }
    return make_float2(mean, rsqrtf(squares / (warps * warp_channels) + eps));
}

// What a norm multiplies and adds to a thread's channels.
template <Kind kind>
struct Modulation {
    float factor[own], offset[own];

    __device__ __forceinline__ Modulation(const Parameters& p, int first, int scale_row) {
#pragma unroll
        for (int i = 0; i < own; ++i) factor[i] = 1.0f, offset[i] = 0.0f;
        if (p.weight != nullptr) {
            load_table(p.weight + first, factor);
            load_table(p.bias + first, offset);
        }
        if (p.scale != nullptr) {
            float a[own], b[own];
            load_table(p.scale + static_cast<long long>(scale_row) * p.channels + first, a);
            load_table(p.shift + static_cast<long long>(scale_row) * p.channels + first, b);
#pragma unroll
            for (int i = 0; i < own; ++i) {
                factor[i] *= 1.0f + a[i];
                offset[i] = fmaf(offset[i], 1.0f + a[i], b[i]);
            }
        }
    }
};

// code = clamp(value * factor + offset) for normed values, which never lie exactly between two codes; plain values are
// rounded before the zero-point is added, as in the reference.
template <Kind kind>
struct Codes : Modulation<kind> {
    using Modulation<kind>::factor, Modulation<kind>::offset;

    __device__ __forceinline__ Codes(const Parameters& p, int first, int scale_row, const uint32_t* places)
        : Modulation<kind>(p, first, scale_row) {
        float inverse[own], zero[own];
#pragma unroll
        for (int i = 0; i < own; ++i) {
            const bool normal = place(places, i) >= p.outliers;
            inverse[i] = 1.0f / __ldg(p.input_scale + normal);
            zero[i] = static_cast<float>(__ldg(p.input_zero_point + normal));
        }
#pragma unroll
        for (int i = 0; i < own; ++i) {
            factor[i] *= inverse[i];
            offset[i] = kind == Kind::quantize ? zero[i] : fmaf(offset[i], inverse[i], zero[i] - 128.0f);
        }
    }

    // The code minus 128, in the low byte.
    __device__ __forceinline__ uint32_t of(float value, int i, float deviation_inverse) const {
        if constexpr (kind == Kind::quantize) {
            const float low = -offset[i], level = fminf(fmaxf(value * factor[i], low), 255.0f + low);
            return __float_as_uint(__fadd_rn(level, magic)) + static_cast<int>(offset[i]) - 128;
        }
        const float level = fmaf(value, deviation_inverse * factor[i], offset[i]);
        return __float_as_uint(fminf(fmaxf(level, -128.0f), 127.0f) + magic);
    }
};

// Values that get a scale of their row: value * factor + offset of scaled channels, then rotated.
template <Kind kind>
struct RowValues : Modulation<kind> {
    using Modulation<kind>::factor, Modulation<kind>::offset;
    const bool rotated;

    __device__ __forceinline__ RowValues(const Parameters& p, int first, int scale_row)
        : Modulation<kind>(p, first, scale_row), rotated(p.rotation > 1) {
        float scale[own];
        load_table(p.channel_scale + first, scale);
#pragma unroll
        for (int i = 0; i < own; ++i) factor[i] *= scale[i], offset[i] *= scale[i];
    }

    // Replaces a thread's values less the mean of the row. The rotation lacks its factor 128^-0.5. Returns the largest
    // magnitude of the warp's values.
    __device__ __forceinline__ float apply(float (&values)[own], float deviation_inverse) const {
#pragma unroll
        for (int i = 0; i < own; ++i) values[i] = fmaf(values[i] * deviation_inverse, factor[i], offset[i]);
        if (rotated) {
#pragma unroll
            for (int half = 1; half < own; half *= 2) {
#pragma unroll
                for (int i = 0; i < own; ++i)
                    if (!(i & half)) {
                        const float a = values[i], b = values[i + half];
                        values[i] = a + b, values[i + half] = a - b;
                    }
            }
#pragma unroll
            for (int distance = 1; distance < rotation_channels / own; distance *= 2) {
                const float sign = threadIdx.x & distance ? -1.0f : 1.0f;
#pragma unroll
                for (int i = 0; i < own; ++i)
                    values[i] = fmaf(sign, values[i], __shfl_xor_sync(0xFFFFFFFF, values[i], distance));
            }
        }
        float largest = 0.0f;
#pragma unroll
        for (int i = 0; i < own; ++i) largest = fmaxf(largest, fabsf(values[i]));
#pragma unroll
        for (int distance = 1; distance < warp; distance *= 2)
            largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFF, largest, distance));
        return largest;
    }
};

// The codes of a thread, of values whose row reaches `largest`.
__device__ __forceinline__ uint2 row_codes(const float (&values)[own], float largest) {
    const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    uint32_t packed[2] = {};
#pragma unroll
    for (int i = 0; i < own; ++i)
        packed[i / 4] |= (__float_as_uint(fmaf(values[i], inverse, magic)) & 0xFF) << i % 4 * 8;
    return make_uint2(packed[0], packed[1]);
}

template <typename T, Kind kind, bool per_row>
__global__ void __launch_bounds__(most_warps* warp) rows_kernel(const Parameters p) {
    extern __shared__ __align__(16) unsigned char memory[];  // codes of a turn; at first the inverse order
    __shared__ float2 parts[turn][most_warps];
    __shared__ float maxima[turn][most_warps];
    const int first = threadIdx.x * own, warps = blockDim.x / warp, own_warp = threadIdx.x / warp;
    const int segment = blockIdx.x / p.segment_blocks, block = blockIdx.x % p.segment_blocks;
    const int begin = segment * p.segment_rows + block * p.block_rows;
    const int end = min(begin + p.block_rows, (segment + 1) * p.segment_rows);
    allow_next_kernel();
    uint32_t places[own / 2];
    if constexpr (!per_row) find_places(p.order, first, p.channels, memory, places);
    await_last_kernel();

    auto at = [&](int row) { return static_cast<long long>(row) * p.channels + first; };
    uint4 x[turn], y[turn];
    auto fetch = [&](int row) {
#pragma unroll
        for (int r = 0; r < turn; ++r) {
            const long long place = at(min(row + r, end - 1));
            x[r] = __ldcg(reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) + place));
            if constexpr (kind == Kind::add_norm)
                y[r] = __ldcg(reinterpret_cast<const uint4*>(static_cast<const T*>(p.y) + place));
        }
    };
    fetch(begin);
    const int scale_row = p.scale != nullptr ? begin / p.rows_per_scale : 0;
    auto quantizer = [&] {
        if constexpr (per_row)
            return RowValues<kind>(p, first, scale_row);
        else
            return Codes<kind>(p, first, scale_row, places);
    }();
    float gate[own];
    if constexpr (kind == Kind::add_norm) {
#pragma unroll
        for (int i = 0; i < own; ++i) gate[i] = 1.0f;
        if (p.gate != nullptr)
            load_table(p.gate + static_cast<long long>(begin / p.rows_per_gate) * p.channels + first, gate);
    }
    for (int row = begin; row < end; row += turn) {
        float values[turn][own];
#pragma unroll
        for (int r = 0; r < turn; ++r) {
            unpack<T>(x[r], values[r]);
            if constexpr (kind == Kind::add_norm) {
                float added[own];
                unpack<T>(y[r], added);
#pragma unroll
                for (int i = 0; i < own; ++i) values[r][i] = fmaf(gate[i], added[i], values[r][i]);
                const uint4 sum =
                    make_uint4(pack(values[r][0], values[r][1], T()), pack(values[r][2], values[r][3], T()),
                               pack(values[r][4], values[r][5], T()), pack(values[r][6], values[r][7], T()));
                if (row + r < end) *reinterpret_cast<uint4*>(static_cast<T*>(p.total) + at(row + r)) = sum;
            }
        }
        if (row + turn < end) fetch(row + turn);
        if constexpr (kind != Kind::quantize) {
#pragma unroll
            for (int r = 0; r < turn; ++r) {
                const float2 part = statistics(values[r]);
                if (threadIdx.x % warp == 0) parts[r][own_warp] = part;
            }
            __syncthreads();
        }
#pragma unroll
        for (int r = 0; r < turn; ++r) {
            float2 row_statistics = make_float2(0.0f, 1.0f);
            if constexpr (kind != Kind::quantize) row_statistics = merge(parts[r], warps, p.eps);
            if constexpr (per_row) {
#pragma unroll
                for (int i = 0; i < own; ++i) values[r][i] -= row_statistics.x;
                const float largest = quantizer.apply(values[r], row_statistics.y);
                if (threadIdx.x % warp == 0) maxima[r][own_warp] = largest;
            } else {
                unsigned char* target = memory + r * p.channels;
#pragma unroll
                for (int i = 0; i < own; ++i)
                    target[place(places, i)] = static_cast<unsigned char>(
                        quantizer.of(values[r][i] - row_statistics.x, i, row_statistics.y));
            }
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < turn; ++r) {
            uint2 packed;
            if constexpr (per_row) {
                float largest = 0.0f;
                for (int i = 0; i < warps; ++i) largest = fmaxf(largest, maxima[r][i]);
                packed = row_codes(values[r], largest);
                const float step = largest * ((quantizer.rotated ? rotation_factor : 1.0f) / 127.0f);
                if (threadIdx.x == 0 && row + r < end) p.row_scale[row + r] = largest > 0.0f ? step : 1.0f;
            } else {
                packed = *reinterpret_cast<const uint2*>(memory + r * p.channels + first);
            }
            if (row + r < end) *reinterpret_cast<uint2*>(p.codes + at(row + r)) = packed;
        }
        if constexpr (kind == Kind::quantize) __syncthreads();  // the next turn writes where this one still reads
    }
}

constexpr int widths = most_warps + 1;

// Blocks of a width that run at once, so that one wave of them covers all rows.
template <typename T, Kind kind, bool per_row>
int room(int device, int channels) {
    static std::atomic<int> known[devices_limit][widths];
    std::atomic<int>& blocks = known[device][channels / warp_channels];
    if (blocks.load() == 0) {
        int processors = 0, each = 0;
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, rows_kernel<T, kind, per_row>, channels / own, per_row ? 0 : turn * channels);
        blocks = max(1, processors * each);
    }
    return blocks;
}

template <typename T, Kind kind, bool per_row>
cudaError_t launch(Parameters p, int rows, int device, cudaStream_t stream) {
    const int wanted = room<T, kind, per_row>(device, p.channels), fair = (rows + wanted - 1) / wanted;
    p.block_rows = min((fair + turn - 1) / turn * turn, p.segment_rows);
    p.segment_blocks = (p.segment_rows + p.block_rows - 1) / p.block_rows;
    const int blocks = rows / p.segment_rows * p.segment_blocks;
    const int shared = per_row ? 0 : turn * p.channels;
    return launch_early(rows_kernel<T, kind, per_row>, blocks, p.channels / own, shared, stream, p);
}

int greatest_common_divisor(int a, int b) {
    while (b) {
        const int rest = a % b;
        a = b, b = rest;
    }
    return a;
}

}  // namespace

// Returns 0 or a CUDA error. x, y, total [rows, channels] bfloat16 (half = 0) or float16 (half = 1); codes int8 of the
// same shape. Without eps >= 0 nothing is normed; without y nothing is added. With channel_scale [channels] every row gets
// a scale of its own, row_scale [rows], after a rotation of blocks of 128 channels (or of 1), and order and input quantizer
// are not read. `channels` is a multiple of 256, at most 5120.
extern "C" int qarvd_rows(const void* x, const void* y, const float* gate, const float* weight, const float* bias,
                          const float* scale, const float* shift, const int* order, const float* input_scale,
                          const int* input_zero_point, const float* channel_scale, void* total, void* codes,
                          float* row_scale, int rows, int channels, int outliers, int rotation, int rows_per_gate,
                          int rows_per_scale, float eps, int half, int device, void* stream) {
    if (device < 0 || device >= devices_limit) return cudaErrorInvalidDevice;
    const OnDevice current(device);
    if (current.error != cudaSuccess) return current.error;
    Parameters p{x, y, gate, weight, bias, scale, shift, order, input_scale, input_zero_point, channel_scale, total,
                 static_cast<int8_t*>(codes), row_scale, channels, outliers, rotation, rows_per_gate, rows_per_scale};
    p.eps = eps;
    p.segment_rows = greatest_common_divisor(gate ? rows_per_gate : rows, scale ? rows_per_scale : rows);
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    auto run = [&](auto type, auto per_row) {
        using T = decltype(type);
        constexpr bool own_scale = decltype(per_row)::value;
        if (eps < 0) return launch<T, Kind::quantize, own_scale>(p, rows, device, queue);
        return y ? launch<T, Kind::add_norm, own_scale>(p, rows, device, queue)
                 : launch<T, Kind::norm, own_scale>(p, rows, device, queue);
    };
    auto choose = [&](auto type) {
        return channel_scale ? run(type, std::true_type()) : run(type, std::false_type());
    };
    return half ? choose(__half()) : choose(__nv_bfloat16());
}
