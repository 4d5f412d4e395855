// Matrix products on Hopper's warpgroup tensor cores: D[128 weight rows, TN tokens] = W · Xᵀ, the weights on the instruction's M side,
// so that any number of tokens in eights costs what it is (N = 8 … 256) and one core serves prefill and decode.
//
// A block: two consumer warpgroups of 64 weight rows each, and a producer warpgroup that gives its registers to them. Blocks are
// persistent: producer and consumers walk the same list of tiles, so copies of the next tile run under the epilogue of this one.
// A stage holds 64 k of 128 + TN rows, K-major, 128 bytes a row, 16-byte chunk c of row r at c ^ (r % 8): the layout that a
// tensor map with 128-byte swizzle writes, wgmma reads, and cp.async can be told to write for gathered rows.
// Barriers: full[stage] (copies have landed), empty[stage] (each of the eight consumer warps has read it).
// A token tile is multiplied in quarters of TN: a tile with few tokens left runs a narrower instruction.
//
// Shared memory (bytes from a 1,024-byte boundary): stages 196,608 · staging of the epilogue 2 × 9,216 · barriers 128 · flags and
// expert ends 272 · pairs and weights of the tile 2 × 2 × 1,024.
// Source of the idea: NVIDIA's PTX ISA on wgmma, tensor maps and mbarrier; producer and consumers as in CUTLASS.
#pragma once
#include "common.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#define WGMMA_THREADS 384
#define WGMMA_ROWS 128  // weight rows of a tile
#define WGMMA_BK 64
#define WGMMA_A_BYTES (WGMMA_ROWS * 128)
#define WGMMA_STAGING 9216  // of a warpgroup

struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

// ---- barriers, copies, fences

DEVICE void barrier_init(uint32_t barrier, int arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory"); }
DEVICE void barrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_arrive(uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
// Arrives once the thread's cp.async so far have landed; counts as one of the barrier's arrivals.
DEVICE void barrier_arrive_after_copies(uint32_t barrier) { asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory"); }
DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
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
// Threads of one warpgroup.
DEVICE void group_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void tma_load(uint32_t to, const TensorMap &map, uint32_t barrier, int c0, int c1) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to), "l"(&map),
                 "r"(barrier), "r"(c0), "r"(c1)
                 : "memory");
}
DEVICE void tma_load(uint32_t to, const TensorMap &map, uint32_t barrier, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to), "l"(&map),
                 "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
                 : "memory");
}
DEVICE void tma_load(uint32_t to, const TensorMap &map, uint32_t barrier, int c0, int c1, int c2, int c3, int c4) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
                 : "memory");
}
// Four 8 × 8 matrices of 2-byte elements, transposed: lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void stmatrix4_trans(uint32_t address, const uint32_t (&v)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}

// ---- wgmma: d[64, N] (+)= A[64, 16] · B[N, 16]ᵀ, both from shared memory, K-major
//
// Thread 32 w + 4 g + t of the warpgroup holds d[4 j ..] = (row 16 w + g, columns 8 j + 2 t, + 1), (row + 8, the same columns).

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// 128-byte swizzle, 1,024 bytes between groups of 8 rows (K-major: rows of M or N, and 16 k further is 32 bytes further; transposed:
// rows of k, of which no operand here is wider than 64).
DEVICE uint64_t wgmma_operand(uint32_t address) { return (uint64_t)1 << 62 | (uint64_t)64 << 32 | (uint64_t)64 << 16 | (address & 0x3ffff) >> 4; }

template <typename T, int N> struct Wgmma;
#define WGMMA_D16 "%0,%1,%2,%3,%4,%5,%6,%7"
#define WGMMA_D32 WGMMA_D16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define WGMMA_D48 WGMMA_D32 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define WGMMA_D64 WGMMA_D48 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_D96 WGMMA_D64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define WGMMA_D128 WGMMA_D96 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_D192 \
    WGMMA_D128 \
    ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define WGMMA_D256 \
    WGMMA_D192 \
    ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define WGMMA_O(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_O16 WGMMA_O(0)
#define WGMMA_O32 WGMMA_O16, WGMMA_O(8)
#define WGMMA_O48 WGMMA_O32, WGMMA_O(16)
#define WGMMA_O64 WGMMA_O48, WGMMA_O(24)
#define WGMMA_O96 WGMMA_O64, WGMMA_O(32), WGMMA_O(40)
#define WGMMA_O128 WGMMA_O96, WGMMA_O(48), WGMMA_O(56)
#define WGMMA_O192 WGMMA_O128, WGMMA_O(64), WGMMA_O(72), WGMMA_O(80), WGMMA_O(88)
#define WGMMA_O256 WGMMA_O192, WGMMA_O(96), WGMMA_O(104), WGMMA_O(112), WGMMA_O(120)
#define WGMMA(T, NAME, N, A, B, P)                                                                                            \
    template <> struct Wgmma<T, N> {                                                                                          \
        template <int SIZE> static __device__ __forceinline__ void run(float (&d)[SIZE], uint64_t a, uint64_t b, int keep) {  \
            asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " P ", 0;\n"                                                 \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" WGMMA_D##N "}, " A ", " B       \
                         ", keep, 1, 1, 0, 0;\n}\n"                                                                           \
                         : WGMMA_O##N                                                                                         \
                         : "l"(a), "l"(b), "r"(keep));                                                                        \
        }                                                                                                                     \
    };
#define WGMMAS(T, NAME)                       \
    WGMMA(T, NAME, 16, "%8", "%9", "%10")     \
    WGMMA(T, NAME, 32, "%16", "%17", "%18")   \
    WGMMA(T, NAME, 48, "%24", "%25", "%26")   \
    WGMMA(T, NAME, 64, "%32", "%33", "%34")   \
    WGMMA(T, NAME, 96, "%48", "%49", "%50")   \
    WGMMA(T, NAME, 128, "%64", "%65", "%66")  \
    WGMMA(T, NAME, 192, "%96", "%97", "%98")  \
    WGMMA(T, NAME, 256, "%128", "%129", "%130")
WGMMAS(bf16, "bf16")
WGMMAS(f16, "f16")

// ---- the core

template <typename T, int TN> struct Wide {
    static constexpr int QUARTER = TN / 4, STAGE_BYTES = WGMMA_A_BYTES + TN * 128, STAGES = 196608 / STAGE_BYTES;
    static_assert(STAGES * STAGE_BYTES == 196608 && STAGES <= 8, "stages fill their part of shared memory");

    unsigned char *memory;  // on a 1,024-byte boundary
    uint32_t base;
    int stage = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ Wide(unsigned char *raw) {
        memory = raw + (-smem_address(raw) & 1023);
        base = smem_address(memory);
    }
    __device__ __forceinline__ uint32_t a() const { return base + stage * STAGE_BYTES; }
    __device__ __forceinline__ uint32_t b() const { return a() + WGMMA_A_BYTES; }
    __device__ __forceinline__ uint32_t full() const { return base + 196608 + 2 * WGMMA_STAGING + stage * 8; }
    __device__ __forceinline__ uint32_t empty() const { return full() + 64; }
    __device__ __forceinline__ unsigned char *staging(int group) const { return memory + 196608 + group * WGMMA_STAGING; }
    __device__ __forceinline__ int *flags() const { return reinterpret_cast<int *>(memory + 196608 + 2 * WGMMA_STAGING + 128); }
    __device__ __forceinline__ int *ends() const { return flags() + 4; }
    __device__ __forceinline__ int *pairs(int group) const { return ends() + 64 + group * 512; }
    __device__ __forceinline__ float *weights(int group) const { return reinterpret_cast<float *>(pairs(group) + 256); }

    // All threads; `copiers`: producer threads whose own copies a stage waits for, beside the tensor maps'.
    __device__ __forceinline__ void init(int copiers) {
        if (threadIdx.x == 0) {
            for (stage = 0; stage < STAGES; stage++) {
                barrier_init(full(), 1 + copiers);
                barrier_init(empty(), 8);
            }
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
            fence_async();
        }
        stage = 0;
        __syncthreads();
    }
    // A consumer warp has read the stage.
    static __device__ __forceinline__ void release(uint32_t empty_barrier) {
        if (threadIdx.x % WARP == 0) barrier_arrive(empty_barrier);
    }
    // `boxes` quarters of a token tile at row `row` of x; one thread.
    __device__ __forceinline__ void fetch_tokens(const TensorMap &x, int boxes, int k, int row) const {
        for (int i = 0; i < boxes; i++) tma_load(b() + i * QUARTER * 128, x, full(), k, row + i * QUARTER);
    }
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
    // How many quarters of TN a tile of `tokens` takes.
    static __device__ __forceinline__ int quarters(int tokens) { return min(4, (tokens + QUARTER - 1) / QUARTER); }

    // Consumers: acc = the product over `steps` stages. `meanwhile` runs once under the first stage's products.
    template <int N, bool GATHERED, class F> __device__ __forceinline__ void multiply(int steps, float (&acc)[TN / 2], const F &meanwhile) {
        const int group = threadIdx.x / 128;
        const auto issue = [&](bool keep) {
            barrier_wait(full(), phase);
            if (GATHERED) fence_async();  // the rows were written by ordinary copies
            const uint64_t wa = wgmma_operand(a() + group * 8192), xb = wgmma_operand(b());
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < WGMMA_BK / 16; k++) Wgmma<T, N>::run(acc, wa + 2 * k, xb + 2 * k, keep || k);
            wgmma_commit();
        };
        issue(false);
        meanwhile();
        for (int step = 1; step < steps; step++) {
            const uint32_t before = empty();
            advance();
            issue(true);
            wgmma_wait<1>();
            release(before);
        }
        wgmma_wait<0>();
        release(empty());
        advance();
#pragma unroll
        for (int i = 0; i < TN / 2; i++) asm volatile("" : "+f"(acc[i])::"memory");  // no use of them moves above the wait
    }
    template <bool GATHERED, class F> __device__ __forceinline__ void multiply(int tokens, int steps, float (&acc)[TN / 2], const F &meanwhile) {
        switch (quarters(tokens)) {
        case 1: multiply<QUARTER, GATHERED>(steps, acc, meanwhile); break;
        case 2: multiply<QUARTER * 2, GATHERED>(steps, acc, meanwhile); break;
        case 3: multiply<QUARTER * 3, GATHERED>(steps, acc, meanwhile); break;
        default: multiply<TN, GATHERED>(steps, acc, meanwhile);
        }
    }

    // Consumers: rounds `ROUND` tokens of the accumulators through shared memory to 16-byte stores. `pack(i, group of 8 tokens, half)`…
    // GATED: rows g and g + 8 are gate and up of one output. `bias`: of rows g and g + 8. `scale`: per token, or null.
    // `row(token)`: where the token's output begins; n: the warpgroup's first column of N.
    template <typename Out, bool GATED, class Row>
    __device__ __forceinline__ void store(const float (&acc)[TN / 2], int tokens, int n, int N, float2 bias, const float *scale, const Row &row) {
        const int group = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / WARP, lane = thread % WARP, g = lane / 4, t = lane % 4;
        unsigned char *to = staging(group);
        if constexpr (sizeof(Out) == 4) {
            constexpr int PITCH = 68;  // floats
            float *rows = reinterpret_cast<float *>(to);
#pragma unroll
            for (int r = 0; r < TN / 32; r++) {
                if (r * 32 >= tokens) continue;
                group_sync(group);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float *d = acc + (r * 4 + j) * 4;
                    float *at = rows + (j * 8 + 2 * t) * PITCH + warp * 16 + g;
                    at[0] = d[0] + bias.x;
                    at[PITCH] = d[1] + bias.x;
                    at[8] = d[2] + bias.y;
                    at[PITCH + 8] = d[3] + bias.y;
                }
                group_sync(group);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int at = i * 128 + thread, token = at / 16, c = at % 16 * 4;
                    if (r * 32 + token < tokens && n + c < N)
                        *reinterpret_cast<float4 *>(row(r * 32 + token) + n + c) = *reinterpret_cast<const float4 *>(rows + token * PITCH + c);
                }
            }
        } else {
            constexpr int COLUMNS = GATED ? 32 : 64, PITCH = COLUMNS * 2 + 16, CHUNKS = COLUMNS / 8;
            const int matrix = lane / 8, from = GATED ? matrix * 8 + lane % 8 : matrix / 2 * 8 + lane % 8;
            const uint32_t address = smem_address(to) + from * PITCH + (GATED ? warp * 16 : warp * 32 + matrix % 2 * 16);
#pragma unroll
            for (int r = 0; r < TN / 64; r++) {
                if (r * 64 >= tokens) continue;
                group_sync(group);
#pragma unroll
                for (int j = 0; j < 8; j += GATED ? 4 : 2) {
                    uint32_t v[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        if constexpr (GATED) {
                            const float *d = acc + (r * 8 + j + i) * 4;
                            v[i] = pack2<Out>(silu(d[0]) * d[2], silu(d[1]) * d[3]);
                        } else {
                            const float *d = acc + (r * 8 + j + i / 2) * 4 + i % 2 * 2;
                            const float add = i % 2 ? bias.y : bias.x;
                            float2 by = make_float2(1.f, 1.f);
                            if (scale) by = *reinterpret_cast<const float2 *>(scale + (r * 8 + j + i / 2) * 8 + 2 * t);
                            v[i] = pack2<Out>((d[0] + add) * by.x, (d[1] + add) * by.y);
                        }
                    }
                    stmatrix4_trans(address + j * 8 * PITCH, v);
                }
                group_sync(group);
#pragma unroll
                for (int i = 0; i < 64 * CHUNKS / 128; i++) {
                    const int at = i * 128 + thread, token = at / CHUNKS, c = at % CHUNKS * 8;
                    if (r * 64 + token < tokens && n + c < N)
                        *reinterpret_cast<uint4 *>(row(r * 64 + token) + n + c) = *reinterpret_cast<const uint4 *>(to + token * PITCH + c * 2);
                }
            }
        }
    }
};

template <int REGISTERS> DEVICE void registers_give() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS> DEVICE void registers_take() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
#define PRODUCER_REGISTERS 56
#define CONSUMER_REGISTERS 224  // 128 · 56 + 256 · 224 <= 65,536

#endif
