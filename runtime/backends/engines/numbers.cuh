// What all kernels share. Numbers in memory: STORE is 16 for fp16, 17 for bf16, 32 for fp32. Without any header, so NVRTC needs none.

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

// On SM 90 and later a kernel may begin while the one before it ends. What it does until `await_inputs` must not depend on
// that one; it then waits for that one's end, and so for all before it.
#if __CUDA_ARCH__ >= 900
__device__ inline void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ inline void await_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
__device__ inline void let_next_begin() {}
__device__ inline void await_inputs() {}
#endif
