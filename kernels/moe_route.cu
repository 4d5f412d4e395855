// moe_route: score[t, e] = sigmoid(x[t] · gate[e]); the K experts with the largest score + bias (equal: the lower index);
// weight = score, divided by (their sum + 1e-6) if normalised, times the scaling factor.
// moe_lists: the (token, k) pairs of each expert, in token order, and the list of experts that have any.
//
// Shapes: x [T, H], gate [E, H], bias [E] f32 or null; pair p = t · K + k: pair_weight [T · K] f32, pair_expert [T · K];
// sorted_pairs [T · K], offsets [E + 1], active [E], active_count [1]. E <= 64, E a multiple of 8, K <= 8, H a multiple of 32.
// Router product accumulated and kept in f32 (bf16 inputs).
// Grid: one block of 8 warps per 16 tokens; a warp owns every eighth 32 of H for all experts, partial sums meet in shared memory and
// are added in warp order. With at most 16 tokens the one block also makes the lists, so a decode step needs no second kernel.
// moe_lists: one block per expert, 1,024 threads; it counts the smaller experts' pairs for its own offset.
// Cost: E · H · 2 bytes from L2 per 16 tokens.
#include "common.cuh"

#define ROUTE_WARPS 8
#define ROUTE_TOKENS 16

template <typename T>
DEVICE void route(const T *__restrict__ x, const T *__restrict__ gate, const float *__restrict__ bias, float *__restrict__ pair_weight,
                  int *__restrict__ pair_expert, int *__restrict__ sorted_pairs, int *__restrict__ offsets, int *__restrict__ active,
                  int *__restrict__ active_count, int tokens, int H, int E, int K, int normalise, float scaling) {
    extern __shared__ float logits[];  // [warps][16 tokens][E]
    __shared__ int chosen[ROUTE_TOKENS * 8];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int t0 = blockIdx.x * ROUTE_TOKENS;
    pdl_launch();
    pdl_wait();
    for (int e0 = 0; e0 < E; e0 += 16) {
        float d[2][4] = {};
        const bool low = e0 + g < E, high = e0 + g + 8 < E;
        const T *w0 = gate + (size_t)(e0 + g) * H + t * 8;
        const T *w1 = w0 + (size_t)8 * H;
        #pragma unroll 4
        for (int k = warp * 32; k < H; k += ROUTE_WARPS * 32) {
            const uint4 zero = make_uint4(0, 0, 0, 0);
            const uint4 a = low ? *reinterpret_cast<const uint4 *>(w0 + k) : zero;
            const uint4 b = high ? *reinterpret_cast<const uint4 *>(w1 + k) : zero;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int m = t0 + i * 8 + g;
                const uint4 v = m < tokens ? *reinterpret_cast<const uint4 *>(x + (size_t)m * H + k + t * 8) : zero;
                mma16816<T>(d[i], a.x, b.x, a.y, b.y, v.x, v.y);
                mma16816<T>(d[i], a.z, b.z, a.w, b.w, v.z, v.w);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int e = e0 + g + j / 2 * 8, m = i * 8 + 2 * t + j % 2;
                if (e < E) logits[(warp * ROUTE_TOKENS + m) * E + e] = d[i][j];
            }
    }
    __syncthreads();
    for (int m = warp; m < ROUTE_TOKENS && t0 + m < tokens; m += ROUTE_WARPS) {
        float score[2], rank[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int e = lane + h * WARP;
            score[h] = 0.f;
            rank[h] = -INFINITY;
            if (e < E) {
                float sum = 0.f;
#pragma unroll
                for (int i = 0; i < ROUTE_WARPS; i++) sum += logits[(i * ROUTE_TOKENS + m) * E + e];
                score[h] = 1.f / (1.f + expf(-sum));
                rank[h] = score[h] + (bias ? bias[e] : 0.f);
                if (!(rank[h] > -INFINITY)) rank[h] = -3.0e38f;  // NaN: still a valid expert
            }
        }
        float total = 0.f, mine = 0.f;
        int expert = 0;
        for (int k = 0; k < K; k++) {
            const bool second = rank[1] > rank[0];
            float best = second ? rank[1] : rank[0], value = second ? score[1] : score[0];
            int at = lane + (second ? WARP : 0);
#pragma unroll
            for (int o = 16; o; o >>= 1) {
                const float other = __shfl_xor_sync(FULL, best, o), other_value = __shfl_xor_sync(FULL, value, o);
                const int other_at = __shfl_xor_sync(FULL, at, o);
                if (other > best || (other == best && other_at < at)) {
                    best = other;
                    value = other_value;
                    at = other_at;
                }
            }
            total += value;
            if (lane == k) {
                mine = value;
                expert = at;
            }
            if (at % WARP == lane) rank[at / WARP] = -INFINITY;
        }
        if (lane < K) {
            const int p = (t0 + m) * K + lane;
            pair_weight[p] = (normalise ? mine / (total + 1e-6f) : mine) * scaling;
            pair_expert[p] = expert;
            chosen[m * K + lane] = expert;
        }
    }
    if (gridDim.x > 1) return;
    __syncthreads();
    const int pairs = tokens * K;
    __shared__ int count[64], begin[65];
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        int n = 0;
        for (int p = 0; p < pairs; p++) n += chosen[p] == e;
        count[e] = n;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int sum = 0, n = 0;
        for (int e = 0; e < E; e++) {
            begin[e] = sum;
            offsets[e] = sum;
            if (count[e]) active[n++] = e;
            sum += count[e];
        }
        offsets[E] = sum;
        *active_count = n;
    }
    __syncthreads();
    for (int p = threadIdx.x; p < pairs; p += blockDim.x) {
        int before = 0;
        for (int q = 0; q < p; q++) before += chosen[q] == chosen[p];
        sorted_pairs[begin[chosen[p]] + before] = p;
    }
}

#define ROUTE(T)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(ROUTE_WARPS *WARP)                                                         \
        moe_route_##T(const T *x, const T *gate, const float *bias, float *pair_weight, int *pair_expert, int *sorted_pairs, \
                      int *offsets, int *active, int *active_count, int tokens, int H, int E, int K, int normalise,         \
                      float scaling) {                                                                                      \
        route<T>(x, gate, bias, pair_weight, pair_expert, sorted_pairs, offsets, active, active_count, tokens, H, E, K,     \
                 normalise, scaling);                                                                                       \
    }
ROUTE(bf16)
ROUTE(f16)

extern "C" __global__ void __launch_bounds__(1024)
    moe_lists(const int *__restrict__ pair_expert, int *__restrict__ sorted_pairs, int *__restrict__ offsets, int *__restrict__ active,
              int *__restrict__ active_count, int pairs, int E) {
    __shared__ int scan[33];
    __shared__ int seen[64];
    const int e = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    pdl_launch();
    pdl_wait();
    if (threadIdx.x < 64) seen[threadIdx.x] = 0;
    __syncthreads();
    int smaller = 0;
    for (int p = threadIdx.x; p < pairs; p += blockDim.x) {
        const int other = pair_expert[p];
        smaller += other < e;
        if (e == 0) seen[other] = 1;
    }
    smaller = __reduce_add_sync(FULL, smaller);
    if (lane == 0) scan[warp] = smaller;
    __syncthreads();
    int begin = 0;
    for (int i = 0; i < 32; i++) begin += scan[i];
    int filled = begin;
    for (int p0 = 0; p0 < pairs; p0 += blockDim.x) {
        const int p = p0 + threadIdx.x;
        const bool mine = p < pairs && pair_expert[p] == e;
        const unsigned ballot = __ballot_sync(FULL, mine);
        __syncthreads();
        if (lane == 0) scan[warp] = __popc(ballot);
        __syncthreads();
        int before = 0, all = 0;
        for (int i = 0; i < 32; i++) {
            before += i < warp ? scan[i] : 0;
            all += scan[i];
        }
        if (mine) sorted_pairs[filled + before + __popc(ballot & ((1u << lane) - 1))] = p;
        filled += all;
    }
    if (threadIdx.x == 0) {
        offsets[e] = begin;
        if (e == E - 1) offsets[E] = filled;
        if (e == 0) {
            int n = 0;
            for (int i = 0; i < E; i++)
                if (seen[i]) active[n++] = i;
            *active_count = n;
        }
    }
}
