// A stored matrix in the dtype: matrix [outs, IN] -> whole [outs, IN]. Compiled by NVRTC; numbers.cuh, mma.cuh and packs.cuh
// are put before it, and its macros are theirs and IN.

typedef unsigned long long size;

// A thread for each eight numbers, so that neighbours write side by side.
extern "C" __global__ void widen(const unsigned* matrix, const store* scales, uint4* whole, size eights)
{
    size i = (size)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= eights) return;
    uint4 pack = make_uint4(__ldcs(matrix + i * BITS / 4), 0, 0, 0);
#if BITS == 8
    pack.y = __ldcs(matrix + i * 2 + 1);
    float scale = load(scales[i / (IN / 8)]);
#else
    unsigned scale = both(scales[i / (BLOCK / 8)]);
#endif
    whole[i] = whole_of(pack, 0, scale);
}
