// Attention of many rows, as prompts have them: queries [T, Nq, D] x caches [N, C, D] -> attended [T, Nq D], in tensor cores.
// Compiled by NVRTC; numbers.cuh, mma.cuh and copies.cuh are put before it. attention.cu has the one for few rows.
//
// Macros: STORE 16 or 17; HEAD, a multiple of 16, at most 128. A query row is a row of the call together with one of the G
// query heads that share a head of keys; each of four warps takes 16 of them, past tiles of KEYS cache rows. Scores and
// sums are fp32 (the running softmax of FlashAttention, arXiv 2205.14135); what values are multiplied by is rounded.

typedef unsigned long long size;
typedef long long position;

#define WARPS 4
#define KEYS 64
#define STRIDE (HEAD + 8)  // of a row in shared memory: the banks of eight rows do not meet
#define LOW -1e30f

// A tile of cache rows on its way to shared memory, zeros after the last one.
__device__ inline void fetch(store (*tile)[STRIDE], const store* rows, unsigned count) {
    for (unsigned i = threadIdx.x; i < KEYS * HEAD / 8; i += 32 * WARPS) {
        unsigned row = i / (HEAD / 8), column = i % (HEAD / 8) * 8;
        unsigned to = (unsigned)__cvta_generic_to_shared(&tile[row][column]);
        copy(to, rows + (row < count ? (size)row * HEAD + column : 0), row < count);
    }
    commit();
}
__device__ inline void arrived() {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
}

__device__ inline unsigned pair(float low, float high) { return narrow(low) | (unsigned)narrow(high) << 16; }

// grid (tiles of query rows, 1, N)
extern "C" __global__ void __launch_bounds__(32 * WARPS) attend_long(
    const store* queries, const store* keys, const store* values, const position* positions, store* out,
    unsigned num_heads, unsigned num_kv_heads, unsigned capacity, unsigned rows, float scale)
{
    __shared__ __align__(16) store key_tile[KEYS][STRIDE], value_tile[KEYS][STRIDE];
    let_next_begin();
    await_inputs();
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, line = lane / 4, quad = lane % 4, kv = blockIdx.z;
    unsigned group = num_heads / num_kv_heads, query_rows = rows * group;
    unsigned tile = gridDim.x - 1 - blockIdx.x;  // the longest first
    unsigned first_row = tile * 16 * WARPS, last_row = min(first_row + 16 * WARPS, query_rows) - 1;
    unsigned first = (unsigned)*positions, used = min(first + last_row / group + 1, capacity);
    const store *all_keys = keys + (size)kv * capacity * HEAD, *all_values = values + (size)kv * capacity * HEAD;
    fetch(key_tile, all_keys, used);

    // Of a tile of 16 x 8, a lane has columns 2 * quad and 2 * quad + 1 of rows `line` and `line + 8`.
    unsigned query[HEAD / 16][4], seen[2];
    size at[2];
    for (int i = 0; i < 2; i++) {
        unsigned r = first_row + warp * 16 + line + 8 * i;
        bool exists = r < query_rows;
        seen[i] = exists ? min(first + r / group + 1, capacity) : 0;
        at[i] = ((size)(r / group) * num_heads + kv * group + r % group) * HEAD;
        for (int s = 0; s < HEAD / 16; s++)
            for (int j = 0; j < 2; j++)
                query[s][i + 2 * j] =
                    exists ? *reinterpret_cast<const unsigned*>(queries + at[i] + s * 16 + j * 8 + quad * 2) : 0;
    }
    float sums[HEAD / 8][4], most[2] = {LOW, LOW}, total[2] = {0, 0};
    for (int d = 0; d < HEAD / 8; d++)
        for (int i = 0; i < 4; i++) sums[d][i] = 0;

    for (unsigned start = 0; start < used; start += KEYS) {
        arrived();
        fetch(value_tile, all_values + (size)start * HEAD, used - start);
        float scores[KEYS / 8][4];
#pragma unroll
        for (int k = 0; k < KEYS / 8; k++) {
            for (int i = 0; i < 4; i++) scores[k][i] = 0;
#pragma unroll
            for (int s = 0; s < HEAD / 16; s++) {
                const unsigned* key = reinterpret_cast<const unsigned*>(&key_tile[k * 8 + line][s * 16 + quad * 2]);
                multiply(scores[k], query[s][0], query[s][1], query[s][2], query[s][3], key[0], key[4]);
            }
        }
        arrived();
        if (start + KEYS < used) fetch(key_tile, all_keys + (size)(start + KEYS) * HEAD, used - start - KEYS);
        for (int i = 0; i < 2; i++) {
            float top = most[i], sum = 0;
            for (int k = 0; k < KEYS / 8; k++)
                for (int j = 0; j < 2; j++) {
                    float& score = scores[k][2 * i + j];
                    score = start + k * 8 + quad * 2 + j < seen[i] ? score * scale : LOW;
                    top = fmaxf(top, score);
                }
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            float kept = __expf(most[i] - top);
            for (int k = 0; k < KEYS / 8; k++)
                for (int j = 0; j < 2; j++) {
                    float& score = scores[k][2 * i + j];
                    score = score == LOW ? 0 : __expf(score - top);
                    sum += score;
                }
            most[i] = top, total[i] = total[i] * kept + sum;
            for (int d = 0; d < HEAD / 8; d++) sums[d][2 * i] *= kept, sums[d][2 * i + 1] *= kept;
        }
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
            const float *low = scores[2 * k], *high = scores[2 * k + 1];
            unsigned a0 = pair(low[0], low[1]), a1 = pair(low[2], low[3]);
            unsigned a2 = pair(high[0], high[1]), a3 = pair(high[2], high[3]);
#pragma unroll
            for (int d = 0; d < HEAD / 16; d++) {
                unsigned b0, b1, b2, b3;
                const store* value = &value_tile[k * 16 + lane % 16][d * 16 + lane / 16 * 8];
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                             : "=r"(b0), "=r"(b1), "=r"(b2), "=r"(b3)
                             : "r"((unsigned)__cvta_generic_to_shared(value)));
                multiply(sums[2 * d], a0, a1, a2, a3, b0, b1);
                multiply(sums[2 * d + 1], a0, a1, a2, a3, b2, b3);
            }
        }
    }
    for (int i = 0; i < 2; i++) {
        total[i] += __shfl_xor_sync(~0u, total[i], 1);
        total[i] += __shfl_xor_sync(~0u, total[i], 2);
        if (first_row + warp * 16 + line + 8 * i >= query_rows) continue;
        for (int d = 0; d < HEAD / 8; d++)
            *reinterpret_cast<unsigned*>(out + at[i] + d * 8 + quad * 2) =
                pair(sums[d][2 * i] / total[i], sums[d][2 * i + 1] / total[i]);
    }
}
