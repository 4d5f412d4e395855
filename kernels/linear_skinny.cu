// Products of a few tokens with a matrix, y[m, n] = Σ_k x[m, k] · w[n, k], and what stands before and after them in a layer, in one
// kernel each: the time is that of reading w once (include/stream.cuh).
//
// linear_skinny      out = y (+ bias), in the element type or f32 (logits)
// linear_add         out += y (+ bias): the residual stream, rounded once
// linear_swiglu      w = [gate; up] [2F, K]: out[m, f] = silu(y[m, f]) ⊙ y[m, F + f]
// linear_short_conv  w = [B; C; x] [3H, K]: a decode step's short convolution (short_conv.cu) of y (+ bias), rounded as the plain
//                    operations round; the slot's state moves on
// *_norm: x is normed first, rms_norm(x) · norm rounded to the element type, by every block for itself (M <= 8).
//
// Shapes: x [M, K], w [N, K]. K a multiple of 256 (with a norm at most 2,048), N (F, H) of 16 (8, 16).
// Grid: (blocks, ceil(M / (8 · TILES))), a block per SM in all: it takes 8 · TILES tokens and walks a contiguous range of tiles: 16 rows, 8 of gate and the 8 of up beside them, or 16 channels of B, C and x
// in turn. f32 accumulation; a token's result depends on no other.
// conv: taps [H, L], bias [H] or null, state [slots, L - 1, H], 2 <= L <= 4; slot < 0: a padding row, which keeps no state.
// Cost: N · K · 2 bytes, the same again from L2 for each further group of tokens.
#include "stream.cuh"

enum Epilogue { STORE, ADD, SWIGLU, CONV };

template <int TILES> struct SkinnyShared : StreamShared<TILES> {
    uint4 norm[STREAM_STEPS * STREAM_WARPS * 4];  // 2,048 elements
    float squares[STREAM_WARPS][8];
};

template <typename T, Epilogue KIND> struct RowWalk {
    const T *w;  // at the lane's column
    int tile, end, N, K;
    __device__ __forceinline__ bool next(const T *&p0, const T *&p1) {
        if (tile >= end) return false;
        const int g = threadIdx.x % WARP / 4;
        if (KIND == SWIGLU) {
            p0 = w + (size_t)(tile * 8 + g) * K;
            p1 = p0 + (size_t)N * K;
        } else {
            // CONV: N = H, tiles run over B, C, x of 16 channels.
            const int row = KIND == CONV ? tile % 3 * N + tile / 3 * 16 : tile * 16;
            p0 = w + (size_t)(row + g) * K;
            p1 = p0 + (size_t)8 * K;
        }
        tile++;
        return true;
    }
};

template <typename T> struct ConvArgs {
    const T *taps, *bias;
    T *state;
    const int32_t *slots;
    const uint8_t *reset;
    int L;
};

template <typename T, typename Out, int TILES, bool NORM, Epilogue KIND>
DEVICE void skinny(const T *x, const T *norm, float eps, const T *w, const T *bias, Out *out, int M, int N, int K, const ConvArgs<T> conv) {
    extern __shared__ __align__(128) unsigned char raw[];
    auto &shared = *reinterpret_cast<SkinnyShared<TILES> *>(raw);
    constexpr int ROWS = KIND == SWIGLU ? 8 : 16, PARTS = KIND == CONV ? 3 : 1, OUTS = (TILES * 8 * ROWS + STREAM_THREADS - 1) / STREAM_THREADS;
    const int g = threadIdx.x % WARP / 4, column = stream_column(K), steps = K / 256, m0 = blockIdx.y * TILES * 8;
    x += (size_t)m0 * K;
    M = min(M - m0, TILES * 8);
    const int used = (M + 7) / 8;
    int begin, end;
    stream_range(N / ROWS, begin, end);
    out += (size_t)m0 * N;
    pdl_launch();
    Stream<T, TILES, RowWalk<T, KIND>> stream(shared, steps, RowWalk<T, KIND>{w + column, begin * PARTS, end * PARTS, N, K});
    if (NORM)
        for (int i = threadIdx.x; i < K / 8; i += STREAM_THREADS) shared.norm[i] = reinterpret_cast<const uint4 *>(norm)[i];
    // CONV: the slots are the step's and the states the last step's: known before the wait.
    int slot[OUTS];
    bool reset[OUTS];
    float old[OUTS][3];
    const auto past = [&](int tile) {
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            const int j = o * STREAM_THREADS + threadIdx.x;
            const bool has = slot[o] >= 0 && !reset[o];
            const T *state = conv.state + (size_t)max(slot[o], 0) * (conv.L - 1) * N + tile / 3 * 16 + j % ROWS;
#pragma unroll
            for (int k = 0; k < 3; k++) old[o][k] = k < conv.L - 1 && has ? fresh(state + (size_t)k * N) : 0.f;
        }
    };
    if (KIND == CONV) {
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            const int m = (o * STREAM_THREADS + threadIdx.x) / ROWS;
            slot[o] = m < M ? __ldcg(conv.slots + m0 + m) : -1;
            reset[o] = m < M && __ldcg(conv.reset + m0 + m);
        }
        if (begin < end) past(begin * PARTS);
    }
    pdl_wait();

    // A segment's tokens, in the order in which they are multiplied.
    uint4 v[TILES][STREAM_STEPS];
    const auto load = [&](int s0) {
#pragma unroll
        for (int s = 0; s < STREAM_STEPS; s++)
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                v[i][s] = make_uint4(0, 0, 0, 0);
                if (i * 8 + g < M && s0 + s < steps) v[i][s] = fresh16(x + (size_t)(i * 8 + g) * K + column + (s0 + s) * 32);
            }
    };
    load(0);
    if (NORM) {
        float squares = 0.f;
#pragma unroll
        for (int s = 0; s < STREAM_STEPS; s++) {
            float f[8];
            unpack8<T>(v[0][s], f);
#pragma unroll
            for (int j = 0; j < 8; j++) squares += f[j] * f[j];
        }
        squares += __shfl_xor_sync(FULL, squares, 1);
        squares += __shfl_xor_sync(FULL, squares, 2);
        if (threadIdx.x % 4 == 0) shared.squares[threadIdx.x / WARP][g] = squares;
        __syncthreads();
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < STREAM_WARPS; i++) sum += shared.squares[i][g];
        const float scale = rsqrtf(sum / K + eps);
#pragma unroll
        for (int s = 0; s < STREAM_STEPS; s++) {
            if (s >= steps) break;
            float f[8], n[8];
            unpack8<T>(v[0][s], f);
            unpack8<T>(shared.norm[(column + s * 32) / 8], n);
#pragma unroll
            for (int j = 0; j < 8; j++) f[j] = f[j] * scale * n[j];
            v[0][s] = pack8<T>(f);
        }
    }

    int buffer = 0;
    float first[OUTS], second[OUTS];  // CONV: B, C. ADD: what is added to.
    for (int tile = begin * PARTS; tile < end * PARTS; tile++) {
        if (KIND == ADD)
#pragma unroll
            for (int o = 0; o < OUTS; o++) {
                const int j = o * STREAM_THREADS + threadIdx.x, r = j % ROWS, m = j / ROWS;
                first[o] = m < M ? fresh(out + (size_t)m * N + tile * ROWS + r) : 0.f;
            }
        if (KIND == CONV && tile % 3 == 0 && tile > begin * PARTS) past(tile);
        float d[TILES][2][4] = {};
        for (int s0 = 0; s0 < steps; s0 += STREAM_STEPS) {
            const int next = s0 + STREAM_STEPS;
            stream.multiply(v, min(STREAM_STEPS, steps - s0), used, d);
            // The first segment again for the next tile.
            if (steps > STREAM_STEPS && (next < steps || tile + 1 < end * PARTS)) load(next < steps ? next : 0);
        }
        stream_partial<TILES>(shared, buffer, d);
        __syncthreads();
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            const int j = o * STREAM_THREADS + threadIdx.x, r = j % ROWS, m = j / ROWS;
            if (m >= M) continue;
            float sum = stream_sum<TILES>(shared, buffer, r, m);
            if (KIND == SWIGLU) {
                out[(size_t)m * N + tile * 8 + r] = from_f32<Out>(silu(sum) * stream_sum<TILES>(shared, buffer, r + 8, m));
            } else if (KIND == CONV) {
                const int part = tile % 3, c = tile / 3 * 16 + r;
                if (bias) sum += to_f32<T>(bias[part * N + c]);
                sum = to_f32<T>(from_f32<T>(sum));
                if (part == 0) {
                    first[o] = sum;
                } else if (part == 1) {
                    second[o] = sum;
                } else {
                    const float z = to_f32<T>(from_f32<T>(first[o] * sum));
                    float y = conv.bias ? to_f32<T>(conv.bias[c]) : 0.f;
#pragma unroll
                    for (int k = 0; k < 3; k++)
                        if (k < conv.L - 1) y += to_f32<T>(conv.taps[c * conv.L + k]) * old[o][k];
                    y += to_f32<T>(conv.taps[c * conv.L + conv.L - 1]) * z;
                    out[(size_t)m * N + c] = from_f32<Out>(second[o] * y);
                    T *state = conv.state + (size_t)max(slot[o], 0) * (conv.L - 1) * N + c;
                    if (slot[o] >= 0)
#pragma unroll
                        for (int k = 0; k < 3; k++)
                            if (k < conv.L - 1) state[(size_t)k * N] = from_f32<T>(k + 1 < conv.L - 1 ? old[o][min(k + 1, 2)] : z);
                }
            } else {
                if (bias) sum += to_f32<T>(bias[tile * 16 + r]);
                out[(size_t)m * N + tile * 16 + r] = from_f32<Out>(KIND == ADD ? first[o] + sum : sum);
            }
        }
        buffer ^= 1;
    }
    cp_async_wait<0>();
}

#define PLAIN(NAME, T, Out, TILES, NORM, KIND)                                                                               \
    extern "C" __global__ void __launch_bounds__(STREAM_THREADS, 1)                                                             \
        NAME(const T *x, const T *norm, float eps, const T *w, const T *bias, Out *out, int M, int N, int K) {               \
        skinny<T, Out, TILES, NORM, KIND>(x, norm, eps, w, bias, out, M, N, K, ConvArgs<T>{});                               \
    }
#define CONVOLVED(NAME, T, TILES, NORM)                                                                                      \
    extern "C" __global__ void __launch_bounds__(STREAM_THREADS, 1)                                                             \
        NAME(const T *x, const T *norm, float eps, const T *w, const T *bias, T *out, int M, int N, int K, const T *taps,    \
             const T *taps_bias, T *state, const int32_t *slots, const uint8_t *reset, int L) {                              \
        skinny<T, T, TILES, NORM, CONV>(x, norm, eps, w, bias, out, M, N, K,                                                 \
                                        ConvArgs<T>{taps, taps_bias, state, slots, reset, L});                               \
    }
#define TILED(T, TILES)                                                 \
    PLAIN(linear_skinny_##T##_##T##_##TILES, T, T, TILES, false, STORE) \
    PLAIN(linear_skinny_##T##_float_##TILES, T, float, TILES, false, STORE) \
    PLAIN(linear_add_##T##_##TILES, T, T, TILES, false, ADD)            \
    PLAIN(linear_swiglu_##T##_##TILES, T, T, TILES, false, SWIGLU)      \
    CONVOLVED(linear_short_conv_##T##_##TILES, T, TILES, false)
#define SKINNY(T)                                                  \
    TILED(T, 1)                                                    \
    TILED(T, 2)                                                    \
    TILED(T, 4)                                                    \
    PLAIN(linear_skinny_norm_##T##_##T##_1, T, T, 1, true, STORE)  \
    PLAIN(linear_skinny_norm_##T##_float_1, T, float, 1, true, STORE) \
    PLAIN(linear_swiglu_norm_##T##_1, T, T, 1, true, SWIGLU)       \
    CONVOLVED(linear_short_conv_norm_##T##_1, T, 1, true)

SKINNY(bf16)
SKINNY(f16)
