// qk_norm_rope_kv, in place on qkv [T, (Nq + 2 Nk) D]: every q and k head h becomes rope(rms_norm(h) · weight); K and V then go
// to the cache at slot_mapping[t] = block · P + offset (negative: nowhere).
//
// RoPE is rotate-half: elements (j, j + 32) turn by position · θ^(-2j / 64), angle, sine and cosine in f32.
// D = 64. K and V cache [blocks, Nk, P, D] in the element type: a (block, head) tile is contiguous, which is what attention reads.
// Grid: (T, ceil((Nq + 2 Nk) / 8)), a warp per head; lane l holds elements l and l + 32, the pair that RoPE turns.
// `inverse_frequency` [32] f32 is computed on the host in f64.
// Cost: T · (Nq + 2 Nk) · 64 · 4 bytes + T · 2 · Nk · 64 · 2.
#include "common.cuh"

template <typename T>
DEVICE void qk(T *qkv, const T *q_norm, const T *k_norm, const float *inverse_frequency, const uint32_t *positions,
               const int64_t *slot_mapping, T *k_cache, T *v_cache, int Nq, int Nk, int P, float eps) {
    const int lane = threadIdx.x % WARP, head = blockIdx.y * 8 + threadIdx.x / WARP;
    if (head >= Nq + 2 * Nk) return;
    const bool is_q = head < Nq, is_v = head >= Nq + Nk;
    const size_t t = blockIdx.x;
    T *p = qkv + (t * (Nq + 2 * Nk) + head) * 64;
    const T *weight = is_q ? q_norm : k_norm;
    const float w0 = to_f32<T>(weight[lane]), w1 = to_f32<T>(weight[lane + 32]);
    const float frequency = inverse_frequency[lane];
    pdl_launch();
    pdl_wait();
    float a = to_f32<T>(p[lane]), b = to_f32<T>(p[lane + 32]);
    if (!is_v) {
        const float scale = rsqrtf(warp_sum(a * a + b * b) / 64.f + eps);
        a *= scale * w0;
        b *= scale * w1;
        float sine, cosine;
        sincosf((float)positions[t] * frequency, &sine, &cosine);
        const float turned = a * cosine - b * sine;
        b = b * cosine + a * sine;
        a = turned;
    }
    if (is_q) {
        p[lane] = from_f32<T>(a);
        p[lane + 32] = from_f32<T>(b);
        return;
    }
    const int64_t slot = slot_mapping[t];
    if (slot < 0) return;
    const int kv_head = head - Nq - (is_v ? Nk : 0);
    T *cache = (is_v ? v_cache : k_cache) + (((size_t)(slot / P) * Nk + kv_head) * P + slot % P) * 64;
    cache[lane] = from_f32<T>(a);
    cache[lane + 32] = from_f32<T>(b);
}

#define QK(T)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        qk_norm_rope_kv_##T(T *qkv, const T *q_norm, const T *k_norm, const float *inverse_frequency,                      \
                            const uint32_t *positions, const int64_t *slot_mapping, T *k_cache, T *v_cache, int Nq, int Nk, \
                            int P, float eps) {                                                                            \
        qk<T>(qkv, q_norm, k_norm, inverse_frequency, positions, slot_mapping, k_cache, v_cache, Nq, Nk, P, eps);          \
    }
QK(bf16)
QK(f16)
