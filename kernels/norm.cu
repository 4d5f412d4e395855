// rms_norm: out = x · rsqrt(mean(x²) + eps) · weight; add_rms_norm: residual += Σ deltas, out = rms_norm(residual).
// swiglu: out = silu(gate) ⊙ up.
//
// Shapes: x, residual, out [rows, H]; weight [H]; delta [rows, parts, H] (parts > 1: the experts' weighted outputs, summed in
// order here, so that the MoE needs no reduction kernel). 2-byte elements, statistics and sums in f32, the residual is
// rounded before it is normalised so that both see the same value. H a multiple of 8, H <= 8 · 256 · TURNS.
// Grid: one block of 256 threads per row; a thread owns 8 neighbouring elements per turn and keeps them in registers, which for one
// turn are few enough to fill an SM with threads.
// Cost: bytes = rows · H · 2 · (2 + parts + 1); no reuse.
#include "common.cuh"

#define NORM_THREADS 256

template <typename T, int TURNS>
DEVICE void add_norm_row(T *residual, const T *delta, int parts, const T *weight, float eps, T *out, int H, bool store) {
    __shared__ float scratch[NORM_THREADS / WARP];
    const size_t row = blockIdx.x;
    float v[TURNS][8];
    uint4 w[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        const int c = (i * NORM_THREADS + threadIdx.x) * 8;
        if (c < H) w[i] = *reinterpret_cast<const uint4 *>(weight + c);
    }
    pdl_launch();
    pdl_wait();
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        const int c = (i * NORM_THREADS + threadIdx.x) * 8;
        if (c < H) {
            unpack8<T>(*reinterpret_cast<const uint4 *>(residual + row * H + c), v[i]);
            if (parts) {
                float d[8], total[8] = {};
                for (int p0 = 0; p0 < parts; p0 += 4) {
                    uint4 part[4];
#pragma unroll
                    for (int p = 0; p < 4; p++)
                        if (p0 + p < parts) part[p] = *reinterpret_cast<const uint4 *>(delta + (row * parts + p0 + p) * H + c);
#pragma unroll
                    for (int p = 0; p < 4; p++) {
                        if (p0 + p >= parts) break;
                        unpack8<T>(part[p], d);
#pragma unroll
                        for (int j = 0; j < 8; j++) total[j] += d[j];
                    }
                }
#pragma unroll
                for (int j = 0; j < 8; j++) v[i][j] += total[j];
                const uint4 rounded = pack8<T>(v[i]);
                unpack8<T>(rounded, v[i]);
                if (store) *reinterpret_cast<uint4 *>(residual + row * H + c) = rounded;
            }
#pragma unroll
            for (int j = 0; j < 8; j++) sum += v[i][j] * v[i][j];
        }
    }
    const float scale = rsqrtf(block_sum<NORM_THREADS / WARP>(sum, scratch) / H + eps);
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        const int c = (i * NORM_THREADS + threadIdx.x) * 8;
        if (c < H) {
            float g[8];
            unpack8<T>(w[i], g);
#pragma unroll
            for (int j = 0; j < 8; j++) v[i][j] = v[i][j] * scale * g[j];
            *reinterpret_cast<uint4 *>(out + row * H + c) = pack8<T>(v[i]);
        }
    }
}

#define NORM(T, TURNS)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(NORM_THREADS)                                                           \
        rms_norm_##T##_##TURNS(const T *x, const T *weight, float eps, T *out, int H) {                                  \
        add_norm_row<T, TURNS>(const_cast<T *>(x), nullptr, 0, weight, eps, out, H, false);                              \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(NORM_THREADS)                                                           \
        add_rms_norm_##T##_##TURNS(T *residual, const T *delta, int parts, const T *weight, float eps, T *out, int H) {  \
        add_norm_row<T, TURNS>(residual, delta, parts, weight, eps, out, H, true);                                       \
    }
#define SWIGLU(T)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(256) swiglu_##T(const T *gate_up, T *out, int rows, int F) {            \
        pdl_launch();                                                                                                    \
        pdl_wait();                                                                                                      \
        const size_t vectors = (size_t)rows * F / 8;                                                                     \
        for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < vectors; i += (size_t)gridDim.x * blockDim.x) { \
            const size_t row = i * 8 / F, c = i * 8 % F;                                                                 \
            float g[8], u[8];                                                                                            \
            unpack8<T>(*reinterpret_cast<const uint4 *>(gate_up + row * 2 * F + c), g);                                  \
            unpack8<T>(*reinterpret_cast<const uint4 *>(gate_up + row * 2 * F + F + c), u);                              \
            for (int j = 0; j < 8; j++) g[j] = silu(g[j]) * u[j];                                                        \
            *reinterpret_cast<uint4 *>(out + i * 8) = pack8<T>(g);                                                       \
        }                                                                                                                \
    }

NORM(bf16, 1)
NORM(bf16, 4)
SWIGLU(bf16)
NORM(f16, 1)
NORM(f16, 4)
SWIGLU(f16)
