// attention of prefill rows on sm_90a; formula, shapes and cache as in attention.cu, which has the other architectures and decode rows.
//
// Grid (Nk, pieces), longest contexts first: a block takes a piece (up to 32 tokens of one row) of one KV head, its G = Nq / Nk query heads
// packed as (token, head) rows: two warpgroups of 64 rows. KV tiles of 64 tokens come in boxes of 16 by
// tensor map (cache rows [blocks · Nk · P, 64], swizzled), K and V of a tile on one barrier, four stages.
// S[64, 64] = Q · Kᵀ from shared memory; P stays in registers as the A operand of P · V, whose V is read transposed. A warpgroup issues
// P · V of a tile and Q · Kᵀ of the next together and works on the softmax of one while the other three of an SM use the tensor cores.
// Positions past the context are masked in S and zero in V (a box past the end is filled with zeros, the rest of its last box here).
// Two blocks share an SM. P a multiple of 16, G <= 4.
// Cost: FLOPs 4 · Nq · 64 · context per token; as many exponentials as a fourth of a percent of that, the other bound.
// Source of the idea: FlashAttention-3.
#include "wgmma.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#define KV_TILE 64
#define KV_STAGES 4
#define KV_BYTES (KV_TILE * 128)
#define QUERY_ROWS 128

// o[64, 64] += p[64, 16] · v[16, 64]: p in registers (as the A operand of mma16816), v with its 64 contiguous.
template <typename T> DEVICE void wgmma_pv(float (&d)[32], const uint32_t (&p)[4], uint64_t v);
#define WGMMA_PV(T, NAME)                                                                                                        \
    template <> __device__ __forceinline__ void wgmma_pv<T>(float (&d)[32], const uint32_t(&p)[4], uint64_t v) {                 \
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {" WGMMA_D64 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;" \
                     : WGMMA_O64                                                                                                 \
                     : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));                                                      \
    }
WGMMA_PV(bf16, "bf16")
WGMMA_PV(f16, "f16")

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <typename T>
DEVICE void attend(const TensorMap &k_map, const TensorMap &v_map, const T *__restrict__ qkv, const uint32_t *__restrict__ block_tables,
                   const int32_t *__restrict__ piece_row, const uint32_t *__restrict__ piece_start, const uint32_t *__restrict__ row_starts,
                   const uint32_t *__restrict__ context_lens, T *__restrict__ out, int Nq, int Nk, int P, int max_blocks, float scale,
                   int piece_tokens) {
    extern __shared__ unsigned char raw[];
    unsigned char *memory = raw + (-smem_address(raw) & 1023);
    const uint32_t q_base = smem_address(memory), stages = q_base + QUERY_ROWS * 128, barriers = stages + KV_STAGES * 2 * KV_BYTES;
    const auto full = [&](int stage) { return barriers + stage * 16; };
    const auto empty = [&](int stage) { return barriers + stage * 16 + 8; };
    pdl_launch();
    pdl_wait();
    const int piece = gridDim.y - 1 - blockIdx.y, kv_head = blockIdx.x, G = Nq / Nk;
    const int row = piece_row[piece];
    if (row < 0) return;
    const int row_begin = row_starts[row], row_end = row_starts[row + 1];
    if (row_end - row_begin == 1) return;  // a decode row
    const int t0 = piece_start[piece], tokens = min(piece_tokens, row_end - t0), rows = tokens * G;
    const int q_position = (int)context_lens[row] - (row_end - t0);  // of the piece's first token
    const int end = q_position + tokens, tiles = (end + KV_TILE - 1) / KV_TILE;
    if (threadIdx.x == 0) {
        for (int s = 0; s < KV_STAGES; s++) {
            barrier_init(full(s), 1);
            barrier_init(empty(s), 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        fence_async();
    }
    __syncthreads();
    const int lane = threadIdx.x % WARP, group = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / WARP, g = lane / 4, t = lane % 4;
    // The first warp copies: lane l < 8 the l % 4-th box of K or V. Where a tile's box begins is looked up one tile before it is fetched.
    const uint32_t *blocks = block_tables + (size_t)row * max_blocks;
    int box_row = 0;
    const auto look_up = [&](int tile) {
        const int token = tile * KV_TILE + lane % 4 * 16;
        box_row = lane < 8 && token < end ? ((int)blocks[token / P] * Nk + kv_head) * P + token % P : -16;  // outside: zeros
    };
    const auto fetch = [&](int tile) {
        const int stage = tile % KV_STAGES;
        if (tile >= KV_STAGES) barrier_wait(empty(stage), (tile / KV_STAGES - 1) & 1);
        if (lane == 0) barrier_expect(full(stage), 2 * KV_BYTES);
        __syncwarp();
        if (lane < 8)
            tma_load(stages + stage * 2 * KV_BYTES + lane / 4 * KV_BYTES + lane % 4 * 2048, lane < 4 ? k_map : v_map, full(stage), 0, box_row);
    };
    if (threadIdx.x < WARP) {
        for (int tile = 0; tile < min(2, tiles); tile++) {
            look_up(tile);
            fetch(tile);
        }
        look_up(2);
    }
    // Q to shared memory, eight 16-byte chunks a row, swizzled; rows past the piece are zeros.
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int m = group * 64 + i * 16 + thread / 8, c = thread % 8;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (m < rows) v = *reinterpret_cast<const uint4 *>(qkv + ((size_t)(t0 + m / G) * (Nq + 2 * Nk) + kv_head * G + m % G) * 64 + c * 8);
        *reinterpret_cast<uint4 *>(memory + m * 128 + ((c ^ (m & 7)) << 4)) = v;
    }
    fence_async();
    group_sync(group);
    const uint64_t q = wgmma_operand(q_base + group * 64 * 128);
    const int m0 = group * 64 + warp * 16 + g, m1 = m0 + 8;
    const int sees0 = m0 < rows ? q_position + m0 / G : 0, sees1 = m1 < rows ? q_position + m1 / G : 0;  // last visible position
    const float log2_scale = scale * 1.44269504f;
    float s[32], o[32] = {}, high[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};

    const auto score = [&](int tile) {
        barrier_wait(full(tile % KV_STAGES), tile / KV_STAGES & 1);
        const uint32_t kv = stages + tile % KV_STAGES * 2 * KV_BYTES;
        if (tile == tiles - 1 && end % 16) {  // what an unfinished block holds past the end may be anything
            const int r = end - tile * KV_TILE + thread / 8;
            if (r < ((end - tile * KV_TILE + 15) & ~15))
                *reinterpret_cast<uint4 *>(memory + (kv - q_base) + KV_BYTES + r * 128 + thread % 8 * 16) = make_uint4(0, 0, 0, 0);
            fence_async();
            group_sync(group);
        }
        wgmma_fence();
        const uint64_t k = wgmma_operand(kv);
#pragma unroll
        for (int i = 0; i < 4; i++) Wgmma<T, 64>::run(s, q + 2 * i, k + 2 * i, i);
        wgmma_commit();
    };
#pragma unroll
    for (int i = 0; i < 32; i++) asm volatile("" : "+f"(o[i]));  // zero before the first product is in flight
    score(0);
    for (int tile = 0; tile < tiles; tile++) {
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < 32; i++) asm volatile("" : "+f"(s[i]), "+f"(o[i])::"memory");
        if (tile > 0 && lane == 0) barrier_arrive(empty((tile - 1) % KV_STAGES));  // P · V of the tile before is done
        if (threadIdx.x < WARP && tile + 2 < tiles) {
            fetch(tile + 2);
            look_up(tile + 3);
        }
        const int from = tile * KV_TILE;
        if (from + KV_TILE > q_position + 1) {
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (from + j * 8 + 2 * t + i % 2 > (i < 2 ? sees0 : sees1)) s[j * 4 + i] = -INFINITY;
        }
        float now[2] = {high[0], high[1]}, shrink[2];
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) now[i / 2] = fmaxf(now[i / 2], s[j * 4 + i]);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            now[h] = fmaxf(now[h], __shfl_xor_sync(FULL, now[h], 1));
            now[h] = fmaxf(now[h], __shfl_xor_sync(FULL, now[h], 2));
            shrink[h] = exp2_fast((high[h] - now[h]) * log2_scale);
            high[h] = now[h];
            now[h] *= log2_scale;
            sum[h] *= shrink[h];
        }
        uint32_t p[4][4];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float e[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                e[i] = exp2_fast(fmaf(s[j * 4 + i], log2_scale, -now[i / 2]));
                sum[i / 2] += e[i];
            }
            p[j / 2][j % 2 * 2] = pack2<T>(e[0], e[1]);
            p[j / 2][j % 2 * 2 + 1] = pack2<T>(e[2], e[3]);
        }
        if (__any_sync(FULL, shrink[0] != 1.f || shrink[1] != 1.f)) {
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) o[j * 4 + i] *= shrink[i / 2];
        }
        wgmma_fence();
        const uint64_t v = wgmma_operand(stages + tile % KV_STAGES * 2 * KV_BYTES + KV_BYTES);
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma_pv<T>(o, p[k], v + k * 128);
        wgmma_commit();
        if (tile + 1 < tiles) score(tile + 1);
    }
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < 32; i++) asm volatile("" : "+f"(o[i])::"memory");
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(FULL, sum[h], 1);
        sum[h] += __shfl_xor_sync(FULL, sum[h], 2);
        const int m = h ? m1 : m0;
        if (m >= rows) continue;
        T *to = out + ((size_t)(t0 + m / G) * Nq + kv_head * G + m % G) * 64;
        const float inverse = 1.f / sum[h];
#pragma unroll
        for (int j = 0; j < 8; j++)
            *reinterpret_cast<uint32_t *>(to + j * 8 + 2 * t) = pack2<T>(o[j * 4 + 2 * h] * inverse, o[j * 4 + 2 * h + 1] * inverse);
    }
}

#define ATTENTION(T)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                                          \
        attention_prefill_wgmma_##T(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map, const T *qkv, \
                                    const uint32_t *block_tables, const int32_t *piece_row, const uint32_t *piece_start,          \
                                    const uint32_t *row_starts, const uint32_t *context_lens, T *out, int Nq, int Nk, int P,       \
                                    int max_blocks, float scale, int piece_tokens) {                                              \
        attend<T>(k_map, v_map, qkv, block_tables, piece_row, piece_start, row_starts, context_lens, out, Nq, Nk, P, max_blocks,  \
                  scale, piece_tokens);                                                                                           \
    }
ATTENTION(bf16)
ATTENTION(f16)

#endif
