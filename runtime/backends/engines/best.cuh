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
