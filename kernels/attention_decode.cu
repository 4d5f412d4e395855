// attention_decode: out[t, h] = Σ_j softmax_j(scale · q[t, h] · k[j, h / G]) v[j] over the cached context of a row of one token, G = Nq / Nk.
// attention_step: the same for a step of such rows alone, with what comes before: q and k heads of `qkv` are normed and turned here
// (qk_norm_rope.cu), and the token's K and V go to the cache at slot_mapping[t] (negative: nowhere).
//
// Shapes: qkv [T, (Nq + 2 Nk) 64] (attention_decode: its q part normed and turned), K and V cache [blocks, Nk, P, 64], block_tables
// [S, max_blocks], out [T, Nq 64]. D = 64, P a multiple of 16, G <= 4; softmax and accumulation in f32.
// Grid: (pieces, Nk, at most max_splits), 4 warps. The context is cut at fixed multiples of `split_tokens`, whatever the batch, so a
// row's sum never depends on its neighbours; within a split, warp w takes tiles w, w + 4, … of 32 tokens, and the warps' results are added in their
// order. The G query heads of a KV head stand on the M side of an MMA, so K and V are read once per group.
// Rows of several splits leave (unnormalised out, max, sum) in `partial`; the last block of a (row, KV head) to arrive adds them in split
// order, so that the result does not depend on timing. `partial` is [rows, Nq, max_splits, 66]; `arrived` [rows · Nk] holds zeros and is
// left so. split_tokens is a multiple of 128.
// A block takes splits z, z + gridDim.z, …, and a warp has two of its tiles under way, also from one split to the next.
// A warp's first two tiles are requested before pdl_wait in attention_step: what is cached was written by an earlier step. The new token's row
// of it is put in afterwards.
// Cost: bytes = context · Nk · 64 · 4 per row.
// Source of the idea: Flash-Decoding.
#include "stream.cuh"

#define DECODE_WARPS 4
#define DECODE_TILE 32
#define DECODE_STAGES 2

struct DecodeShared {
    unsigned char kv[DECODE_WARPS][DECODE_STAGES][2][DECODE_TILE * 128];  // K, V of a tile, in swizzled rows of 128 bytes
    unsigned char q[16 * 128];                                            // head within the group, 64 elements
    float out[DECODE_WARPS][4][66];                                       // of each warp: out, max, sum
    unsigned last;
};

DEVICE uint32_t swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// Copies DECODE_TILE tokens of a cache head, K and V; rows past `end` become zeros. Places are looked up before the first copy.
template <typename T>
DEVICE void load_tile(unsigned char *ks, unsigned char *vs, const T *k_cache, const T *v_cache, const uint32_t *blocks, int head, int Nk, int P,
                      int from, int end) {
    constexpr int TURNS = DECODE_TILE * 8 / WARP;
    const int lane = threadIdx.x % WARP, c = lane % 8;
    size_t at[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        const int token = min(from + i * 4 + lane / 8, end - 1);
        at[i] = (((size_t)__ldcg(blocks + token / P) * Nk + head) * P + token % P) * 64 + c * 8;
    }
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        const int r = i * 4 + lane / 8;
        cp_async16(smem_address(ks) + swizzled(r, c), k_cache + at[i], from + r < end);
        cp_async16(smem_address(vs) + swizzled(r, c), v_cache + at[i], from + r < end);
    }
}

// A head's elements lane and lane + 32, normed and turned.
template <typename T>
DEVICE void norm_and_turn(const T *head, const T *weight, float frequency, uint32_t position, float eps, float &a, float &b) {
    const int lane = threadIdx.x % WARP;
    a = fresh(head + lane);
    b = fresh(head + lane + 32);
    const float scale = rsqrtf(warp_sum(a * a + b * b) / 64.f + eps);
    a *= scale * to_f32<T>(weight[lane]);
    b *= scale * to_f32<T>(weight[lane + 32]);
    float sine, cosine;
    sincosf((float)position * frequency, &sine, &cosine);
    const float turned = a * cosine - b * sine;
    b = b * cosine + a * sine;
    a = turned;
}

template <typename T> DEVICE void put(unsigned char *tile, int row, int element, float v) {
    *reinterpret_cast<T *>(tile + swizzled(row, element / 8) + element % 8 * 2) = from_f32<T>(v);
}

template <typename T, bool STEP>
DEVICE void attend(const T *qkv, T *k_cache, T *v_cache, const uint32_t *block_tables, const int32_t *piece_row,
                   const uint32_t *row_starts, const uint32_t *context_lens, T *out, float *partial, unsigned *arrived, int Nq, int Nk, int P,
                   int max_blocks, float scale, int split_tokens, int max_splits, const T *q_norm, const T *k_norm, const float *inverse_frequency,
                   const int64_t *slot_mapping, float eps) {
    extern __shared__ __align__(128) unsigned char raw[];
    auto &shared = *reinterpret_cast<DecodeShared *>(raw);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int G = Nq / Nk, kv_head = blockIdx.y;
    pdl_launch();
    if (!STEP) pdl_wait();
    // The step's arrays are there before its first kernel begins.
    const int row = __ldcg(piece_row + blockIdx.x), at_row = max(row, 0);
    const int t0 = __ldcg(row_starts + at_row), context = __ldcg(context_lens + at_row);
    const bool mine = row >= 0 && (int)__ldcg(row_starts + at_row + 1) - t0 == 1 && (int)blockIdx.z * split_tokens < context;
    const uint32_t *blocks = block_tables + (size_t)at_row * max_blocks;
    constexpr int TURN = DECODE_WARPS * DECODE_TILE;
    // The warp's next tile to request, from split to split of the block: a split is whole turns.
    int next = blockIdx.z * split_tokens + warp * DECODE_TILE, turns = 0, stage = 0;
    const auto bring = [&] {
        if (mine && next < context)
            load_tile<T>(shared.kv[warp][stage][0], shared.kv[warp][stage][1], k_cache, v_cache, blocks, kv_head, Nk, P, next, context);
        cp_async_commit();
        stage = stage + 1 == DECODE_STAGES ? 0 : stage + 1;
        next += TURN;
        if (++turns * TURN == split_tokens) {
            turns = 0;
            next += (gridDim.z - 1) * split_tokens;
        }
    };
#pragma unroll
    for (int i = 0; i < DECODE_STAGES; i++) bring();
    if (STEP) pdl_wait();
    if (!mine) {
        cp_async_wait<0>();
        return;
    }

    // Queries: warp w brings head w of the group.
    const T *token = qkv + (size_t)t0 * (Nq + 2 * Nk) * 64;
    if (warp < G) {
        const T *head = token + (size_t)(kv_head * G + warp) * 64;
        if (STEP) {
            float a, b;
            norm_and_turn<T>(head, q_norm, inverse_frequency[lane], context - 1, eps, a, b);
            put<T>(shared.q, warp, lane, a);
            put<T>(shared.q, warp, lane + 32, b);
        } else if (lane < 8) {
            *reinterpret_cast<uint4 *>(shared.q + swizzled(warp, lane)) = fresh16(head + lane * 8);
        }
    }
    for (int i = G * 8 + threadIdx.x; i < 16 * 8; i += DECODE_WARPS * WARP)
        *reinterpret_cast<uint4 *>(shared.q + swizzled(i / 8, i % 8)) = make_uint4(0, 0, 0, 0);
    __syncthreads();
    uint32_t q[4][4];
#pragma unroll
    for (int k = 0; k < 4; k++) ldmatrix4(q[k], smem_address(shared.q) + swizzled(lane % 16, k * 2 + lane / 16));

    // Adds `n` results, the i-th at `at(i)`: elements 2 lane and 2 lane + 1 of a head. Other blocks' come from L2.
    float2 v;
    float top, total;
    const auto add = [&](int n, const auto &at, const auto &one, const auto &two) {
        top = -INFINITY;
        total = 0.f;
        v = make_float2(0.f, 0.f);
        for (int i = 0; i < n; i++) top = fmaxf(top, one(at(i) + 64));
        for (int i = 0; i < n; i++) {
            const float2 x = two(reinterpret_cast<const float2 *>(at(i) + lane * 2));
            const float high = one(at(i) + 64), weight = high == -INFINITY ? 0.f : exp2f(high - top);
            total += weight * one(at(i) + 65);
            v.x += weight * x.x;
            v.y += weight * x.y;
        }
    };
    const auto own = [](const auto *p) { return *p; };
    const auto theirs = [](const auto *p) { return __ldcg(p); };
    const auto store = [&](int head) {
        const float inverse = 1.f / total;
        *reinterpret_cast<uint32_t *>(out + ((size_t)t0 * Nq + head) * 64 + lane * 2) = pack2<T>(v.x * inverse, v.y * inverse);
    };
    const int splits = (context + split_tokens - 1) / split_tokens, head = kv_head * G + warp;
    float *const results = partial + ((size_t)row * Nq + head) * max_splits * 66;
    const float log2_scale = scale * 1.44269504f;
    for (int split = blockIdx.z; split < splits; split += gridDim.z) {
        float o[8][4] = {}, high = -INFINITY, sum = 0.f;  // of query head g; rows g + 8 are empty
        const int end = min(context, (split + 1) * split_tokens);
        for (int from = split * split_tokens + warp * DECODE_TILE; from < end; from += TURN) {
            unsigned char *ks = shared.kv[warp][stage][0], *vs = shared.kv[warp][stage][1];
            cp_async_wait<DECODE_STAGES - 1>();
            __syncwarp();
            const int newest = context - 1 - from;  // the token's row in this tile
            if (STEP && newest >= 0 && newest < DECODE_TILE) {
                const T *k_head = token + (size_t)(Nq + kv_head) * 64, *v_head = token + (size_t)(Nq + Nk + kv_head) * 64;
                float a, b;
                norm_and_turn<T>(k_head, k_norm, inverse_frequency[lane], context - 1, eps, a, b);
                put<T>(ks, newest, lane, a);
                put<T>(ks, newest, lane + 32, b);
                if (lane < 8) *reinterpret_cast<uint4 *>(vs + swizzled(newest, lane)) = fresh16(v_head + lane * 8);
                __syncwarp();
                const int64_t slot = slot_mapping[t0];
                if (slot >= 0 && lane < 16) {
                    T *cache = (lane < 8 ? k_cache : v_cache) + (((size_t)(slot / P) * Nk + kv_head) * P + slot % P) * 64 + lane % 8 * 8;
                    *reinterpret_cast<uint4 *>(cache) = *reinterpret_cast<const uint4 *>((lane < 8 ? ks : vs) + swizzled(newest, lane % 8));
                }
            }
            float s[DECODE_TILE / 8][4] = {};
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int j = 0; j < DECODE_TILE / 16; j++) {
                    uint32_t b[4];
                    ldmatrix4(b, smem_address(ks) + swizzled(j * 16 + lane % 16, k * 2 + lane / 16));
                    mma16816<T>(s[2 * j], q[k][0], q[k][1], q[k][2], q[k][3], b[0], b[2]);
                    mma16816<T>(s[2 * j + 1], q[k][0], q[k][1], q[k][2], q[k][3], b[1], b[3]);
                }
            float now = high;
#pragma unroll
            for (int j = 0; j < DECODE_TILE / 8; j++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    s[j][i] = from + j * 8 + 2 * t + i < context ? s[j][i] * log2_scale : -INFINITY;
                    now = fmaxf(now, s[j][i]);
                }
            now = fmaxf(now, __shfl_xor_sync(FULL, now, 1));
            now = fmaxf(now, __shfl_xor_sync(FULL, now, 2));
            const float shrink = high == -INFINITY ? 0.f : exp2f(high - now);
            high = now;
            sum *= shrink;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                o[j][0] *= shrink;
                o[j][1] *= shrink;
            }
            uint32_t p[DECODE_TILE / 16][2];
#pragma unroll
            for (int j = 0; j < DECODE_TILE / 8; j++) {
                const float e0 = s[j][0] == -INFINITY ? 0.f : exp2f(s[j][0] - high), e1 = s[j][1] == -INFINITY ? 0.f : exp2f(s[j][1] - high);
                sum += e0 + e1;
                p[j / 2][j % 2] = pack2<T>(e0, e1);
            }
#pragma unroll
            for (int k = 0; k < DECODE_TILE / 16; k++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    // V [token][d]: transposed on load, so that a register holds two tokens of one d.
                    uint32_t b[4];
                    ldmatrix4_trans(b, smem_address(vs) + swizzled(k * 16 + lane % 16, j * 2 + lane / 16));
                    mma16816<T>(o[2 * j], p[k][0], 0u, p[k][1], 0u, b[0], b[1]);
                    mma16816<T>(o[2 * j + 1], p[k][0], 0u, p[k][1], 0u, b[2], b[3]);
                }
            __syncwarp();
            bring();
        }
        sum += __shfl_xor_sync(FULL, sum, 1);
        sum += __shfl_xor_sync(FULL, sum, 2);
        if (g < G) {
            float *to = shared.out[warp][g];
#pragma unroll
            for (int j = 0; j < 8; j++) *reinterpret_cast<float2 *>(to + j * 8 + 2 * t) = make_float2(o[j][0], o[j][1]);
            if (t == 0) *reinterpret_cast<float2 *>(to + 64) = make_float2(high, sum);
        }
        __syncthreads();
        if (warp < G) {
            add(DECODE_WARPS, [&](int i) { return shared.out[i][warp]; }, own, own);
            if (splits == 1) {
                store(head);
            } else {
                float *to = results + split * 66;
                *reinterpret_cast<float2 *>(to + lane * 2) = v;
                if (lane == 0) *reinterpret_cast<float2 *>(to + 64) = make_float2(top, total);
            }
        }
        __syncthreads();  // the results have been read, and may be overwritten
    }
    if (splits == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned *counter = arrived + (size_t)row * Nk + kv_head;
        shared.last = atomicAdd(counter, 1) == min(splits, (int)gridDim.z) - 1;
        if (shared.last) *counter = 0;
    }
    __syncthreads();
    if (!shared.last || warp >= G) return;
    __threadfence();
    add(splits, [&](int i) { return results + i * 66; }, theirs, theirs);
    store(head);
}

#define ATTENTION(T)                                                                                                           \
    extern "C" __global__ void __launch_bounds__(DECODE_WARPS *WARP)                                                           \
        attention_decode_##T(const T *qkv, T *k_cache, T *v_cache, const uint32_t *block_tables, const int32_t *piece_row,     \
                             const uint32_t *row_starts, const uint32_t *context_lens, T *out, float *partial,                 \
                             unsigned *arrived, int Nq, int Nk, int P, int max_blocks, float scale, int split_tokens,          \
                             int max_splits) {                                                                                 \
        attend<T, false>(qkv, k_cache, v_cache, block_tables, piece_row, row_starts, context_lens, out, partial, arrived, Nq,  \
                         Nk, P, max_blocks, scale, split_tokens, max_splits, nullptr, nullptr, nullptr, nullptr, 0.f);         \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(DECODE_WARPS *WARP)                                                           \
        attention_step_##T(const T *qkv, T *k_cache, T *v_cache, const uint32_t *block_tables, const int32_t *piece_row,       \
                           const uint32_t *row_starts, const uint32_t *context_lens, T *out, float *partial,                   \
                           unsigned *arrived, int Nq, int Nk, int P, int max_blocks, float scale, int split_tokens,            \
                           int max_splits, const T *q_norm, const T *k_norm, const float *inverse_frequency,                   \
                           const int64_t *slot_mapping, float eps) {                                                           \
        attend<T, true>(qkv, k_cache, v_cache, block_tables, piece_row, row_starts, context_lens, out, partial, arrived, Nq,   \
                        Nk, P, max_blocks, scale, split_tokens, max_splits, q_norm, k_norm, inverse_frequency, slot_mapping,   \
                        eps);                                                                                                  \
    }
ATTENTION(bf16)
ATTENTION(f16)
