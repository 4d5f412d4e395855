//! From a row of logits to a token: pure functions over f32, the reference for every backend's sampler.
//!
//! A logit that is NaN counts as −∞. When nothing may be sampled (every token forbidden), the most likely token of the
//! unmodified row is taken: one odd request must not fail its whole batch.

use std::collections::HashMap;

use super::simd::{self, Isa};
use crate::step::{LogprobsMode, SamplingParams, TokenId, TokenLogprobs, TokenMask};

/// Below this a temperature means greedy, as in vLLM.
pub const GREEDY_TEMPERATURE: f32 = 1e-5;

/// How often tokens occur in a sequence, for the penalties.
#[derive(Clone, Debug, Default)]
pub struct TokenCounts {
    index: HashMap<TokenId, usize>,
    /// Token and its count in the output; tokens of the prompt alone have 0.
    entries: Vec<(TokenId, u32)>,
}

impl TokenCounts {
    pub fn new(prompt: &[TokenId], output: &[TokenId]) -> Self {
        let mut counts = Self::default();
        prompt.iter().for_each(|&token| counts.entry(token, 0));
        output.iter().for_each(|&token| counts.add_output(token));
        counts
    }

    pub fn add_output(&mut self, token: TokenId) {
        self.entry(token, 1);
    }

    fn entry(&mut self, token: TokenId, n: u32) {
        let at = *self.index.entry(token).or_insert_with(|| {
            self.entries.push((token, 0));
            self.entries.len() - 1
        });
        self.entries[at].1 += n;
    }
}

/// What a sequence has said so far.
#[derive(Clone, Copy, Debug)]
pub struct History<'a> {
    pub output: &'a [TokenId],
    /// Needed only with penalties.
    pub counts: Option<&'a TokenCounts>,
    /// Tokens generated before this one.
    pub output_index: u32,
}

/// Buffers of one thread.
#[derive(Default)]
pub struct Scratch {
    logits: Vec<f32>,
    saved: Vec<(TokenId, f32)>,
    candidates: Vec<(TokenId, f32)>,
}

pub fn uses_penalties(params: &SamplingParams) -> bool {
    params.repetition_penalty != 1.0 || params.frequency_penalty != 0.0 || params.presence_penalty != 0.0
}

fn is_greedy(params: &SamplingParams) -> bool {
    params.temperature < GREEDY_TEMPERATURE
}

/// Whether anything changes the row before the choice.
fn adjusts(params: &SamplingParams, history: &History<'_>, mask: Option<&TokenMask>) -> bool {
    params.allowed_token_ids.is_some()
        || !params.bad_words.is_empty()
        || history.output_index < params.min_tokens
        || !params.logit_bias.is_empty()
        || uses_penalties(params)
        || mask.is_some()
}

/// Chooses the next token, and its logprobs if the sequence wants them.
pub fn sample(
    isa: Isa,
    row: &[f32],
    params: &SamplingParams,
    history: &History<'_>,
    mask: Option<&TokenMask>,
    scratch: &mut Scratch,
) -> (TokenId, Option<TokenLogprobs>) {
    let Scratch {
        logits,
        saved,
        candidates,
    } = scratch;
    let greedy = is_greedy(params);
    if greedy && params.logprobs.is_none() && !adjusts(params, history, mask) {
        return (argmax(row).unwrap_or(0), None);
    }
    logits.clear();
    logits.extend(row.iter().map(|&x| if x.is_nan() { f32::NEG_INFINITY } else { x }));
    adjust(logits, params, history, mask, saved);
    if !greedy && params.temperature != 1.0 {
        logits.iter_mut().for_each(|x| *x /= params.temperature);
    }

    let id = match argmax(logits) {
        None => argmax(row).unwrap_or(0),
        Some(best) if greedy => best,
        Some(best) => {
            let filtered = filter(isa, logits, best, params, candidates);
            if filtered && is_processed(params.logprobs_mode) && params.logprobs.is_some() {
                logits.fill(f32::NEG_INFINITY);
                candidates.iter().for_each(|&(id, x)| logits[id as usize] = x);
            }
            let race = Race {
                seed: params.seed,
                output_index: history.output_index,
            };
            let start = (best, logits[best as usize]);
            if filtered {
                race.run(start, candidates.iter().copied())
            } else {
                race.run(start, (0..).zip(logits.iter().copied()))
            }
        }
    };
    let logprobs = params.logprobs.map(|n| {
        let values = if is_processed(params.logprobs_mode) {
            &logits[..]
        } else {
            row
        };
        report(isa, values, id, n, params.logprobs_mode, candidates)
    });
    (id, logprobs)
}

/// Log-probabilities of a known token of the prompt, from the model's logits whatever the mode, as vLLM.
pub fn score(isa: Isa, row: &[f32], token: TokenId, top: u32, scratch: &mut Scratch) -> TokenLogprobs {
    report(isa, row, token, top, LogprobsMode::RawLogprobs, &mut scratch.candidates)
}

fn is_processed(mode: LogprobsMode) -> bool {
    matches!(mode, LogprobsMode::ProcessedLogprobs | LogprobsMode::ProcessedLogits)
}

/// The largest value above −∞, the lowest id of equal ones; NaN is skipped.
pub fn argmax(row: &[f32]) -> Option<TokenId> {
    // Blocks first: the maximum of a block vectorises, and only blocks that raise it are searched.
    const BLOCK: usize = 256;
    const LANES: usize = 16;
    let mut best = (f32::NEG_INFINITY, None);
    for (block, values) in row.chunks(BLOCK).enumerate() {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (chunks, tail) = values.as_chunks::<LANES>();
        for chunk in chunks {
            for j in 0..LANES {
                lanes[j] = if chunk[j] > lanes[j] { chunk[j] } else { lanes[j] };
            }
        }
        let max = lanes
            .into_iter()
            .chain(tail.iter().copied())
            .fold(f32::NEG_INFINITY, f32::max);
        if max > best.0 {
            best = (
                max,
                values
                    .iter()
                    .position(|&x| x == max)
                    .map(|i| (block * BLOCK + i) as TokenId),
            );
        }
    }
    best.1
}

/// Everything between the model's logits and the temperature, in `SamplingParams`' order. Ids outside the row are ignored.
fn adjust(
    logits: &mut [f32],
    params: &SamplingParams,
    history: &History<'_>,
    mask: Option<&TokenMask>,
    saved: &mut Vec<(TokenId, f32)>,
) {
    const FORBIDDEN: f32 = f32::NEG_INFINITY;
    if let Some(allowed) = &params.allowed_token_ids {
        saved.clear();
        saved.extend(allowed.iter().filter_map(|&id| Some((id, *logits.get(id as usize)?))));
        logits.fill(FORBIDDEN);
        saved.iter().for_each(|&(id, x)| logits[id as usize] = x);
    }
    let forbid = |logits: &mut [f32], id: TokenId| {
        if let Some(x) = logits.get_mut(id as usize) {
            *x = FORBIDDEN;
        }
    };
    for word in &params.bad_words {
        // vLLM looks at the output alone, not at the prompt.
        if let Some((&last, prefix)) = word.split_last()
            && history.output.ends_with(prefix)
        {
            forbid(logits, last);
        }
    }
    if history.output_index < params.min_tokens {
        params.min_tokens_suppressed.iter().for_each(|&id| forbid(logits, id));
    }
    for &(id, bias) in &params.logit_bias {
        if let Some(x) = logits.get_mut(id as usize) {
            *x += bias;
        }
    }
    if let Some(counts) = history.counts
        && uses_penalties(params)
    {
        for &(id, n) in &counts.entries {
            let Some(x) = logits.get_mut(id as usize) else { continue };
            *x = if *x > 0.0 {
                *x / params.repetition_penalty
            } else {
                *x * params.repetition_penalty
            };
            if n > 0 {
                *x -= params.frequency_penalty * n as f32;
                *x -= params.presence_penalty;
            }
        }
    }
    if let Some(TokenMask(words)) = mask {
        for (word, values) in logits.chunks_mut(32).enumerate() {
            let bits = words.get(word).copied().unwrap_or(0);
            if bits == u32::MAX {
                continue;
            }
            for (bit, x) in values.iter_mut().enumerate() {
                if bits >> bit & 1 == 0 {
                    *x = FORBIDDEN;
                }
            }
        }
    }
}

/// Leaves in `kept` what min-p, top-k and top-p let through; false when they are all off (`kept` is then untouched).
///
/// Ties at the k-th value all stay, as in vLLM; ties at the edge of top-p go to the lower id.
fn filter(isa: Isa, logits: &[f32], best: TokenId, params: &SamplingParams, kept: &mut Vec<(TokenId, f32)>) -> bool {
    let max = logits[best as usize];
    let top_k = params.top_k as usize;
    let (use_k, use_p) = (top_k > 0 && top_k < logits.len(), params.top_p < 1.0);
    if !use_k && !use_p && params.min_p <= 0.0 {
        return false;
    }
    // p ≥ min_p · p_max.
    let mut floor = if params.min_p > 0.0 {
        max + params.min_p.ln()
    } else {
        f32::NEG_INFINITY
    };
    floor = floor.min(max);
    if use_k {
        floor = floor.max(kth_largest(logits, top_k, floor, kept));
    }
    kept.clear();
    kept.extend(
        (0..)
            .zip(logits.iter().copied())
            .filter(|&(_, x)| x >= floor && x > f32::NEG_INFINITY),
    );
    if use_p {
        keep_nucleus(isa, kept, max, params.top_p);
    }
    true
}

/// Most likely first, equal values by lower id.
fn descending(a: &(TokenId, f32), b: &(TokenId, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The k-th largest of the values at or above `floor`, or `floor` if there are fewer.
fn kth_largest(logits: &[f32], k: usize, floor: f32, heap: &mut Vec<(TokenId, f32)>) -> f32 {
    // Keeps the best of what was seen; a value must beat the threshold to enter, which few do.
    let room = (4 * k).max(256);
    let mut threshold = floor;
    let shrink = |heap: &mut Vec<(TokenId, f32)>| {
        heap.select_nth_unstable_by(k - 1, descending);
        heap.truncate(k);
        heap[k - 1].1
    };
    heap.clear();
    for (id, &x) in (0..).zip(logits) {
        if x >= threshold {
            heap.push((id, x));
            if heap.len() >= room {
                threshold = shrink(heap);
            }
        }
    }
    if heap.len() >= k { shrink(heap) } else { floor }
}

/// Cuts `kept` to the smallest set of the most likely tokens whose mass reaches `top_p`; at least one stays.
fn keep_nucleus(isa: Isa, kept: &mut Vec<(TokenId, f32)>, max: f32, top_p: f32) {
    let total: f64 = kept.iter().map(|&(_, x)| f64::from(exp(isa, x - max))).sum();
    let goal = f64::from(top_p) * total;
    let mut mass = 0.0;
    let mut sorted = 0;
    while sorted < kept.len() {
        let n = (sorted * 8).max(64).min(kept.len());
        if n < kept.len() {
            kept[sorted..].select_nth_unstable_by(n - 1 - sorted, descending);
        }
        kept[sorted..n].sort_unstable_by(descending);
        for i in sorted..n {
            mass += f64::from(exp(isa, kept[i].1 - max));
            if mass >= goal {
                kept.truncate(i + 1);
                return;
            }
        }
        sorted = n;
    }
}

fn exp(isa: Isa, x: f32) -> f32 {
    if isa == Isa::Portable {
        simd::exp::<false>(x)
    } else {
        simd::exp::<true>(x)
    }
}

/// The random choice: the largest of logit + Gumbel noise, a sample of the softmax. The noise of a token is a function of
/// (seed, output index, token).
struct Race {
    seed: u64,
    output_index: u32,
}

impl Race {
    /// Noise lies below: −ln(−ln(1 − 2⁻³³)).
    const MAX_NOISE: f32 = 22.9;

    fn noise(&self, id: TokenId) -> f32 {
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let bits = philox4x32([id, self.output_index, 0, 0], key)[0];
        let u = (f64::from(bits) + 0.5) / 4_294_967_296.0;
        -(-u.ln()).ln() as f32
    }

    /// `start` is among the candidates; its score lets most of the others go without noise.
    fn run(&self, start: (TokenId, f32), candidates: impl Iterator<Item = (TokenId, f32)>) -> TokenId {
        let mut best = (start.0, start.1 + self.noise(start.0));
        for (id, x) in candidates {
            if x + Self::MAX_NOISE < best.1 || id == start.0 || x == f32::NEG_INFINITY {
                continue;
            }
            let score = x + self.noise(id);
            if score > best.1 || (score == best.1 && id < best.0) {
                best = (id, score);
            }
        }
        best.0
    }
}

/// Philox4x32-10, a counter-based generator.
///
/// # Source
/// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// `sum += Σ exp(x - max)`, −∞ and NaN counting 0.
#[inline(always)]
fn sum_exp_body<const FMA: bool>(row: &[f32], max: f32, sum: &mut f64) {
    const LANES: usize = 16;
    // Blocks bound the rounding error of the f32 lanes.
    for block in row.chunks(4096) {
        let mut lanes = [0.0f32; LANES];
        let (chunks, tail) = block.as_chunks::<LANES>();
        for chunk in chunks {
            for j in 0..LANES {
                let y = simd::exp::<FMA>(chunk[j] - max);
                lanes[j] += if y > 0.0 { y } else { 0.0 };
            }
        }
        for (j, &x) in tail.iter().enumerate() {
            let y = simd::exp::<FMA>(x - max);
            lanes[j] += if y > 0.0 { y } else { 0.0 };
        }
        *sum += lanes.iter().map(|&x| f64::from(x)).sum::<f64>();
    }
}

simd::versions! {
    fn sum_exp(row: &[f32], max: f32, sum: &mut f64) = sum_exp_body
}

/// What a token and its `top` best alternatives are reported with.
fn report(
    isa: Isa,
    values: &[f32],
    id: TokenId,
    top: u32,
    mode: LogprobsMode,
    heap: &mut Vec<(TokenId, f32)>,
) -> TokenLogprobs {
    let clean = |x: f32| if x.is_nan() { f32::NEG_INFINITY } else { x };
    let value = values.get(id as usize).map_or(f32::NEG_INFINITY, |&x| clean(x));
    let shift = match mode {
        LogprobsMode::RawLogits | LogprobsMode::ProcessedLogits => 0.0,
        LogprobsMode::RawLogprobs | LogprobsMode::ProcessedLogprobs => {
            let max = argmax(values).map_or(0.0, |best| values[best as usize]);
            let mut sum = 0.0;
            sum_exp(isa, values, max, &mut sum);
            // Not one f32: max + ln(sum) would lose digits of the logarithm.
            if sum > 0.0 { f64::from(max) + sum.ln() } else { 0.0 }
        }
    };
    let shifted = |x: f32| (f64::from(x) - shift) as f32;
    // vLLM counts the tokens that are at least as likely, equal ones included.
    let rank = values.iter().filter(|&&x| clean(x) >= value).count() as u32;
    let k = (top as usize).min(values.len());
    let mut best = Vec::with_capacity(k);
    if k > 0 {
        let floor = if k < values.len() {
            // NaN never reaches the floor.
            kth_largest(values, k, f32::NEG_INFINITY, heap)
        } else {
            f32::NEG_INFINITY
        };
        heap.clear();
        heap.extend((0..).zip(values.iter().map(|&x| clean(x))).filter(|&(_, x)| x >= floor));
        if heap.len() > k {
            heap.select_nth_unstable_by(k - 1, descending);
            heap.truncate(k);
        }
        heap.sort_unstable_by(descending);
        best.extend(heap.iter().map(|&(id, x)| (id, shifted(x))));
    }
    TokenLogprobs {
        id,
        logprob: shifted(value),
        rank,
        top: best,
    }
}

#[cfg(test)]
#[path = "sampling_tests.rs"]
mod tests;
