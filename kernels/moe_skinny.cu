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
// Grid: a block per SM walks a contiguous range of (active expert, tile, pass); moe_w2_add: of tiles, all active experts for each.
// An expert with more than TILES · 8 tokens takes several passes over a tile, whose weights then come from L2; passes are shared out
// evenly too.
// Cost: distinct experts · 3 · F · H · 2 bytes.
#include "stream.cuh"

#define MAX_PAIRS 1024

template <int TILES> struct ExpertShared : StreamShared<TILES> {
    int count[64];
    unsigned char expert[MAX_PAIRS];
    int list[STREAM_WARPS][TILES * 8];  // pairs of the expert at hand, one copy a warp
};

// Which experts have pairs, as a bit each.
template <class Shared> DEVICE unsigned long long read_pairs(Shared &shared, const int *pair_expert, int pairs) {
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

// As many pairs of expert e as the warp's list holds, in token order from the `from`-th on; returns how many.
template <class Shared> DEVICE int list_pairs(Shared &shared, int e, int from, int pairs) {
    const int lane = threadIdx.x % WARP;
    constexpr int MOST = sizeof(shared.list[0]) / sizeof(int);
    int *list = shared.list[threadIdx.x / WARP], found = -from;
    __syncwarp();
    for (int p0 = 0; p0 < pairs; p0 += WARP) {
        const bool hit = p0 + lane < pairs && shared.expert[p0 + lane] == e;
        const unsigned hits = __ballot_sync(FULL, hit);
        const int at = found + __popc(hits & ((1u << lane) - 1));
        if (hit && at >= 0 && at < MOST) list[at] = p0 + lane;
        found += __popc(hits);
    }
    __syncwarp();
    return min(found, MOST);
}

// A position in the order (expert, tile, pass).
struct Cursor {
    unsigned long long rest;  // the expert at hand and those after it
    int expert, tile, pass;
};

template <typename T, int TILES, bool GATED> struct ExpertWalk {
    const T *w;  // at the lane's column
    const int *count;
    Cursor at;
    int tiles, left, rows, K;  // left: items of the block

    __device__ __forceinline__ int passes(int e) const { return (count[e] + TILES * 8 - 1) / (TILES * 8); }

    // The block's share of all (expert, tile, pass).
    __device__ __forceinline__ void start(unsigned long long active) {
        int all = 0, first, last;
        for (unsigned long long rest = active; rest; rest &= rest - 1) all += passes(__ffsll((long long)rest) - 1);
        stream_range(all * tiles, first, last);
        left = last - first;
        at.rest = active;
        at.expert = at.tile = at.pass = 0;
        while (at.rest) {
            at.expert = __ffsll((long long)at.rest) - 1;
            const int n = passes(at.expert);
            if (first < n * tiles) {
                at.tile = first / n;
                at.pass = first % n;
                break;
            }
            first -= n * tiles;
            at.rest &= at.rest - 1;
        }
    }
    __device__ __forceinline__ void advance() {
        left--;
        if (++at.pass * TILES * 8 < count[at.expert]) return;
        at.pass = 0;
        if (++at.tile < tiles) return;
        at.tile = 0;
        at.rest &= at.rest - 1;
        at.expert = max(__ffsll((long long)at.rest) - 1, 0);
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
    const unsigned long long active = read_pairs(shared, pair_expert, pairs);
    ExpertWalk<T, TILES, GATED> here{w + column, shared.count, {}, rows / ROWS, 0, rows, K};
    here.start(active);
    uint4 v[TILES][STREAM_STEPS];
    int buffer = 0, loaded = -1, loaded_pass = 0, count = 0;
    const int *list = shared.list[threadIdx.x / WARP];
    const auto load = [&] {
        if (here.left <= 0 || (here.at.expert == loaded && here.at.pass == loaded_pass)) return;
        loaded = here.at.expert;
        loaded_pass = here.at.pass;
        count = list_pairs(shared, loaded, loaded_pass * TILES * 8, pairs);
        const T *from[TILES];
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const int pair = i * 8 + g < count ? list[i * 8 + g] : -1;
            from[i] = pair < 0 ? nullptr : x + (size_t)(GATED ? pair / per_token : pair) * K + column;
        }
        // In the order in which they are multiplied.
#pragma unroll
        for (int s = 0; s < STREAM_STEPS; s++)
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                v[i][s] = make_uint4(0, 0, 0, 0);
                if (from[i] && s < steps) v[i][s] = fresh16(from[i] + s * 32);
            }
    };
    // What the previous kernel leaves is read before the queue fills, or it would wait behind it.
    if (GATED) load();
    Stream<T, TILES, ExpertWalk<T, TILES, GATED>> stream(shared, steps, here);
    if (!GATED) {
        pdl_launch();
        pdl_wait();
    }
    while (here.left > 0) {
        load();
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

#define ADD_DEPTH StreamDepth<1>::value

// Units of moe_w2_add carry the lane's 16 bytes of a token beside the weights: their expert changes too often for a load to be waited
// for, which stands behind what is under way.
struct AddShared {
    uint4 queue[ADD_DEPTH][3][STREAM_THREADS];
    float partial[2][STREAM_WARPS][1][16][9];
    int count[64];
    unsigned char expert[MAX_PAIRS];
    int list[STREAM_WARPS][8];
    float sum[8][16];
};

// The order of moe_w2_add's units: tiles of 16 rows, all active experts for each, the steps of K.
template <typename T> struct SumWalk {
    const T *w;  // at the lane's column
    unsigned long long active, rest;
    int tile, end, step, steps, rows, K;
    __device__ __forceinline__ bool done() const { return tile >= end; }
    __device__ __forceinline__ int expert() const { return __ffsll((long long)rest) - 1; }
    __device__ __forceinline__ const T *weights() const {
        return w + ((size_t)expert() * rows + tile * 16 + threadIdx.x % WARP / 4) * K + step * 32;
    }
    // Whether another expert begins.
    __device__ __forceinline__ bool advance() {
        if (++step < steps) return false;
        step = 0;
        rest &= rest - 1;
        if (!rest) {
            rest = active;
            tile++;
        }
        return true;
    }
};

template <typename T>
DEVICE void experts_add(const T *x, const T *w, const int *pair_expert, const float *pair_weight, T *residual, int tokens, int rows, int K, int per_token) {
    extern __shared__ __align__(128) unsigned char raw[];
    auto &shared = *reinterpret_cast<AddShared *>(raw);
    const int g = threadIdx.x % WARP / 4, column = stream_column(K), steps = K / 256, pairs = tokens * per_token;
    const int m = threadIdx.x / 16, r = threadIdx.x % 16;  // thread (m, r) adds up the m-th pair of an expert
    if (threadIdx.x < 64) shared.count[threadIdx.x] = 0;
    if (threadIdx.x < 128) shared.sum[m][r] = 0.f;
    __syncthreads();
    const unsigned long long active = read_pairs(shared, pair_expert, pairs);
    int begin, end;
    stream_range(rows / 16, begin, end);
    const uint64_t policy = evict_first();
    const uint32_t slots = smem_address(&shared.queue[0][0][threadIdx.x]);
    constexpr uint32_t PLACE = STREAM_THREADS * 16, UNIT = 3 * PLACE;
    const int *list = shared.list[threadIdx.x / WARP];
    // The pair whose token the lane brings for an expert, or -1.
    const auto pair_of = [&](int expert, int index) {
        const int count = list_pairs(shared, expert, 0, pairs);
        return index < count ? list[index] : -1;
    };
    const auto bring_weights = [&](const SumWalk<T> &at, int slot) {
        const T *p = at.weights();
        copy_weights(slots + slot * UNIT, p, policy);
        copy_weights(slots + slot * UNIT + PLACE, p + (size_t)8 * K, policy);
    };
    const auto bring_token = [&](const SumWalk<T> &at, int slot, int pair) {
        const T *p = x + (size_t)max(pair, 0) * K + column + at.step * 32;
        cp_async16(slots + slot * UNIT + 2 * PLACE, p, pair >= 0);
    };
    const SumWalk<T> first{w + column, active, active, begin, end, 0, steps, rows, K};
    SumWalk<T> ahead = first;
    for (int i = 0; i < ADD_DEPTH; i++) {
        if (!ahead.done()) {
            bring_weights(ahead, i);
            ahead.advance();
        }
        cp_async_commit();
    }
    pdl_launch();
    pdl_wait();
    int pair = pair_of(first.expert(), g);
    ahead = first;
    for (int i = 0; i < ADD_DEPTH; i++) {
        if (!ahead.done()) {
            bring_token(ahead, i, pair);
            if (ahead.advance()) pair = pair_of(ahead.expert(), g);
        }
        cp_async_commit();
    }
    int buffer = 0, slot = 0;
    for (int tile = begin; tile < end; tile++) {
        for (unsigned long long rest = active; rest; rest &= rest - 1) {
            const int mine = pair_of(__ffsll((long long)rest) - 1, m);
            const float weight = mine >= 0 ? __ldcg(pair_weight + mine) : 0.f;
            float d[1][2][4] = {};
            for (int s = 0; s < steps; s++) {
                cp_async_wait<ADD_DEPTH - 1>();
                const uint4 a = shared.queue[slot][0][threadIdx.x], b = shared.queue[slot][1][threadIdx.x], v = shared.queue[slot][2][threadIdx.x];
                mma16816<T>(d[0][0], a.x, b.x, a.y, b.y, v.x, v.y);
                mma16816<T>(d[0][1], a.z, b.z, a.w, b.w, v.z, v.w);
                if (!ahead.done()) {
                    bring_weights(ahead, slot);
                    bring_token(ahead, slot, pair);
                    if (ahead.advance()) pair = pair_of(ahead.expert(), g);
                }
                cp_async_commit();
                slot = (slot + 1) % ADD_DEPTH;
            }
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
    extern "C" __global__ void __launch_bounds__(STREAM_THREADS, 1)                                                             \
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
