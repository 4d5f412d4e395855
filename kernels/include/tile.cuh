// A block's matrix product on tensor cores through shared memory: acc += X[BM tokens, K] · W[BN rows, K]ᵀ.
//
// Layout: both operands keep K contiguous. A stage holds BK = 64 k of BM + BN rows, 128 bytes a row in eight 16-byte chunks;
// chunk c of row r lies at c ^ (r % 8), so that cp.async writes and ldmatrix reads touch every bank once.
// Warps stand WM × WN over the tile; each owns BM/WM × BN/WN in m16n8 accumulators.
// Rows are fetched through a functor (row, chunk address, valid), which is how the experts gather theirs.
// mma.sync and cp.async alone: the same code runs from sm_80 on.
#pragma once
#include "common.cuh"

template <typename T, int BM_, int BN_, int WM_, int WN_, int STAGES_> struct Tile {
    static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_, STAGES = STAGES_, BK = 64;
    static constexpr int THREADS = WM * WN * WARP;
    static constexpr int MI = BM / WM / 16, NI = BN / WN / 8;  // accumulators per warp
    static constexpr int STAGE_BYTES = (BM + BN) * BK * 2;
    static constexpr int SMEM_BYTES = STAGES * STAGE_BYTES;
    static_assert(BM % (WM * 16) == 0 && BN % (WN * 16) == 0, "warps own whole 16-row pieces");

    float acc[MI][NI][4];
    const T *anywhere;  // a readable address, for copies of zero bytes

    __device__ __forceinline__ Tile(const T *readable) : anywhere(readable) {}

    __device__ __forceinline__ uint32_t chunk(uint32_t base, int row, int c) { return base + row * 128 + ((c ^ (row & 7)) << 4); }

    template <int ROWS, class Source> __device__ __forceinline__ void load(uint32_t base, int k0, int k_end, const Source &source) {
#pragma unroll
        for (int i = 0; i < (ROWS * 8 + THREADS - 1) / THREADS; i++) {
            const int j = i * THREADS + threadIdx.x, row = j / 8, c = j % 8;
            if (ROWS * 8 % THREADS == 0 || j < ROWS * 8) {
                const T *p = source(row);
                const int k = k0 + c * 8;
                const bool valid = p != nullptr && k < k_end;
                cp_async16(chunk(base, row, c), valid ? p + k : anywhere, valid);
            }
        }
    }

    // k range [k_begin, k_end), both multiples of 8. `x` and `w` give the address of k = 0 of a tile row, or null.
    template <class X, class W> __device__ __forceinline__ void run(char *smem, int k_begin, int k_end, const X &x, const W &w) {
        const uint32_t base = smem_address(smem);
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        const int wm = warp / WN * (BM / WM), wn = warp % WN * (BN / WN);
        const int steps = (k_end - k_begin + BK - 1) / BK;
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int j = 0; j < NI; j++) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.f;

        // Weights do not depend on the predecessor: the first stages' are on their way before it has finished.
#pragma unroll
        for (int s = 0; s < STAGES - 1; s++)
            if (s < steps) load<BN>(base + s * STAGE_BYTES + BM * 128, k_begin + s * BK, k_end, w);
        pdl_launch();
        pdl_wait();
#pragma unroll
        for (int s = 0; s < STAGES - 1; s++) {
            if (s < steps) load<BM>(base + s * STAGE_BYTES, k_begin + s * BK, k_end, x);
            cp_async_commit();
        }
        for (int step = 0; step < steps; step++) {
            cp_async_wait<STAGES - 2>();
            __syncthreads();
            const int next = step + STAGES - 1;
            if (next < steps) {
                const uint32_t to = base + next % STAGES * STAGE_BYTES;
                load<BN>(to + BM * 128, k_begin + next * BK, k_end, w);
                load<BM>(to, k_begin + next * BK, k_end, x);
            }
            cp_async_commit();
            const uint32_t xs = base + step % STAGES * STAGE_BYTES, ws = xs + BM * 128;
#pragma unroll
            for (int kk = 0; kk < BK / 16; kk++) {
                uint32_t a[MI][4], b[NI / 2][4];
#pragma unroll
                for (int i = 0; i < MI; i++) ldmatrix4(a[i], chunk(xs, wm + i * 16 + lane % 16, kk * 2 + lane / 16));
#pragma unroll
                for (int j = 0; j < NI / 2; j++) ldmatrix4(b[j], chunk(ws, wn + j * 16 + lane % 16, kk * 2 + lane / 16));
#pragma unroll
                for (int i = 0; i < MI; i++)
#pragma unroll
                    for (int j = 0; j < NI; j++)
                        mma16816<T>(acc[i][j], a[i][0], a[i][1], a[i][2], a[i][3], b[j / 2][j % 2], b[j / 2][j % 2 + 2]);
            }
        }
        cp_async_wait<0>();
        __syncthreads();
    }

    // Calls f(row in tile, column in tile, value, value of the next column) for every pair of neighbours.
    template <class F> __device__ __forceinline__ void each(const F &f) {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
        const int wm = warp / WN * (BM / WM), wn = warp % WN * (BN / WN);
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int j = 0; j < NI; j++) {
                f(wm + i * 16 + g, wn + j * 8 + 2 * t, acc[i][j][0], acc[i][j][1]);
                f(wm + i * 16 + g + 8, wn + j * 8 + 2 * t, acc[i][j][2], acc[i][j][3]);
            }
    }

    // The same for weights whose rows alternate, eight of gate and eight of up: f(row, column of F, gate, gate', up, up').
    template <class F> __device__ __forceinline__ void each_gated(const F &f) {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
        const int wm = warp / WN * (BM / WM), wn = warp % WN * (BN / WN);
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int j = 0; j < NI; j += 2) {
                const int c = (wn + j * 8) / 2 + 2 * t;
                f(wm + i * 16 + g, c, acc[i][j][0], acc[i][j][1], acc[i][j + 1][0], acc[i][j + 1][1]);
                f(wm + i * 16 + g + 8, c, acc[i][j][2], acc[i][j][3], acc[i][j + 1][2], acc[i][j + 1][3]);
            }
    }
};
