// sample: one token per request from a row of logits; score: log-probabilities of a known token (prompt logprobs).
// start_slot: resets a slot's token counts.
//
// Shapes: logits [N, V] f32; counts [slots, V] u16 (low 15 bits: times generated, bit 15: in the prompt); masks [requests, ceil(V / 32)]
// bits, set = allowed; edits: per slot up to EDITS (id, addend) pairs, -inf addends for ids held back.
// Order: masks and edits, penalties (repetition over prompt and output, presence and frequency over output), temperature,
// min-p, top-k, top-p, then the largest of logit / temperature + Gumbel noise. The noise of a token depends on (seed, index of the
// output token, token id) alone, hence the draw on nothing else. Equal values: the lower id.
// Thresholds of top-k and top-p are found by radix selection over the ordered bits of the logit, 8 bits a pass, with integer
// counts and 2^-32 fixed-point masses, so that no sum depends on the order of atomics. Tokens equal to the threshold are kept.
// top-k up to 1,024: the k-th largest of the threads' own maxima bounds the k-th largest value from below; the few values from
// there on are gathered in shared memory, where the rest happens. More than CANDIDATES of them: the whole row is selected from.
// Edits and completed bad words are written into the row and taken back before raw log-probabilities are read.
// bad words: per slot up to WORDS (offset, length) pairs and WORD_TOKENS ids; history [slots, WORD_TOKENS] holds output token i at
// i % WORD_TOKENS. A word of n ids is completed when the last n - 1 outputs are its first n - 1.
// Grid: one block of 1,024 threads per request. Cost: 1 pass over the row for greedy, 2 with top-k, up to 10 for the rest, from L2.
// Spills: sample
#include "common.cuh"

#define SAMPLER_THREADS 1024
#define EDITS 1024
#define WORDS 128
#define WORD_TOKENS 1024
#define CANDIDATES 2048
#define TOP 32  // log-probabilities a request may ask for, and then some

struct SlotParams {
    float temperature, top_p, min_p, repetition, presence, frequency;
    int top_k;      // 0 = off
    int logprobs;   // alternatives, -1 = none wanted
    int mode;       // 0 raw logprobs, 1 raw logits, 2 processed logprobs, 3 processed logits
    int min_tokens; // the first `held` edits apply while output_index < min_tokens, the others always
    int held, edits;
    int penalties;  // whether counts are kept
    int words;
    unsigned long long seed;
};

struct SampleRequest {
    int logit_row, slot, output_index, mask;  // mask: row of masks or -1
};

// What a request gives back; the host reads `top` entries as asked.
struct Sampled {
    int id;
    float logprob;
    int rank;
    int count;
    int top_id[TOP];
    float top_logprob[TOP];
};

DEVICE uint32_t philox(unsigned long long seed, uint32_t a, uint32_t b) {
    uint32_t c0 = a, c1 = b, c2 = 0x5851f42du, c3 = 0x4c957f2du, k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma unroll
    for (int i = 0; i < 10; i++) {
        const uint32_t h0 = __umulhi(0xd2511f53u, c0), l0 = 0xd2511f53u * c0;
        const uint32_t h1 = __umulhi(0xcd9e8d57u, c2), l1 = 0xcd9e8d57u * c2;
        c0 = h1 ^ c1 ^ k0;
        c1 = l1;
        c2 = h0 ^ c3 ^ k1;
        c3 = l0;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return c0;
}

// Larger float, larger key; NaN is the smallest.
DEVICE uint32_t key_of(float v) {
    if (!(v == v)) return 0;
    const uint32_t u = __float_as_uint(v);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

struct Best {
    float value;
    int id;
};
DEVICE Best better(Best a, Best b) { return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a; }
DEVICE Best block_best(Best v, Best *scratch) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v = better(v, Best{__shfl_xor_sync(FULL, v.value, o), __shfl_xor_sync(FULL, v.id, o)});
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = v;
    __syncthreads();
    v = scratch[threadIdx.x % WARP];
#pragma unroll
    for (int o = 16; o; o >>= 1) v = better(v, Best{__shfl_xor_sync(FULL, v.value, o), __shfl_xor_sync(FULL, v.id, o)});
    return v;
}
DEVICE unsigned long long block_total(unsigned long long v, unsigned long long *scratch) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(FULL, v, o);
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = v;
    __syncthreads();
    v = scratch[threadIdx.x % WARP];
#pragma unroll
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(FULL, v, o);
    return v;
}

// f(v, row[v], seen[v]) for every v, 0 for `seen` if there is none: 16 bytes a thread and turn, four loads in flight, past L1.
template <class F> DEVICE void each(const float *row, const uint16_t *seen, int V, const F &f) {
    if (V % 4) {
        for (int v = threadIdx.x; v < V; v += SAMPLER_THREADS) f(v, __ldcg(row + v), seen ? seen[v] : 0u);
        return;
    }
    for (int i = threadIdx.x; i < V / 4; i += 4 * SAMPLER_THREADS) {
        float4 x[4];
        uint2 n[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            n[j] = make_uint2(0, 0);
            if (i + j * SAMPLER_THREADS >= V / 4) continue;
            x[j] = __ldcg(reinterpret_cast<const float4 *>(row) + i + j * SAMPLER_THREADS);
            if (seen) n[j] = reinterpret_cast<const uint2 *>(seen)[i + j * SAMPLER_THREADS];
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int v = (i + j * SAMPLER_THREADS) * 4;
            if (v >= V) break;
            f(v, x[j].x, n[j].x & 0xffff);
            f(v + 1, x[j].y, n[j].x >> 16);
            f(v + 2, x[j].z, n[j].y & 0xffff);
            f(v + 3, x[j].w, n[j].y >> 16);
        }
    }
}

// The largest key whose bin and all above weigh at least `target`, weighing only values for which `weigh` is not 0. `value(v)` of
// all v < V.
template <class Value, class Weigh>
DEVICE uint32_t threshold(int V, unsigned long long target, const Value &value, const Weigh &weigh, unsigned long long *bins) {
    __shared__ uint32_t chosen;
    __shared__ unsigned long long above;
    uint32_t prefix = 0;
    unsigned long long before = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += SAMPLER_THREADS) bins[i] = 0;
        __syncthreads();
        for (int v = threadIdx.x; v < V; v += SAMPLER_THREADS) {
            const float l = value(v);
            const uint32_t key = key_of(l);
            if (shift == 24 || key >> (shift + 8) == prefix >> (shift + 8)) {
                const unsigned long long w = weigh(l);
                if (w) atomicAdd(&bins[key >> shift & 255], w);
            }
        }
        __syncthreads();
        if (threadIdx.x < WARP) {
            // Lane l looks at the eight bins from 255 - 8 l down; the first lane that reaches the target finds the bin.
            const int lane = threadIdx.x, top = 255 - 8 * lane;
            unsigned long long own = 0;
            for (int i = 0; i < 8; i++) own += bins[top - i];
            unsigned long long until = own;
            for (int o = 1; o < WARP; o <<= 1) {
                const unsigned long long other = __shfl_up_sync(FULL, until, o);
                if (lane >= o) until += other;
            }
            const unsigned reached = __ballot_sync(FULL, before + until >= target);
            if (lane == (reached ? __ffs(reached) - 1 : WARP - 1)) {
                unsigned long long sum = before + until - own;
                int bin = top;
                for (; bin > top - 7; bin--) {
                    if (sum + bins[bin] >= target) break;
                    sum += bins[bin];
                }
                chosen = bin;
                above = sum;
            }
        }
        __syncthreads();
        prefix |= chosen << shift;
        before = above;
        __syncthreads();
    }
    return prefix;
}

// log-sum-exp, the value of `id`, its rank and the best `count`, over value(v).
template <class Value>
DEVICE void report(int V, int id, int count, bool logits, const Value &value, Sampled *out, Best *scratch, unsigned long long *sums) {
    Best best{-INFINITY, V};
    for (int v = threadIdx.x; v < V; v += SAMPLER_THREADS) best = better(best, Best{value(v), v});
    best = block_best(best, scratch);
    const float mine = value(id);
    // 2^-40 fixed point: integer addition does not depend on the order of threads.
    unsigned long long mass = 0, rank = 0;
    for (int v = threadIdx.x; v < V; v += SAMPLER_THREADS) {
        const float l = value(v);
        mass += (unsigned long long)(expf(l - best.value) * 1099511627776.f);
        rank += l >= mine;  // vLLM's rank: equal values count
    }
    mass = block_total(mass, sums);
    rank = block_total(rank, sums);
    const float lse = logits ? 0.f : best.value + (float)(log((double)mass) - 40.0 * 0.6931471805599453);
    if (threadIdx.x == 0) {
        out->logprob = mine - lse;
        out->rank = (int)rank;
        out->count = count;
    }
    Best last{INFINITY, -1};
    for (int i = 0; i < count; i++) {
        Best next{-INFINITY, V};
        for (int v = threadIdx.x; v < V; v += SAMPLER_THREADS) {
            const Best here{value(v), v};
            if (here.value < last.value || (here.value == last.value && v > last.id)) next = better(next, here);
        }
        last = block_best(next, scratch);
        if (threadIdx.x == 0) {
            out->top_id[i] = min(last.id, V - 1);
            out->top_logprob[i] = last.value - lse;
        }
    }
}

extern "C" __global__ void __launch_bounds__(SAMPLER_THREADS)
    sample(float *__restrict__ logits, const SampleRequest *__restrict__ requests, const SlotParams *__restrict__ params,
           uint16_t *__restrict__ counts, const uint32_t *__restrict__ masks, const int2 *__restrict__ edit_lists,
           const uint32_t *__restrict__ word_lists, uint32_t *__restrict__ history, uint32_t *__restrict__ last_sampled,
           Sampled *__restrict__ out, int V) {
    __shared__ Best scratch[WARP];
    __shared__ unsigned long long sums[WARP], bins[256];
    __shared__ float original[EDITS + WORDS], maxima[SAMPLER_THREADS];
    __shared__ Best candidates[CANDIDATES];
    __shared__ int gathered;
    pdl_launch();
    pdl_wait();
    // In page-locked host memory, like `out`: read once.
    __shared__ int4 fetched;
    if (threadIdx.x == 0)
        asm volatile("ld.volatile.global.v4.s32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(fetched.x), "=r"(fetched.y), "=r"(fetched.z), "=r"(fetched.w)
                     : "l"(requests + blockIdx.x));
    __syncthreads();
    const SampleRequest request{fetched.x, fetched.y, fetched.z, fetched.w};
    const SlotParams p = params[request.slot];
    float *row = logits + (size_t)request.logit_row * V;
    uint16_t *seen = counts + (size_t)request.slot * V;
    const uint32_t *mask = request.mask < 0 ? nullptr : masks + (size_t)request.mask * ((V + 31) / 32);
    const int2 *edits = edit_lists + (size_t)request.slot * EDITS;
    const int first = request.output_index < p.min_tokens ? 0 : p.held;
    uint32_t *outputs = history + (size_t)request.slot * WORD_TOKENS;
    const uint32_t *words = word_lists + (size_t)request.slot * (2 * WORDS + WORD_TOKENS);
    int completed = -1;  // the id that would complete this thread's bad word
    if (threadIdx.x < p.words) {
        const uint32_t *word = words + 2 * WORDS + words[2 * threadIdx.x];
        const int n = words[2 * threadIdx.x + 1];
        bool follows = n - 1 <= request.output_index;
        for (int i = 1; i < n && follows; i++) follows = outputs[(request.output_index - i) % WORD_TOKENS] == word[n - 1 - i];
        if (follows) completed = word[n - 1];
    }
    // Every original is saved before anything is added, so an id may stand in several places.
    for (int i = first + threadIdx.x; i < p.edits; i += SAMPLER_THREADS) original[i] = row[edits[i].x];
    if (completed >= 0) original[EDITS + threadIdx.x] = row[completed];
    __syncthreads();
    for (int i = first + threadIdx.x; i < p.edits; i += SAMPLER_THREADS) atomicAdd(&row[edits[i].x], __int_as_float(edits[i].y));
    if (completed >= 0) atomicAdd(&row[completed], -INFINITY);
    __syncthreads();
    __threadfence_block();

    const auto adjust = [&](int v, float l, uint32_t n) {
        if (!(l == l)) l = -INFINITY;
        if (mask && !(mask[v / 32] >> (v % 32) & 1)) return -INFINITY;
        if (p.penalties) {
            if (n) l = l > 0.f ? l / p.repetition : l * p.repetition;
            if (n & 0x7fff) l -= p.frequency * (n & 0x7fff) + p.presence;
        }
        return l;
    };
    const auto adjusted = [&](int v) { return adjust(v, __ldcg(row + v), p.penalties ? seen[v] : 0u); };
    const uint16_t *times = p.penalties ? seen : nullptr;
    Best best{-INFINITY, V};
    each(row, times, V, [&](int v, float l, uint32_t n) { best = better(best, Best{adjust(v, l, n), v}); });
    const float own_high = best.value;
    best = block_best(best, scratch);
    const float high = best.value;
    const bool greedy = p.temperature < 1e-5f || !(high > -INFINITY);
    const float inverse = greedy ? 1.f : 1.f / p.temperature;
    uint32_t keep = 1;
    if (!greedy) {
        float lowest = -INFINITY;
        if (p.min_p > 0.f) lowest = high + p.temperature * logf(p.min_p);
        if (p.min_p > 0.f) keep = key_of(lowest);
        const bool top_k = p.top_k > 0 && p.top_k < V;
        int count = -1;  // of candidates; -1: the whole row
        if (top_k && p.top_k <= SAMPLER_THREADS) {
            maxima[threadIdx.x] = own_high;
            if (threadIdx.x == 0) gathered = 0;
            __syncthreads();
            const uint32_t bound = max(
                1u, threshold(SAMPLER_THREADS, p.top_k, [&](int i) { return maxima[i]; },
                              [&](float l) { return (unsigned long long)(l > -INFINITY); }, bins));
            each(row, times, V, [&](int v, float l, uint32_t n) {
                l = adjust(v, l, n);
                if (l > -INFINITY && key_of(l) >= bound) {
                    const int at = atomicAdd(&gathered, 1);
                    if (at < CANDIDATES) candidates[at] = Best{l, v};
                }
            });
            __syncthreads();
            if (gathered <= CANDIDATES) count = gathered;
        }
        // What is chosen from: value and id of the i-th.
        const auto select = [&](int n, const auto &at) {
            const auto value = [&](int i) { return at(i).value; };
            const auto counted = [&](float l) { return (unsigned long long)(l >= lowest && l > -INFINITY); };
            const auto mass = [&](float l) {
                return l >= lowest && key_of(l) >= keep ? (unsigned long long)(expf((l - high) * inverse) * 4294967296.f) : 0ull;
            };
            if (top_k) keep = max(keep, threshold(n, p.top_k, value, counted, bins));
            if (p.top_p < 1.f) {
                unsigned long long all = 0;
                for (int i = threadIdx.x; i < n; i += SAMPLER_THREADS) all += mass(value(i));
                all = block_total(all, sums);
                const unsigned long long target = max(1ull, (unsigned long long)((double)all * p.top_p));
                keep = max(keep, threshold(n, target, value, mass, bins));
            }
            Best drawn{-INFINITY, V};
            for (int i = threadIdx.x; i < n; i += SAMPLER_THREADS) {
                const Best here = at(i);
                const float l = here.value;
                if (!(l > -INFINITY) || key_of(l) < keep) continue;
                const float u = ((float)(philox(p.seed, request.output_index, here.id) >> 8) + 0.5f) * (1.f / 16777216.f);
                drawn = better(drawn, Best{(l - high) * inverse - logf(-logf(u)), here.id});
            }
            best = block_best(drawn, scratch);
        };
        if (count >= 0)
            select(count, [&](int i) { return candidates[i]; });
        else
            select(V, [&](int v) { return Best{adjusted(v), v}; });
    }
    const int id = min(best.id, V - 1);
    Sampled *result = out + blockIdx.x;
    if (p.logprobs >= 0) {
        const int count = min(p.logprobs, TOP);
        if (p.mode >= 2) {
            const auto processed = [&](int v) {
                const float l = adjusted(v);
                return key_of(l) >= keep ? l * inverse : -INFINITY;
            };
            report(V, id, count, p.mode == 3, processed, result, scratch, sums);
        } else {
            __syncthreads();
            for (int i = first + threadIdx.x; i < p.edits; i += SAMPLER_THREADS) row[edits[i].x] = original[i];
            if (completed >= 0) row[completed] = original[EDITS + threadIdx.x];
            __syncthreads();
            report(V, id, count, p.mode == 1, [&](int v) { return row[v]; }, result, scratch, sums);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        result->id = id;
        last_sampled[request.slot] = id;
        outputs[request.output_index % WORD_TOKENS] = id;
        if (p.penalties && (seen[id] & 0x7fff) < 0x7fff) seen[id]++;
    }
}

struct ScoreRequest {
    int logit_row, token, count, logits;
};

extern "C" __global__ void __launch_bounds__(SAMPLER_THREADS)
    score(const float *__restrict__ logits, const ScoreRequest *__restrict__ requests, Sampled *__restrict__ out, int V) {
    __shared__ Best scratch[WARP];
    __shared__ unsigned long long sums[WARP];
    pdl_launch();
    pdl_wait();
    const ScoreRequest request = requests[blockIdx.x];
    const float *row = logits + (size_t)request.logit_row * V;
    Sampled *result = out + blockIdx.x;
    report(V, request.token, min(request.count, TOP), request.logits, [&](int v) { return row[v]; }, result, scratch, sums);
    if (threadIdx.x == 0) result->id = request.token;
}

// counts[slot] := prompt and output tokens; `tokens` holds the prompt's ids, then the output's. Grid: one block.
extern "C" __global__ void __launch_bounds__(1024)
    start_slot(uint16_t *__restrict__ counts, const uint32_t *__restrict__ tokens, uint32_t *__restrict__ history,
               uint32_t *__restrict__ last_sampled, int slot, int prompt, int output, int V) {
    pdl_launch();
    pdl_wait();
    uint16_t *seen = counts + (size_t)slot * V;
    for (int v = threadIdx.x; v < V; v += blockDim.x) seen[v] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < prompt; i += blockDim.x) seen[tokens[i]] = 0x8000;
    __syncthreads();
    // Serial: outputs repeat, and a slot rarely starts with any.
    if (threadIdx.x == 0) {
        for (int i = prompt; i < prompt + output; i++) {
            seen[tokens[i]]++;
            history[(size_t)slot * WORD_TOKENS + (i - prompt) % WORD_TOKENS] = tokens[i];
        }
        if (output) last_sampled[slot] = tokens[prompt + output - 1];
    }
}
