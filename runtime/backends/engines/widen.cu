// A stored matrix in the dtype: matrix [outs, IN] -> whole [outs, IN]. Compiled by NVRTC; numbers.cuh and packs.cuh are put
// before it, and its macros are theirs and IN.

typedef unsigned long long size;

// grid: a thread for each pack
extern "C" __global__ void widen(const uint4* matrix, const store* scales, uint4* whole, size packs)
{
    let_next_begin();
    await_inputs();
    size i = (size)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    uint4 pack = __ldcs(matrix + i);
#if BITS == 8
    float scale = load(scales[i / (IN / PACK)]);
#elif BITS == 4
    unsigned scale = both(scales[i / (BLOCK / PACK)]);
#else
    unsigned scale = 0;
#endif
#pragma unroll
    for (int e = 0; e < PACK / 8; e++) whole[i * (PACK / 8) + e] = whole_of(pack, e, scale);
}
