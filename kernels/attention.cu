// attention: out[t, h] = Σ_j softmax_j(scale · q[t, h] · k[j, h / (Nq / Nk)]) v[j], causal, over the cached context of t's row.
//
// Shapes: qkv [T, (Nq + 2 Nk) 64] (its q part, normed and turned), K and V cache [blocks, Nk, P, 64], block_tables [S, max_blocks],
// out [T, Nq 64]. D = 64, P a multiple of 16; softmax and accumulation in f32.
// Grouped queries share the tile: the M side of an MMA holds (token, head) pairs of one KV head, so K and V are read once per group.
//
// attention_prefill: rows of more than one token; attention_decode.cu takes the others.
// Grid: (pieces, Nk): a piece is up to 32 tokens of one row, G = Nq / Nk heads each; a warp owns 16 of the (token, head) rows. KV goes
// through shared memory in tiles of 64 tokens, double buffered with cp.async.
// Cost: bytes = context · Nk · 64 · 4 per row; FLOPs 4 · Nq · 64 · context per token.
// Source of the idea: online softmax over KV tiles (FlashAttention-2).
#include "common.cuh"

#define KV_TILE 64

// Copies KV_TILE tokens of one cache head into a swizzled [KV_TILE][64] tile; rows past `end` become zeros.
template <typename T, int THREADS>
DEVICE void load_kv(uint32_t to, const T *cache, const uint32_t *blocks, int head, int Nk, int P, int from, int end) {
#pragma unroll
    for (int i = 0; i < KV_TILE * 8 / THREADS; i++) {
        const int j = i * THREADS + threadIdx.x, r = j / 8, c = j % 8, token = from + r;
        const bool valid = token < end;
        const T *p = cache;
        if (valid) p += (((size_t)blocks[token / P] * Nk + head) * P + token % P) * 64 + c * 8;
        cp_async16(to + r * 128 + ((c ^ (r & 7)) << 4), p, valid);
    }
}

template <typename T, int WARPS>  // WARPS · 16 (token, head) rows
DEVICE void attend(const T *__restrict__ qkv, const T *__restrict__ k_cache, const T *__restrict__ v_cache,
                   const uint32_t *__restrict__ block_tables, const int32_t *__restrict__ piece_row, const uint32_t *__restrict__ piece_start,
                   const uint32_t *__restrict__ row_starts, const uint32_t *__restrict__ context_lens, T *__restrict__ out, int Nq, int Nk,
                   int P, int max_blocks, float scale, int piece_tokens) {
    __shared__ __align__(128) char smem[2][2][KV_TILE * 128];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int G = Nq / Nk, kv_head = blockIdx.y;
    pdl_launch();
    pdl_wait();
    const int row = piece_row[blockIdx.x];
    if (row < 0) return;
    const int row_begin = row_starts[row], row_end = row_starts[row + 1];
    if (row_end - row_begin == 1) return;  // attention_decode.cu's
    const int t0 = piece_start[blockIdx.x], tokens = min(piece_tokens, row_end - t0);
    const int context = context_lens[row];
    const int q_position = context - (row_end - t0);  // of the piece's first token
    const int last = q_position + tokens;             // context that the piece's last token sees
    const int begin = 0, end = last;
    const uint32_t *blocks = block_tables + (size_t)row * max_blocks;

    // Q as A operands: row m = token * G + head within the group.
    const int m0 = warp * 16 + g, m1 = m0 + 8, rows = tokens * G;
    uint32_t q[4][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int m = half ? m1 : m0;
        const T *p = qkv + ((size_t)(t0 + m / G) * (Nq + 2 * Nk) + kv_head * G + m % G) * 64;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            q[k][half] = m < rows ? *reinterpret_cast<const uint32_t *>(p + k * 16 + 2 * t) : 0u;
            q[k][half + 2] = m < rows ? *reinterpret_cast<const uint32_t *>(p + k * 16 + 8 + 2 * t) : 0u;
        }
    }
    const int sees0 = m0 < rows ? q_position + m0 / G : -1, sees1 = m1 < rows ? q_position + m1 / G : -1;  // last visible position

    float o[8][4] = {}, high[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
    const float log2_scale = scale * 1.44269504f;
    const int tiles = (end - begin + KV_TILE - 1) / KV_TILE;
    const uint32_t base = smem_address(smem);
    load_kv<T, WARPS * WARP>(base, k_cache, blocks, kv_head, Nk, P, begin, end);
    load_kv<T, WARPS * WARP>(base + KV_TILE * 128, v_cache, blocks, kv_head, Nk, P, begin, end);
    cp_async_commit();
    for (int tile = 0; tile < tiles; tile++) {
        const int from = begin + tile * KV_TILE;
        if (tile + 1 < tiles) {
            const uint32_t to = base + (tile + 1) % 2 * 2 * KV_TILE * 128;
            load_kv<T, WARPS * WARP>(to, k_cache, blocks, kv_head, Nk, P, from + KV_TILE, end);
            load_kv<T, WARPS * WARP>(to + KV_TILE * 128, v_cache, blocks, kv_head, Nk, P, from + KV_TILE, end);
        }
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const uint32_t ks = base + tile % 2 * 2 * KV_TILE * 128, vs = ks + KV_TILE * 128;
        float s[KV_TILE / 8][4] = {};
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int j = 0; j < KV_TILE / 16; j++) {
                const int r = j * 16 + lane % 16, c = k * 2 + lane / 16;
                uint32_t b[4];
                ldmatrix4(b, ks + r * 128 + ((c ^ (r & 7)) << 4));
                mma16816<T>(s[2 * j], q[k][0], q[k][1], q[k][2], q[k][3], b[0], b[2]);
                mma16816<T>(s[2 * j + 1], q[k][0], q[k][1], q[k][2], q[k][3], b[1], b[3]);
            }
        const bool masked = from + KV_TILE > q_position || from + KV_TILE > end;
        float now[2] = {high[0], high[1]};
#pragma unroll
        for (int j = 0; j < KV_TILE / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[j][i] *= log2_scale;
                if (masked) {
                    const int position = from + j * 8 + 2 * t + i % 2;
                    if (position > (i < 2 ? sees0 : sees1) || position >= end) s[j][i] = -INFINITY;
                }
                now[i / 2] = fmaxf(now[i / 2], s[j][i]);
            }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            now[h] = fmaxf(now[h], __shfl_xor_sync(FULL, now[h], 1));
            now[h] = fmaxf(now[h], __shfl_xor_sync(FULL, now[h], 2));
            const float shrink = high[h] == -INFINITY ? 0.f : exp2f(high[h] - now[h]);
            high[h] = now[h];
            sum[h] *= shrink;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                o[j][2 * h] *= shrink;
                o[j][2 * h + 1] *= shrink;
            }
        }
        uint32_t p[KV_TILE / 16][4];
#pragma unroll
        for (int j = 0; j < KV_TILE / 8; j++) {
            float e[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                e[i] = s[j][i] == -INFINITY ? 0.f : exp2f(s[j][i] - high[i / 2]);
                sum[i / 2] += e[i];
            }
            p[j / 2][j % 2 * 2] = pack2<T>(e[0], e[1]);
            p[j / 2][j % 2 * 2 + 1] = pack2<T>(e[2], e[3]);
        }
#pragma unroll
        for (int k = 0; k < KV_TILE / 16; k++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                // V [token k][d]: transposed on load, so that a register holds two tokens of one d.
                const int r = k * 16 + lane % 16, c = j * 2 + lane / 16;
                uint32_t b[4];
                ldmatrix4_trans(b, vs + r * 128 + ((c ^ (r & 7)) << 4));
                mma16816<T>(o[2 * j], p[k][0], p[k][1], p[k][2], p[k][3], b[0], b[1]);
                mma16816<T>(o[2 * j + 1], p[k][0], p[k][1], p[k][2], p[k][3], b[2], b[3]);
            }
        __syncthreads();
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(FULL, sum[h], 1);
        sum[h] += __shfl_xor_sync(FULL, sum[h], 2);
        const int m = h ? m1 : m0;
        if (m >= rows) continue;
        const int head = kv_head * G + m % G;
        T *to = out + ((size_t)(t0 + m / G) * Nq + head) * 64;
        const float inverse = 1.f / sum[h];
#pragma unroll
        for (int j = 0; j < 8; j++)
            *reinterpret_cast<uint32_t *>(to + j * 8 + 2 * t) = pack2<T>(o[j][2 * h] * inverse, o[j][2 * h + 1] * inverse);
    }
}

#define ATTENTION(T)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(8 * WARP)                                                                   \
        attention_prefill_##T(const T *qkv, const T *k_cache, const T *v_cache, const uint32_t *block_tables,                \
                              const int32_t *piece_row, const uint32_t *piece_start, const uint32_t *row_starts,             \
                              const uint32_t *context_lens, T *out, int Nq, int Nk, int P, int max_blocks, float scale,      \
                              int piece_tokens) {                                                                            \
        attend<T, 8>(qkv, k_cache, v_cache, block_tables, piece_row, piece_start, row_starts, context_lens, out, Nq, Nk, P,  \
                     max_blocks, scale, piece_tokens);                                                                       \
    }
ATTENTION(bf16)
ATTENTION(f16)
