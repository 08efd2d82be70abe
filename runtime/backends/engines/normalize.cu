// Rows of x [T, IN], each over its root mean square and times `norm` [IN], rounded in between as a model does: a block for
// each row. Compiled by NVRTC; numbers.cuh is put before it, and its macros are STORE 16 or 17 and IN, a multiple of 8.

typedef unsigned long long size;

#define WARPS 8

extern "C" __global__ void __launch_bounds__(32 * WARPS) normalize(const uint4* x, const uint4* norm, uint4* out, float eps)
{
    __shared__ float parts[WARPS];
    let_next_begin();
    await_inputs();
    const uint4* row = x + (size)blockIdx.x * (IN / 8);
    float sum = 0;
    for (unsigned i = threadIdx.x; i < IN / 8; i += 32 * WARPS) {
        uint4 eight = row[i];
        const store* numbers = reinterpret_cast<const store*>(&eight);
        for (int j = 0; j < 8; j++) sum += load(numbers[j]) * load(numbers[j]);
    }
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < WARPS; w++) sum += parts[w];
    float inverse = rsqrtf(sum / IN + eps);
    for (unsigned i = threadIdx.x; i < IN / 8; i += 32 * WARPS) {
        uint4 eight = row[i], weights = norm[i];
        store* numbers = reinterpret_cast<store*>(&eight);
        const store* factors = reinterpret_cast<const store*>(&weights);
        for (int j = 0; j < 8; j++)
            numbers[j] = narrow(load(narrow(load(numbers[j]) * inverse)) * load(factors[j]));
        out[(size)blockIdx.x * (IN / 8) + i] = eight;
    }
}
