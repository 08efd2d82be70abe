// A linear layer of few rows: out [T, outs] = x [T, IN] W^T, W [outs, IN] read once, at the pace of memory. Compiled by
// NVRTC; numbers.cuh, mma.cuh and packs.cuh are put before it.
//
// A block makes BANDS x 16 outputs of all rows: each of its warps takes a part of the sum, in tensor cores, and the parts
// are added in the order of the warps. So a row's outputs do not depend on how many rows there are, nor on the bands.
//
// Macros: STORE 16 or 17; BITS and BLOCK, how W is stored; IN, a multiple of PACK; TILES of 8 rows of x; BANDS of 16 lines
// of W, each of which takes its part of what is done for x; WARPS; and what is done on the way:
//   NORM      x is normalized (root mean square over IN, times `norm`) before it is multiplied
//   BIAS      `bias` [outs] is added
//   RESIDUAL  `residual` [T, outs] is added
//   GATE      W is gates above, then ups: out = silu(gate) * up, half as many outputs as rows of W

typedef unsigned long long size;

#define STEP (4 * PACK)
#define STEPS ((IN + STEP - 1) / STEP)
#define MY_STEPS ((STEPS + WARPS - 1) / WARPS)
#define BATCH (MY_STEPS < 4 ? MY_STEPS : 4)  // steps whose packs are on their way at once
#define BLOCKS (BANDS * TILES > 2 ? 1 : WARPS == 8 && BITS == 8 ? 3 : 2)  // of a multiprocessor, at least
#define EIGHTS (PACK / 8)

// 8 numbers of a row from `k` on; nothing where there is no such row or number
__device__ inline uint4 eight_at(const store* row, unsigned k, bool there) {
    return there && k < IN ? *reinterpret_cast<const uint4*>(row + k) : make_uint4(0, 0, 0, 0);
}

#if NORM
__device__ inline float inverse_of(const float (*squares)[TILES * 8], unsigned row, float eps) {
    float sum = 0;
    for (int w = 0; w < WARPS; w++) sum += squares[w][row];
    return rsqrtf(sum / IN + eps);
}
__device__ inline float power_below(float x) {  // one that fp16 has too
    return __uint_as_float(min(max(__float_as_uint(x) & 0x7f800000u, 0x38800000u), 0x47000000u));
}
#endif

// The lines of W that a lane has of a band: of gates and ups the same ones.
__device__ inline unsigned first_of(int band, unsigned line) {
    return (blockIdx.x * BANDS + band) * (GATE ? 8 : 16) + line;
}
__device__ inline unsigned second_of(unsigned first, unsigned outs) { return first + (GATE ? outs : 8); }

// A line of W, which is read once: packs of a batch of steps, and what they are multiplied by.
struct Line {
    const uint4* packs;
    const store* scales;
    bool there;
    uint4 pack[BATCH];
    unsigned scale[BATCH];
    __device__ inline void set(const unsigned char* weight, const store* all_scales, unsigned line, bool exists) {
        packs = reinterpret_cast<const uint4*>(weight + (size)line * (IN / 8 * BITS));
        there = exists;
#if BITS == 4
        scales = all_scales + (size)line * (IN / BLOCK);
#endif
    }
    __device__ inline void fetch(unsigned from, int steps) {
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            unsigned k = from + i * STEP;
            bool needed = i < steps && there && k < IN;
            pack[i] = needed ? __ldcs(packs + k / PACK) : make_uint4(0, 0, 0, 0);
#if BITS == 4
            scale[i] = needed ? both(__ldg(scales + k / BLOCK)) : 0;
#endif
        }
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) product(
    const store* x, const unsigned char* weight, const store* scales, const store* bias, const store* norm,
    const store* residual, store* out, unsigned rows, unsigned outs, float eps)
{
    // Of a tile of 16 x 8, a lane has outputs `line` and `line + 8` of rows 2 * quad and 2 * quad + 1, and in a step the
    // numbers of pack `quad`: which of them meet in one multiplication does not matter, as long as both sides agree.
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, line = lane / 4, quad = lane % 4;
    unsigned begin = warp * MY_STEPS * STEP + quad * PACK;
    Line upper[BANDS], lower[BANDS];
#pragma unroll
    for (int band = 0; band < BANDS; band++) {
        unsigned first = first_of(band, line), second = second_of(first, outs);
        upper[band].set(weight, scales, first, first < outs);
        lower[band].set(weight, scales, second, GATE ? first < outs : second < outs);
        upper[band].fetch(begin, MY_STEPS), lower[band].fetch(begin, MY_STEPS);
    }
    let_next_begin();
    await_inputs();
    float sums[BANDS][TILES][4];
    for (int band = 0; band < BANDS; band++)
        for (int t = 0; t < TILES; t++)
            for (int i = 0; i < 4; i++) sums[band][t][i] = 0;
    __shared__ float parts[WARPS][BANDS][TILES][32][4];

#if NORM
    // Numbers are multiplied by `norm` and by a power of two, which is exact and near the root mean square's inverse; the
    // sums by what that lacks. Meanwhile, the first packs of W are on their way.
    __shared__ float squares[WARPS][TILES * 8];
    unsigned factor[TILES];
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        const store* row = x + (size)(t * 8 + line) * IN;
        float sum = 0;
#pragma unroll 4
        for (int e = 0; e < MY_STEPS * EIGHTS; e++) {
            uint4 eight = eight_at(row, begin + e / EIGHTS * STEP + e % EIGHTS * 8, t * 8 + line < rows);
            const store* numbers = reinterpret_cast<const store*>(&eight);
#pragma unroll
            for (int j = 0; j < 8; j++) sum += load(numbers[j]) * load(numbers[j]);
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (quad == 0) squares[warp][t * 8 + line] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < TILES; t++) factor[t] = both(narrow(power_below(inverse_of(squares, t * 8 + line, eps))));
#endif

    for (int start = 0; start < MY_STEPS; start += BATCH) {
        if (start)
#pragma unroll
            for (int band = 0; band < BANDS; band++) {
                upper[band].fetch(begin + start * STEP, MY_STEPS - start);
                lower[band].fetch(begin + start * STEP, MY_STEPS - start);
            }
#pragma unroll
        for (int i = 0; i < BATCH * EIGHTS; i++) {
            unsigned k = begin + (start + i / EIGHTS) * STEP + i % EIGHTS * 8;
#if NORM
            uint4 n = eight_at(norm, k, true);
#endif
            uint4 c[TILES];
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                c[t] = eight_at(x + (size)(t * 8 + line) * IN, k, t * 8 + line < rows);
#if NORM
                c[t].x = times(times(c[t].x, factor[t]), n.x), c[t].y = times(times(c[t].y, factor[t]), n.y);
                c[t].z = times(times(c[t].z, factor[t]), n.z), c[t].w = times(times(c[t].w, factor[t]), n.w);
#endif
                c[t] = mixed(c[t]);
            }
#pragma unroll
            for (int band = 0; band < BANDS; band++) {
                uint4 u = eight_of(upper[band].pack[i / EIGHTS], i % EIGHTS, upper[band].scale[i / EIGHTS]);
                uint4 l = eight_of(lower[band].pack[i / EIGHTS], i % EIGHTS, lower[band].scale[i / EIGHTS]);
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    multiply(sums[band][t], u.x, l.x, u.y, l.y, c[t].x, c[t].y);
                    multiply(sums[band][t], u.z, l.z, u.w, l.w, c[t].z, c[t].w);
                }
            }
        }
    }
    for (int band = 0; band < BANDS; band++)
        for (int t = 0; t < TILES; t++)
            for (int i = 0; i < 4; i++) parts[warp][band][t][lane][i] = sums[band][t][i];
    __syncthreads();
    if (warp >= BANDS * TILES) return;
    unsigned band = warp / TILES, tile = warp % TILES, first = first_of(band, line), second = second_of(first, outs);
    bool has_first = first < outs, has_second = GATE ? has_first : second < outs;
    float sum[4] = {0, 0, 0, 0};
    for (int w = 0; w < WARPS; w++)
        for (int i = 0; i < 4; i++) sum[i] += parts[w][band][tile][lane][i];
#if BITS == 8
    float scale = has_first ? load(scales[first]) : 0;
    sum[0] *= scale, sum[1] *= scale;
    scale = has_second ? load(scales[second]) : 0;
    sum[2] *= scale, sum[3] *= scale;
#endif
#if NORM
    for (int i = 0; i < 2; i++) {
        float inverse = inverse_of(squares, tile * 8 + quad * 2 + i, eps), rest = inverse / power_below(inverse);
        sum[i] *= rest, sum[2 + i] *= rest;
    }
#endif
#if BIAS
    if (has_first) sum[0] += load(bias[first]), sum[1] += load(bias[first]);
    if (has_second) sum[2] += load(bias[second]), sum[3] += load(bias[second]);
#endif
    for (int i = 0; i < 2; i++) {
        unsigned row = tile * 8 + quad * 2 + i;
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
