// moe_experts: h[p] = silu(w1_e x) ⊙ (w3_e x), then delta[p] = weight_p · w2_e h[p], for every pair p = (token, k) of every
// expert e that has any. The sum over k happens where the residual is read (add_rms_norm with parts = K), in k order.
//
// Shapes: x [T, H], w13 [E, 2F, H] (w1 rows, then w3), w2 [E, H, F], h [T · K, F], delta [T · K, H]; the lists of moe_route.cu.
// f32 accumulation; h and delta are rounded to the element type once.
//
// Few tokens, *_skinny: an expert's weights are read once while its tokens pass. sm_90 and later: the items of include/stream.cuh are
// (active expert, 16 rows), walked by a block per SM. Before sm_90: grid (rows / 16, min(T · K, E)), weights in registers.
// The inner dimension is at most 2,048, a multiple of 256 before sm_90, and cut in chunks (include/stream.cuh). In w13 the 16 rows of an item are 8 of w1 and the 8 of w3 beside
// them, so both halves of a pair of outputs are summed by one thread.
// Many tokens, *_gemm: grid (columns, tiles), a block finds its expert by counting tiles, rows gathered by index
// (include/tile.cuh). No sorting, padding or reduction passes.
// Cost: bytes = distinct experts · 3 · F · H · 2; FLOPs = T · K · 6 · F · H.
#include "stream.cuh"
#include "tile.cuh"

#define EXPERT_WARPS 8
#define EXPERT_STEPS 8  // of 32 k: the largest inner dimension is 8 · 8 · 32 = 2048
#define EXPERT_TILES 2  // of 8 pairs at a time

#if __CUDA_ARCH__ >= 900
template <typename T, bool GATED>
DEVICE void expert_skinny(const T *__restrict__ x, const T *__restrict__ w, const int *__restrict__ sorted_pairs, const int *__restrict__ offsets,
                          const int *__restrict__ active, const int *__restrict__ active_count, const float *__restrict__ pair_weight,
                          T *__restrict__ out, int rows, int K, int per_token, int chunk) {
    // GATED: rows = F, x is indexed by token; else rows = H, x is indexed by pair.
    constexpr int TILE_ROWS = GATED ? 8 : 16;
    extern __shared__ __align__(128) unsigned char raw[];
    auto *shared = reinterpret_cast<StreamShared<EXPERT_TILES> *>(raw);
    StreamRing ring;
    ring.init(shared, chunk);
    const int g = threadIdx.x % WARP / 4, tiles = rows / TILE_ROWS, chunks = K / chunk;
    pdl_launch();
    pdl_wait();
    int first, last;
    stream_range(*active_count * tiles, first, last);
    const int items = (last - first) * chunks;
    const auto fetch = [&](int n) {
        const int tile = first + n / chunks, r0 = tile % tiles * TILE_ROWS;
        const T *from = w + ((size_t)active[tile / tiles] * rows * (GATED ? 2 : 1) + r0) * K + n % chunks * chunk;
        ring.fetch(n, [&](int r) { return from + (size_t)(GATED && r >= 8 ? rows + r - 8 : r) * K; });
    };
    if (threadIdx.x < WARP)
        for (int n = 0; n < min(items, STREAM_STAGES); n++) fetch(n);
    StreamTokens<T, EXPERT_TILES> kept[STREAM_KEPT];
    int n = 0, loaded = -1, begin = 0, end = 0;
    for (int tile = first; tile < last; tile++) {
        const int expert = tile / tiles, r0 = tile % tiles * TILE_ROWS;
        const auto load = [&](int p0) {
#pragma unroll
            for (int c = 0; c < STREAM_KEPT; c++)
                if (c < chunks)
                    kept[c].load(ring, [&](int i) -> const T * {
                        const int at = p0 + i * 8 + g;
                        if (at >= end) return nullptr;
                        const int pair = sorted_pairs[at];
                        return x + (size_t)(GATED ? pair / per_token : pair) * K + c * chunk;
                    });
        };
        if (expert != loaded) {
            begin = offsets[active[expert]];
            end = offsets[active[expert] + 1];
        }
        for (int p0 = begin; p0 < end; p0 += EXPERT_TILES * 8) {
            const bool whole = end - begin <= EXPERT_TILES * 8;  // then the tokens stay for the expert's next tile
            if (!whole || expert != loaded) load(p0);
            float d[EXPERT_TILES][4] = {};
            const bool last_pass = p0 + EXPERT_TILES * 8 >= end;
#pragma unroll
            for (int c = 0; c < STREAM_KEPT; c++) {
                if (c >= chunks) break;
                ring.wait(n + c);
                kept[c].multiply(ring, n + c, d);
                if (c == chunks - 1) stream_partial<EXPERT_TILES>(shared, d);
                __syncthreads();  // the stage is read
                if (last_pass && threadIdx.x < WARP && n + c + STREAM_STAGES < items) fetch(n + c + STREAM_STAGES);
            }
            for (int j = threadIdx.x; j < EXPERT_TILES * 8 * TILE_ROWS; j += EXPERT_WARPS * WARP) {
                const int r = j % TILE_ROWS, m = j / TILE_ROWS, at = p0 + m;
                if (at >= end) continue;
                const int pair = sorted_pairs[at];
                const float sum = stream_sum(shared, m / 8, r, m % 8);
                out[(size_t)pair * rows + r0 + r] =
                    from_f32<T>(GATED ? silu(sum) * stream_sum(shared, m / 8, r + 8, m % 8) : sum * pair_weight[pair]);
            }
            __syncthreads();
        }
        n += chunks;
        loaded = expert;
    }
}
#else
template <typename T, bool GATED>
DEVICE void expert_skinny(const T *__restrict__ x, const T *__restrict__ w, const int *__restrict__ sorted_pairs, const int *__restrict__ offsets,
                          const int *__restrict__ active, const int *__restrict__ active_count, const float *__restrict__ pair_weight,
                          T *__restrict__ out, int rows, int K, int per_token, int chunk) {
    // GATED: rows = F, x is indexed by token; else rows = H, x is indexed by pair.
    __shared__ float partial[EXPERT_WARPS][EXPERT_TILES][16][9];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    pdl_launch();
    pdl_wait();
    if (blockIdx.y >= *active_count) return;
    const int e = active[blockIdx.y], begin = offsets[e], end = offsets[e + 1];
    const int per_warp = K / EXPERT_WARPS, column = warp * per_warp + t * 8;
    const int r0 = blockIdx.x * (GATED ? 8 : 16);
    const T *w0 = w + (size_t)e * rows * K * (GATED ? 2 : 1) + (size_t)(r0 + g) * K + column;
    const T *w1 = w0 + (size_t)(GATED ? rows : 8) * K;
    uint4 a[EXPERT_STEPS], b[EXPERT_STEPS];
#pragma unroll
    for (int s = 0; s < EXPERT_STEPS; s++)
        if (s * 32 < per_warp) {
            a[s] = load_stream(w0 + s * 32);
            b[s] = load_stream(w1 + s * 32);
        }
    for (int p0 = begin; p0 < end; p0 += EXPERT_TILES * 8) {
        float d[EXPERT_TILES][4];
        const T *row[EXPERT_TILES];
#pragma unroll
        for (int i = 0; i < EXPERT_TILES; i++) {
            d[i][0] = d[i][1] = d[i][2] = d[i][3] = 0.f;
            const int at = p0 + i * 8 + g;
            row[i] = nullptr;
            if (at < end) {
                const int pair = sorted_pairs[at];
                row[i] = x + (size_t)(GATED ? pair / per_token : pair) * K + column;
            }
        }
#pragma unroll
        for (int s = 0; s < EXPERT_STEPS; s++) {
            if (s * 32 >= per_warp) break;
#pragma unroll
            for (int i = 0; i < EXPERT_TILES; i++) {
                uint4 v = make_uint4(0, 0, 0, 0);
                if (row[i]) v = *reinterpret_cast<const uint4 *>(row[i] + s * 32);
                mma16816<T>(d[i], a[s].x, b[s].x, a[s].y, b[s].y, v.x, v.y);
                mma16816<T>(d[i], a[s].z, b[s].z, a[s].w, b[s].w, v.z, v.w);
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < EXPERT_TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) partial[warp][i][g + j / 2 * 8][2 * t + j % 2] = d[i][j];
        __syncthreads();
        for (int j = threadIdx.x; j < EXPERT_TILES * 8 * (GATED ? 8 : 16); j += EXPERT_WARPS * WARP) {
            const int r = j % (GATED ? 8 : 16), m = j / (GATED ? 8 : 16), at = p0 + m;
            if (at >= end) continue;
            const int pair = sorted_pairs[at];
            float sum = 0.f, up = 0.f;
#pragma unroll
            for (int i = 0; i < EXPERT_WARPS; i++) {
                sum += partial[i][m / 8][r][m % 8];
                if (GATED) up += partial[i][m / 8][r + 8][m % 8];
            }
            out[(size_t)pair * rows + r0 + r] = from_f32<T>(GATED ? silu(sum) * up : sum * pair_weight[pair]);
        }
    }
}

#endif

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

#define SKINNY(T, NAME, GATED)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(EXPERT_WARPS *WARP)                                                         \
        moe_##NAME##_skinny_##T(const T *x, const T *w, const int *sorted_pairs, const int *offsets, const int *active,          \
                                const int *active_count, const float *pair_weight, T *out, int rows, int K, int per_token,      \
                                int chunk) {                                                                                    \
        expert_skinny<T, GATED>(x, w, sorted_pairs, offsets, active, active_count, pair_weight, out, rows, K, per_token, chunk); \
    }
#define GEMM(T, NAME, GATED, BM, BN, WM, WN, STAGES, BLOCKS)                                                                    \
    extern "C" __global__ void __launch_bounds__(WM *WN *WARP, BLOCKS)                                                          \
        moe_##NAME##_gemm_##T##_##BM##x##BN(const T *x, const T *w, const int *sorted_pairs, const int *offsets,                \
                                            const float *pair_weight, T *out, int rows, int K, int per_token, int E) {          \
        expert_gemm<Tile<T, BM, BN, WM, WN, STAGES>, T, GATED>(x, w, sorted_pairs, offsets, pair_weight, out, rows, K,          \
                                                               per_token, E);                                                   \
    }
#define EXPERTS(T)                               \
    SKINNY(T, w13, true)                         \
    SKINNY(T, w2, false)                         \
    GEMM(T, w13, true, 16, 128, 1, 4, 4, 3)      \
    GEMM(T, w2, false, 16, 128, 1, 4, 4, 3)      \
    GEMM(T, w13, true, 64, 128, 2, 2, 4, 2)      \
    GEMM(T, w2, false, 64, 128, 2, 2, 4, 2)      \
    GEMM(T, w13, true, 128, 128, 2, 4, 3, 2)     \
    GEMM(T, w2, false, 128, 128, 2, 4, 3, 2)

EXPERTS(bf16)
EXPERTS(f16)
