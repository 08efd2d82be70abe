// Packs of 16 bytes of a stored matrix: PACK numbers, 8 in the dtype itself (BITS 16), 16 of 8 bits, 32 of 4 bits, the
// low half of a byte first. Put after numbers.cuh.
//
// A number of 8 bits is an integer; the scale of its row is for whoever adds them up. One of 4 bits is multiplied by the
// scale of its block of BLOCK numbers, which begins and ends with packs, and rounded as the dtype has it.

#define PACK (128 / BITS)

__device__ inline unsigned both(store x) { return x | (unsigned)x << 16; }

// Two numbers at once.
#if STORE == 16
__device__ inline unsigned minus(unsigned a, unsigned b) {
    unsigned y;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
__device__ inline unsigned times(unsigned a, unsigned b) {
    unsigned y;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
__device__ inline unsigned sixteenth_minus_72(unsigned a) {
    unsigned y;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(0x2c002c00), "r"(0xd480d480));
    return y;
}
#elif STORE == 17
__device__ inline unsigned minus(unsigned a, unsigned b) {  // a - b as a * 1 - b: SM 80 has no other
    unsigned y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(0x3f803f80), "r"(b ^ 0x80008000));
    return y;
}
__device__ inline unsigned times(unsigned a, unsigned b) {
    unsigned y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(0x80008000));  // -0: the sign of a zero stays
    return y;
}
#endif

// What is ORed to a small integer makes it a number of the dtype, that much too large.
#if STORE == 16
#define BASE 0x64006400u       // 1024
#else
#define BASE 0x43004300u       // 128
#endif

// Eight numbers of a pack, two in each of x, y, z, w. Those of 4 bits come as 0 4, 1 5, 2 6, 3 7: `mixed` brings others
// into that order, and `in_order` brings these out of it.
__device__ inline uint4 eight_of(const uint4& pack, int which, unsigned scale) {
#if BITS == 16
    return pack;
#elif BITS == 8
    const unsigned* words = reinterpret_cast<const unsigned*>(&pack) + 2 * which;
    unsigned result[4];
    for (int i = 0; i < 2; i++) {
        unsigned word = words[i] ^ 0x80808080u;  // 0 to 255 for -128 to 127
#if STORE == 16
        result[2 * i] = minus(__byte_perm(word, 0x64646464u, 0x4140), 0x64806480u);
        result[2 * i + 1] = minus(__byte_perm(word, 0x64646464u, 0x4342), 0x64806480u);
#else
        float numbers[4];
        for (int j = 0; j < 4; j++)
            numbers[j] = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7650 + j)) - 8388736.0f;
        for (int j = 0; j < 2; j++)
            result[2 * i + j] =
                __byte_perm(__float_as_uint(numbers[2 * j]), __float_as_uint(numbers[2 * j + 1]), 0x7632);
#endif
    }
    return make_uint4(result[0], result[1], result[2], result[3]);
#else
    unsigned word = reinterpret_cast<const unsigned*>(&pack)[which], result[4];
    for (int i = 0; i < 4; i++) {  // 0 to 15 for -8 to 7; fp16 has room for 16 times that, which saves a shift
#if STORE == 16
        if (i % 2) {
            unsigned number = (word >> (4 * i - 4) & 0x00f000f0u) ^ (BASE | 0x00800080u);
            result[i] = times(sixteenth_minus_72(number), scale);
            continue;
        }
#endif
        unsigned number = (word >> (4 * i) & 0x000f000fu) ^ (BASE | 0x00080008u);
        result[i] = times(minus(number, BASE | 0x00080008u), scale);
    }
    return make_uint4(result[0], result[1], result[2], result[3]);
#endif
}

__device__ inline uint4 mixed(const uint4& x) {
#if BITS == 4
    return make_uint4(__byte_perm(x.x, x.z, 0x5410), __byte_perm(x.x, x.z, 0x7632), __byte_perm(x.y, x.w, 0x5410),
                      __byte_perm(x.y, x.w, 0x7632));
#else
    return x;
#endif
}

__device__ inline uint4 in_order(const uint4& x) {
#if BITS == 4
    return make_uint4(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.z, x.w, 0x5410), __byte_perm(x.x, x.y, 0x7632),
                      __byte_perm(x.z, x.w, 0x7632));
#else
    return x;
#endif
}

// Eight numbers of a pack as the dtype has them, in order.
#if BITS == 8
__device__ inline uint4 whole_of(const uint4& pack, int which, float scale) {
    uint4 eight = eight_of(pack, which, 0);
    store* numbers = reinterpret_cast<store*>(&eight);
    for (int j = 0; j < 8; j++) numbers[j] = narrow(load(numbers[j]) * scale);
    return eight;
}
#else
__device__ inline uint4 whole_of(const uint4& pack, int which, unsigned scale) {
    return in_order(eight_of(pack, which, scale));
}
#endif
