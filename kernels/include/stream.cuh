// A persistent stream of weight rows through shared memory, for products with few tokens: the time is that of reading the weights
// once, so the only aim is to keep copies in flight. (sm_90 and later: bulk copies and transaction barriers.)
//
// A block per SM walks a contiguous range of tiles of 16 weight rows; a tile comes in `chunks` items of 16 rows by `chunk` inner
// elements (at most 1,024), each brought by 16 bulk copies into one of three stages: 64 KB are in flight while the third is
// multiplied. A block takes less than half of an SM's shared memory, so the next kernel's blocks are resident, and its first
// weights on their way, before this one ends.
// Rows lie an odd multiple of 64 bytes apart, so that the eight lanes of a quarter warp (rows g, g + 1, four 16-byte columns)
// read all 32 banks once.
// Warp w multiplies every eighth 32 of the chunk; a lane's 16 bytes, eight neighbouring k, serve as "k 2t, 2t + 1, 2t + 8, 2t + 9 of
// two products" on both sides, which permutes k alike in A and B and so changes nothing. Partial sums meet in shared memory
// and are added in warp order.
// Tokens stay in registers while tiles of the same tokens pass, where the inner dimension is at most two chunks.
#pragma once
#include "common.cuh"

#define STREAM_WARPS 8
#define STREAM_STAGES 3
#define STREAM_CHUNK 1024  // most inner elements of an item
#define STREAM_STEPS (STREAM_CHUNK / STREAM_WARPS / 32)
#define STREAM_KEPT 2  // chunks of tokens that registers hold
#define STREAM_STAGE_BYTES (16 * (STREAM_CHUNK * 2 + 64))

#if __CUDA_ARCH__ >= 900

template <int TILES> struct StreamShared {
    unsigned char stages[STREAM_STAGES][STREAM_STAGE_BYTES];
    float partial[STREAM_WARPS][TILES][16][9];
    unsigned long long full[STREAM_STAGES];
};

struct StreamRing {
    uint32_t stages, full, row_bytes;
    int chunk;

    template <class Shared> __device__ __forceinline__ void init(Shared *shared, int chunk_) {
        stages = smem_address(shared->stages);
        full = smem_address(shared->full);
        chunk = chunk_;
        row_bytes = chunk * 2 + (chunk % 64 ? 0 : 64);
        if (threadIdx.x == 0) {
            for (int s = 0; s < STREAM_STAGES; s++)
                asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + s * 8) : "memory");
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        __syncthreads();
    }

    // Starts the copies of an item: row r comes from `source(r)`. Called by warp 0.
    template <class Source> __device__ __forceinline__ void fetch(int n, const Source &source) {
        const int lane = threadIdx.x % WARP, stage = n % STREAM_STAGES;
        const uint32_t barrier = full + stage * 8;
        if (lane == 0)
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(16 * chunk * 2) : "memory");
        __syncwarp();
        if (lane < 16)
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                             stages + stage * STREAM_STAGE_BYTES + lane * row_bytes),
                         "l"(source(lane)), "r"(chunk * 2), "r"(barrier)
                         : "memory");
    }

    __device__ __forceinline__ void wait(int n) const {
        const uint32_t barrier = full + n % STREAM_STAGES * 8, parity = n / STREAM_STAGES & 1;
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "again:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
            "@done bra ready;\n"
            "bra again;\n"
            "ready:\n"
            "}\n" ::"r"(barrier),
            "r"(parity)
            : "memory");
    }

    // Where the lane's 16 bytes of step s stand in a chunk; at or past `chunk`: the warp has no such step.
    __device__ __forceinline__ int column(int s) const {
        return (s * STREAM_WARPS + threadIdx.x / WARP) * 32 + threadIdx.x % 4 * 8;
    }

    // The lane's 16 bytes of row g (half 0) or g + 8 (half 1).
    __device__ __forceinline__ uint4 weights(int n, int s, int half) const {
        const uint32_t row = threadIdx.x % WARP / 4 + half * 8;
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(stages + n % STREAM_STAGES * STREAM_STAGE_BYTES + row * row_bytes + column(s) * 2));
        return v;
    }
};

// A lane's part of TILES · 8 tokens over one chunk: token lane / 4 of each tile.
template <typename T, int TILES> struct StreamTokens {
    uint4 v[TILES][STREAM_STEPS];

    // `x(tile)` is the address of the lane's token at the chunk's first element, or null.
    template <class X> __device__ __forceinline__ void load(const StreamRing &ring, const X &x) {
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const T *row = x(i);
#pragma unroll
            for (int s = 0; s < STREAM_STEPS; s++) {
                v[i][s] = make_uint4(0, 0, 0, 0);
                if (row && ring.column(s) < ring.chunk) v[i][s] = *reinterpret_cast<const uint4 *>(row + ring.column(s));
            }
        }
    }

    // d += item n's weights · tokens.
    __device__ __forceinline__ void multiply(const StreamRing &ring, int n, float (&d)[TILES][4]) const {
#pragma unroll
        for (int s = 0; s < STREAM_STEPS; s++) {
            if (ring.column(s) >= ring.chunk) break;
            const uint4 a = ring.weights(n, s, 0), b = ring.weights(n, s, 1);
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                mma16816<T>(d[i], a.x, b.x, a.y, b.y, v[i][s].x, v[i][s].y);
                mma16816<T>(d[i], a.z, b.z, a.w, b.w, v[i][s].z, v[i][s].w);
            }
        }
    }
};

// The tiles [begin, end) of block b of `blocks`.
DEVICE void stream_range(int tiles, int &begin, int &end) {
    begin = (int)((long long)tiles * blockIdx.x / gridDim.x);
    end = (int)((long long)tiles * (blockIdx.x + 1) / gridDim.x);
}

template <int TILES, class Shared> DEVICE void stream_partial(Shared *shared, const float (&d)[TILES][4]) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) shared->partial[warp][i][g + j / 2 * 8][2 * t + j % 2] = d[i][j];
}

template <class Shared> DEVICE float stream_sum(const Shared *shared, int tile, int row, int column) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < STREAM_WARPS; i++) sum += shared->partial[i][tile][row][column];
    return sum;
}

#endif
