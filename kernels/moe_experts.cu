// moe_experts: h[p] = silu(w1_e x) ⊙ (w3_e x), then delta[p] = weight_p · w2_e h[p], for every pair p = (token, k) of every
// expert e that has any. The sum over k happens where the residual is read (add_rms_norm with parts = K), in k order.
//
// Shapes: x [T, H], w13 [E, 2F, H] (w1 rows, then w3), w2 [E, H, F], h [T · K, F], delta [T · K, H]; the lists of moe_route.cu.
// f32 accumulation; h and delta are rounded to the element type once.
//
// Few tokens are moe_skinny.cu's.
// Many tokens, *_gemm: grid (columns, tiles), a block finds its expert by counting tiles, rows gathered by index
// (include/tile.cuh). No sorting, padding or reduction passes.
// Cost: bytes = distinct experts · 3 · F · H · 2; FLOPs = T · K · 6 · F · H.
#include "tile.cuh"

// The expert and first pair of tile number `tile`, when an expert with n pairs has ceil(n / BM) tiles; false past the last.
template <int BM> DEVICE bool find_tile(const int *offsets, int E, int tile, int &expert, int &begin, int &end) {
    const int lane = threadIdx.x % WARP;
    int done = 0;
    for (int e0 = 0; e0 < E; e0 += WARP) {
        const int e = e0 + lane;
        const int from = e < E ? offsets[e] : 0, to = e < E ? offsets[e + 1] : 0;
        int tiles = (to - from + BM - 1) / BM;
        const int own = tiles;
#pragma unroll
        for (int o = 1; o < WARP; o <<= 1) {
            const int v = __shfl_up_sync(FULL, tiles, o);
            if (lane >= o) tiles += v;
        }
        tiles += done;
        const unsigned hit = __ballot_sync(FULL, tile < tiles);
        if (hit) {
            const int at = __ffs(hit) - 1;
            expert = e0 + at;
            begin = __shfl_sync(FULL, from, at) + (tile - (__shfl_sync(FULL, tiles, at) - __shfl_sync(FULL, own, at))) * BM;
            end = __shfl_sync(FULL, to, at);
            return true;
        }
        done = __shfl_sync(FULL, tiles, WARP - 1);
    }
    return false;
}

template <class Block, typename T, bool GATED>
DEVICE void expert_gemm(const T *__restrict__ x, const T *__restrict__ w, const int *__restrict__ sorted_pairs, const int *__restrict__ offsets,
                        const float *__restrict__ pair_weight, T *__restrict__ out, int rows, int K, int per_token, int E) {
    extern __shared__ char smem[];
    __shared__ int pairs[Block::BM];
    int e, begin, end;
    pdl_wait();
    if (!find_tile<Block::BM>(offsets, E, blockIdx.y, e, begin, end)) return;
    for (int i = threadIdx.x; i < Block::BM; i += Block::THREADS) pairs[i] = begin + i < end ? sorted_pairs[begin + i] : -1;
    __syncthreads();
    const int n0 = blockIdx.x * Block::BN / (GATED ? 2 : 1);
    const T *we = w + (size_t)e * rows * K * (GATED ? 2 : 1);
    Block tile(w);
    tile.run(
        smem, 0, K,
        [&](int r) -> const T * {
            const int pair = pairs[r];
            return pair < 0 ? nullptr : x + (size_t)(GATED ? pair / per_token : pair) * K;
        },
        [&](int r) -> const T * {
            const int row = GATED ? n0 + r / 16 * 8 + r % 8 : n0 + r;
            return row < rows ? we + (size_t)(row + (GATED && r % 16 >= 8 ? rows : 0)) * K : nullptr;
        });
    if constexpr (GATED)
        tile.each_gated([&](int r, int c, float g0, float g1, float u0, float u1) {
            if (pairs[r] >= 0 && n0 + c < rows)
                *reinterpret_cast<uint32_t *>(out + (size_t)pairs[r] * rows + n0 + c) = pack2<T>(silu(g0) * u0, silu(g1) * u1);
        });
    else
        tile.each([&](int r, int c, float a, float b) {
            if (pairs[r] >= 0 && n0 + c < rows) {
                const float weight = pair_weight[pairs[r]];
                *reinterpret_cast<uint32_t *>(out + (size_t)pairs[r] * rows + n0 + c) = pack2<T>(a * weight, b * weight);
            }
        });
}

#define GEMM(T, NAME, GATED, BM, BN, WM, WN, STAGES, BLOCKS)                                                                    \
    extern "C" __global__ void __launch_bounds__(WM *WN *WARP, BLOCKS)                                                          \
        moe_##NAME##_gemm_##T##_##BM##x##BN(const T *x, const T *w, const int *sorted_pairs, const int *offsets,                \
                                            const float *pair_weight, T *out, int rows, int K, int per_token, int E) {          \
        expert_gemm<Tile<T, BM, BN, WM, WN, STAGES>, T, GATED>(x, w, sorted_pairs, offsets, pair_weight, out, rows, K,          \
                                                               per_token, E);                                                   \
    }
#define EXPERTS(T)                               \
    GEMM(T, w13, true, 16, 128, 1, 4, 4, 3)      \
    GEMM(T, w2, false, 16, 128, 1, 4, 4, 3)      \
    GEMM(T, w13, true, 64, 128, 2, 2, 4, 2)      \
    GEMM(T, w2, false, 64, 128, 2, 2, 4, 2)      \
    GEMM(T, w13, true, 128, 128, 2, 4, 3, 2)     \
    GEMM(T, w2, false, 128, 128, 2, 4, 3, 2)

EXPERTS(bf16)
EXPERTS(f16)
