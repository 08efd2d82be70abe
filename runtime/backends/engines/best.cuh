// The best of many tokens, as picks and draws find it: the one with the largest value, the first of equal ones, and NaN before
// any number. Put after numbers.cuh.

typedef unsigned long long size;

#define THREADS 256

struct Best {
    float value;
    unsigned token;
};

__device__ inline bool beats(Best a, Best b) {
    bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    if (a_nan || b_nan) return a_nan && (!b_nan || a.token < b.token);
    return a.value > b.value || (a.value == b.value && a.token < b.token);
}

__device__ inline Best best_of_block(Best mine, Best* shared) {
    for (int step = 16; step; step /= 2) {
        Best other = {__shfl_xor_sync(~0u, mine.value, step), __shfl_xor_sync(~0u, mine.token, step)};
        if (beats(other, mine)) mine = other;
    }
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
    __syncthreads();
    for (int w = 0; w < THREADS / 32; w++)
        if (beats(shared[w], mine)) mine = shared[w];
    __syncthreads();
    return mine;
}

// Whether this is the last of its row's blocks to end, told by a counter; it can then read what the others wrote, past the first
// cache. A block's own writes are behind it when its first thread counts.
__device__ inline bool is_last(unsigned* counter) {
    __shared__ unsigned ended;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        ended = atomicAdd(counter, 1);
    }
    __syncthreads();
    if (ended != gridDim.x - 1) return false;
    __threadfence();
    return true;
}

__device__ inline Best worst() { return {-__int_as_float(0x7f800000), ~0u}; }

// The best of a row, from those of its blocks' threads, by way of `parts` [T, gridDim.x]: true in the last block to end, all of
// whose threads have it then, and which sets the counter back to zero for the next launch.
__device__ inline bool best_of_row(Best* mine, Best* parts, unsigned* counters) {
    __shared__ Best shared[THREADS / 32];
    *mine = best_of_block(*mine, shared);
    Best* of_row = parts + (size)blockIdx.y * gridDim.x;
    if (threadIdx.x == 0) of_row[blockIdx.x] = *mine;
    if (!is_last(counters + blockIdx.y)) return false;
    *mine = worst();
    for (unsigned part = threadIdx.x; part < gridDim.x; part += THREADS) {
        Best one = {__ldcg(&of_row[part].value), __ldcg(&of_row[part].token)};
        if (beats(one, *mine)) *mine = one;
    }
    *mine = best_of_block(*mine, shared);
    if (threadIdx.x == 0) counters[blockIdx.y] = 0;
    return true;
}
