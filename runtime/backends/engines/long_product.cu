// A linear layer of many rows, as prompts have them: out [T, outs] = x [T, IN] W^T, in tensor cores. W [outs, IN] is read
// as it is stored. Compiled by NVRTC; numbers.cuh, mma.cuh, packs.cuh and copies.cuh are put before it. product.cu has the one
// for few.
//
// A block makes ROWS x LINES outputs, in steps of K numbers, of which STAGES are in shared memory or on their way there. A
// warp makes ROWS x WARP_LINES of them from its part of each step, one of K_WARPS, and the parts are added in order in the
// end. So a row's outputs do not depend on how many rows there are.
//
// Macros: STORE 16 or 17; BITS and BLOCK, how W is stored; IN, a multiple of PACK; ROWS, LINES, K (64 or 128), STAGES and
// WARPS; and what is done on the way:
//   BIAS      `bias` [outs] is added
//   RESIDUAL  `residual` [T, outs] is added
//   GATE      W is gates above, then ups: out = silu(gate) * up, half as many outputs as rows of W

typedef unsigned long long size;

#define WARP_LINES 32
#define LINE_WARPS (LINES / WARP_LINES)
#define K_WARPS (WARPS / LINE_WARPS)
#define BLOCKS (K_WARPS > 1 ? 2 : 3)  // of a multiprocessor, at least
#define THREADS (32 * WARPS)
#define STEPS ((IN + K - 1) / K)
#define ROW_BYTES (2 * K)
#define LINE_BYTES (K * BITS / 8)
#define STAGE_BYTES (ROWS * ROW_BYTES + LINES * LINE_BYTES)
#define TILES (ROWS / 8)
#define BANDS (WARP_LINES / 16)
#define PARTS (K / 32 / K_WARPS)  // of 32 numbers, of a step's, that a warp takes
#define LINE_COPIES ((LINES * LINE_BYTES / 16 + THREADS - 1) / THREADS)

// Of a line of the block: its output, and its line of W. Of 16 lines, 8 are gates and 8 their ups.
__device__ inline unsigned output_of(unsigned line) {
    return GATE ? blockIdx.y * (LINES / 2) + line / 16 * 8 + line % 8 : blockIdx.y * LINES + line;
}
__device__ inline unsigned line_of(unsigned line, unsigned outs) {
    return output_of(line) + (GATE && line / 8 % 2 ? outs : 0);
}

// Where 16 bytes of a row of x or of a line of W are in shared memory, so that what a warp reads at once lies in all banks.
__device__ inline unsigned place_of(unsigned bits, unsigned row, unsigned chunk) {
    unsigned length = K * bits / 8;
    if (bits == 16) return row * length + (chunk ^ row % 2) * 16;
    if (K == 64) return row * length + chunk * 16;
    return row * length + (bits == 8 ? chunk ^ row % 2 * 4 : chunk ^ row / 2 % 2 * 2) * 16;
}

// What a thread copies of each step: rows of x that are evenly apart, and lines of W.
struct Copies {
    const store* x;
    const unsigned char* weight;
    unsigned row, row_chunk, rows, line_at[LINE_COPIES];
    __device__ inline Copies(const store* all_x, const unsigned char* all_weight, unsigned all_rows, unsigned outs) {
        row_chunk = threadIdx.x % (ROW_BYTES / 16), row = threadIdx.x / (ROW_BYTES / 16), rows = all_rows;
        x = all_x + (size)(blockIdx.x * ROWS + row) * IN + row_chunk * 8;
        weight = all_weight;
        for (unsigned i = 0; i < LINE_COPIES; i++)
            line_at[i] = line_of(line(i), outs) * (IN / 8 * BITS) + chunk(i) * 16;
    }
    __device__ inline unsigned line(unsigned i) { return (threadIdx.x + i * THREADS) / (LINE_BYTES / 16); }
    __device__ inline unsigned chunk(unsigned i) { return (threadIdx.x + i * THREADS) % (LINE_BYTES / 16); }
    __device__ inline void fetch_rows(unsigned stage, unsigned step) {
        const unsigned each = THREADS * 16 / ROW_BYTES;  // an even number
        bool exists = IN % K == 0 || step * K + row_chunk * 8 < IN;
#pragma unroll
        for (unsigned i = 0; i < ROWS / each; i++) {
            unsigned to = stage + place_of(16, row, row_chunk) + i * each * ROW_BYTES;
            copy(to, x + step * K + i * each * IN, exists && blockIdx.x * ROWS + row + i * each < rows);
        }
    }
    __device__ inline void fetch_lines(unsigned stage, unsigned step, unsigned outs) {
#pragma unroll
        for (unsigned i = 0; i < LINE_COPIES; i++) {
            if (LINES * LINE_BYTES / 16 % THREADS && line(i) >= LINES) break;
            bool exists = output_of(line(i)) < outs && (IN % K == 0 || step * K + chunk(i) * PACK < IN);
            unsigned to = stage + ROWS * ROW_BYTES + place_of(BITS, line(i), chunk(i));
            copy(to, weight + line_at[i] + step * LINE_BYTES, exists);
        }
    }
};

// grid (tiles of rows, tiles of lines)
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) long_product(
    const store* x, const unsigned char* weight, const store* scales, const store* bias, const store* residual, store* out,
    unsigned rows, unsigned outs)
{
    extern __shared__ __align__(128) unsigned char shared[];
    let_next_begin();
    unsigned stages = (unsigned)__cvta_generic_to_shared(shared);
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, line = lane / 4, quad = lane % 4;
    unsigned my_line = warp % LINE_WARPS * WARP_LINES, my_part = warp / LINE_WARPS * PARTS;
    Copies copies(x, weight, rows, outs);
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++)
        if (s < STEPS) copies.fetch_lines(stages + s * STAGE_BYTES, s, outs);
    await_inputs();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < STEPS) copies.fetch_rows(stages + s * STAGE_BYTES, s);
        commit();
    }

    // Of a tile of 16 lines x 8 rows, a lane has rows 2 * quad and 2 * quad + 1 of lines `line` and `line + 8`, and of 64
    // numbers 16 from 16 * quad on: which of them meet in one multiplication does not matter, as long as both sides agree.
    float sums[BANDS][TILES][4];
    for (int b = 0; b < BANDS; b++)
        for (int t = 0; t < TILES; t++)
            for (int i = 0; i < 4; i++) sums[b][t][i] = 0;
#if BITS == 4
    const store* my_scales[BANDS][2];
    for (int b = 0; b < BANDS; b++)
        for (int i = 0; i < 2; i++) {
            unsigned l = my_line + b * 16 + i * 8 + line;
            my_scales[b][i] = scales + (output_of(l) < outs ? line_of(l, outs) : 0) * (IN / BLOCK);
        }
#endif
    unsigned now = 0, next = (STAGES - 1) * STAGE_BYTES;
    for (unsigned step = 0; step < STEPS; step++) {
        unsigned scale[(PARTS + 1) / 2][BANDS][2];
#if BITS == 4
#pragma unroll
        for (int g = 0; g < (PARTS + 1) / 2; g++) {
            unsigned k = step * K + (my_part / 2 + g) * 64 + quad * 16;
            for (int b = 0; b < BANDS; b++)
                for (int i = 0; i < 2; i++) scale[g][b][i] = both(__ldg(my_scales[b][i] + (IN % K ? min(k, IN - 1) : k) / BLOCK));
        }
#endif
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        __syncthreads();
        if (step + STAGES - 1 < STEPS) {
            copies.fetch_rows(stages + next, step + STAGES - 1);
            copies.fetch_lines(stages + next, step + STAGES - 1, outs);
        }
        commit();
        const unsigned char *rows_at = shared + now, *lines_at = rows_at + ROWS * ROW_BYTES;
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            unsigned part = my_part + p, chunk = part / 2 * 8 + quad * 2 + part % 2;
            uint4 w[BANDS][2];
#pragma unroll
            for (int b = 0; b < BANDS; b++)
                for (int i = 0; i < 2; i++) {
                    unsigned l = my_line + b * 16 + i * 8 + line;
#if BITS == 16
                    w[b][i] = *reinterpret_cast<const uint4*>(lines_at + place_of(16, l, chunk));
#elif BITS == 8
                    uint2 eight = *reinterpret_cast<const uint2*>(
                        lines_at + place_of(8, l, part / 2 * 4 + quad) + part % 2 * 8);
                    w[b][i] = eight_of(make_uint4(eight.x, eight.y, 0, 0), 0, 0);
#else
                    unsigned eight = *reinterpret_cast<const unsigned*>(
                        lines_at + place_of(4, l, part / 2 * 2 + quad / 2) + quad % 2 * 8 + part % 2 * 4);
                    w[b][i] = in_order(eight_of(make_uint4(eight, 0, 0, 0), 0, scale[p / 2][b][i]));
#endif
                }
#pragma unroll
            for (int t = 0; t < TILES; t += 4) {
                uint4 c[4];
#pragma unroll
                for (int j = 0; j < 4 && t + j < TILES; j++)
                    c[j] = *reinterpret_cast<const uint4*>(rows_at + place_of(16, (t + j) * 8 + line, chunk));
                // a multiplication waits for the one before it with the same sums, so those come late
#pragma unroll
                for (int b = 0; b < BANDS; b++)
                    for (int j = 0; j < 4 && t + j < TILES; j++)
                        multiply(sums[b][t + j], w[b][0].x, w[b][1].x, w[b][0].y, w[b][1].y, c[j].x, c[j].y);
#pragma unroll
                for (int b = 0; b < BANDS; b++)
                    for (int j = 0; j < 4 && t + j < TILES; j++)
                        multiply(sums[b][t + j], w[b][0].z, w[b][1].z, w[b][0].w, w[b][1].w, c[j].z, c[j].w);
            }
        }
        now = now == (STAGES - 1) * STAGE_BYTES ? 0 : now + STAGE_BYTES;
        next = next == (STAGES - 1) * STAGE_BYTES ? 0 : next + STAGE_BYTES;
    }
    if (K_WARPS > 1) {
        float* sums_at = reinterpret_cast<float*>(shared) + lane;  // the same number of all lanes lies side by side
        for (int from = 1; from < K_WARPS; from++) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < BANDS * TILES * 4; i++)
                if (warp == from) sums_at[i * 32] = (&sums[0][0][0])[i];
            __syncthreads();
#pragma unroll
            for (int i = 0; i < BANDS * TILES * 4; i++)
                if (warp == 0) (&sums[0][0][0])[i] += sums_at[i * 32];
        }
        if (warp > 0) return;
    }
#pragma unroll
    for (int b = 0; b < BANDS; b++) {
        unsigned column[2];
        float scale[2] = {1, 1}, added[2] = {0, 0};
        for (int i = 0; i < 2; i++) {
            unsigned l = my_line + b * 16 + i * 8 + line;
            column[i] = output_of(l);
            if (column[i] >= outs) continue;
#if BITS == 8
            scale[i] = load(scales[line_of(l, outs)]);
#endif
#if BIAS
            added[i] = load(bias[line_of(l, outs)]);
#endif
        }
#pragma unroll
        for (int t = 0; t < TILES; t++)
            for (int j = 0; j < 2; j++) {
                unsigned row = blockIdx.x * ROWS + t * 8 + quad * 2 + j;
                if (row >= rows) continue;
                store* to = out + (size)row * outs;
                float sum[2] = {sums[b][t][j] * scale[0] + added[0], sums[b][t][2 + j] * scale[1] + added[1]};
#if GATE
                float gate = load(narrow(sum[0])), up = load(narrow(sum[1]));
                if (column[0] < outs) to[column[0]] = narrow(load(narrow(gate / (1 + __expf(-gate)))) * up);
#else
                for (int i = 0; i < 2; i++) {
                    if (column[i] >= outs) continue;
#if RESIDUAL
                    to[column[i]] = narrow(load(residual[(size)row * outs + column[i]]) + load(narrow(sum[i])));
#else
                    to[column[i]] = narrow(sum[i]);
#endif
                }
#endif
            }
    }
}
