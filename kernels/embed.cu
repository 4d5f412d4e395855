// embed: out[t] = table[token_ids[t]]; gather: out[n] = x[rows[n]].
// upload: a step's arrays from page-locked host memory, one block per array; offsets and sizes in vectors of 16 bytes. A copy engine
// would need microseconds to take over and give back. It lets no kernel begin before it has ended.
//
// Shapes: table [V, H], token_ids [T], last_sampled [slots], out [T, H]; x [T, H], rows [N], out [N, H]. 2-byte elements, H a multiple of 8.
// Grid: one block of 256 threads per output row, 16 bytes a thread and turn. No arithmetic.
// Preconditions: ids < V (or bit 31 and a slot) and rows < T are checked by the launcher's caller (the engine validates ids).
// Cost: 2 · rows · H · 2 bytes.
#include "common.cuh"

DEVICE void copy_row(const uint4 *source, size_t row, uint4 *out, int vectors) {
    const size_t from = row * vectors, to = (size_t)blockIdx.x * vectors;
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) out[to + i] = source[from + i];
}

extern "C" __global__ void gather_rows(const uint4 *__restrict__ source, const uint32_t *__restrict__ index,
                                       uint4 *__restrict__ out, int vectors) {
    pdl_launch();
    pdl_wait();
    copy_row(source, index[blockIdx.x], out, vectors);
}

// An id with bit 31 stands for the token last sampled in the slot that its other bits name.
extern "C" __global__ void embed(const uint4 *__restrict__ table, const uint32_t *__restrict__ ids,
                                 const uint32_t *__restrict__ last_sampled, uint4 *__restrict__ out, int vectors) {
    pdl_launch();
    pdl_wait();
    uint32_t id = ids[blockIdx.x];
    if (id >> 31) id = last_sampled[id & 0x7fffffff];
    copy_row(table, id, out, vectors);
}

struct Pieces {
    uint2 piece[11];  // offset, size
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
