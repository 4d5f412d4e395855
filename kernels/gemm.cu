// linear for many tokens: out[m, n] = Σ_k x[m, k] · w[n, k] (+ bias[n]).
//
// Shapes: x [M, K], w [N, K], out [M, N] in the element type or f32. K and N multiples of 8; f32 accumulation.
// Grid: (ceil(N / BN), ceil(M / BM), splits). Three tiles (include/tile.cuh): 128 × 128 for prefill, 64 × 64 and 32 × 64 for tens of
// tokens, where there are too few tiles for the card and K is split over blocks: every split writes f32 partials, the
// last block of a tile to arrive adds them in split order, so the result does not depend on timing.
// Preconditions: with splits > 1, `partial` has splits · M · N floats and `arrived` one zero per tile (left zero again).
// Cost: FLOPs 2 · M · N · K; bytes N · K · 2 + M · (K + N) · 2, the partials stay in L2.
#include "tile.cuh"

template <class Block, typename T, typename Out>
DEVICE void gemm(const T *__restrict__ x, const T *__restrict__ w, const T *__restrict__ bias, Out *__restrict__ out,
                 float *__restrict__ partial, unsigned *__restrict__ arrived, int M, int N, int K) {
    extern __shared__ char smem[];
    const int n0 = blockIdx.x * Block::BN, m0 = blockIdx.y * Block::BM, splits = gridDim.z;
    const int k_split = ((K + splits - 1) / splits + Block::BK - 1) / Block::BK * Block::BK;
    const int k_begin = min(K, (int)blockIdx.z * k_split), k_end = min(K, k_begin + k_split);
    Block tile(w);
    tile.run(
        smem, k_begin, k_end, [&](int r) { return m0 + r < M ? x + (size_t)(m0 + r) * K : nullptr; },
        [&](int r) { return n0 + r < N ? w + (size_t)(n0 + r) * K : nullptr; });
    const auto store = [&](int m, int n, float a, float b) {
        if (bias) {
            a += to_f32<T>(bias[n]);
            b += to_f32<T>(bias[n + 1]);
        }
        if constexpr (sizeof(Out) == 4)
            *reinterpret_cast<float2 *>(out + (size_t)m * N + n) = make_float2(a, b);
        else
            *reinterpret_cast<uint32_t *>(out + (size_t)m * N + n) = pack2<T>(a, b);
    };
    if (splits == 1) {
        tile.each([&](int r, int c, float a, float b) {
            if (m0 + r < M && n0 + c < N) store(m0 + r, n0 + c, a, b);
        });
        return;
    }
    const size_t plane = (size_t)M * N;
    tile.each([&](int r, int c, float a, float b) {
        if (m0 + r < M && n0 + c < N)
            *reinterpret_cast<float2 *>(partial + blockIdx.z * plane + (size_t)(m0 + r) * N + n0 + c) = make_float2(a, b);
    });
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned *counter = arrived + blockIdx.y * gridDim.x + blockIdx.x;
        last = atomicAdd(counter, 1) == splits - 1;
        if (last) *counter = 0;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int i = threadIdx.x; i < Block::BM * Block::BN / 2; i += Block::THREADS) {
        const int m = m0 + i / (Block::BN / 2), n = n0 + i % (Block::BN / 2) * 2;
        if (m >= M || n >= N) continue;
        float2 sum = make_float2(0.f, 0.f);
        for (int s = 0; s < splits; s++) {
            const float2 v = __ldcg(reinterpret_cast<const float2 *>(partial + s * plane + (size_t)m * N + n));
            sum.x += v.x;
            sum.y += v.y;
        }
        store(m, n, sum.x, sum.y);
    }
}

#define GEMM(T, Out, BM, BN, WM, WN, STAGES, BLOCKS)                                                                     \
    extern "C" __global__ void __launch_bounds__(WM *WN *WARP, BLOCKS)                                                   \
        gemm_##T##_##Out##_##BM##x##BN(const T *x, const T *w, const T *bias, Out *out, float *partial,                  \
                                       unsigned *arrived, int M, int N, int K) {                                         \
        gemm<Tile<T, BM, BN, WM, WN, STAGES>, T, Out>(x, w, bias, out, partial, arrived, M, N, K);                       \
    }
#define GEMMS(T, Out)                     \
    GEMM(T, Out, 128, 128, 2, 4, 3, 2)    \
    GEMM(T, Out, 64, 64, 2, 2, 4, 3)      \
    GEMM(T, Out, 32, 64, 1, 4, 5, 3)

GEMMS(bf16, bf16)
GEMMS(bf16, float)
GEMMS(f16, f16)
GEMMS(f16, float)
