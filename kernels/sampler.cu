// sample: one token per request from a row of logits; score: log-probabilities of a known token (prompt logprobs).
// start_slot: resets a slot's token counts.
//
// Shapes: logits [N, V] f32; counts [slots, V] u16 (low 15 bits: times generated, bit 15: in the prompt); masks [requests, ceil(V / 32)]
// bits, set = allowed; edits: per slot up to EDITS (id, addend) pairs, -inf addends for ids held back.
// Order: masks and edits, penalties (repetition over prompt and output, presence and frequency over output), temperature,
// min-p, top-k, top-p, then the largest of logit / temperature + Gumbel noise. The noise of a token depends on (seed, index of the
// output token, token id) alone, hence the draw on nothing else. Equal values: the lower id. Where nothing is allowed: id 0.
// Thresholds of top-k and top-p are found by radix selection over the ordered bits of the logit, 8 bits a pass from the highest that
// differs, with integer counts and 2^-32 fixed-point masses, so that no sum depends on the order of atomics or on the number of
// blocks. Tokens equal to the threshold are kept. The k-th largest of the threads' own maxima bounds the k-th largest value from below.
// Where that or min-p bounds what can be drawn, a block gathers what it has above, and if CANDIDATES hold it looks at the row no more.
// Edits and completed bad words are written into the row and taken back before raw log-probabilities are read.
// bad words: per slot up to WORDS (offset, length) pairs and WORD_TOKENS ids; history [slots, WORD_TOKENS] holds output token i at
// i % WORD_TOKENS. A word of n ids is completed when the last n - 1 outputs are its first n - 1.
// Grid: a cluster of up to TEAM blocks (one where there are no clusters) of 1,024 threads per request; each has its share of the row,
// `share` values, in dynamic shared memory if `cached` says that there is room. Cost: the row is read once, from L2, and once more for raw
// log-probabilities; at every pass if not cached.
// sample: at most REQUESTS a launch, as a parameter; results go to page-locked host memory. score: both in device memory.
// Spills: sample
#include "common.cuh"

#define SAMPLER_THREADS 1024
#define EDITS 1024
#define WORDS 128
#define WORD_TOKENS 1024
#define TEAM 8
#define REQUESTS 240
#define CANDIDATES 2048
#define TOP 128  // log-probabilities a request may ask for

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
struct SampleRequests {
    SampleRequest request[REQUESTS];
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

DEVICE float value_of(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }
#define ABOVE_NOTHING 0x00800000u  // the key after that of -inf

// A value and its place in one word whose maximum is the largest value, of equal ones that with the lowest id.
DEVICE unsigned long long pack(float value, int id) { return (unsigned long long)key_of(value + 0.f) << 32 | ~(uint32_t)id; }
DEVICE uint32_t packed_key(unsigned long long v) { return v >> 32; }
DEVICE int packed_id(unsigned long long v) { return (int)~(uint32_t)v; }

// One more of a token in the output.
DEVICE void count_output(uint16_t &seen) {
    if ((seen & 0x7fff) < 0x7fff) seen++;
}

// ---- the blocks of a request

DEVICE uint32_t team_rank() {
    uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}
DEVICE uint32_t team_size() {
    uint32_t size = 1;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
    return size;
}
// Every thread of every block; what they wrote before team_arrive is seen by all after team_wait.
DEVICE void team_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
DEVICE void team_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}
DEVICE void team_sync() {
    team_arrive();
    team_wait();
}
// The same place in the shared memory of block `rank`.
template <class T> DEVICE T *of_block(T *mine, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
    unsigned long long theirs;
    asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
    return reinterpret_cast<T *>(theirs);
#else
    return mine;
#endif
}

// Twice what blocks write for each other: who writes the one has passed a barrier that all reached after reading the other.
struct Team {
    unsigned long long warps[WARP], blocks[2][TEAM], bins[2][256], totals[256];
    unsigned long long above;
    int chosen;
};
struct Turn {
    Team &team;
    uint32_t blocks = 0, bins = 0;
};

template <bool SUM> DEVICE unsigned long long both(unsigned long long a, unsigned long long b) { return SUM ? a + b : max(a, b); }
template <bool SUM> DEVICE unsigned long long across(unsigned long long v, int width) {
    for (int o = width / 2; o; o >>= 1) v = both<SUM>(v, __shfl_xor_sync(FULL, v, o));
    return v;
}
// The sum or the largest of all threads' `v`, for all of them.
template <bool SUM> DEVICE unsigned long long reduce(Turn &turn, unsigned long long v) {
    Team &team = turn.team;
    const uint32_t lane = threadIdx.x % WARP, size = team_size();
    v = across<SUM>(v, WARP);
    if (lane == 0) team.warps[threadIdx.x / WARP] = v;
    __syncthreads();
    unsigned long long *blocks = team.blocks[turn.blocks++ & 1];
    if (threadIdx.x < WARP) {
        v = across<SUM>(team.warps[lane], WARP);
        if (lane < size) *of_block(blocks + team_rank(), lane) = v;
    }
    team_sync();
    return across<SUM>(lane % TEAM < size ? blocks[lane % TEAM] : 0, TEAM);
}

// f(i, row[i], seen[i]) for this thread's i < n, 0 for `seen` if there is none: 16 bytes a thread and turn, four loads in flight, past L1.
template <class F> DEVICE void each(const float *row, const uint16_t *seen, int n, bool vectors, const F &f) {
    if (!vectors) {
        for (int i = threadIdx.x; i < n; i += SAMPLER_THREADS) f(i, __ldcg(row + i), seen ? seen[i] : 0u);
        return;
    }
    for (int i = threadIdx.x; i < n / 4; i += 4 * SAMPLER_THREADS) {
        float4 x[4];
        uint2 times[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            times[j] = make_uint2(0, 0);
            if (i + j * SAMPLER_THREADS >= n / 4) continue;
            x[j] = __ldcg(reinterpret_cast<const float4 *>(row) + i + j * SAMPLER_THREADS);
            if (seen) times[j] = reinterpret_cast<const uint2 *>(seen)[i + j * SAMPLER_THREADS];
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int at = (i + j * SAMPLER_THREADS) * 4;
            if (at >= n) break;
            f(at, x[j].x, times[j].x & 0xffff);
            f(at + 1, x[j].y, times[j].x >> 16);
            f(at + 2, x[j].z, times[j].y & 0xffff);
            f(at + 3, x[j].w, times[j].y >> 16);
        }
    }
}

// The largest key from `low` to `high` such that values from it to `high` weigh at least `target`; `low` if there is none. `value(i)`
// of the block's i < n.
template <class Value, class Weigh>
DEVICE uint32_t threshold(Turn &turn, int n, unsigned long long target, uint32_t low, uint32_t high, const Value &value,
                          const Weigh &weigh) {
    Team &team = turn.team;
    const uint32_t size = team_size();
    unsigned long long before = 0;
    if (low >= high) return low;
    for (int width = 32 - __clz(high - low);;) {
        const int shift = max(0, width - 8);
        unsigned long long *bins = team.bins[turn.bins++ & 1];
        for (int i = threadIdx.x; i < 256; i += SAMPLER_THREADS) bins[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += SAMPLER_THREADS) {
            const float l = value(i);
            const uint32_t key = key_of(l), bin = (key - low) >> shift;
            if (key >= low && key <= high && bin < 256) {
                const unsigned long long w = weigh(l);
                if (w) atomicAdd(bins + bin, w);
            }
        }
        team_sync();
        if (threadIdx.x < 256) {
            unsigned long long total = 0;
            for (uint32_t rank = 0; rank < size; rank++) total += *of_block(bins + threadIdx.x, rank);
            team.totals[threadIdx.x] = total;
        }
        __syncthreads();
        if (threadIdx.x < WARP) {
            // Lane l looks at the eight bins from 255 - 8 l down; the first lane that reaches the target finds the bin.
            const int lane = threadIdx.x, top = 255 - 8 * lane;
            unsigned long long own = 0;
            for (int i = 0; i < 8; i++) own += team.totals[top - i];
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
                    if (sum + team.totals[bin] >= target) break;
                    sum += team.totals[bin];
                }
                team.chosen = bin;
                team.above = sum;
            }
        }
        __syncthreads();
        low += (uint32_t)team.chosen << shift;
        before = team.above;
        if (shift == 0) return low;
        high = min(high, low + (1u << shift) - 1);
        width = shift;
    }
}

// log-sum-exp, the value of `id`, its rank and the best `count`, over the block's value(i), i < n, of ids from `begin` on. `find(id)`
// is the value of any id.
template <class Value, class Find>
DEVICE void report(Turn &turn, int n, int begin, int V, int id, int count, bool logits, const Value &value, const Find &find, Sampled *out) {
    const bool writes = team_rank() == 0 && threadIdx.x == 0;
    unsigned long long best = pack(-INFINITY, V);
    for (int i = threadIdx.x; i < n; i += SAMPLER_THREADS) best = max(best, pack(value(i), begin + i));
    const float high = value_of(packed_key(reduce<false>(turn, best)));
    const float mine = find(id);
    // 2^-40 fixed point: integer addition does not depend on the order of threads.
    unsigned long long mass = 0, rank = 0;
    for (int i = threadIdx.x; i < n; i += SAMPLER_THREADS) {
        const float l = value(i);
        mass += (unsigned long long)(expf(l - high) * 1099511627776.f);
        rank += l >= mine;  // vLLM's rank: equal values count
    }
    mass = reduce<true>(turn, mass);
    rank = reduce<true>(turn, rank);
    const float lse = logits ? 0.f : high + (float)(log((double)mass) - 40.0 * 0.6931471805599453);
    if (writes) {
        out->logprob = mine - lse;
        out->rank = (int)rank;
        out->count = count;
    }
    unsigned long long last = ~0ull;
    for (int place = 0; place < count; place++) {
        unsigned long long next = pack(-INFINITY, V);
        for (int i = threadIdx.x; i < n; i += SAMPLER_THREADS) {
            const unsigned long long here = pack(value(i), begin + i);
            if (here < last) next = max(next, here);
        }
        last = reduce<false>(turn, next);
        if (writes) {
            out->top_id[place] = min(packed_id(last), V - 1);
            out->top_logprob[place] = value_of(packed_key(last)) - lse;
        }
    }
}

extern "C" __global__ void __launch_bounds__(SAMPLER_THREADS)
    sample(float *__restrict__ logits, const SlotParams *__restrict__ params, uint16_t *__restrict__ counts,
           const uint32_t *__restrict__ masks, const int2 *__restrict__ edit_lists, const uint32_t *__restrict__ word_lists,
           uint32_t *__restrict__ history, uint32_t *__restrict__ last_sampled, Sampled *__restrict__ out, int V, int share, int cached,
           const __grid_constant__ SampleRequests requests) {
    extern __shared__ __align__(16) float slice[];
    __shared__ Team team;
    __shared__ float original[EDITS + WORDS], candidates[CANDIDATES];
    __shared__ int candidate_ids[CANDIDATES], gathered;
    pdl_launch();
    team_arrive();
    pdl_wait();
    Turn turn{team};
    const SampleRequest request = requests.request[blockIdx.x / team_size()];
    const SlotParams p = params[request.slot];
    float *row = logits + (size_t)request.logit_row * V;
    uint16_t *seen = counts + (size_t)request.slot * V;
    const uint32_t *mask = request.mask < 0 ? nullptr : masks + (size_t)request.mask * ((V + 31) / 32);
    const int2 *edits = edit_lists + (size_t)request.slot * EDITS;
    const int first = request.output_index < p.min_tokens ? 0 : p.held;
    uint32_t *outputs = history + (size_t)request.slot * WORD_TOKENS;
    const uint32_t *words = word_lists + (size_t)request.slot * (2 * WORDS + WORD_TOKENS);
    // The block's part of the row.
    const int begin = min((int)team_rank() * share, V), n = min(share, V - begin);
    const auto ours = [&](int id) { return (unsigned)(id - begin) < (unsigned)n; };
    int completed = -1;  // the id that would complete this thread's bad word
    if (threadIdx.x < p.words) {
        const uint32_t *word = words + 2 * WORDS + words[2 * threadIdx.x];
        const int length = words[2 * threadIdx.x + 1];
        bool follows = length - 1 <= request.output_index;
        for (int i = 1; i < length && follows; i++)
            follows = outputs[(request.output_index - i) % WORD_TOKENS] == word[length - 1 - i];
        if (follows && ours(word[length - 1])) completed = word[length - 1];
    }
    // Every original is saved before anything is added, so an id may stand in several places.
    for (int i = first + threadIdx.x; i < p.edits; i += SAMPLER_THREADS)
        if (ours(edits[i].x)) original[i] = __ldcg(row + edits[i].x);
    if (completed >= 0) original[EDITS + threadIdx.x] = __ldcg(row + completed);
    __syncthreads();
    for (int i = first + threadIdx.x; i < p.edits; i += SAMPLER_THREADS)
        if (ours(edits[i].x)) atomicAdd(&row[edits[i].x], __int_as_float(edits[i].y));
    if (completed >= 0) atomicAdd(&row[completed], -INFINITY);
    __syncthreads();

    const auto adjust = [&](int v, float l, uint32_t times) {
        if (!(l == l)) l = -INFINITY;
        if (mask && !(mask[v / 32] >> (v % 32) & 1)) return -INFINITY;
        if (p.penalties) {
            if (times) l = l > 0.f ? l / p.repetition : l * p.repetition;
            if (times & 0x7fff) l -= p.frequency * (times & 0x7fff) + p.presence;
        }
        return l + 0.f;  // one zero
    };
    const auto adjusted = [&](int v) { return adjust(v, __ldcg(row + v), p.penalties ? seen[v] : 0u); };
    const bool vectors = V % 4 == 0, draws = p.temperature >= 1e-5f;
    const bool kept = cached && (draws || p.logprobs >= 0);
    const auto value = [&](int i) { return kept ? slice[i] : adjusted(begin + i); };
    const uint16_t *times_from = p.penalties ? seen + begin : nullptr;
    unsigned long long own = pack(-INFINITY, V);
    each(row + begin, times_from, n, vectors, [&](int i, float l, uint32_t times) {
        l = adjust(begin + i, l, times);
        if (kept) slice[i] = l;
        own = max(own, pack(l, begin + i));
    });
    if (threadIdx.x == 0) gathered = 0;
    team_wait();  // all blocks have begun: their shared memory may be written
    unsigned long long best = reduce<false>(turn, own);
    const uint32_t highest = packed_key(best);
    const bool greedy = !draws || highest < ABOVE_NOTHING;
    const float inverse = greedy ? 1.f : 1.f / p.temperature;
    uint32_t keep = ABOVE_NOTHING;
    if (!greedy) {
        const float high = value_of(highest);
        const bool top_k = p.top_k > 0 && p.top_k < V;
        const auto one = [](float) { return 1ull; };
        if (p.min_p > 0.f) keep = max(keep, key_of(high + p.temperature * logf(p.min_p)));
        if (top_k && p.top_k <= SAMPLER_THREADS * team_size()) {
            const float largest = value_of(packed_key(own));
            keep = threshold(turn, SAMPLER_THREADS, p.top_k, keep, highest, [&](int) { return largest; }, one);
        }
        // Draws from the block's at(i), i < count, of ids name(i), and the other blocks'.
        const auto draw = [&](int count, const auto &at, const auto &name) {
            if (top_k) keep = threshold(turn, count, p.top_k, keep, highest, at, one);
            if (p.top_p < 1.f) {
                const auto mass = [&](float l) { return (unsigned long long)(expf((l - high) * inverse) * 4294967296.f); };
                unsigned long long all = 0;
                for (int i = threadIdx.x; i < count; i += SAMPLER_THREADS) {
                    const float l = at(i);
                    if (key_of(l) >= keep) all += mass(l);
                }
                all = reduce<true>(turn, all);
                const unsigned long long target = max(1ull, (unsigned long long)((double)all * p.top_p));
                keep = threshold(turn, count, target, keep, highest, at, mass);
            }
            unsigned long long drawn = pack(-INFINITY, V);
            for (int i = threadIdx.x; i < count; i += SAMPLER_THREADS) {
                const float l = at(i);
                if (key_of(l) < keep) continue;
                // -log(-log(1 - v)): v is exact where it is small, so that the noise is fine where it is large, and finite there.
                const float v = ((float)philox(p.seed, request.output_index, name(i)) + 0.5f) * (1.f / 4294967296.f);
                drawn = max(drawn, pack((l - high) * inverse - logf(-log1pf(-v)), name(i)));
            }
            best = reduce<false>(turn, drawn);
        };
        bool fits = false;
        if (keep > ABOVE_NOTHING) {
            const auto gather = [&](int i, float l) {
                if (key_of(l) < keep) return;
                const int at = atomicAdd(&gathered, 1);
                if (at >= CANDIDATES) return;
                candidates[at] = l;
                candidate_ids[at] = begin + i;
            };
            if (kept)
                for (int i = threadIdx.x; i < n; i += SAMPLER_THREADS) gather(i, slice[i]);
            else
                each(row + begin, times_from, n, vectors, [&](int i, float l, uint32_t times) { gather(i, adjust(begin + i, l, times)); });
            __syncthreads();
            fits = gathered <= CANDIDATES;
        }
        if (fits)
            draw(gathered, [&](int i) { return candidates[i]; }, [&](int i) { return candidate_ids[i]; });
        else
            draw(n, value, [&](int i) { return begin + i; });
    }
    const int id = min(packed_id(best), V - 1);
    Sampled *result = out + blockIdx.x / team_size();
    if (p.logprobs >= 0) {
        const int count = min(p.logprobs, TOP);
        if (p.mode >= 2) {
            const auto processed = [&](float l) { return key_of(l) >= keep ? l * inverse : -INFINITY; };
            report(turn, n, begin, V, id, count, p.mode == 3, [&](int i) { return processed(value(i)); },
                   [&](int v) { return processed(adjusted(v)); }, result);
        } else {
            __syncthreads();
            for (int i = first + threadIdx.x; i < p.edits; i += SAMPLER_THREADS)
                if (ours(edits[i].x)) row[edits[i].x] = original[i];
            if (completed >= 0) row[completed] = original[EDITS + threadIdx.x];
            __syncthreads();
            if (kept) each(row + begin, nullptr, n, vectors, [&](int i, float l, uint32_t) { slice[i] = l; });
            __syncthreads();
            report(turn, n, begin, V, id, count, p.mode == 1, [&](int i) { return kept ? slice[i] : __ldcg(row + begin + i); },
                   [&](int v) { return __ldcg(row + v); }, result);
        }
    }
    // After the last reduction no block looks at another's shared memory, or at the counts.
    if (team_rank() == 0 && threadIdx.x == 0) {
        result->id = id;
        last_sampled[request.slot] = id;
        outputs[request.output_index % WORD_TOKENS] = id;
        if (p.penalties) count_output(seen[id]);
    }
}

struct ScoreRequest {
    int logit_row, token, count;
};

extern "C" __global__ void __launch_bounds__(SAMPLER_THREADS)
    score(const float *__restrict__ logits, const ScoreRequest *__restrict__ requests, Sampled *__restrict__ out, int V, int share,
          int cached) {
    extern __shared__ __align__(16) float slice[];
    __shared__ Team team;
    pdl_launch();
    team_arrive();
    pdl_wait();
    Turn turn{team};
    const ScoreRequest request = requests[blockIdx.x / team_size()];
    const float *row = logits + (size_t)request.logit_row * V;
    Sampled *result = out + blockIdx.x / team_size();
    const int begin = min((int)team_rank() * share, V), n = min(share, V - begin);
    if (cached) each(row + begin, nullptr, n, V % 4 == 0, [&](int i, float l, uint32_t) { slice[i] = l; });
    __syncthreads();
    team_wait();  // all blocks have begun: their shared memory may be written
    report(turn, n, begin, V, request.token, min(request.count, TOP), false,
           [&](int i) { return cached ? slice[i] : __ldcg(row + begin + i); }, [&](int v) { return __ldcg(row + v); }, result);
    if (team_rank() == 0 && threadIdx.x == 0) result->id = request.token;
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
            count_output(seen[tokens[i]]);
            history[(size_t)slot * WORD_TOKENS + (i - prompt) % WORD_TOKENS] = tokens[i];
        }
        if (output) last_sampled[slot] = tokens[prompt + output - 1];
    }
}
