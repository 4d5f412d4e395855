// moe_route_few: the router for few tokens, and the norm before it: x = rms_norm(residual) · norm if `norm`, kept in `normed` for the experts;
// score[e] = sigmoid(x · gate[e]); the K experts with the largest score + bias (equal: the lower index); weight = score, divided by
// (their sum + 1e-6) if normalised, times the scaling factor.
//
// Shapes: x [T, H] (the residual stream, or what is already normed), gate [E, H], bias [E] f32 or null; pair p = t · K + k: pair_weight
// [T · K] f32, pair_expert [T · K]. H a multiple of 32 up to 4,096, E <= 64, K <= 8. f32 accumulation over the rounded x.
// Grid: a block of 16 warps per token; a warp owns every sixteenth 32 of H for all experts, the gates in registers before pdl_wait where they
// fit; the warps' sums are added in their order.
// Experts make their lists themselves (moe_skinny.cu).
// Cost: T · E · H · 2 bytes from L2.
#include "stream.cuh"

#define ROUTE_WARPS 16
#define ROUTE_TILES 4   // of 16 experts
#define ROUTE_AHEAD 2   // tiles whose gates wait in registers
#define ROUTE_UNITS 4   // of 32 inner elements, that a warp has so: H <= 2,048

template <typename T>
DEVICE void route(const T *x, const T *norm, float eps, T *normed, const T *gate, const float *bias, float *pair_weight, int *pair_expert, int H,
                  int E, int K, int normalise, float scaling) {
    __shared__ uint4 row[512];
    __shared__ float sums[ROUTE_WARPS], scores[64], selection[64];
    __shared__ float partial[ROUTE_WARPS][16 * ROUTE_TILES + 8];
    __shared__ int chosen[8];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, vectors = H / 8;
    const size_t token = blockIdx.x;
    pdl_launch();
    const int g = lane / 4, t = lane % 4, units = H / 32;
    // Unit j of a warp is the (warp + 16 j)-th of H; a lane brings 16 bytes of expert g of a tile, and of expert g + 8.
    const auto gates = [&](int tile, int unit, int half) {
        const int e = tile * 16 + half * 8 + g;
        if (e >= E || unit >= units) return make_uint4(0, 0, 0, 0);
        return *reinterpret_cast<const uint4 *>(gate + (size_t)e * H + unit * 32 + t * 8);
    };
    uint4 ahead[ROUTE_AHEAD][ROUTE_UNITS][2];
#pragma unroll
    for (int i = 0; i < ROUTE_AHEAD; i++)
#pragma unroll
        for (int j = 0; j < ROUTE_UNITS; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) ahead[i][j][half] = gates(i, warp + j * ROUTE_WARPS, half);
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
    // Experts are the 16-row side of the product, the token is each of the 8 columns.
    float d[ROUTE_TILES][4] = {};
    const auto multiply = [&](int tile, int unit, uint4 a, uint4 b) {
        if (unit >= units) return;
        const uint4 v = row[unit * 4 + t];
        mma16816<T>(d[tile], a.x, b.x, a.y, b.y, v.x, v.y);
        mma16816<T>(d[tile], a.z, b.z, a.w, b.w, v.z, v.w);
    };
#pragma unroll
    for (int j = 0; j < ROUTE_UNITS; j++)
#pragma unroll
        for (int i = 0; i < ROUTE_AHEAD; i++) multiply(i, warp + j * ROUTE_WARPS, ahead[i][j][0], ahead[i][j][1]);
#pragma unroll
    for (int i = 0; i < ROUTE_TILES; i++)
        if (i * 16 < E)
            for (int j = i < ROUTE_AHEAD ? ROUTE_UNITS : 0; warp + j * ROUTE_WARPS < units; j++)
                multiply(i, warp + j * ROUTE_WARPS, gates(i, warp + j * ROUTE_WARPS, 0), gates(i, warp + j * ROUTE_WARPS, 1));
    if (t == 0)
#pragma unroll
        for (int i = 0; i < ROUTE_TILES; i++) {
            partial[warp][i * 16 + g] = d[i][0];
            partial[warp][i * 16 + g + 8] = d[i][2];
        }
    __syncthreads();
    if (threadIdx.x < E) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < ROUTE_WARPS; i++) sum += partial[i][threadIdx.x];
        scores[threadIdx.x] = 1.f / (1.f + expf(-sum));
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
