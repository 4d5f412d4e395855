// A stream of weights through a queue per lane, for products with few tokens: the time is that of reading the weights once, so the
// only aim is to keep copies in flight, also across the gap between two kernels.
//
// A block of 8 warps multiplies tiles of 16 weight rows with up to TILES · 8 tokens; warp w owns the w-th eighth of the inner
// dimension K. A unit is 32 inner elements of a tile: a lane (g, t) copies 16 bytes of row g and of row g + 8 (cp.async) to places
// in shared memory that only it reads, so the queue needs no barrier, and DEPTH units a lane stand in flight. The first DEPTH
// units are requested before pdl_wait where their address is known then: while the previous kernel ends, this one's weights come.
// Calling a lane's 16 bytes, eight neighbouring k, "k 2t, 2t + 1, 2t + 8, 2t + 9 of two products" on both sides permutes k
// alike in A and B and so changes nothing. Weights are the 16-row side of the product, tokens the 8-wide one.
// The warps' partial sums meet in shared memory and are added in warp order: a token's result depends on no other.
// Tokens stay in registers, at most 8 units of them at a time (a segment: K <= 2048 is one).
// Activations are read with `fresh*`, past L1 and not before pdl_wait: a kernel that began early could find old lines.
#pragma once
#include "common.cuh"

#define STREAM_WARPS 8
#define STREAM_THREADS 256
#define STREAM_STEPS 8

// Units in flight a lane: 48 or 56 KB a block. Fewer do not fill the memory's latency; more only queue there, and what a block must wait
// for (tokens, the router's choice) waits behind them. Launches ask for more than half of an SM's shared memory all the same: where two
// blocks fit, a kernel that begins before its predecessor has left gets two on some SMs and none on others, and takes up to twice its time.
template <int TILES> struct StreamDepth {
    static constexpr int value = TILES == 1 ? 6 : 7;
};

DEVICE uint4 fresh16(const void *p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
DEVICE uint32_t fresh4(const void *p) {
    uint32_t v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
template <typename T> DEVICE float fresh(const T *p) {
    unsigned short v;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
    return to_f32<T>(*reinterpret_cast<T *>(&v));
}

// Weights pass once: the first to leave L2, so that code, activations and small tables stay there.
DEVICE uint64_t evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
DEVICE void copy_weights(uint32_t dst, const void *src, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "l"(policy) : "memory");
}

template <int TILES> struct StreamShared {
    uint4 queue[StreamDepth<TILES>::value][2][STREAM_THREADS];
    float partial[2][STREAM_WARPS][TILES][16][9];
};

// Where the lane's part of K begins.
DEVICE int stream_column(int K) { return threadIdx.x / WARP * (K / STREAM_WARPS) + threadIdx.x % 4 * 8; }

// `Walk::next(p0, p1)` gives the lane's addresses in the next tile, rows g and g + 8 at its first column; false after the last.
template <typename T, int TILES, class Walk> struct Stream {
    static constexpr int DEPTH = StreamDepth<TILES>::value;
    const uint4 *slots;  // the lane's places
    const uint64_t policy = evict_first();
    int in = 0, out = 0, step = 0, steps;
    bool more;
    const T *p0, *p1;
    Walk walk;

    // steps: units of a tile, K / 256.
    __device__ __forceinline__ Stream(StreamShared<TILES> &shared, int steps_, const Walk &walk_)
        : slots(&shared.queue[0][0][threadIdx.x]), steps(steps_), walk(walk_) {
        more = walk.next(p0, p1);
#pragma unroll 1
        for (int i = 0; i < DEPTH; i++) push();
    }

    __device__ __forceinline__ void push() {
        if (more) {
            const uint32_t to = smem_address(slots) + in * (2 * STREAM_THREADS * 16);
            copy_weights(to, p0 + step * 32, policy);
            copy_weights(to + STREAM_THREADS * 16, p1 + step * 32, policy);
            if (++step == steps) {
                step = 0;
                more = walk.next(p0, p1);
            }
        }
        cp_async_commit();
        in = in + 1 == DEPTH ? 0 : in + 1;
    }

    // d += the next `n` units of the tile · tokens; `used` of the TILES have any.
    __device__ __forceinline__ void multiply(const uint4 (&v)[TILES][STREAM_STEPS], int n, int used, float (&d)[TILES][2][4]) {
#pragma unroll
        for (int s = 0; s < STREAM_STEPS; s++) {
            if (s >= n) break;
            cp_async_wait<DEPTH - 1>();
            const uint4 a = slots[out * (2 * STREAM_THREADS)], b = slots[out * (2 * STREAM_THREADS) + STREAM_THREADS];
            out = out + 1 == DEPTH ? 0 : out + 1;
#pragma unroll
            for (int i = 0; i < TILES; i++)
                if (TILES == 1 || i < used) {
                    mma16816<T>(d[i][0], a.x, b.x, a.y, b.y, v[i][s].x, v[i][s].y);
                    mma16816<T>(d[i][1], a.z, b.z, a.w, b.w, v[i][s].z, v[i][s].w);
                }
            push();
        }
    }
};

template <int TILES, class Shared> DEVICE void stream_partial(Shared &shared, int buffer, const float (&d)[TILES][2][4]) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) shared.partial[buffer][warp][i][g + j / 2 * 8][2 * t + j % 2] = d[i][0][j] + d[i][1][j];
}

template <int TILES, class Shared> DEVICE float stream_sum(const Shared &shared, int buffer, int row, int token) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < STREAM_WARPS; i++) sum += shared.partial[buffer][i][token / 8][row][token % 8];
    return sum;
}

// The block's share [begin, end) of tiles.
DEVICE void stream_range(int tiles, int &begin, int &end) {
    begin = (int)((long long)tiles * blockIdx.x / gridDim.x);
    end = (int)((long long)tiles * (blockIdx.x + 1) / gridDim.x);
}
