// read_bandwidth: one pass over a buffer, for the yardstick that benchmarks quote. Grid: any; 16 bytes a thread and turn, eight
// loads in flight. The sum keeps the loads alive. Cost: `vectors` · 16 bytes.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(512) read_bandwidth(const uint4 *__restrict__ source, unsigned long long vectors, uint32_t *out) {
    const unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    uint32_t sum = 0;
    for (unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x; i < vectors; i += 8 * stride) {
        uint4 v[8];
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = i + j * stride < vectors ? load_stream(source + i + j * stride) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (sum == 0x9e3779b9u) *out = sum;
}
