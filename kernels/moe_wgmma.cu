// moe_experts for many tokens on sm_90a: h[i] = silu(w1_e x) ⊙ (w3_e x) for the i-th pair of the experts' lists, then
// delta[p] = weight_p · w2_e h[i] for the pair p = (token, k) that stands there. Elsewhere, and for few tokens, moe_experts.cu.
//
// Shapes: x [T, H], w13 [E, 2F, H] (w1 rows, then w3), w2 [E, H, F], h [T · K, F] in the lists' order, delta [T · K, H]; the lists of
// moe_route.cu. H and F multiples of 8, E <= 64. f32 accumulation; h and delta are rounded to the element type once.
//
// Tiles of 128 weight rows × TN pairs of one expert (include/wgmma.cuh), TN 64, 128 or 256; persistent blocks find theirs from the
// experts' offsets: an expert's tiles stand together, its pairs innermost, so that a wave shares weights and tokens in L2.
// w13: the tensor map is [E, F / 8, 2, 8, H] with boxes of 8 · 2 · 8 rows, which interleaves 8 rows of w1 with their 8 of w3: both halves
// of an output are in one thread. The rows of x are gathered by the producer's 128 threads with cp.async into the swizzled layout.
// w2: weights [E, H, F] and h come by tensor map; outputs are scattered to their pairs by whole 128-byte pieces.
// No sorting, padding or reduction passes. What lies past H, F or an expert's end is zero or never stored.
// Cost: bytes = distinct experts · 3 · F · H · 2; FLOPs = T · K · 6 · F · H.
#include "wgmma.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

struct ExpertTile {
    int expert, begin, tokens, column;  // first pair of the tile in the lists, pairs in it, first weight tile's number
};

// Tiles of the experts up to and with each, for E <= 64; by the first warp.
template <int TN> DEVICE void count_tiles(const int *__restrict__ offsets, int E, int *ends) {
    const int lane = threadIdx.x % WARP;
    int done = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int e = half * WARP + lane;
        int tiles = e < E ? (offsets[e + 1] - offsets[e] + TN - 1) / TN : 0;
#pragma unroll
        for (int o = 1; o < WARP; o <<= 1) {
            const int v = __shfl_up_sync(FULL, tiles, o);
            if (lane >= o) tiles += v;
        }
        ends[e] = tiles + done;
        done = __shfl_sync(FULL, tiles, WARP - 1);
    }
}

// The i-th item; whole warps.
template <int TN> DEVICE ExpertTile find_tile(const int *__restrict__ offsets, const int *ends, int columns, int i) {
    const int lane = threadIdx.x % WARP;
    const int e = __popc(__ballot_sync(FULL, i >= ends[lane] * columns)) + __popc(__ballot_sync(FULL, i >= ends[lane + WARP] * columns));
    const int first = e ? ends[e - 1] : 0, tiles = ends[e] - first, local = i - first * columns;
    ExpertTile tile;
    tile.expert = e;
    tile.column = local / tiles;
    tile.begin = offsets[e] + local % tiles * TN;
    tile.tokens = min(TN, offsets[e + 1] - tile.begin);
    return tile;
}

// h[i] = silu(w1 x) ⊙ (w3 x). K = H.
template <typename T, int TN>
DEVICE void gate_up(const TensorMap &w, const T *__restrict__ x, const int *__restrict__ sorted_pairs, const int *__restrict__ offsets,
                    T *__restrict__ h, int F, int K, int per_token, int E) {
    extern __shared__ unsigned char raw[];
    Wide<T, TN> core(raw);
    core.init(128);
    pdl_launch();
    pdl_wait();
    if (threadIdx.x < WARP) count_tiles<TN>(offsets, E, core.ends());
    __syncthreads();
    const int columns = (F + WGMMA_ROWS / 2 - 1) / (WGMMA_ROWS / 2), items = core.ends()[63] * columns, steps = (K + WGMMA_BK - 1) / WGMMA_BK;
    if (threadIdx.x >= 256) {
        registers_give<PRODUCER_REGISTERS>();
        const int thread = threadIdx.x - 256, row = thread / 8, c = thread % 8;
        const uint32_t at = row * 128 + ((c ^ (row & 7)) << 4);
        for (int i = blockIdx.x; i < items; i += gridDim.x) {
            const ExpertTile tile = find_tile<TN>(offsets, core.ends(), columns, i);
            const int rows = core.quarters(tile.tokens) * core.QUARTER;
            uint32_t from[TN / 16];  // rows past the expert's end repeat its last
#pragma unroll
            for (int j = 0; j < TN / 16; j++)
                from[j] = j * 16 < rows ? (uint32_t)(sorted_pairs[tile.begin + min(j * 16 + row, tile.tokens - 1)] / per_token) * K + c * 8 : 0u;
            for (int step = 0; step < steps; step++, core.advance()) {
                barrier_wait(core.empty(), core.phase ^ 1);
                if (thread == 0) {
                    barrier_expect(core.full(), WGMMA_A_BYTES);
                    tma_load(core.a(), w, core.full(), step * WGMMA_BK, 0, 0, tile.column * (WGMMA_ROWS / 16), tile.expert);
                }
                const bool valid = step * WGMMA_BK + c * 8 < K;
#pragma unroll
                for (int j = 0; j < TN / 16; j++)
                    if (j * 16 < rows) cp_async16(core.b() + at + j * 2048, x + (valid ? from[j] + step * WGMMA_BK : 0u), valid);
                barrier_arrive_after_copies(core.full());
            }
        }
        return;
    }
    registers_take<CONSUMER_REGISTERS>();
    const int group = threadIdx.x / 128;
    float acc[TN / 2] = {};
    for (int i = blockIdx.x; i < items; i += gridDim.x) {
        const ExpertTile tile = find_tile<TN>(offsets, core.ends(), columns, i);
        core.template multiply<true>(tile.tokens, steps, acc, [] {});
        core.template store<T, true>(acc, tile.tokens, tile.column * (WGMMA_ROWS / 2) + group * 32, F, make_float2(0.f, 0.f), nullptr,
                                     [&](int token) { return h + (size_t)(tile.begin + token) * F; });
    }
}

// delta[p] = weight_p · w2 h[i]. N = H, K = F.
template <typename T, int TN>
DEVICE void down(const TensorMap &w, const TensorMap &h, const int *__restrict__ sorted_pairs, const int *__restrict__ offsets,
                 const float *__restrict__ pair_weight, T *__restrict__ delta, int N, int K, int E) {
    extern __shared__ unsigned char raw[];
    Wide<T, TN> core(raw);
    core.init(0);
    pdl_launch();
    pdl_wait();
    if (threadIdx.x < WARP) count_tiles<TN>(offsets, E, core.ends());
    __syncthreads();
    const int columns = (N + WGMMA_ROWS - 1) / WGMMA_ROWS, items = core.ends()[63] * columns, steps = (K + WGMMA_BK - 1) / WGMMA_BK;
    if (threadIdx.x >= 256) {
        registers_give<PRODUCER_REGISTERS>();
        for (int i = blockIdx.x; threadIdx.x < 256 + WARP && i < items; i += gridDim.x) {
            const ExpertTile tile = find_tile<TN>(offsets, core.ends(), columns, i);
            const int boxes = core.quarters(tile.tokens);
            for (int step = 0; step < steps; step++, core.advance()) {
                if (threadIdx.x == 256) {
                    barrier_wait(core.empty(), core.phase ^ 1);
                    barrier_expect(core.full(), WGMMA_A_BYTES + boxes * core.QUARTER * 128);
                    tma_load(core.a(), w, core.full(), step * WGMMA_BK, tile.column * WGMMA_ROWS, tile.expert);
                    core.fetch_tokens(h, boxes, step * WGMMA_BK, tile.begin);
                }
            }
        }
    } else {
        registers_take<CONSUMER_REGISTERS>();
        const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
        constexpr int EACH = (TN + 127) / 128;
        int *pairs = core.pairs(group);
        float *weights = core.weights(group);
        float acc[TN / 2] = {};
        for (int i = blockIdx.x; i < items; i += gridDim.x) {
            const ExpertTile tile = find_tile<TN>(offsets, core.ends(), columns, i);
            int pair[EACH];
            float weight[EACH];
            core.template multiply<false>(tile.tokens, steps, acc, [&] {
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    const int token = j * 128 + thread;
                    pair[j] = token < tile.tokens ? sorted_pairs[tile.begin + token] : 0;
                }
#pragma unroll
                for (int j = 0; j < EACH; j++) weight[j] = pair_weight[pair[j]];
            });
            group_sync(group);  // the last tile's pairs have been read
#pragma unroll
            for (int j = 0; j < EACH; j++)
                if (j * 128 + thread < TN) {
                    pairs[j * 128 + thread] = pair[j];
                    weights[j * 128 + thread] = weight[j];
                }
            core.template store<T, false>(acc, tile.tokens, tile.column * WGMMA_ROWS + group * 64, N, make_float2(0.f, 0.f), weights,
                                          [&](int token) { return delta + (size_t)pairs[token] * N; });
        }
    }
}

#define GATE_UP(T, TN)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(WGMMA_THREADS, 1)                                                                \
        moe_w13_wgmma_##T##_##TN(const __grid_constant__ TensorMap w, const T *x, const int *sorted_pairs, const int *offsets,    \
                                 T *h, int F, int K, int per_token, int E) {                                                      \
        gate_up<T, TN>(w, x, sorted_pairs, offsets, h, F, K, per_token, E);                                                       \
    }
#define DOWN(T, TN)                                                                                                                \
    extern "C" __global__ void __launch_bounds__(WGMMA_THREADS, 1)                                                                 \
        moe_w2_wgmma_##T##_##TN(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap h, const int *sorted_pairs,  \
                                const int *offsets, const float *pair_weight, T *delta, int N, int K, int E) {                     \
        down<T, TN>(w, h, sorted_pairs, offsets, pair_weight, delta, N, K, E);                                                     \
    }
#define EXPERTS(T)                                       \
    GATE_UP(T, 64)                                       \
    GATE_UP(T, 128)                                      \
    GATE_UP(T, 256)                                      \
    DOWN(T, 64)                                         \
    DOWN(T, 128)                                        \
    DOWN(T, 256)
EXPERTS(bf16)
EXPERTS(f16)

#endif
