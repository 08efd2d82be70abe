// Draws tokens: logits [T, V] -> token ids [T], their logits [T], and their rows of the embedding table [T, IN], in place of those
// of the head, whose own pick has left the largest logit of each row in `token_logits`. Compiled by NVRTC; numbers.cuh and
// best.cuh are put before it, and for a quantized table also mma.cuh, packs.cuh and pick.cu; its macros are theirs and IN.
//
// The token at a position is the one with the largest (logit - top) / temperature + noise among those that the filters keep.
// runtime/decoding/sampling.py says why, and computes the same bits: so every product and sum is rounded by itself, and
// probabilities are added up as integers. Where the largest logit is not finite, the head's pick stays.
//
// A filter is a bound on logits: its key, whose order is that of the logits. `narrow` finds 8 bits of it at a time, from the
// highest on, by a histogram of the tokens that have the bits found so far: of their number for top-k, and then, among those that
// top-k keeps, of their probability for top-p. `draw` compares with both. Each block looks at a part of a row; the last of
// a row's blocks to end, told by `counters`, puts the parts together and leaves counters and histograms zeroed.

#define KEY_BITS (STORE == 32 ? 32 : 16)
#define EACH 8  // tokens of a thread, and of a counter of the generator
#define PER_BLOCK (EACH * THREADS)

struct Settings {
    unsigned long long seed;
    double top_p;
    float temperature, least;  // `least` is the logarithm of min_p
    unsigned long long top_k;
};

struct Row {
    unsigned key[2];  // the bounds of top-k and top-p, as far as they are known
    unsigned left, unused;  // tokens that top-k keeps with these bits
    unsigned long long above;  // the weight of tokens above these bits
    double limit;  // top-p keeps tokens while those above them weigh less than this
};

// Never contracted to one rounding, as a product and a sum may be.
__device__ inline float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }

__device__ inline unsigned key_of(store x) {
#if STORE == 32
    unsigned bits = __float_as_uint(x);
#else
    unsigned bits = x;
#endif
    const unsigned sign = 1u << (KEY_BITS - 1);
    if (bits == sign) bits = 0;  // -0 is 0
    return bits & sign ? ~bits & (sign | (sign - 1)) : bits | sign;
}

__device__ inline bool finite(float x) { return fabsf(x) < __int_as_float(0x7f800000); }

// exp(x) for x up to 0 as whole multiples of 2^-40.
__device__ inline unsigned long long weight(float x) {
    x = fmaxf(x, -40.0f);
    float n = rintf(mul(x, 1.4426950408889634f));
    float r = add(add(x, -mul(n, 0.693359375f)), -mul(n, -2.1219444005469058e-4f));
    const float factors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    float y = 1.0f / 5040;
#pragma unroll
    for (int i = 0; i < 7; i++) y = add(mul(y, r), factors[i]);
    return ((unsigned long long)(unsigned)mul(y, 16777216.0f) << 16) >> (int)-n;
}

// x = 2^exponent (1 + rest), 1 + rest from sqrt(1/2) to sqrt(2).
__device__ inline float split(float x, float* rest) {
    int bits = __float_as_int(x), exponent = (bits - 0x3f3504f3) >> 23;
    *rest = add(__int_as_float(bits - (exponent << 23)), -1.0f);
    return (float)exponent;
}

__device__ inline float log_of(float exponent, float rest) {
    float s = __fdiv_rn(rest, add(rest, 2.0f)), z = mul(s, s), y = 1.0f / 9;
    y = add(mul(y, z), 1.0f / 7);
    y = add(mul(y, z), 1.0f / 5);
    y = add(mul(y, z), 1.0f / 3);
    s = add(s, s);
    return add(mul(exponent, 0.6931471805599453f), add(s, mul(s, mul(z, y))));
}

__device__ inline float gumbel(unsigned bits) {
    bool near_1 = bits >= 0xb504f334u;
    float u = mul(add((float)(near_1 ? ~bits : bits), 0.5f), 2.3283064365386963e-10f), rest;
    float exponent = split(u, &rest);
    float drawn = near_1 ? -log_of(0.0f, -u) : -log_of(exponent, rest);
    exponent = split(drawn, &rest);
    return -log_of(exponent, rest);
}

// Four words of Philox4x64-10 for the counter (first, second, 0, 0) and the key (seed, 0).
__device__ inline void philox(unsigned long long first, unsigned long long second, unsigned long long seed, unsigned long long* c) {
    unsigned long long k0 = seed, k1 = 0;
    c[0] = first, c[1] = second, c[2] = c[3] = 0;
    for (int round = 0; round < 10; round++) {
        unsigned long long a = 0xd2e7470ee14c6c93ull, b = 0xca5a826395121157ull;
        unsigned long long high_a = __umul64hi(a, c[0]), high_b = __umul64hi(b, c[2]), low_a = a * c[0], low_b = b * c[2];
        c[0] = high_b ^ c[1] ^ k0, c[1] = low_b, c[2] = high_a ^ c[3] ^ k1, c[3] = low_a;
        k0 += 0x9e3779b97f4a7c15ull, k1 += 0xbb67ae8584caa73bull;
    }
}

__device__ inline float scaled_of(store logit, float top, float temperature) {
    return __fdiv_rn(add(load(logit), -top), temperature);
}

__device__ inline bool keeps_top_k(const Settings* s, unsigned vocabulary) { return s->top_k && s->top_k < vocabulary; }

// grid (parts of a row, T); the bits of `filter` (0: top-k, 1: top-p) below those that were found in `level` launches before.
extern "C" __global__ void __launch_bounds__(THREADS) narrow(
    const store* logits, const store* tops, const Settings* settings, Row* states, unsigned long long* sums, unsigned* counters,
    unsigned vocabulary, unsigned filter, unsigned level)
{
    __shared__ unsigned low[256], high[256], found;
    __shared__ unsigned long long above[THREADS];
    let_next_begin();
    await_inputs();
    float top = load(tops[blockIdx.y]), temperature = settings->temperature;
    bool by_k = keeps_top_k(settings, vocabulary);
    if (!finite(top) || !(filter ? settings->top_p < 1 : by_k)) return;
    const store* row = logits + (size)blockIdx.y * vocabulary;
    Row* state = states + blockIdx.y;
    const int shift = KEY_BITS - 8 * (level + 1);
    unsigned prefix = level ? state->key[filter] : 0, least = filter && by_k ? state->key[0] : 0;
    low[threadIdx.x] = high[threadIdx.x] = 0;
    __syncthreads();
    store logit[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        unsigned token = blockIdx.x * PER_BLOCK + i * THREADS + threadIdx.x;
        logit[i] = row[token < vocabulary ? token : vocabulary - 1];
    }
    unsigned digit = 0;
    unsigned long long run = 0;  // of this digit, not yet added: many logits have their highest bits in common
    auto flush = [&] {  // in two words, as sums of 2048 weights fill 52 bits
        if (run & 0xfffff) atomicAdd(low + digit, (unsigned)(run & 0xfffff));
        if (run >> 20) atomicAdd(high + digit, (unsigned)(run >> 20));
    };
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        float value = load(logit[i]);
        unsigned key = key_of(logit[i]);
        if (blockIdx.x * PER_BLOCK + i * THREADS + threadIdx.x >= vocabulary || value != value) continue;
        if (key < least || (level && key >> (shift + 8) != prefix)) continue;
        if (digit != (key >> shift & 255)) flush(), run = 0, digit = key >> shift & 255;
        run += filter ? weight(scaled_of(logit[i], top, temperature)) : 1;
    }
    flush();
    __syncthreads();
    unsigned long long* sum = sums + 256 * blockIdx.y + threadIdx.x;
    unsigned long long mine = ((unsigned long long)high[threadIdx.x] << 20) + low[threadIdx.x];
    if (mine) atomicAdd(sum, mine);
    if (!is_last(counters + blockIdx.y)) return;
    mine = __ldcg(sum);
    *sum = 0;
    unsigned long long upward = mine;  // of this digit and those above it
    for (int step = 1; step < THREADS; step *= 2) {
        above[threadIdx.x] = upward;
        __syncthreads();
        if (threadIdx.x + step < THREADS) upward += above[threadIdx.x + step];
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        found = 255;
        counters[blockIdx.y] = 0;
        if (filter && !level) state->limit = __dmul_rn(settings->top_p, (double)upward), state->above = 0;
        if (!filter && !level) state->left = (unsigned)settings->top_k;
    }
    __syncthreads();
    unsigned long long before = upward - mine + (filter ? state->above : 0);
    bool kept = filter ? mine && (before == 0 || (double)before < state->limit) : before < state->left && mine;
    if (kept) atomicMin(&found, threadIdx.x);
    __syncthreads();
    if (threadIdx.x != found) return;
    state->key[filter] = prefix << 8 | found;
    if (filter) state->above = before;
    else state->left -= (unsigned)before;
}

// grid (parts of a row, T)
extern "C" __global__ void __launch_bounds__(THREADS) draw(
    const store* logits, const long long* positions, const uint4* table, const store* scales, const Settings* settings,
    const Row* states, long long* token_ids, store* token_logits, uint4* embeddings, Best* parts, unsigned* counters,
    unsigned vocabulary)
{
    let_next_begin();
    await_inputs();
    float top = load(token_logits[blockIdx.y]), temperature = settings->temperature, least = settings->least;
    if (!finite(top)) return;
    const store* row = logits + (size)blockIdx.y * vocabulary;
    unsigned key = keeps_top_k(settings, vocabulary) ? states[blockIdx.y].key[0] : 0;
    if (settings->top_p < 1 && states[blockIdx.y].key[1] > key) key = states[blockIdx.y].key[1];
    Best mine = worst();
    unsigned first = blockIdx.x * PER_BLOCK + threadIdx.x * EACH;
    float scaled[EACH];
    unsigned kept = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        store logit = row[first + i < vocabulary ? first + i : vocabulary - 1];
        scaled[i] = scaled_of(logit, top, temperature);
        kept |= (unsigned)(first + i < vocabulary && scaled[i] >= least && key_of(logit) >= key) << i;
    }
    if (kept) {
        unsigned long long words[EACH / 2];
        philox(1 + first / EACH, positions[blockIdx.y] + 1, settings->seed, words);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (!(kept >> i & 1)) continue;
            Best one = {add(scaled[i], gumbel((unsigned)(words[i / 2] >> 32 * (i % 2)))), first + i};
            if (beats(one, mine)) mine = one;
        }
    }
    if (!best_of_row(&mine, parts, counters)) return;
    if (threadIdx.x == 0) {
        token_ids[blockIdx.y] = mine.token;
        token_logits[blockIdx.y] = row[mine.token];
    }
#if BITS == 16
    const store* from = (const store*)table + (size)mine.token * IN;
    store* to = (store*)embeddings + (size)blockIdx.y * IN;
    for (unsigned i = threadIdx.x; i < IN; i += THREADS) to[i] = from[i];
#else
    embed_row(table, scales, mine.token, embeddings + (size)blockIdx.y * (IN / 8));
#endif
}
