// moe_route: the router, and the norm before it: x = rms_norm(residual) · norm if `norm`, kept in `normed` for the experts;
// score[t, e] = sigmoid(x[t] · gate[e]); the K experts with the largest score + bias (equal: the lower index); weight = score, divided
// by (their sum + 1e-6) if normalised, times the scaling factor.
// moe_lists: the (token, k) pairs of each expert, in token order. For few tokens the experts list theirs themselves (moe_skinny.cu).
//
// Shapes: x [T, H] (the residual stream, or what is already normed), gate [E, H], bias [E] f32 or null; pair p = t · K + k: pair_weight
// [T · K] f32, pair_expert [T · K]; sorted_pairs [T · K], offsets [E + 1]. H a multiple of 32, E <= 64, K <= 8. The product is
// accumulated over the rounded x and kept in f32.
// Grid: persistent blocks of 16 warps over groups of up to 8 tokens, the width of one instruction, so a group costs what a token does; a
// warp owns every sixteenth 32 of H for all experts. Gates stay in registers from group to group, read before pdl_wait, where they fit
// (32 experts of 2,048). The warps' sums are added in their order: a token's result depends on no other.
// moe_lists: a block per expert, 32 warps; a warp takes a part of the pairs. It counts the smaller experts' pairs for its own offset.
// Shared memory of moe_route: the norm's weights [H], tokens of a group [group][H + 32], sums [16][group][E], scores [group][E].
// Memory has nothing else to do meanwhile: with many tokens, `ahead_bytes` at `ahead_of`, the experts' first weights, come to L2 (sm_90 on).
// Cost: E · H · 2 bytes from L2 per block, T · H · 2 per step.
#include "stream.cuh"

#define ROUTE_WARPS 16
#define ROUTE_THREADS (ROUTE_WARPS * WARP)
#define ROUTE_TILES 2  // of 16 experts at a time; the gates of the first stay in registers
#define ROUTE_UNITS 4  // of 32 inner elements, that a warp has so: H <= 2,048

// Of what is read next, to L2: `bytes` a multiple of 16.
#define AHEAD_CHUNK 16384
DEVICE void prefetch_l2(const void *p, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#endif
}

// A warp: the experts of a token with these scores.
DEVICE void choose_experts(const float *scores, const float *__restrict__ bias, float *__restrict__ pair_weight, int *__restrict__ pair_expert,
                           int E, int K, int normalise, float scaling) {
    const int lane = threadIdx.x % WARP;
    float score[2];
    uint32_t key[2];  // ordered as score + bias are; 0: none, or taken
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int e = lane + h * WARP;
        score[h] = e < E ? scores[e] : 0.f;
        float v = score[h] + (e < E && bias ? bias[e] : 0.f);
        if (!(v > -INFINITY)) v = -3.0e38f;  // NaN: still a valid expert
        v += 0.f;                            // -0 is 0
        const uint32_t bits = __float_as_uint(v);
        key[h] = e < E ? bits ^ ((int)bits < 0 ? 0xffffffffu : 0x80000000u) : 0;
    }
    float total = 0.f, mine = 0.f;
    int chosen = 0;
    for (int k = 0; k < K; k++) {
        const uint32_t most = __reduce_max_sync(FULL, max(key[0], key[1]));
        const unsigned low = __ballot_sync(FULL, key[0] == most), high = __ballot_sync(FULL, key[1] == most);
        const int e = low ? __ffs((int)low) - 1 : __ffs((int)high) - 1 + WARP;
        const float s = __shfl_sync(FULL, e < WARP ? score[0] : score[1], e % WARP);
        if (e == lane) key[0] = 0;
        if (e == lane + WARP) key[1] = 0;
        total += s;
        if (lane == k) {
            chosen = e;
            mine = s;
        }
    }
    if (lane < K) {
        pair_weight[lane] = (normalise ? mine / (total + 1e-6f) : mine) * scaling;
        pair_expert[lane] = chosen;
    }
}

template <typename T>
DEVICE void route(const T *__restrict__ x, const T *__restrict__ norm, float eps, T *__restrict__ normed, const T *__restrict__ gate,
                  const float *__restrict__ bias, float *__restrict__ pair_weight, int *__restrict__ pair_expert, int tokens, int group, int H,
                  int E, int K, int normalise, float scaling, const unsigned char *ahead_of, int ahead_bytes) {
    extern __shared__ __align__(16) unsigned char raw[];
    __shared__ float sums[ROUTE_WARPS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4, units = H / 32, vectors = H / 8, stride = vectors + 4;
    uint4 *weights = reinterpret_cast<uint4 *>(raw);                    // [vectors], of the norm
    uint4 *rows = weights + vectors;                                    // [group][stride]
    float *partial = reinterpret_cast<float *>(rows + group * stride);  // [warps][group][E]
    float *scores = partial + ROUTE_WARPS * group * E;                  // [group][E]
    pdl_launch();
    // Unit j of a warp is the (warp + 16 j)-th of H; a lane brings 16 bytes of expert g of a tile, and of expert g + 8.
    const auto gates = [&](int e0, int unit, int half) {
        const int e = e0 + half * 8 + g;
        if (e >= E || unit >= units) return make_uint4(0, 0, 0, 0);
        return *reinterpret_cast<const uint4 *>(gate + e * H + unit * 32 + t * 8);
    };
    uint4 ahead[ROUTE_TILES][ROUTE_UNITS][2];
#pragma unroll
    for (int i = 0; i < ROUTE_TILES; i++)
#pragma unroll
        for (int j = 0; j < ROUTE_UNITS; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) ahead[i][j][half] = gates(i * 16, warp + j * ROUTE_WARPS, half);
    if (norm)
        for (int i = threadIdx.x; i < vectors; i += ROUTE_THREADS) weights[i] = reinterpret_cast<const uint4 *>(norm)[i];
    pdl_wait();
    for (int t0 = blockIdx.x * group; t0 < tokens; t0 += gridDim.x * group) {
        const int count = min(group, tokens - t0);
        const T *from = x + (size_t)t0 * H;
#pragma unroll 1
        for (int i = threadIdx.x; i < count * vectors; i += ROUTE_THREADS) {
            const int m = i / vectors;
            cp_async16(smem_address(rows + m * stride + i - m * vectors), from + (size_t)i * 8, true);
        }
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        if (t0 == blockIdx.x * group && lane == 0)
            for (int i = (blockIdx.x * ROUTE_WARPS + warp) * AHEAD_CHUNK; i < ahead_bytes; i += gridDim.x * ROUTE_WARPS * AHEAD_CHUNK)
                prefetch_l2(ahead_of + i, min(AHEAD_CHUNK, ahead_bytes - i));
        if (norm) {
            const int share = ROUTE_WARPS / group, m = warp / share, first = warp % share * WARP + lane;  // of a token: warps
            float sum = 0.f;
            uint4 *row = rows + m * stride;
            if (m < count)
#pragma unroll 1
                for (int i = first; i < vectors; i += share * WARP) {
                    float f[8];
                    unpack8<T>(row[i], f);
#pragma unroll
                    for (int j = 0; j < 8; j++) sum += f[j] * f[j];
                }
            sum = warp_sum(sum);
            if (lane == 0) sums[warp] = sum;
            __syncthreads();
            if (m < count) {
                sum = 0.f;
                for (int i = 0; i < share; i++) sum += sums[m * share + i];
                const float scale = rsqrtf(sum / H + eps);
#pragma unroll 1
                for (int i = first; i < vectors; i += share * WARP) {
                    float f[8], n[8];
                    unpack8<T>(row[i], f);
                    unpack8<T>(weights[i], n);
#pragma unroll
                    for (int j = 0; j < 8; j++) f[j] = f[j] * scale * n[j];
                    row[i] = pack8<T>(f);
                    reinterpret_cast<uint4 *>(normed + (size_t)(t0 + m) * H)[i] = row[i];
                }
            }
            __syncthreads();
        }
        // Experts are the 16-row side of the product, tokens the 8-wide side; columns past the last repeat it.
        const uint4 *row = rows + min(g, count - 1) * stride + t;
#pragma unroll 1
        for (int e0 = 0; e0 < E; e0 += 16 * ROUTE_TILES) {
            float d[ROUTE_TILES][4] = {};
            const auto multiply = [&](int tile, int unit, uint4 a, uint4 b) {
                const uint4 v = row[unit * 4];
                mma16816<T>(d[tile], a.x, b.x, a.y, b.y, v.x, v.y);
                mma16816<T>(d[tile], a.z, b.z, a.w, b.w, v.z, v.w);
            };
            if (e0 == 0)
#pragma unroll
                for (int j = 0; j < ROUTE_UNITS; j++)
#pragma unroll
                    for (int i = 0; i < ROUTE_TILES; i++)
                        if (warp + j * ROUTE_WARPS < units) multiply(i, warp + j * ROUTE_WARPS, ahead[i][j][0], ahead[i][j][1]);
#pragma unroll 1
            for (int unit = warp + (e0 ? 0 : ROUTE_UNITS * ROUTE_WARPS); unit < units; unit += ROUTE_WARPS)
#pragma unroll
                for (int i = 0; i < ROUTE_TILES; i++) multiply(i, unit, gates(e0 + i * 16, unit, 0), gates(e0 + i * 16, unit, 1));
#pragma unroll
            for (int i = 0; i < ROUTE_TILES; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int e = e0 + i * 16 + g + j / 2 * 8, m = 2 * t + j % 2;
                    if (e < E && m < count) partial[(warp * group + m) * E + e] = d[i][j];
                }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < count * E; i += ROUTE_THREADS) {
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < ROUTE_WARPS; w++) sum += partial[w * group * E + i];
            scores[i] = 1.f / (1.f + expf(-sum));
        }
        __syncthreads();
        if (warp < count)
            choose_experts(scores + warp * E, bias, pair_weight + (size_t)(t0 + warp) * K, pair_expert + (size_t)(t0 + warp) * K, E, K, normalise, scaling);
        // `scores` are written again two barriers later.
    }
}

#define ROUTE(T)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(ROUTE_THREADS)                                                              \
        moe_route_##T(const T *x, const T *norm, float eps, T *normed, const T *gate, const float *bias, float *pair_weight, \
                      int *pair_expert, int tokens, int group, int H, int E, int K, int normalise, float scaling,            \
                      const unsigned char *ahead_of, int ahead_bytes) {                                                      \
        route<T>(x, norm, eps, normed, gate, bias, pair_weight, pair_expert, tokens, group, H, E, K, normalise, scaling,     \
                 ahead_of, ahead_bytes);                                                                                     \
    }
ROUTE(bf16)
ROUTE(f16)

extern "C" __global__ void __launch_bounds__(1024)
    moe_lists(const int *__restrict__ pair_expert, int *__restrict__ sorted_pairs, int *__restrict__ offsets, int pairs, int E) {
    __shared__ int mine[32], below[32];
    const int e = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    // The warp's part of the pairs.
    const int part = (pairs + 1023) / 1024 * WARP, first = min(warp * part, pairs), last = min(first + part, pairs);
    pdl_launch();
    pdl_wait();
    int smaller = 0, own = 0;
#pragma unroll 4
    for (int p = first + lane; p < last; p += WARP) {
        const int other = __ldcg(pair_expert + p);
        smaller += other < e;
        own += other == e;
    }
    smaller = __reduce_add_sync(FULL, smaller);
    own = __reduce_add_sync(FULL, own);
    if (lane == 0) {
        mine[warp] = own;
        below[warp] = smaller;
    }
    __syncthreads();
    const int begin = __reduce_add_sync(FULL, below[lane]), all = __reduce_add_sync(FULL, mine[lane]);
    int at = begin + __reduce_add_sync(FULL, lane < warp ? mine[lane] : 0);
#pragma unroll 4
    for (int p0 = first; p0 < last; p0 += WARP) {
        const int p = p0 + lane;
        const bool hit = p < last && __ldcg(pair_expert + p) == e;
        const unsigned hits = __ballot_sync(FULL, hit);
        if (hit) sorted_pairs[at + __popc(hits & ((1u << lane) - 1))] = p;
        at += __popc(hits);
    }
    if (threadIdx.x == 0) {
        offsets[e] = begin;
        if (e == E - 1) offsets[E] = begin + all;
    }
}
