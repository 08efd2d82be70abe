// A linear layer of few rows: out [T, outs] = x [T, IN] W^T, W [outs, IN] read once, at the pace of memory. Compiled by
// NVRTC; numbers.cuh is put before it.
//
// A block makes 16 outputs of all rows: each of its warps takes a part of the sum, in tensor cores, and the parts are
// added in the order of the warps. So a row's outputs do not depend on how many rows there are.
//
// Macros: STORE 16 or 17; IN, a multiple of 8; TILES of 8 rows of x; WARPS; and what is done on the way:
//   NORM      x is normalized (root mean square over IN, times `norm`) before it is multiplied
//   BIAS      `bias` [outs] is added
//   RESIDUAL  `residual` [T, outs] is added
//   GATE      W is gates above, then ups: out = silu(gate) * up, half as many outputs as rows of W

typedef unsigned long long size;

#define STEPS ((IN + 31) / 32)
#define MY_STEPS ((STEPS + WARPS - 1) / WARPS)

__device__ inline void multiply(float* sum, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
#if STORE == 16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 8 numbers of a row from `k` on; nothing where there is no such row or number
__device__ inline uint4 pack_of(const store* row, unsigned k, bool there) {
    return there && k < IN ? *reinterpret_cast<const uint4*>(row + k) : make_uint4(0, 0, 0, 0);
}
__device__ inline uint4 stream_of(const store* row, unsigned k, bool there) {
    return there && k < IN ? __ldcs(reinterpret_cast<const uint4*>(row + k)) : make_uint4(0, 0, 0, 0);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) product(
    const store* x, const store* weight, const store* bias, const store* norm, const store* residual, store* out,
    unsigned rows, unsigned outs, float eps)
{
    // Of a tile of 16 x 8, a lane has outputs `line` and `line + 8` of rows 2 * quad and 2 * quad + 1, and in a step of
    // 32 numbers those from 8 * quad on: which of them meet in one multiplication does not matter, as long as both
    // sides agree.
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, line = lane / 4, quad = lane % 4;
#if GATE
    unsigned first = blockIdx.x * 8 + line, second = outs + first;
    bool has_first = first < outs, has_second = has_first;
#else
    unsigned first = blockIdx.x * 16 + line, second = first + 8;
    bool has_first = first < outs, has_second = second < outs;
#endif
    const store *upper = weight + (size)first * IN, *lower = weight + (size)second * IN;
    unsigned begin = warp * MY_STEPS * 32 + quad * 8;
    float sums[TILES][4];
    for (int t = 0; t < TILES; t++)
        for (int i = 0; i < 4; i++) sums[t][i] = 0;
    __shared__ float parts[WARPS][TILES][32][4];

#if NORM
    uint4 normed[MY_STEPS][TILES];
    __shared__ float squares[WARPS][TILES * 8];
    for (int t = 0; t < TILES; t++) {
        unsigned row = t * 8 + line;
        float sum = 0;
#pragma unroll
        for (int step = 0; step < MY_STEPS; step++) {
            normed[step][t] = pack_of(x + (size)row * IN, begin + step * 32, row < rows);
            const store* numbers = reinterpret_cast<const store*>(&normed[step][t]);
#pragma unroll
            for (int j = 0; j < 8; j++) sum += load(numbers[j]) * load(numbers[j]);
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (quad == 0) squares[warp][t * 8 + line] = sum;
    }
    __syncthreads();
    for (int t = 0; t < TILES; t++) {
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += squares[w][t * 8 + line];
        float scale = rsqrtf(sum / IN + eps);
#pragma unroll
        for (int step = 0; step < MY_STEPS; step++) {
            uint4 factors = pack_of(norm, begin + step * 32, true);
            store* numbers = reinterpret_cast<store*>(&normed[step][t]);
            const store* factor = reinterpret_cast<const store*>(&factors);
#pragma unroll
            for (int j = 0; j < 8; j++)
                numbers[j] = narrow(load(narrow(load(numbers[j]) * scale)) * load(factor[j]));
        }
    }
#endif

#if NORM
#pragma unroll
#else
#pragma unroll 8
#endif
    for (int step = 0; step < MY_STEPS; step++) {
        unsigned k = begin + step * 32;
        uint4 a = stream_of(upper, k, has_first), b = stream_of(lower, k, has_second);
        for (int t = 0; t < TILES; t++) {
#if NORM
            uint4 c = normed[step][t];
#else
            unsigned row = t * 8 + line;
            uint4 c = pack_of(x + (size)row * IN, k, row < rows);
#endif
            multiply(sums[t], a.x, b.x, a.y, b.y, c.x, c.y);
            multiply(sums[t], a.z, b.z, a.w, b.w, c.z, c.w);
        }
    }
    for (int t = 0; t < TILES; t++)
        for (int i = 0; i < 4; i++) parts[warp][t][lane][i] = sums[t][i];
    __syncthreads();
    if (warp >= TILES) return;
    float sum[4] = {0, 0, 0, 0};
    for (int w = 0; w < WARPS; w++)
        for (int i = 0; i < 4; i++) sum[i] += parts[w][warp][lane][i];
#if BIAS
    if (has_first) sum[0] += load(bias[first]), sum[1] += load(bias[first]);
    if (has_second) sum[2] += load(bias[second]), sum[3] += load(bias[second]);
#endif
    for (int i = 0; i < 2; i++) {
        unsigned row = warp * 8 + quad * 2 + i;
        if (row >= rows) continue;
        store* to = out + (size)row * outs;
#if GATE
        float gate = load(narrow(sum[i])), up = load(narrow(sum[2 + i]));
        if (has_first) to[first] = narrow(load(narrow(gate / (1 + __expf(-gate)))) * up);
#elif RESIDUAL
        const store* from = residual + (size)row * outs;
        if (has_first) to[first] = narrow(load(from[first]) + load(narrow(sum[i])));
        if (has_second) to[second] = narrow(load(from[second]) + load(narrow(sum[2 + i])));
#else
        if (has_first) to[first] = narrow(sum[i]);
        if (has_second) to[second] = narrow(sum[2 + i]);
#endif
    }
}
