// linear for a few tokens: out[m, n] = Σ_k x[m, k] · w[n, k] (+ bias[n]), M <= 16: the time is that of reading w once.
//
// Shapes: x [M, K], w [N, K], out [M, N] in the element type or f32 (logits). N a multiple of 16, K of 256, f32 accumulation.
// Layout: both operands keep K contiguous, as the checkpoint does. A lane loads 16 bytes = 8 neighbouring k of one weight
// row and the same 8 k of one token; calling them "k 2t, 2t+1, 2t+8, 2t+9 of two products" permutes k alike in A and B, which
// a dot product cannot see. So weights go from memory to tensor-core registers with no shared memory between.
// sm_90 and later: include/stream.cuh; grid: a block per SM, 8 warps; K is cut into chunks of at most 1,024. The first stages'
// weights are on their way before pdl_wait.
// Before sm_90: grid of N / 16 blocks of 8 warps; a warp owns all 16 rows of the block and an eighth of K, in turns of 256 k held
// in registers.
// Partial sums are added in warp order, so the result does not depend on M or on neighbours.
// Preconditions: `chunk` divides K, is a multiple of 32 and at most 1,024; before sm_90 K is a multiple of 256.
// Cost: N · K · 2 bytes; M > 16 goes to gemm.cu.
#include "stream.cuh"

#define SKINNY_WARPS 8
#define SKINNY_STEPS 8  // of 32 k: a warp's turn

#if __CUDA_ARCH__ >= 900
template <typename T, typename Out, int TILES>  // TILES of 8 tokens
DEVICE void skinny(const T *__restrict__ x, const T *__restrict__ w, const T *__restrict__ bias, Out *__restrict__ out, int M, int N, int K, int chunk) {
    extern __shared__ __align__(128) unsigned char raw[];
    auto *shared = reinterpret_cast<StreamShared<TILES> *>(raw);
    StreamRing ring;
    ring.init(shared, chunk);
    const int chunks = K / chunk, g = threadIdx.x % WARP / 4;
    int begin, end;
    stream_range(N / 16, begin, end);
    const int items = (end - begin) * chunks;
    const auto fetch = [&](int n) {
        const T *from = w + (size_t)(begin + n / chunks) * 16 * K + n % chunks * chunk;
        ring.fetch(n, [&](int r) { return from + (size_t)r * K; });
    };
    if (threadIdx.x < WARP)
        for (int n = 0; n < min(items, STREAM_STAGES); n++) fetch(n);
    pdl_launch();
    pdl_wait();
    StreamTokens<T, TILES> kept[STREAM_KEPT];
    const auto load = [&](StreamTokens<T, TILES> &tokens, int c) {
        tokens.load(ring, [&](int i) { return i * 8 + g < M ? x + (size_t)(i * 8 + g) * K + c * chunk : nullptr; });
    };
    if (chunks <= STREAM_KEPT)
#pragma unroll
        for (int c = 0; c < STREAM_KEPT; c++)
            if (c < chunks) load(kept[c], c);
    int n = 0;
    for (int tile = begin; tile < end; tile++) {
        float d[TILES][4] = {};
        const auto next = [&] {
            __syncthreads();  // the stage is read
            if (threadIdx.x < WARP && n + STREAM_STAGES < items) fetch(n + STREAM_STAGES);
            n++;
        };
        if (chunks <= STREAM_KEPT) {
#pragma unroll
            for (int c = 0; c < STREAM_KEPT; c++) {
                if (c >= chunks) break;
                ring.wait(n);
                kept[c].multiply(ring, n, d);
                if (c == chunks - 1) stream_partial<TILES>(shared, d);
                next();
            }
        } else {
            for (int c = 0; c < chunks; c++) {
                load(kept[0], c);
                ring.wait(n);
                kept[0].multiply(ring, n, d);
                if (c == chunks - 1) stream_partial<TILES>(shared, d);
                next();
            }
        }
        for (int j = threadIdx.x; j < TILES * 128; j += STREAM_WARPS * WARP) {
            const int r = j % 16, m = j / 16;
            if (m >= M) continue;
            float sum = stream_sum(shared, m / 8, r, m % 8);
            if (bias) sum += to_f32<T>(bias[tile * 16 + r]);
            out[(size_t)m * N + tile * 16 + r] = from_f32<Out>(sum);
        }
        __syncthreads();
    }
}
#else
template <typename T, typename Out, int TILES>  // TILES of 8 tokens
DEVICE void skinny(const T *__restrict__ x, const T *__restrict__ w, const T *__restrict__ bias, Out *__restrict__ out, int M, int N, int K, int chunk) {
    __shared__ float partial[SKINNY_WARPS][TILES][16][8];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int n0 = blockIdx.x * 16;
    const int per_warp = K / SKINNY_WARPS;  // a multiple of 32
    const T *w0 = w + (size_t)(n0 + g) * K + warp * per_warp + t * 8;
    const T *w1 = w0 + (size_t)8 * K;
    float d[TILES][4];
#pragma unroll
    for (int i = 0; i < TILES; i++) d[i][0] = d[i][1] = d[i][2] = d[i][3] = 0.f;
    bool first = true;
    for (int k = 0; k < per_warp; k += SKINNY_STEPS * 32) {
        uint4 a[SKINNY_STEPS], b[SKINNY_STEPS];
#pragma unroll
        for (int s = 0; s < SKINNY_STEPS; s++)
            if (k + s * 32 < per_warp) {
                a[s] = load_stream(w0 + k + s * 32);
                b[s] = load_stream(w1 + k + s * 32);
            }
        if (first) {
            pdl_launch();
            pdl_wait();
            first = false;
        }
#pragma unroll
        for (int s = 0; s < SKINNY_STEPS; s++) {
            if (k + s * 32 >= per_warp) break;
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                const int m = i * 8 + g;
                uint4 v = make_uint4(0, 0, 0, 0);
                if (m < M) v = *reinterpret_cast<const uint4 *>(x + (size_t)m * K + warp * per_warp + k + s * 32 + t * 8);
                mma16816<T>(d[i], a[s].x, b[s].x, a[s].y, b[s].y, v.x, v.y);
                mma16816<T>(d[i], a[s].z, b[s].z, a[s].w, b[s].w, v.z, v.w);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        partial[warp][i][g][2 * t] = d[i][0];
        partial[warp][i][g][2 * t + 1] = d[i][1];
        partial[warp][i][g + 8][2 * t] = d[i][2];
        partial[warp][i][g + 8][2 * t + 1] = d[i][3];
    }
    __syncthreads();
    for (int j = threadIdx.x; j < TILES * 128; j += SKINNY_WARPS * WARP) {
        const int n = j % 16, m = j / 16;
        if (m >= M) continue;
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < SKINNY_WARPS; i++) sum += partial[i][m / 8][n][m % 8];
        if (bias) sum += to_f32<T>(bias[n0 + n]);
        out[(size_t)m * N + n0 + n] = from_f32<Out>(sum);
    }
}

#endif

#define SKINNY(T, Out, TILES)                                                                                       \
    extern "C" __global__ void __launch_bounds__(SKINNY_WARPS *WARP)                                             \
        linear_skinny_##T##_##Out##_##TILES(const T *x, const T *w, const T *bias, Out *out, int M, int N, int K, int chunk) { \
        skinny<T, Out, TILES>(x, w, bias, out, M, N, K, chunk);                                                            \
    }

SKINNY(bf16, bf16, 1)
SKINNY(bf16, bf16, 2)
SKINNY(bf16, float, 1)
SKINNY(bf16, float, 2)
SKINNY(f16, f16, 1)
SKINNY(f16, f16, 2)
SKINNY(f16, float, 1)
SKINNY(f16, float, 2)
