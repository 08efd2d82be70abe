// Picks tokens: logits [T, V] -> the largest of each row, the first of equal ones, and NaN before any number; its token
// id [T], its logit [T], and its row of the embedding table [T, IN]. `embed` gives the rows of a prompt's tokens. Compiled by
// NVRTC; numbers.cuh, mma.cuh, packs.cuh and best.cuh are put before it, and its macros are theirs and IN.
//
// Each block looks at a part of a row; the last of a row's blocks to end puts the parts together.

// A row of the embedding table, by all threads of a block.
__device__ inline void embed_row(const uint4* table, const store* scales, size token, uint4* to) {
    const uint4* from = table + token * (IN / PACK);
    for (unsigned i = threadIdx.x; i < IN / PACK; i += THREADS) {
        uint4 pack = from[i];
#if BITS == 8
        float scale = load(scales[token]);
#elif BITS == 4
        unsigned scale = both(scales[token * (IN / BLOCK) + i * PACK / BLOCK]);
#else
        unsigned scale = 0;
#endif
#pragma unroll
        for (int e = 0; e < PACK / 8; e++) to[i * (PACK / 8) + e] = whole_of(pack, e, scale);
    }
}

// grid (T): token ids [T] -> their rows [T, IN]
extern "C" __global__ void __launch_bounds__(THREADS) embed(
    const long long* token_ids, const uint4* table, const store* scales, uint4* embeddings)
{
    let_next_begin();
    await_inputs();
    embed_row(table, scales, token_ids[blockIdx.x], embeddings + (size)blockIdx.x * (IN / 8));
}

// grid (parts of a row, T)
extern "C" __global__ void __launch_bounds__(THREADS) pick(
    const store* logits, const uint4* table, const store* scales, long long* token_ids, store* token_logits,
    uint4* embeddings, Best* parts, unsigned* counters, unsigned vocabulary)
{
    let_next_begin();
    await_inputs();
    const store* row = logits + (size)blockIdx.y * vocabulary;
    Best mine = worst();
    for (unsigned token = blockIdx.x * THREADS + threadIdx.x; token < vocabulary; token += gridDim.x * THREADS) {
        Best one = {load(row[token]), token};
        if (beats(one, mine)) mine = one;
    }
    if (!best_of_row(&mine, parts, counters)) return;
    if (threadIdx.x == 0) {
        token_ids[blockIdx.y] = mine.token;
        token_logits[blockIdx.y] = row[mine.token];
    }
    embed_row(table, scales, mine.token, embeddings + (size)blockIdx.y * (IN / 8));
}
