// short_conv: [B | C | x] = bcx; z = B ⊙ x; y_t = Σ_k taps[c, k] · z_{t-L+1+k} (+ bias); out = C ⊙ y. The slot's state keeps the
// last L - 1 values of z of its row.
//
// Shapes: bcx [T, 3H], taps [H, L], bias [H] or null, state [slots, L - 1, H] (oldest first), out [T, H]; 2 <= L <= 4; H even.
// z is computed in f32, rounded to the element type when it is stored and when it is read back from bcx, so that a value does
// not depend on where a row was cut.
// Grid: (pieces, ceil(H / 256)): a piece is up to 32 tokens of one row (piece_row, piece_start; a decode row is one piece), a thread
// owns two neighbouring channels of it and walks its tokens with the L - 1 last z in registers. Before its first token it reads
// them from the state, from earlier tokens of the row, or takes zero (reset, or before the row).
// Where every row is one piece, its thread also writes the state it alone has read (`keep_state`); otherwise short_conv_state writes
// the states of all rows afterwards, so that no piece reads what another has replaced.
// Preconditions: slots of padding rows are negative (they are skipped).
// Cost: T · 4H · 2 bytes + S · 2 (L - 1) H · 2.
#include "common.cuh"

template <typename T, int L> struct Conv {
    static __device__ __forceinline__ float2 round(float2 v) { return unpack2<T>(pack2<T>(v.x, v.y)); }

    // z of the row's token `i` (relative to the row's start, may be negative: the state).
    static __device__ __forceinline__ float2 z(const T *bcx, const T *state, int H, int c, size_t row_start, int i, int slot, bool reset) {
        if (i >= 0) {
            const T *p = bcx + (row_start + i) * 3 * H + c;
            const float2 b = unpack2<T>(*reinterpret_cast<const uint32_t *>(p));
            const float2 x = unpack2<T>(*reinterpret_cast<const uint32_t *>(p + 2 * H));
            return round(make_float2(b.x * x.x, b.y * x.y));
        }
        if (reset) return make_float2(0.f, 0.f);
        return unpack2<T>(*reinterpret_cast<const uint32_t *>(state + ((size_t)slot * (L - 1) + (L - 1 + i)) * H + c));
    }
};

template <typename T, int L>
DEVICE void conv(const T *__restrict__ bcx, const T *__restrict__ taps, const T *__restrict__ bias, T *__restrict__ state,
                 const int32_t *__restrict__ piece_row, const uint32_t *__restrict__ piece_start, const uint32_t *__restrict__ row_starts,
                 const int32_t *__restrict__ slots, const uint8_t *__restrict__ reset_conv, T *__restrict__ out, int H, int keep_state) {
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * 2;
    if (c >= H) return;
    float2 tap[L], add = make_float2(0.f, 0.f);
#pragma unroll
    for (int k = 0; k < L; k++) tap[k] = make_float2(to_f32<T>(taps[c * L + k]), to_f32<T>(taps[(c + 1) * L + k]));
    if (bias) add = unpack2<T>(*reinterpret_cast<const uint32_t *>(bias + c));
    pdl_launch();
    pdl_wait();
    const int row = piece_row[blockIdx.x];
    if (row < 0) return;
    const int slot = slots[row];
    if (slot < 0) return;
    const size_t row_start = row_starts[row];
    const int begin = piece_start[blockIdx.x] - row_start;
    const int end = min(begin + 32, (int)(row_starts[row + 1] - row_start));
    const bool reset = reset_conv[row];
    float2 window[L];
#pragma unroll
    for (int k = 0; k < L - 1; k++) window[k] = Conv<T, L>::z(bcx, state, H, c, row_start, begin - (L - 1) + k, slot, reset);
    for (int i = begin; i < end; i++) {
        window[L - 1] = Conv<T, L>::z(bcx, state, H, c, row_start, i, slot, reset);
        float2 y = add;
#pragma unroll
        for (int k = 0; k < L; k++) {
            y.x += tap[k].x * window[k].x;
            y.y += tap[k].y * window[k].y;
        }
        const size_t t = row_start + i;
        const float2 gate = unpack2<T>(*reinterpret_cast<const uint32_t *>(bcx + t * 3 * H + H + c));
        *reinterpret_cast<uint32_t *>(out + t * H + c) = pack2<T>(gate.x * y.x, gate.y * y.y);
#pragma unroll
        for (int k = 0; k < L - 1; k++) window[k] = window[k + 1];
    }
    if (keep_state)
#pragma unroll
        for (int k = 0; k < L - 1; k++)
            *reinterpret_cast<uint32_t *>(state + ((size_t)slot * (L - 1) + k) * H + c) = pack2<T>(window[k].x, window[k].y);
}

// Grid: (S, ceil(H / 512)).
template <typename T, int L>
DEVICE void keep(const T *__restrict__ bcx, T *__restrict__ state, const uint32_t *__restrict__ row_starts, const int32_t *__restrict__ slots,
                 const uint8_t *__restrict__ reset_conv, int H) {
    const int row = blockIdx.x, c = (blockIdx.y * blockDim.x + threadIdx.x) * 2;
    pdl_launch();
    pdl_wait();
    const int slot = slots[row];
    if (c >= H || slot < 0) return;
    const size_t row_start = row_starts[row];
    const int n = row_starts[row + 1] - row_start;
    float2 last[L - 1];
#pragma unroll
    for (int k = 0; k < L - 1; k++) last[k] = Conv<T, L>::z(bcx, state, H, c, row_start, n - (L - 1) + k, slot, reset_conv[row]);
#pragma unroll
    for (int k = 0; k < L - 1; k++) *reinterpret_cast<uint32_t *>(state + ((size_t)slot * (L - 1) + k) * H + c) = pack2<T>(last[k].x, last[k].y);
}

#define CONV(T, L)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(128)                                                                         \
        short_conv_##T##_##L(const T *bcx, const T *taps, const T *bias, T *state, const int32_t *piece_row,                  \
                             const uint32_t *piece_start, const uint32_t *row_starts, const int32_t *slots,                   \
                             const uint8_t *reset_conv, T *out, int H, int keep_state) {                                      \
        conv<T, L>(bcx, taps, bias, state, piece_row, piece_start, row_starts, slots, reset_conv, out, H, keep_state);        \
    }                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                                                         \
        short_conv_state_##T##_##L(const T *bcx, T *state, const uint32_t *row_starts, const int32_t *slots,                  \
                                   const uint8_t *reset_conv, int H) {                                                        \
        keep<T, L>(bcx, state, row_starts, slots, reset_conv, H);                                                             \
    }
CONV(bf16, 2)
CONV(bf16, 3)
CONV(bf16, 4)
CONV(f16, 2)
CONV(f16, 3)
CONV(f16, 4)
