// linear for many tokens on sm_90a: out[m, n] = Σ_k x[m, k] · w[n, k] (+ bias[n]). Elsewhere gemm.cu.
//
// Shapes: x [M, K], w [N, K], out [M, N] in the element type or f32. K and N multiples of 8; f32 accumulation.
// Tiles of 128 weight rows × TN tokens (include/wgmma.cuh), TN 64, 128 or 256; both operands come by tensor map (w as [1, N, K] in
// boxes of 128 rows, x as [M, K] in boxes of TN / 4), which fill what lies past K, N or M with zeros.
// Grid: persistent blocks over tiles · splits items; tiles in bands of 8 token tiles, so that the tiles of one wave share
// weights and tokens in L2. With splits > 1 each part of K leaves f32 sums in `partial`, in the accumulators' own order, and the
// last to arrive adds them in order: the result does not depend on timing.
// Preconditions: splits <= ceil(K / 64); `partial` has tiles · splits · 128 · TN floats and `arrived` two zeros per tile (left zero).
// Cost: FLOPs 2 · M · N · K; bytes N · K · 2 + M · (K + N) · 2.
#include "wgmma.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#define BAND 8

template <typename T, typename Out, int TN>
DEVICE void gemm(const TensorMap &w, const TensorMap &x, const T *__restrict__ bias, Out *__restrict__ out, float *__restrict__ partial,
                 unsigned *__restrict__ arrived, int M, int N, int K, int splits) {
    extern __shared__ unsigned char raw[];
    Wide<T, TN> core(raw);
    core.init(0);
    pdl_launch();
    const int w_tiles = (N + WGMMA_ROWS - 1) / WGMMA_ROWS, x_tiles = (M + TN - 1) / TN, items = w_tiles * x_tiles * splits;
    const int all_steps = (K + WGMMA_BK - 1) / WGMMA_BK;
    struct Item {
        int tile, split, n0, m0, tokens, first, steps;
    };
    const auto find = [&](int i) {
        Item item;
        item.tile = i / splits;
        item.split = i % splits;
        const int band = item.tile / (BAND * w_tiles), in_band = item.tile % (BAND * w_tiles), width = min(BAND, x_tiles - band * BAND);
        item.n0 = in_band / width * WGMMA_ROWS;
        item.m0 = (band * BAND + in_band % width) * TN;
        item.tokens = min(TN, M - item.m0);
        item.first = all_steps * item.split / splits;
        item.steps = all_steps * (item.split + 1) / splits - item.first;
        return item;
    };
    if (threadIdx.x >= 256) {
        registers_give<PRODUCER_REGISTERS>();
        bool first = true;
        for (int i = blockIdx.x; threadIdx.x == 256 && i < items; i += gridDim.x) {
            const Item item = find(i);
            const int boxes = core.quarters(item.tokens);
            const auto fetch_w = [&](int step) {
                barrier_expect(core.full(), WGMMA_A_BYTES + boxes * core.QUARTER * 128);
                tma_load(core.a(), w, core.full(), (item.first + step) * WGMMA_BK, item.n0, 0);
            };
            const auto fetch_x = [&](int step) { core.fetch_tokens(x, boxes, (item.first + step) * WGMMA_BK, item.m0); };
            int step = 0;
            if (first) {  // weights do not depend on the predecessor
                const int ahead = min(core.STAGES, item.steps);
                for (; step < ahead; step++, core.advance()) fetch_w(step);
                pdl_wait();
                core.stage = 0;
                core.phase = 0;
                for (step = 0; step < ahead; step++, core.advance()) fetch_x(step);
                first = false;
            }
            for (; step < item.steps; step++, core.advance()) {
                barrier_wait(core.empty(), core.phase ^ 1);
                fetch_w(step);
                fetch_x(step);
            }
        }
    } else {
        registers_take<CONSUMER_REGISTERS>();
        const int group = threadIdx.x / 128, thread = threadIdx.x % 128, row = group * 64 + thread / WARP * 16 + thread % WARP / 4;
        float acc[TN / 2] = {};
        if (splits > 1) pdl_wait();  // the predecessor's partial sums have been added
        for (int i = blockIdx.x; i < items; i += gridDim.x) {
            const Item item = find(i);
            core.template multiply<false>(item.tokens, item.steps, acc, [] {});
            if (splits > 1) {
                const auto sums = [&](int split) {
                    return reinterpret_cast<float4 *>(partial) + ((size_t)(item.tile * splits + split) * 2 + group) * (TN / 8 * 128) + thread;
                };
#pragma unroll
                for (int j = 0; j < TN / 8; j++) sums(item.split)[j * 128] = make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
                __threadfence();
                group_sync(group);
                if (thread == 0) {
                    unsigned *counter = arrived + item.tile * 2 + group;
                    const bool last = atomicAdd(counter, 1) == splits - 1;
                    if (last) *counter = 0;
                    core.flags()[group] = last;
                }
                group_sync(group);
                if (!core.flags()[group]) continue;
                __threadfence();
#pragma unroll
                for (int j = 0; j < TN / 2; j++) acc[j] = 0.f;
                for (int s = 0; s < splits; s++) {
#pragma unroll
                    for (int j = 0; j < TN / 8; j++) {
                        const float4 v = __ldcg(sums(s) + j * 128);
                        acc[4 * j] += v.x;
                        acc[4 * j + 1] += v.y;
                        acc[4 * j + 2] += v.z;
                        acc[4 * j + 3] += v.w;
                    }
                }
            }
            float2 add = make_float2(0.f, 0.f);
            if (bias) {
                if (item.n0 + row < N) add.x = to_f32<T>(bias[item.n0 + row]);
                if (item.n0 + row + 8 < N) add.y = to_f32<T>(bias[item.n0 + row + 8]);
            }
            core.template store<Out, false>(acc, item.tokens, item.n0 + group * 64, N, add, nullptr, [&](int token) { return out + (size_t)(item.m0 + token) * N; });
        }
    }
}

#define GEMM(T, Out, TN)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(WGMMA_THREADS, 1)                                                                  \
        gemm_wgmma_##T##_##Out##_##TN(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const T *bias,       \
                                      Out *out, float *partial, unsigned *arrived, int M, int N, int K, int splits) {                \
        gemm<T, Out, TN>(w, x, bias, out, partial, arrived, M, N, K, splits);                                                        \
    }
#define GEMMS(T, Out) GEMM(T, Out, 64) GEMM(T, Out, 128) GEMM(T, Out, 256)

GEMMS(bf16, bf16)
GEMMS(bf16, float)
GEMMS(f16, f16)
GEMMS(f16, float)

#endif
