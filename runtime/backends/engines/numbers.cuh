// Numbers in memory: STORE is 16 for fp16, 17 for bf16, 32 for fp32. Without any header, so NVRTC needs none.

#if STORE == 32
typedef float store;
__device__ inline float load(store x) { return x; }
__device__ inline store narrow(float x) { return x; }
#elif STORE == 16
typedef unsigned short store;
__device__ inline float load(store x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
__device__ inline store narrow(float x) {
    store y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
#else
typedef unsigned short store;
__device__ inline float load(store x) { return __uint_as_float((unsigned)x << 16); }
__device__ inline store narrow(float x) {
    if (x != x) return 0x7fc0;  // rounding would carry a NaN into the sign
    unsigned bits = __float_as_uint(x);
    return (store)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#endif
