// Judges a draft: its probability among the logits [V] that it was picked from, and whether drafting goes on after it. Compiled by
// NVRTC; numbers.cuh and best.cuh are put before it.
//
// The probability is 1 / sum of exp(logit - picked), so no largest logit has to be found first: if the picked one is far below
// it, the sum overflows to infinity, and the probability is 0. Where it is not a number, drafting goes on.
//
// Each block adds up a part of the row; the last of them to end adds up the parts, always in one order.

// Lets the conditional node with this handle run, in the launch of the graph that the kernel is part of. The driver has it.
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(unsigned long long handle, unsigned value);

__device__ inline float sum_of_block(float mine, float* shared) {
    for (int step = 16; step; step /= 2) mine += __shfl_xor_sync(~0u, mine, step);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
    __syncthreads();
    mine = 0;
    for (int w = 0; w < THREADS / 32; w++) mine += shared[w];
    __syncthreads();
    return mine;
}

// grid (parts of a row). `made` becomes the drafts that will have been made by the next judgement, where this is draft `number`.
extern "C" __global__ void __launch_bounds__(THREADS) judge(
    const store* logits, const store* picked, const float* threshold, long long* made, float* parts, unsigned* counter,
    unsigned vocabulary, unsigned number, size next)
{
    __shared__ float shared[THREADS / 32];
    let_next_begin();
    await_inputs();
    float of_draft = load(*picked), mine = 0;
    for (unsigned token = blockIdx.x * THREADS + threadIdx.x; token < vocabulary; token += gridDim.x * THREADS)
        mine += expf(load(logits[token]) - of_draft);
    mine = sum_of_block(mine, shared);
    if (threadIdx.x == 0) parts[blockIdx.x] = mine;
    if (!is_last(counter)) return;
    mine = sum_of_block(threadIdx.x < gridDim.x ? __ldcg(parts + threadIdx.x) : 0.0f, shared);
    if (threadIdx.x) return;
    *counter = 0;
    bool goes_on = !(1.0f / mine < *threshold);
    *made = number + goes_on;
    cudaGraphSetConditional(next, goes_on);
}
