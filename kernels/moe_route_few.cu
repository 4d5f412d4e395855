// moe_route_few: the router for few tokens, and the norm before it: x = rms_norm(residual) · norm if `norm`, kept in `normed` for the experts;
// score[e] = sigmoid(x · gate[e]); the K experts with the largest score + bias (equal: the lower index); weight = score, divided by
// (their sum + 1e-6) if normalised, times the scaling factor.
//
// Shapes: x [T, H] (the residual stream, or what is already normed), gate [E, H], bias [E] f32 or null; pair p = t · K + k: pair_weight
// [T · K] f32, pair_expert [T · K]. H a multiple of 8 up to 4,096, E <= 64, K <= 8. f32 accumulation over the rounded x.
// Grid: a block of 16 warps per token; a warp owns every sixteenth expert, its gates in registers before pdl_wait where they fit.
// Experts make their lists themselves (moe_skinny.cu).
// Cost: T · E · H · 2 bytes from L2.
#include "stream.cuh"

#define ROUTE_WARPS 16
#define ROUTE_AHEAD 2   // experts of a warp whose gates wait in registers
#define ROUTE_TURNS 8   // 16-byte pieces a lane of such a gate: H <= 2,048

template <typename T>
DEVICE void route(const T *x, const T *norm, float eps, T *normed, const T *gate, const float *bias, float *pair_weight, int *pair_expert, int H,
                  int E, int K, int normalise, float scaling) {
    __shared__ uint4 row[512];
    __shared__ float sums[ROUTE_WARPS], scores[64], selection[64];
    __shared__ int chosen[8];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, vectors = H / 8;
    const size_t token = blockIdx.x;
    pdl_launch();
    const bool fits = vectors <= ROUTE_TURNS * WARP;
    uint4 ahead[ROUTE_AHEAD][ROUTE_TURNS];
#pragma unroll
    for (int i = 0; i < ROUTE_AHEAD; i++)
#pragma unroll
        for (int j = 0; j < ROUTE_TURNS; j++) {
            const int e = warp + i * ROUTE_WARPS, c = j * WARP + lane;
            ahead[i][j] = make_uint4(0, 0, 0, 0);
            if (fits && e < E && c < vectors) ahead[i][j] = reinterpret_cast<const uint4 *>(gate + (size_t)e * H)[c];
        }
    uint4 scale_by = make_uint4(0, 0, 0, 0);
    if (norm && threadIdx.x < vectors) scale_by = reinterpret_cast<const uint4 *>(norm)[threadIdx.x];
    pdl_wait();
    uint4 mine = make_uint4(0, 0, 0, 0);
    if (threadIdx.x < vectors) mine = fresh16(x + token * H + threadIdx.x * 8);
    if (norm) {
        float f[8], n[8], sum = 0.f;
        unpack8<T>(mine, f);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += f[j] * f[j];
        const float scale = rsqrtf(block_sum<ROUTE_WARPS>(sum, sums) / H + eps);
        unpack8<T>(scale_by, n);
#pragma unroll
        for (int j = 0; j < 8; j++) f[j] = f[j] * scale * n[j];
        mine = pack8<T>(f);
        if (threadIdx.x < vectors) *reinterpret_cast<uint4 *>(normed + token * H + threadIdx.x * 8) = mine;
    }
    if (threadIdx.x < vectors) row[threadIdx.x] = mine;
    __syncthreads();
    const auto dot = [&](uint4 a, int c, float &sum) {
        float f[8], g[8];
        unpack8<T>(row[c], f);
        unpack8<T>(a, g);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += f[j] * g[j];
    };
#pragma unroll
    for (int i = 0; i < 64 / ROUTE_WARPS; i++) {
        const int e = warp + i * ROUTE_WARPS;
        if (e >= E) break;
        float sum = 0.f;
        if (i < ROUTE_AHEAD && fits) {
#pragma unroll
            for (int j = 0; j < ROUTE_TURNS; j++)
                if (j * WARP + lane < vectors) dot(ahead[min(i, ROUTE_AHEAD - 1)][j], j * WARP + lane, sum);
        } else {
            for (int c = lane; c < vectors; c += WARP) dot(reinterpret_cast<const uint4 *>(gate + (size_t)e * H)[c], c, sum);
        }
        sum = warp_sum(sum);
        if (lane == 0) scores[e] = 1.f / (1.f + expf(-sum));
    }
    __syncthreads();
    if (warp) return;
    // An expert's place is the number of those before it.
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int e = lane + h * WARP;
        float v = e < E ? scores[e] + (bias ? bias[e] : 0.f) : -INFINITY;
        if (e < E && !(v > -INFINITY)) v = -3.0e38f;  // NaN: still a valid expert
        selection[e] = v;
    }
    __syncwarp();
    int place[2] = {0, 0};
#pragma unroll 8
    for (int other = 0; other < E; other++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int e = lane + h * WARP;
            place[h] += selection[other] > selection[e] || (selection[other] == selection[e] && other < e);
        }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int e = lane + h * WARP;
        if (e < E && place[h] < K) chosen[place[h]] = e;
    }
    __syncwarp();
    if (lane < K) {
        float total = 0.f;
        for (int k = 0; k < K; k++) total += scores[chosen[k]];
        const int e = chosen[lane];
        const size_t p = token * K + lane;
        pair_weight[p] = (normalise ? scores[e] / (total + 1e-6f) : scores[e]) * scaling;
        pair_expert[p] = e;
    }
}

#define ROUTE(T)                                                                                                                \
    extern "C" __global__ void __launch_bounds__(ROUTE_WARPS *WARP)                                                             \
        moe_route_few_##T(const T *x, const T *norm, float eps, T *normed, const T *gate, const float *bias, float *pair_weight, \
                          int *pair_expert, int H, int E, int K, int normalise, float scaling) {                                \
        route<T>(x, norm, eps, normed, gate, bias, pair_weight, pair_expert, H, E, K, normalise, scaling);                      \
    }
ROUTE(bf16)
ROUTE(f16)
