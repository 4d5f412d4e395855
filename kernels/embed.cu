// embed: out[t] = table[token_ids[t]]; gather: out[n] = x[rows[n]]; feed_back: token_ids[row_starts[s]] = last[slots[s]].
// upload: a step's arrays from page-locked host memory, one block per array; offsets and sizes in vectors of 16 bytes. A copy engine
// would need microseconds to take over and give back. It lets no kernel begin before it has ended.
//
// Shapes: table [V, H], token_ids [T], out [T, H]; x [T, H], rows [N], out [N, H]. 2-byte elements, H a multiple of 8.
// Grid: one block of 256 threads per output row, 16 bytes a thread and turn. No arithmetic.
// Preconditions: ids < V and rows < T are checked by the launcher's caller (the engine validates ids).
// Cost: 2 · rows · H · 2 bytes.
#include "common.cuh"

extern "C" __global__ void gather_rows(const uint4 *__restrict__ source, const uint32_t *__restrict__ index,
                                       uint4 *__restrict__ out, int vectors) {
    pdl_launch();
    pdl_wait();
    const size_t from = (size_t)index[blockIdx.x] * vectors, to = (size_t)blockIdx.x * vectors;
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) out[to + i] = source[from + i];
}

// Rows whose input is the token last sampled in their slot. Grid: S threads.
extern "C" __global__ void feed_back(uint32_t *__restrict__ token_ids, const uint32_t *__restrict__ row_starts,
                                     const int32_t *__restrict__ slots, const uint8_t *__restrict__ feedback,
                                     const uint32_t *__restrict__ last_sampled, int rows) {
    pdl_launch();
    pdl_wait();
    const int s = blockIdx.x * blockDim.x + threadIdx.x;
    if (s < rows && feedback[s] && slots[s] >= 0) token_ids[row_starts[s]] = last_sampled[slots[s]];
}

struct Pieces {
    uint2 piece[12];  // offset, size
};

extern "C" __global__ void __launch_bounds__(128)
    upload(const uint4 *source, uint4 *__restrict__ target, const __grid_constant__ Pieces pieces) {
    pdl_wait();
    const uint2 piece = pieces.piece[blockIdx.x];
    for (uint32_t i = piece.x + threadIdx.x; i < piece.x + piece.y; i += blockDim.x) {
        uint4 v;
        asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(source + i));
        target[i] = v;
    }
    __threadfence();
}
