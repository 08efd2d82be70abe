// Attention over the KV caches. Compiled by NVRTC; numbers.cuh is put before it.
//
//   attend   qkv [T, (Nq+2N) D] x caches -> attended [T, Nq D]; queries and keys are normed and rotated on the way, and
//            keys and values go into the caches
//   rotate   that alone, with the queries [T, Nq, D] written out, for long_attention.cu
//
// Macros: STORE, see numbers.cuh; HEAD the size D of a head; ROWS query rows of a warp; KEYS cache rows of a tile. Numbers
// are computed with in fp32. A query row is a row of the call together with one of the G query
// heads that share a head of keys; four warps take ROWS of them each.
//
// With several splits, each block attends to a part of the cache rows and leaves its sums, unnormalized, in `partials`
// with their largest score and their weight; the last of them to end, told by `counters`, puts them together and sets
// its counter back to zero for the next launch.

typedef unsigned long long size;
typedef long long position;

#define HALF (HEAD / 2)
#define WARPS 4
#define COLUMNS ((HEAD + 31) / 32)
#define SLOTS (KEYS / 32)
#define TILE_ROWS (WARPS * ROWS)
#define LOW -1e30f
#define PACK (16 / (int)sizeof(store))
#define PACKED (HEAD % PACK == 0)
#define PACKS (PACKED ? (KEYS * HEAD / PACK + 32 * WARPS - 1) / (32 * WARPS) : 1)

__device__ inline float warp_sum(float x) {
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}
__device__ inline float warp_max(float x) {
    for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// `count` rows of a cache, on the way to shared memory: all loads at once where rows are whole packs of 16 bytes.
struct Rows {
    uint4 packs[PACKS];
    const store* from;
    __device__ inline void fetch(const store* rows, unsigned count) {
        from = rows;
        if (PACKED)
#pragma unroll
            for (int p = 0; p < PACKS; p++) {
                unsigned i = threadIdx.x + p * 32 * WARPS;
                if (i < count * HEAD / PACK) packs[p] = reinterpret_cast<const uint4*>(rows)[i];
            }
    }
    __device__ inline void store_to(float* tile, unsigned stride, unsigned count) const {
        if (PACKED) {
#pragma unroll
            for (int p = 0; p < PACKS; p++) {
                unsigned i = (threadIdx.x + p * 32 * WARPS) * PACK;
                if (i >= count * HEAD) continue;
                const store* numbers = reinterpret_cast<const store*>(packs + p);
                float* to = tile + i / HEAD * stride + i % HEAD;
#pragma unroll
                for (int j = 0; j < PACK; j++) to[j] = load(numbers[j]);
            }
        } else
            for (unsigned i = threadIdx.x; i < count * HEAD; i += 32 * WARPS)
                tile[i / HEAD * stride + i % HEAD] = load(from[i]);
    }
};

// A head of queries or keys, normed and rotated by a warp, number by number.
template <typename Put>
__device__ inline void rotated(const store* from, const store* norm, const store* cosines, const store* sines, float eps, Put put) {
    unsigned lane = threadIdx.x % 32;
    float scale = 1;
    if (norm) {
        float sum = 0;
        for (unsigned i = lane; i < HEAD; i += 32) { float x = load(from[i]); sum += x * x; }
        scale = rsqrtf(warp_sum(sum) / HEAD + eps);
    }
    for (unsigned i = lane; i < HALF; i += 32) {
        float a = load(from[i]), b = load(from[i + HALF]);
        if (norm) {
            a = load(narrow(load(narrow(a * scale)) * load(norm[i])));
            b = load(narrow(load(narrow(b * scale)) * load(norm[i + HALF])));
        }
        float c = load(cosines[i]), s = load(sines[i]);
        put(i, narrow(a * c - b * s));
        put(i + HALF, narrow(b * c + a * s));
    }
}

// A warp for each head of each row. grid (T, heads / 4)
extern "C" __global__ void rotate(
    const store* qkv, store* keys, store* values, store* queries, const position* positions, const store* cos_table,
    const store* sin_table, const store* q_norm, const store* k_norm, unsigned num_heads, unsigned num_kv_heads,
    unsigned capacity, float eps)
{
    let_next_begin();
    await_inputs();
    unsigned lane = threadIdx.x % 32, head = blockIdx.y * WARPS + threadIdx.x / 32, row = blockIdx.x;
    unsigned all = num_heads + 2 * num_kv_heads;
    if (head >= all) return;
    const store* from = qkv + ((size)row * all + head) * HEAD;
    size place = *positions + row;
    if (place >= capacity) return;
    if (head >= num_heads + num_kv_heads) {
        store* to = values + ((size)(head - num_heads - num_kv_heads) * capacity + place) * HEAD;
        for (unsigned i = lane; i < HEAD; i += 32) to[i] = from[i];
        return;
    }
    bool is_query = head < num_heads;
    store* to = is_query ? queries + ((size)row * num_heads + head) * HEAD
                         : keys + ((size)(head - num_heads) * capacity + place) * HEAD;
    rotated(from, is_query ? q_norm : k_norm, cos_table + place * HALF, sin_table + place * HALF, eps,
            [=](unsigned i, store x) { to[i] = x; });
}

// grid (tiles of query rows, splits, N)
extern "C" __global__ void __launch_bounds__(32 * WARPS) attend(
    const store* qkv, store* keys, store* values, const position* positions, const store* cos_table,
    const store* sin_table, const store* q_norm, const store* k_norm, unsigned num_heads, unsigned num_kv_heads,
    unsigned capacity, float eps, store* out, float* partials, unsigned* counters, unsigned rows, unsigned split_rows,
    float scale)
{
    __shared__ float query[HEAD][TILE_ROWS];
    __shared__ float tile[KEYS * (HEAD + 1)];
    __shared__ float weights[KEYS][TILE_ROWS];
    __shared__ unsigned ended;
    let_next_begin();
    await_inputs();
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, kv = blockIdx.z;
    unsigned group = num_heads / num_kv_heads, query_rows = rows * group, first_row = blockIdx.x * TILE_ROWS;
    unsigned all = num_heads + 2 * num_kv_heads;
    unsigned first = (unsigned)*positions, last_row = min(first_row + TILE_ROWS, query_rows) - 1;
    // query rows are ordered by row of the call, then by head: those of a tile see about as much
    unsigned used = min(first + last_row / group + 1, capacity);
    unsigned begin = blockIdx.y * split_rows, end = min(begin + split_rows, used);
    if (begin >= used) return;
    unsigned splits = (used + split_rows - 1) / split_rows;

    for (unsigned i = warp * ROWS; i < (warp + 1) * ROWS; i++) {
        unsigned r = first_row + i;
        size row = r / group, place = min(first + (unsigned)row, capacity - 1);
        if (r < query_rows)
            rotated(qkv + (row * all + kv * group + r % group) * HEAD, q_norm, cos_table + place * HALF,
                    sin_table + place * HALF, eps, [&](unsigned d, store x) { query[d][i] = load(x) * scale; });
        else
            for (unsigned d = lane; d < HEAD; d += 32) query[d][i] = 0;
    }
    float most[ROWS], total[ROWS], sums[ROWS][COLUMNS];
    unsigned seen[ROWS];
    for (int r = 0; r < ROWS; r++) {
        unsigned row = first_row + warp * ROWS + r;
        seen[r] = row < query_rows ? min(first + row / group + 1, capacity) : 0;
        most[r] = LOW, total[r] = 0;
        for (int c = 0; c < COLUMNS; c++) sums[r][c] = 0;
    }
    for (unsigned start = begin; start < end; start += KEYS) {
        // rows of this call, from `cached` on, are not in the caches yet: the last tile, which sees all, puts them there
        unsigned count = min((unsigned)KEYS, end - start), cached = start < first ? min(count, first - start) : 0;
        bool writes = blockIdx.x == gridDim.x - 1;
        size from = ((size)kv * capacity + start) * HEAD;
        Rows key_rows, value_rows;
        key_rows.fetch(keys + from, cached);
        value_rows.fetch(values + from, cached);
        __syncthreads();
        key_rows.store_to(tile, HEAD + 1, cached);
        for (unsigned k = cached + warp; k < count; k += WARPS) {
            size place = start + k;
            rotated(qkv + ((place - first) * all + num_heads + kv) * HEAD, k_norm, cos_table + place * HALF,
                    sin_table + place * HALF, eps, [&](unsigned d, store x) {
                        tile[k * (HEAD + 1) + d] = load(x);
                        if (writes) keys[from + k * HEAD + d] = x;
                    });
        }
        __syncthreads();
        float scores[ROWS][SLOTS];
        for (int r = 0; r < ROWS; r++)
            for (int s = 0; s < SLOTS; s++) scores[r][s] = 0;
#pragma unroll 8
        for (int d = 0; d < HEAD; d++) {
            float key[SLOTS];
            for (int s = 0; s < SLOTS; s++) key[s] = tile[(lane + 32 * s) * (HEAD + 1) + d];
            for (int r = 0; r < ROWS; r++)
                for (int s = 0; s < SLOTS; s++) scores[r][s] += query[d][warp * ROWS + r] * key[s];
        }
        for (int r = 0; r < ROWS; r++) {
            float top = LOW;
            for (int s = 0; s < SLOTS; s++) {
                unsigned place = lane + 32 * s;
                if (place >= count || start + place >= seen[r]) scores[r][s] = LOW;
                top = fmaxf(top, scores[r][s]);
            }
            top = fmaxf(most[r], warp_max(top));
            float kept = __expf(most[r] - top), sum = 0;
            for (int s = 0; s < SLOTS; s++) {
                float weight = scores[r][s] == LOW ? 0 : __expf(scores[r][s] - top);
                weights[lane + 32 * s][warp * ROWS + r] = weight;
                sum += weight;
            }
            most[r] = top, total[r] = total[r] * kept + warp_sum(sum);
            for (int c = 0; c < COLUMNS; c++) sums[r][c] *= kept;
        }
        __syncthreads();
        value_rows.store_to(tile, HEAD, cached);
        for (unsigned k = cached + warp; k < count; k += WARPS)
            for (unsigned d = lane; d < HEAD; d += 32) {
                store x = qkv[((size)(start + k - first) * all + num_heads + num_kv_heads + kv) * HEAD + d];
                tile[k * HEAD + d] = load(x);
                if (writes) values[from + k * HEAD + d] = x;
            }
        __syncthreads();
#pragma unroll 4
        for (unsigned k = 0; k < count; k++)
            for (int c = 0; c < COLUMNS; c++) {
                float value = lane + 32 * c < HEAD ? tile[k * HEAD + lane + 32 * c] : 0;
                for (int r = 0; r < ROWS; r++) sums[r][c] += weights[k][warp * ROWS + r] * value;
            }
    }
    if (splits > 1) {
        // partials [N, tiles, splits, TILE_ROWS, HEAD + 2]
        unsigned pair = kv * gridDim.x + blockIdx.x;
        float* mine = partials + ((size)pair * gridDim.y + blockIdx.y) * TILE_ROWS * (HEAD + 2);
        for (int r = 0; r < ROWS; r++) {
            float* to = mine + (warp * ROWS + r) * (HEAD + 2);
            for (int c = 0; c < COLUMNS; c++)
                if (lane + 32 * c < HEAD) to[lane + 32 * c] = sums[r][c];
            if (lane == 0) to[HEAD] = most[r], to[HEAD + 1] = total[r];
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) ended = atomicAdd(counters + pair, 1);
        __syncthreads();
        if (ended != splits - 1) return;
        __threadfence();
        if (threadIdx.x == 0) counters[pair] = 0;
        const float* parts = partials + ((size)pair * gridDim.y * TILE_ROWS + warp * ROWS) * (HEAD + 2);
        const size stride = TILE_ROWS * (HEAD + 2);
        for (int r = 0; r < ROWS; r++) {
            most[r] = LOW, total[r] = 0;
            for (int c = 0; c < COLUMNS; c++) sums[r][c] = 0;
        }
        for (unsigned start = 0; start < splits; start += 32) {  // a lane looks at a split, then all lanes add it
            unsigned count = min(splits - start, 32u);
            const float* part = parts + start * stride;
            float top[ROWS], weight[ROWS], share[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                top[r] = lane < count ? __ldcg(part + lane * stride + r * (HEAD + 2) + HEAD) : LOW;
                weight[r] = lane < count ? __ldcg(part + lane * stride + r * (HEAD + 2) + HEAD + 1) : 0;
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float newest = fmaxf(most[r], warp_max(top[r])), kept = __expf(most[r] - newest);
                share[r] = __expf(top[r] - newest);
                most[r] = newest, total[r] = total[r] * kept + warp_sum(weight[r] * share[r]);
                for (int c = 0; c < COLUMNS; c++) sums[r][c] *= kept;
            }
#pragma unroll 4
            for (unsigned s = 0; s < count; s++)
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    float its = __shfl_sync(~0u, share[r], s);
                    for (int c = 0; c < COLUMNS; c++)
                        if (lane + 32 * c < HEAD)
                            sums[r][c] += its * __ldcg(part + s * stride + r * (HEAD + 2) + lane + 32 * c);
                }
        }
    }
    for (int r = 0; r < ROWS; r++) {
        unsigned row = first_row + warp * ROWS + r;
        if (row >= query_rows) continue;
        store* to = out + ((size)(row / group) * num_heads + kv * group + row % group) * HEAD;
        for (int c = 0; c < COLUMNS; c++)
            if (lane + 32 * c < HEAD) to[lane + 32 * c] = narrow(sums[r][c] / total[r]);
    }
}
