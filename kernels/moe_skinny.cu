// The experts of a few tokens: h[p] = silu(w1_e x) ⊙ (w3_e x), then weight_p · w2_e h[p], for every pair p = (token, k) of every
// expert e that has any. An expert's weights are read once while its tokens pass (include/stream.cuh).
//
// moe_w13_skinny  h [T · K, F] of x [T, H]; tiles of 8 rows of w1 and the 8 of w3 beside them
// moe_w2_skinny   delta [T · K, H], weighted; the sum over k happens where the residual is read (add_rms_norm with parts = K)
// moe_w2_add      residual [T, H] += Σ_k delta, T <= 8, summed in f32 in the order of the experts' numbers; rounded once
//
// Shapes: w13 [E, 2F, H] (w1 rows, then w3), w2 [E, H, F]; pair_expert, pair_weight [T · K]. H, F multiples of 256 up to 2,048; E <= 64;
// T · K <= 1,024. f32 accumulation; h and delta are rounded to the element type once.
// Every block makes the experts' lists for itself from pair_expert. moe_w13 lets its successor begin only once it has itself waited
// for the router: so moe_w2 knows the experts, and has its first weights under way, before h is there.
// Grid: a block per SM walks a contiguous range of (active expert, tile); moe_w2_add: of tiles, all active experts for each.
// An expert with more than TILES · 8 tokens takes several passes over a tile, whose weights then come from L2.
// Cost: distinct experts · 3 · F · H · 2 bytes.
#include "stream.cuh"

#define MAX_PAIRS 1024

template <int TILES> struct ExpertShared : StreamShared<TILES> {
    int count[64];
    unsigned char expert[MAX_PAIRS];
    int list[STREAM_WARPS][TILES * 8];  // pairs of the expert at hand, one copy a warp
    float sum[8][16];                   // moe_w2_add
};

// Which experts have pairs, as a bit each.
template <int TILES> DEVICE unsigned long long read_pairs(ExpertShared<TILES> &shared, const int *pair_expert, int pairs) {
    for (int p = threadIdx.x; p < pairs; p += STREAM_THREADS) {
        const int e = (int)fresh4(pair_expert + p);
        shared.expert[p] = e;
        atomicAdd(&shared.count[e], 1);
    }
    __syncthreads();
    const int lane = threadIdx.x % WARP;
    const unsigned low = __ballot_sync(FULL, shared.count[lane] > 0), high = __ballot_sync(FULL, shared.count[lane + WARP] > 0);
    return low | (unsigned long long)high << 32;
}

// Pairs [from, from + TILES · 8) of expert e, in token order, to the warp's list; returns how many.
template <int TILES> DEVICE int list_pairs(ExpertShared<TILES> &shared, int e, int from, int pairs) {
    const int lane = threadIdx.x % WARP;
    int *list = shared.list[threadIdx.x / WARP], found = -from;
    __syncwarp();
    for (int p0 = 0; p0 < pairs; p0 += WARP) {
        const bool hit = p0 + lane < pairs && shared.expert[p0 + lane] == e;
        const unsigned hits = __ballot_sync(FULL, hit);
        const int at = found + __popc(hits & ((1u << lane) - 1));
        if (hit && at >= 0 && at < TILES * 8) list[at] = p0 + lane;
        found += __popc(hits);
    }
    __syncwarp();
    return min(found, TILES * 8);
}

// A position in the order (expert, tile, pass).
struct Cursor {
    unsigned long long rest;  // the expert at hand and those after it
    int expert, tile, pass;
    __device__ __forceinline__ void start(unsigned long long active, int skip) {
        rest = active;
        for (int i = 0; i < skip; i++) rest &= rest - 1;
        expert = __ffsll((long long)rest) - 1;
        pass = 0;
    }
};

template <typename T, int TILES, bool GATED> struct ExpertWalk {
    const T *w;  // at the lane's column
    const int *count;
    Cursor at;
    int tiles, left, rows, K;  // left: tiles of the block
    __device__ __forceinline__ void advance() {
        if (++at.pass * TILES * 8 < count[at.expert]) return;
        at.pass = 0;
        left--;
        if (++at.tile < tiles) return;
        at.tile = 0;
        at.rest &= at.rest - 1;
        at.expert = __ffsll((long long)at.rest) - 1;
    }
    __device__ __forceinline__ bool next(const T *&p0, const T *&p1) {
        if (left <= 0) return false;
        const int g = threadIdx.x % WARP / 4;
        const T *from = w + ((size_t)at.expert * rows * (GATED ? 2 : 1) + at.tile * (GATED ? 8 : 16) + g) * K;
        p0 = from;
        p1 = from + (size_t)(GATED ? rows : 8) * K;
        advance();
        return true;
    }
};

template <typename T, int TILES, bool GATED>
DEVICE void experts(const T *x, const T *w, const int *pair_expert, const float *pair_weight, T *out, int tokens, int rows, int K, int per_token) {
    constexpr int ROWS = GATED ? 8 : 16, OUTS = (TILES * 8 * ROWS + STREAM_THREADS - 1) / STREAM_THREADS;
    extern __shared__ __align__(128) unsigned char raw[];
    auto &shared = *reinterpret_cast<ExpertShared<TILES> *>(raw);
    const int g = threadIdx.x % WARP / 4, column = stream_column(K), steps = K / 256, pairs = tokens * per_token;
    if (threadIdx.x < 64) shared.count[threadIdx.x] = 0;
    __syncthreads();
    if (GATED) {
        pdl_wait();
        pdl_launch();
    }
    const unsigned long long active = read_pairs<TILES>(shared, pair_expert, pairs);
    const int tiles = rows / ROWS;
    int first, last;
    stream_range(__popcll((long long)active) * tiles, first, last);
    ExpertWalk<T, TILES, GATED> walk{w + column, shared.count, {}, tiles, last - first, rows, K};
    walk.at.start(active, first / tiles);
    walk.at.tile = first % tiles;
    ExpertWalk<T, TILES, GATED> here = walk;
    Stream<T, TILES, ExpertWalk<T, TILES, GATED>> stream(shared, steps, walk);
    if (!GATED) {
        pdl_launch();
        pdl_wait();
    }
    uint4 v[TILES][STREAM_STEPS];
    int buffer = 0, loaded = -1, loaded_pass = 0, count = 0;
    const int *list = shared.list[threadIdx.x / WARP];
    while (here.left > 0) {
        if (here.at.expert != loaded || here.at.pass != loaded_pass) {
            loaded = here.at.expert;
            loaded_pass = here.at.pass;
            count = list_pairs<TILES>(shared, loaded, loaded_pass * TILES * 8, pairs);
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                const int pair = i * 8 + g < count ? list[i * 8 + g] : -1;
                const T *from = x + (size_t)(GATED ? pair / per_token : pair) * K + column;
#pragma unroll
                for (int s = 0; s < STREAM_STEPS; s++) {
                    v[i][s] = make_uint4(0, 0, 0, 0);
                    if (pair >= 0 && s < steps) v[i][s] = fresh16(from + s * 32);
                }
            }
        }
        float d[TILES][2][4] = {};
        stream.multiply(v, steps, (count + 7) / 8, d);
        stream_partial<TILES>(shared, buffer, d);
        __syncthreads();
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            const int j = o * STREAM_THREADS + threadIdx.x, r = j % ROWS, m = j / ROWS;
            if (m >= count) continue;
            const int pair = list[m];
            const float sum = stream_sum<TILES>(shared, buffer, r, m);
            out[(size_t)pair * rows + here.at.tile * ROWS + r] =
                from_f32<T>(GATED ? silu(sum) * stream_sum<TILES>(shared, buffer, r + 8, m) : sum * __ldcg(pair_weight + pair));
        }
        buffer ^= 1;
        here.advance();
    }
    cp_async_wait<0>();
}

// Tiles of 16 rows, all active experts for each.
template <typename T> struct SumWalk {
    const T *w;
    unsigned long long active, rest;
    int tile, end, rows, K;
    __device__ __forceinline__ bool next(const T *&p0, const T *&p1) {
        if (!rest) {
            rest = active;
            tile++;
        }
        if (tile >= end) return false;
        const int expert = __ffsll((long long)rest) - 1;
        rest &= rest - 1;
        p0 = w + ((size_t)expert * rows + tile * 16 + threadIdx.x % WARP / 4) * K;
        p1 = p0 + (size_t)8 * K;
        return true;
    }
};

template <typename T>
DEVICE void experts_add(const T *x, const T *w, const int *pair_expert, const float *pair_weight, T *residual, int tokens, int rows, int K, int per_token) {
    extern __shared__ __align__(128) unsigned char raw[];
    auto &shared = *reinterpret_cast<ExpertShared<1> *>(raw);
    const int g = threadIdx.x % WARP / 4, column = stream_column(K), steps = K / 256, pairs = tokens * per_token;
    if (threadIdx.x < 64) shared.count[threadIdx.x] = 0;
    if (threadIdx.x < 128) shared.sum[threadIdx.x / 16][threadIdx.x % 16] = 0.f;
    __syncthreads();
    const unsigned long long active = read_pairs<1>(shared, pair_expert, pairs);
    int begin, end;
    stream_range(rows / 16, begin, end);
    Stream<T, 1, SumWalk<T>> stream(shared, steps, SumWalk<T>{w + column, active, active, begin, end, rows, K});
    pdl_launch();
    pdl_wait();
    // The next expert's tokens are on their way while one's weights are multiplied.
    uint4 v[1][STREAM_STEPS], ahead[STREAM_STEPS];
    int mine = -1, mine_ahead = -1;  // thread (m, r) adds up pair m of an expert
    const int m = threadIdx.x / 16, r = threadIdx.x % 16;
    const int *list = shared.list[threadIdx.x / WARP];
    const auto prefetch = [&](int expert) {
        const int count = list_pairs<1>(shared, expert, 0, pairs);
        const int pair = g < count ? list[g] : -1;
        mine_ahead = m < count ? list[m] : -1;
#pragma unroll
        for (int s = 0; s < STREAM_STEPS; s++) {
            ahead[s] = make_uint4(0, 0, 0, 0);
            if (pair >= 0 && s < steps) ahead[s] = fresh16(x + (size_t)pair * K + column + s * 32);
        }
    };
    int buffer = 0;
    if (begin < end) prefetch(__ffsll((long long)active) - 1);
    for (int tile = begin; tile < end; tile++) {
        for (unsigned long long rest = active; rest;) {
            mine = mine_ahead;
#pragma unroll
            for (int s = 0; s < STREAM_STEPS; s++) v[0][s] = ahead[s];
            rest &= rest - 1;
            if (rest || tile + 1 < end) prefetch(__ffsll((long long)(rest ? rest : active)) - 1);
            const float weight = mine >= 0 ? __ldcg(pair_weight + mine) : 0.f;
            float d[1][2][4] = {};
            stream.multiply(v, steps, 1, d);
            stream_partial<1>(shared, buffer, d);
            __syncthreads();
            if (mine >= 0) shared.sum[mine / per_token][r] += weight * stream_sum<1>(shared, buffer, r, m);
            buffer ^= 1;
        }
        __syncthreads();
        if (threadIdx.x < 128) {
            if (m < tokens) {
                T *to = residual + (size_t)m * rows + tile * 16 + r;
                *to = from_f32<T>(fresh(to) + shared.sum[m][r]);
            }
            shared.sum[m][r] = 0.f;
        }
        // The next addition comes after the next __syncthreads.
    }
    cp_async_wait<0>();
}

#define EXPERT(NAME, BODY, T)                                                                                                \
    extern "C" __global__ void __launch_bounds__(STREAM_THREADS)                                                             \
        NAME(const T *x, const T *w, const int *pair_expert, const float *pair_weight, T *out, int tokens, int rows, int K,  \
             int per_token) {                                                                                                \
        BODY(x, w, pair_expert, pair_weight, out, tokens, rows, K, per_token);                                               \
    }
#define TILED(T, TILES)                                                \
    EXPERT(moe_w13_skinny_##T##_##TILES, (experts<T, TILES, true>), T) \
    EXPERT(moe_w2_skinny_##T##_##TILES, (experts<T, TILES, false>), T)
#define SKINNY(T)                                    \
    TILED(T, 1)                                      \
    TILED(T, 2)                                      \
    TILED(T, 4)                                      \
    EXPERT(moe_w2_add_##T, (experts_add<T>), T)

SKINNY(bf16)
SKINNY(f16)
