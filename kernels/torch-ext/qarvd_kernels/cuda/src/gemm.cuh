// Dual-scale int8 GEMM for Hopper: out[m, n] = epilogue(sum over two groups of input channels).
//
// The first `k1` input channels (the outliers) have scales of their own. Their int32 sum is brought to the scale of the
// rest by one rounding multiplication in registers, between the two groups, and the product continues in the same
// accumulators. Each group has its own tensor maps. TMA fills what lies outside their extent with zeros, so neither group
// has to be a multiple of the K block.
//
// One block computes tiles of 128 or 192 rows, persistently: a producer warp keeps a ring of K blocks filled by TMA
// loads, consumer warpgroups of 64 rows each run the products and their own epilogue, with no barrier between them. Two
// blocks form a cluster and take neighbouring tiles of the list (rows change fastest); where these share their columns,
// each block loads half of the weight tile and multicasts it to both.
//
// A thread's accumulators belong to pairs of columns, 8 apart. The weight rows are therefore loaded in another order, by
// a tensor map of rank 5: of every 32 columns, those that one thread holds are neighbours, and it writes 8 of them at
// once, directly from registers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"
#include "ring.cuh"
#include "wgmma.cuh"

namespace qarvd {

// Output format; int32 is the accumulator itself, int8 is GELU and static quantization.
enum Format : int { bfloat16 = 0, float16 = 1, float32 = 2, int32 = 3, int8 = 4 };
// Output formats that share one kernel.
enum class Output { half_precision, full_precision, gelu_int8 };

struct GemmParameters {
    int m, n;
    int row_tiles, tiles;
    int blocks_outliers, blocks;  // K blocks of group 0, of both groups
    const float *ratio, *scale, *bias;
    const int* row_sums;         // [M, 2] or null
    const float* row_sum_scale;  // [2, N] or null
    const float* row_scale;      // [M] or null
    const void* residual;        // [M, N] in the format of out, or null
    const float* gate;           // [M / gate_rows, N] or null
    int gate_rows;
    const float* out_scale;     // [2], GELU only
    const int* out_zero_point;  // [2], GELU only
    int out_outliers;
    void* out;
    Format format;
};

constexpr int warpgroup = 128, consumer_rows = 64;
constexpr int cluster_blocks = 2, shared_limit = 227 * 1024;
constexpr int group_columns = 32, own_columns = 8;  // columns that are permuted among each other; those of one thread

// A tile of the result, the K block, and what follows from them.
template <int tile_rows, int tile_columns, int block>
struct Layout {
    static constexpr int rows = tile_rows, columns = tile_columns, block_k = block;
    static constexpr int consumers = rows / consumer_rows, threads = (consumers + 1) * warpgroup;
    // Per thread, out of the 64 Ki registers of a multiprocessor.
    static constexpr int producer_registers = consumers == 2 ? 40 : 32, consumer_registers = consumers == 2 ? 232 : 160;
    static_assert((producer_registers + consumers * consumer_registers) * warpgroup <= 65536);

    static constexpr int a_bytes = rows * block_k, stage = a_bytes + columns * block_k;
    static constexpr int line = columns * 4, lines_bytes = 3 * line, lines_buffers = 2;  // ratio, scale, bias
    static constexpr int barriers_bytes = 256, fixed = lines_buffers * lines_bytes + barriers_bytes;
    static constexpr int stages = (shared_limit - fixed) / stage;
    static constexpr int bytes = stages * stage + fixed;
    // The halves of a weight tile that the two blocks of a cluster load.
    static constexpr int left = (columns / 2 + group_columns - 1) / group_columns * group_columns;
    static constexpr int right = columns - left;
    static_assert(stages >= 3 && (2 * stages + 2 * lines_buffers) * 8 <= barriers_bytes);
};

template <typename L>
struct Shared {
    uint32_t base;
    __device__ __forceinline__ uint32_t a(int stage) const { return base + stage * L::stage; }
    __device__ __forceinline__ uint32_t b(int stage) const { return a(stage) + L::a_bytes; }
    __device__ __forceinline__ uint32_t lines(int buffer) const {
        return base + L::stages * L::stage + buffer * L::lines_bytes;
    }
    __device__ __forceinline__ uint32_t barriers() const { return lines(L::lines_buffers); }
    __device__ __forceinline__ uint32_t full(int stage) const { return barriers() + stage * 8; }
    __device__ __forceinline__ uint32_t empty(int stage) const { return full(L::stages + stage); }
    __device__ __forceinline__ uint32_t lines_full(int buffer) const { return full(2 * L::stages + buffer); }
    __device__ __forceinline__ uint32_t lines_empty(int buffer) const {
        return full(2 * L::stages + L::lines_buffers + buffer);
    }
};

struct Maps {
    CUtensorMap a[2], weight[2][2];  // of each group of channels; boxes of either half
};

// The tiles of a block, rows fastest: every turn, a cluster takes two neighbours. One division for all turns.
template <typename L>
class Tiles {
  public:
    int row, column;  // of the tile's first element
    bool shares_columns;

    __device__ __forceinline__ Tiles(const GemmParameters& p)
        : p(p), first(blockIdx.x / cluster_blocks * cluster_blocks), column_tile(first / p.row_tiles),
          row_tile(first % p.row_tiles), column_step(gridDim.x / p.row_tiles), row_step(gridDim.x % p.row_tiles) {}
    __device__ __forceinline__ bool take() {
        if (first >= p.tiles) return false;
        const int rank = cluster_rank();
        const bool last_of_odd = first + 1 == p.tiles;  // its partner computes rows beyond M, which are never stored
        const bool wraps = row_tile + 1 == p.row_tiles && !last_of_odd;
        shares_columns = !wraps;
        row = (rank && wraps ? 0 : row_tile + rank) * L::rows;
        column = (rank && wraps ? column_tile + 1 : column_tile) * L::columns;
        first += gridDim.x, column_tile += column_step, row_tile += row_step;
        if (row_tile >= p.row_tiles) row_tile -= p.row_tiles, ++column_tile;
        return true;
    }

  private:
    const GemmParameters& p;
    int first, column_tile, row_tile;
    const int column_step, row_step;
};

// The producer: one thread.
template <typename L>
__device__ __forceinline__ void produce(const Maps& maps, const GemmParameters& p, Shared<L> shared) {
    const int rank = cluster_rank();
    Ring<L::stages> ring;
    Ring<L::lines_buffers> lines;
    for (Tiles<L> tile(p); tile.take();) {
        barrier_wait(shared.lines_empty(lines.index), lines.phase ^ 1);
        const uint32_t barrier = shared.lines_full(lines.index), target = shared.lines(lines.index);
        const uint32_t bytes = min(L::columns, p.n - tile.column) * 4;
        barrier_expect(barrier, bytes * (p.blocks_outliers ? 3 : 2));
        if (p.blocks_outliers) load_line(target, p.ratio + tile.column, bytes, barrier);
        load_line(target + L::line, p.scale + tile.column, bytes, barrier);
        load_line(target + 2 * L::line, p.bias + tile.column, bytes, barrier);
        lines.advance();

#pragma unroll 1
        for (int block = 0; block < p.blocks; ++block) {
            const int channels = block >= p.blocks_outliers;
            const int k = (channels ? block - p.blocks_outliers : block) * L::block_k;
            const CUtensorMap *left = &maps.weight[channels][0], *right = &maps.weight[channels][1];
            const uint32_t full = shared.full(ring.index), b = shared.b(ring.index);
            const uint32_t b_right = b + L::left * L::block_k;
            const int group = tile.column / group_columns, group_right = group + L::left / group_columns;
            barrier_wait(shared.empty(ring.index), ring.phase ^ 1);
            barrier_expect(full, L::stage);
            load_tile(shared.a(ring.index), &maps.a[channels], k, tile.row, full);
            if (!tile.shares_columns) {
                load_groups(b, left, k, group, full);
                load_groups(b_right, right, k, group_right, full);
            } else if (rank == 0) {
                load_groups_multicast(b, left, k, group, full, (1 << cluster_blocks) - 1);
            } else {
                load_groups_multicast(b_right, right, k, group_right, full, (1 << cluster_blocks) - 1);
            }
            ring.advance();
        }
    }
}

template <int count>
struct Values {
    float of[count];
};

__device__ __forceinline__ Values<own_columns> load_shared(uint32_t address) {
    Values<own_columns> v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.of[0]), "=f"(v.of[1]), "=f"(v.of[2]), "=f"(v.of[3])
                 : "r"(address));
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.of[4]), "=f"(v.of[5]), "=f"(v.of[6]), "=f"(v.of[7])
                 : "r"(address + 16));
    return v;
}

__device__ __forceinline__ Values<own_columns> load_global(const float* pointer) {
    const float4 low = __ldg(reinterpret_cast<const float4*>(pointer));
    const float4 high = __ldg(reinterpret_cast<const float4*>(pointer) + 1);
    return {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
}

// Accumulator of own column `i` (0 to 7) of column group `group`, in the upper (0) or lower (1) of a thread's two rows.
__device__ __forceinline__ constexpr int accumulator(int group, int half, int i) {
    return group * 16 + i / 2 * 4 + half * 2 + i % 2;
}

// acc = rint(float(acc) * ratio[n]), ties to even. All consumers do this at the same time, with idle tensor cores: one
// long block of instructions, because a branch per column group costs more in latencies than the arithmetic, and no
// conversions to integers, which run at an eighth of the rate of additions.
template <int tile_columns>
__device__ __forceinline__ void rescale(int* accumulators, uint32_t ratios) {
    constexpr float round = 12582912.0f, reach = 4194304.0f;  // 1.5 * 2^23; adding it rounds what is below 2^22
    float largest[4] = {};
#pragma unroll
    for (int group = 0; group < tile_columns / group_columns; ++group) {
        const Values<own_columns> ratio = load_shared(ratios + group * group_columns * 4);
#pragma unroll
        for (int i = 0; i < 2 * own_columns; ++i) {
            int& accumulator_bits = accumulators[accumulator(group, i / own_columns, i % own_columns)];
            const float x = __fmul_rn(__int2float_rn(accumulator_bits), ratio.of[i % own_columns]);
            largest[i % 4] = fmaxf(largest[i % 4], fabsf(x));
            accumulator_bits = __float_as_int(x);
        }
    }
    const bool far = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3])) > reach;
    if (__any_sync(0xFFFFFFFF, far)) {
#pragma unroll
        for (int i = 0; i < tile_columns / 2; ++i) accumulators[i] = __float2int_rn(__int_as_float(accumulators[i]));
    } else {
#pragma unroll
        for (int i = 0; i < tile_columns / 2; ++i)
            accumulators[i] =
                __float_as_int(__fadd_rn(__int_as_float(accumulators[i]), round)) - __float_as_int(round);
    }
}

__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_approximate(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// gelu(x) = x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)) of two values with one division; tanh.approx is too coarse.
__device__ __forceinline__ void gelu_tanh(float& x, float& y) {
    constexpr float linear = 2.3022082f, cubic = linear * 0.044715f;  // in powers of two
    // The bound keeps the product of both denominators finite; 2^-62 is zero at any output scale.
    const float u = 1.0f + exp2_approximate(fminf(-x * fmaf(cubic * x, x, linear), 62.0f));
    const float v = 1.0f + exp2_approximate(fminf(-y * fmaf(cubic * y, y, linear), 62.0f));
    const float inverse = reciprocal_approximate(u * v);
    x *= v * inverse;
    y *= u * inverse;
}

// An int8 code in the low byte: value * inverse_scale + zero_point, both divided by 255, is cut to [0, 1] by the
// instruction itself. Adding 1.5 * 2^23 rounds to an integer and leaves it there.
__device__ __forceinline__ uint32_t quantize(float value, float inverse_scale, float zero_point) {
    return __float_as_uint(fmaf(__saturatef(fmaf(value, inverse_scale, zero_point)), 255.0f, 12582912.0f - 128.0f));
}

template <Format format>
__device__ __forceinline__ uint32_t pack_half(float x, float y) {
    if constexpr (format == Format::bfloat16) {
        const __nv_bfloat162 packed = __floats2bfloat162_rn(x, y);
        return reinterpret_cast<const uint32_t&>(packed);
    }
    const __half2 packed = __floats2half2_rn(x, y);
    return reinterpret_cast<const uint32_t&>(packed);
}

template <Format format>
__device__ __forceinline__ float2 unpack_half(uint32_t packed) {
    if constexpr (format == Format::bfloat16)
        return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(packed));
    return __half22float2(reinterpret_cast<const __half2&>(packed));
}

// Terms that few calls need: the remainder of the zero-points of asymmetric weights (row sum times column scale, for
// each group), a gate per column and a residual.
template <Format format>
__device__ __forceinline__ void finish_extras(const GemmParameters& p, Values<own_columns>& y, int row, int column) {
    if (p.row_sums != nullptr) {
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            const float sum = __int2float_rn(__ldg(p.row_sums + row * 2 + group));
            const Values<own_columns> scale = load_global(p.row_sum_scale + group * p.n + column);
#pragma unroll
            for (int i = 0; i < own_columns; ++i) y.of[i] = fmaf(-sum, scale.of[i], y.of[i]);
        }
    }
    if constexpr (format != Format::int8) {
        if (p.residual == nullptr) return;
        if (p.gate != nullptr) {
            const long long place = static_cast<long long>(row / p.gate_rows) * p.n + column;
            const Values<own_columns> gate = load_global(p.gate + place);
#pragma unroll
            for (int i = 0; i < own_columns; ++i) y.of[i] *= gate.of[i];
        }
        const long long place = static_cast<long long>(row) * p.n + column;
        if constexpr (format == Format::float32) {
            const Values<own_columns> residual = load_global(static_cast<const float*>(p.residual) + place);
#pragma unroll
            for (int i = 0; i < own_columns; ++i) y.of[i] += residual.of[i];
        } else {
            const uint4 words = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.residual) + place));
            const uint32_t packed[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int i = 0; i < own_columns; i += 2) {
                const float2 residual = unpack_half<format>(packed[i / 2]);
                y.of[i] += residual.x, y.of[i + 1] += residual.y;
            }
        }
    }
}

// Registers to global memory. Thread `lane` holds columns 8 (lane % 4) to + 7 of every 32, of two rows.
template <int tile_columns, Format format, bool extras>
__device__ __forceinline__ void store(
    const GemmParameters& p, const int* accumulators, uint32_t scales, int row, int column, float2 row_scale) {
    float2 inverse_scale, zero_point;  // of the two output groups
    if constexpr (format == Format::int8) {
        constexpr float levels = 1.0f / 255.0f;
        inverse_scale = make_float2(levels / __ldg(p.out_scale), levels / __ldg(p.out_scale + 1));
        zero_point = make_float2(levels * __ldg(p.out_zero_point), levels * __ldg(p.out_zero_point + 1));
    }
#pragma unroll
    for (int group = 0; group < tile_columns / group_columns; ++group) {
        const int at = group * group_columns;
        const bool inside = column + at < p.n;  // no branch: loads of the next columns shall overtake stores of these
        if (extras && !inside) break;
        const Values<own_columns> scale = load_shared(scales + at * 4);
        const Values<own_columns> bias = load_shared(scales + (tile_columns + at) * 4);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int own_row = row + half * 8;
            const long long place = static_cast<long long>(own_row) * p.n + column + at;
            if constexpr (format == Format::int32) {
                if (own_row >= p.m || !inside) continue;
                int4* out = reinterpret_cast<int4*>(static_cast<int*>(p.out) + place);
#pragma unroll
                for (int i = 0; i < own_columns; i += 4)
                    out[i / 4] = make_int4(
                        accumulators[accumulator(group, half, i)], accumulators[accumulator(group, half, i + 1)],
                        accumulators[accumulator(group, half, i + 2)], accumulators[accumulator(group, half, i + 3)]);
            } else {
                Values<own_columns> y;
                const float factor = half ? row_scale.y : row_scale.x;  // 1 changes nothing
#pragma unroll
                for (int i = 0; i < own_columns; ++i) {
                    const float sum = __int2float_rn(accumulators[accumulator(group, half, i)]);
                    y.of[i] = fmaf(__fmul_rn(sum, factor), scale.of[i], bias.of[i]);
                }
                if constexpr (extras)
                    if (own_row < p.m) finish_extras<format>(p, y, own_row, column + at);
                if constexpr (format == Format::float32) {
                    if (own_row >= p.m || !inside) continue;
                    float4* out = reinterpret_cast<float4*>(static_cast<float*>(p.out) + place);
                    out[0] = make_float4(y.of[0], y.of[1], y.of[2], y.of[3]);
                    out[1] = make_float4(y.of[4], y.of[5], y.of[6], y.of[7]);
                } else if constexpr (format == Format::int8) {
                    const bool normal = column + at >= p.out_outliers;  // a multiple of 8, like the columns of a thread
                    const float inverse = normal ? inverse_scale.y : inverse_scale.x;
                    const float zero = normal ? zero_point.y : zero_point.x;
                    uint32_t codes[own_columns];
#pragma unroll
                    for (int i = 0; i < own_columns; i += 2) {
                        gelu_tanh(y.of[i], y.of[i + 1]);
                        codes[i] = quantize(y.of[i], inverse, zero);
                        codes[i + 1] = quantize(y.of[i + 1], inverse, zero);
                        codes[i / 2] = __byte_perm(codes[i], codes[i + 1], 0x0040);
                    }
                    const uint2 packed =
                        make_uint2(__byte_perm(codes[0], codes[1], 0x5410), __byte_perm(codes[2], codes[3], 0x5410));
                    if (own_row < p.m && inside)
                        *reinterpret_cast<uint2*>(static_cast<int8_t*>(p.out) + place) = packed;
                } else {
                    const uint4 packed =
                        make_uint4(pack_half<format>(y.of[0], y.of[1]), pack_half<format>(y.of[2], y.of[3]),
                                   pack_half<format>(y.of[4], y.of[5]), pack_half<format>(y.of[6], y.of[7]));
                    if (own_row < p.m && inside)
                        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.out) + place) = packed;
                }
            }
        }
    }
}

// One branch selects code for each format: a test for each element would cost as much as the arithmetic.
template <int tile_columns, Output output, bool extras, typename... Arguments>
__device__ __forceinline__ void store_format(const GemmParameters& p, Arguments... arguments) {
    if constexpr (output == Output::gelu_int8) {
        store<tile_columns, Format::int8, extras>(p, arguments...);
    } else if constexpr (output == Output::full_precision) {
        if (p.format == Format::float32)
            store<tile_columns, Format::float32, extras>(p, arguments...);
        else
            store<tile_columns, Format::int32, false>(p, arguments...);
    } else {
        if (p.format == Format::bfloat16)
            store<tile_columns, Format::bfloat16, extras>(p, arguments...);
        else
            store<tile_columns, Format::float16, extras>(p, arguments...);
    }
}

// One consumer warpgroup: 64 rows of the tile.
template <typename L, Output output>
__device__ __forceinline__ void consume(const GemmParameters& p, Shared<L> shared) {
    constexpr int tile_columns = L::columns, block_k = L::block_k;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int consumer = threadIdx.x / warpgroup - 1;
    const uint32_t own_rows = consumer * consumer_rows * block_k;
    Ring<L::stages> ring;
    Ring<L::lines_buffers> lines;
    int accumulators[tile_columns / 2];
    for (Tiles<L> tile(p); tile.take();) {
        const int row = tile.row + consumer * consumer_rows + warp * 16 + lane / 4;
        float2 row_scale = make_float2(1.0f, 1.0f);  // read before the products, which hide the latency
        if (p.row_scale != nullptr)
            row_scale = make_float2(__ldg(p.row_scale + min(row, p.m - 1)), __ldg(p.row_scale + min(row + 8, p.m - 1)));
        const uint32_t own_lines = shared.lines(lines.index) + lane % 4 * own_columns * 4;
        int held = -1;  // buffer of the ring that the product in flight reads
        auto release = [&] {
            if (held >= 0 && lane < cluster_blocks) barrier_arrive_remote(shared.empty(held), lane);
        };
        auto run = [&](int begin, int end) {
            for (int block = begin; block < end; ++block) {
                barrier_wait(shared.full(ring.index), ring.phase);
                const uint64_t a = wgmma_operand<block_k>(shared.a(ring.index) + own_rows);
                const uint64_t b = wgmma_operand<block_k>(shared.b(ring.index));
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < block_k / 32; ++step)
                    wgmma<tile_columns>(accumulators, a + step * 2, b + step * 2, block > 0 || step > 0);
                wgmma_commit();
                wgmma_wait<1>();
                release();
                held = ring.index;
                ring.advance();
            }
            wgmma_wait<0>();
            wgmma_pin<0, tile_columns / 2>(accumulators);
            release();
            held = -1;
        };

        if (p.blocks_outliers) {
            run(0, p.blocks_outliers);
            barrier_wait(shared.lines_full(lines.index), lines.phase);
            rescale<tile_columns>(accumulators, own_lines);
            wgmma_pin<0, tile_columns / 2>(accumulators);
        }
        if (p.blocks_outliers < p.blocks) run(p.blocks_outliers, p.blocks);
        if (p.blocks_outliers == 0) barrier_wait(shared.lines_full(lines.index), lines.phase);

        const int column = tile.column + lane % 4 * own_columns;
        if (p.row_sums == nullptr && p.residual == nullptr)
            store_format<tile_columns, output, false>(p, accumulators, own_lines + L::line, row, column, row_scale);
        else
            store_format<tile_columns, output, true>(p, accumulators, own_lines + L::line, row, column, row_scale);
        barrier_arrive(shared.lines_empty(lines.index));
        lines.advance();
    }
}

template <typename L, Output output>
__global__ void __cluster_dims__(cluster_blocks, 1, 1) __launch_bounds__(L::threads, 1)
    gemm_kernel(const __grid_constant__ Maps maps, const __grid_constant__ GemmParameters p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const Shared<L> shared{shared_address(memory)};
    const int role = __shfl_sync(0xFFFFFFFF, threadIdx.x / warpgroup, 0);
    if (threadIdx.x == 0) {
        if (shared.base % 1024) __trap();  // required by the swizzles
        for (int group = 0; group < 2; ++group) {
            prefetch_map(&maps.a[group]);
            prefetch_map(&maps.weight[group][0]);
            prefetch_map(&maps.weight[group][1]);
        }
        for (int stage = 0; stage < L::stages; ++stage) {
            barrier_init(shared.full(stage), 1);
            barrier_init(shared.empty(stage), L::consumers * 4 * cluster_blocks);
        }
        for (int buffer = 0; buffer < L::lines_buffers; ++buffer) {
            barrier_init(shared.lines_full(buffer), 1);
            barrier_init(shared.lines_empty(buffer), L::consumers * warpgroup);  // every thread reads them
        }
        barrier_init_fence();
    }
    cluster_sync();
    allow_next_kernel();
    await_last_kernel();

    if (role == 0) {
        registers_decrease<L::producer_registers>();
        if (threadIdx.x == 0) produce(maps, p, shared);
        __syncwarp();
    } else {
        registers_increase<L::consumer_registers>();
        consume<L, output>(p, shared);
        __syncwarp();
    }
    cluster_sync();  // a block must not leave while its partner still signals its barriers
}

}  // namespace qarvd
