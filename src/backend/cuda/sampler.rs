//! The sampler's state on the device, and the results' way back.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::driver::{Address, Arg, Device, Event, Memory, Pinned, download};
use super::{bug, need};
use crate::backend::{Result, SampleRequest, ScoreRequest};
use crate::step::{LogprobsMode, MAX_LOGPROBS, SampledToken, SamplingParams, StartedSlot, TokenId, TokenLogprobs};

// Sizes that sampler.cu shares.
const EDITS: usize = 1024;
const WORDS: usize = 128;
const WORD_TOKENS: usize = 1024;
const TOP: usize = MAX_LOGPROBS;
const PARAMS_BYTES: usize = 64;
const REQUEST_BYTES: usize = 16;
/// Requests of one launch, and cells of 8 bytes that each takes of its parameters.
const REQUESTS: usize = 240;
const REQUEST_CELLS: usize = REQUEST_BYTES / 8;
/// Most blocks of a request where there are clusters.
const TEAM: usize = 8;
const THREADS: usize = 1024;
/// Shared memory of a multiprocessor that a block does not keep its part of a row in: the kernel's own, and the driver's.
const OTHER_SHARED_BYTES: usize = 32 << 10;
const SAMPLED_BYTES: usize = 16 + TOP * 8;
/// Samples whose results may wait to be read: of two steps, each once for the rows without a mask and once for those with one.
const RING: usize = 4;

struct Pending {
    ring: usize,
    /// Whether the request's slot wanted logprobs, and how many alternatives.
    wants: Vec<Option<usize>>,
    /// Where the results have arrived; none where there are none.
    done: Option<Arc<Event>>,
}

#[derive(Clone, Default)]
struct Slot {
    started: bool,
    logprobs: Option<u32>,
    prompt_logprobs: u32,
    /// Allowed ids as mask words.
    allowed: Option<Arc<[u32]>>,
}

/// Blocks of a request, values of its row that each looks at, and the shared memory that keeps them (0: nothing does).
struct Split {
    blocks: usize,
    share: usize,
    kept_bytes: usize,
}

pub struct CudaSampler {
    vocab: usize,
    max_rows: usize,
    params: Memory,
    counts: Memory,
    edits: Memory,
    words: Memory,
    history: Memory,
    last: Memory,
    masks: Memory,
    requests: Memory,
    results: Memory,
    /// Ids of a slot that starts; grows at need, outside of steps' hot path.
    tokens: Memory,
    /// Masks on their way; free again when the results of their sample have been read.
    staging: Vec<Pinned>,
    received: Vec<Pinned>,
    next: usize,
    pending: VecDeque<Pending>,
    slots: Vec<Slot>,
    device: Arc<Device>,
}

impl CudaSampler {
    pub fn new(device: &Arc<Device>, slots: usize, vocab: usize, max_rows: usize) -> Result<CudaSampler> {
        let memory = |bytes| Memory::new(device, bytes, "sampler");
        let words = vocab.div_ceil(32);
        Ok(CudaSampler {
            vocab,
            max_rows,
            params: memory(slots * PARAMS_BYTES)?,
            counts: memory(slots * vocab * 2)?,
            edits: memory(slots * EDITS * 8)?,
            words: memory(slots * (2 * WORDS + WORD_TOKENS) * 4)?,
            history: memory(slots * WORD_TOKENS * 4)?,
            last: memory(slots * 4)?,
            masks: memory(max_rows * words * 4)?,
            requests: memory(max_rows * REQUEST_BYTES)?,
            results: memory(max_rows * SAMPLED_BYTES)?,
            tokens: memory(64 << 10)?,
            staging: (0..RING)
                .map(|_| Pinned::new(device, max_rows * words * 4))
                .collect::<Result<_>>()?,
            received: (0..RING)
                .map(|_| Pinned::new(device, max_rows * SAMPLED_BYTES))
                .collect::<Result<_>>()?,
            next: 0,
            pending: VecDeque::new(),
            slots: vec![Slot::default(); slots],
            device: device.clone(),
        })
    }

    pub fn vocab(&self) -> usize {
        self.vocab
    }

    pub fn last_sampled(&self) -> Address {
        self.last.address
    }

    pub fn start(&mut self, device: &Device, started: &StartedSlot) -> Result<()> {
        let slot = started.slot as usize;
        need("start_slot", slot < self.slots.len(), || {
            format!("slot {slot} of {}", self.slots.len())
        })?;
        let p = &*started.sampling;
        let word_tokens: usize = p.bad_words.iter().map(Vec::len).sum();
        let fits = p.bad_words.len() <= WORDS && word_tokens <= WORD_TOKENS && !p.bad_words.contains(&vec![]);
        need("start_slot", fits, || {
            let n = p.bad_words.len();
            format!("{n} bad words of {word_tokens} tokens; at most {WORDS} of {WORD_TOKENS}, none empty")
        })?;
        let penalties = p.repetition_penalty != 1.0 || p.presence_penalty != 0.0 || p.frequency_penalty != 0.0;
        let (held, edits) = edit_list(p);
        need("start_slot", edits.len() <= EDITS, || {
            format!("{} biased and held-back ids; at most {EDITS}", edits.len())
        })?;
        self.slots[slot] = Slot {
            started: true,
            logprobs: p.logprobs,
            prompt_logprobs: p.prompt_logprobs.unwrap_or(0),
            allowed: p.allowed_token_ids.as_ref().map(|ids| mask_of(ids, self.vocab)),
        };

        let mut raw = Vec::with_capacity(PARAMS_BYTES);
        for v in [
            p.temperature,
            p.top_p,
            p.min_p,
            p.repetition_penalty,
            p.presence_penalty,
            p.frequency_penalty,
        ] {
            raw.extend_from_slice(&v.to_le_bytes());
        }
        let mode = match p.logprobs_mode {
            LogprobsMode::RawLogprobs => 0,
            LogprobsMode::RawLogits => 1,
            LogprobsMode::ProcessedLogprobs => 2,
            LogprobsMode::ProcessedLogits => 3,
        };
        let alternatives = p.logprobs.map_or(-1, |n| n.min(TOP as u32) as i32);
        let top_k = p.top_k.min(self.vocab as u32) as i32;
        let ints = [
            top_k,
            alternatives,
            mode,
            p.min_tokens as i32,
            held as i32,
            edits.len() as i32,
            i32::from(penalties),
            p.bad_words.len() as i32,
        ];
        for v in ints {
            raw.extend_from_slice(&v.to_le_bytes());
        }
        raw.extend_from_slice(&p.seed.to_le_bytes());
        // Copies from pageable memory: the driver has staged them when the call returns.
        self.params.upload(slot * PARAMS_BYTES, &raw, "start_slot")?;
        if !edits.is_empty() {
            let bytes: Vec<u8> = edits
                .iter()
                .flat_map(|(id, add)| [id.to_le_bytes(), add.to_le_bytes()].concat())
                .collect();
            self.edits.upload(slot * EDITS * 8, &bytes, "start_slot")?;
        }
        if !p.bad_words.is_empty() {
            let mut cells = vec![0u32; 2 * WORDS];
            for (i, word) in p.bad_words.iter().enumerate() {
                (cells[2 * i], cells[2 * i + 1]) = ((cells.len() - 2 * WORDS) as u32, word.len() as u32);
                cells.extend_from_slice(word);
            }
            let bytes: Vec<u8> = cells.iter().flat_map(|c| c.to_le_bytes()).collect();
            self.words
                .upload(slot * (2 * WORDS + WORD_TOKENS) * 4, &bytes, "start_slot")?;
        }
        if penalties || !started.output.is_empty() {
            let ids: Vec<u8> = started
                .prompt
                .iter()
                .chain(&started.output)
                .flat_map(|id| id.to_le_bytes())
                .collect();
            if ids.len() > self.tokens.bytes {
                self.tokens = Memory::new(&self.device, ids.len().next_power_of_two(), "sampler")?;
            }
            self.tokens.upload(0, &ids, "start_slot")?;
            let args = [
                self.counts.address.arg(),
                self.tokens.address.arg(),
                self.history.address.arg(),
                self.last.address.arg(),
                slot.arg(),
                started.prompt.len().arg(),
                started.output.len().arg(),
                self.vocab.arg(),
            ];
            device.launch(device.function("start_slot", 0)?, [1, 1, 1], 1024, 0, &args)?;
        }
        Ok(())
    }

    pub fn sample(&mut self, device: &Device, logits: Address, requests: &[SampleRequest]) -> Result<()> {
        need("sample", requests.len() <= self.max_rows, || {
            format!("{} rows of {}", requests.len(), self.max_rows)
        })?;
        need("sample", self.pending.len() < RING, || {
            "results of earlier steps were not read".into()
        })?;
        let ring = self.next % RING;
        let mut wants = Vec::with_capacity(requests.len());
        if requests.is_empty() {
            self.next += 1;
            self.pending.push_back(Pending {
                ring,
                wants,
                done: None,
            });
            return Ok(());
        }
        let words = self.vocab.div_ceil(32);
        let staging = &mut self.staging[ring];
        let bytes = staging.bytes_mut();
        let mut masks = 0;
        let mut cells = Vec::with_capacity(requests.len().next_multiple_of(REQUESTS) * REQUEST_CELLS);
        for request in requests {
            let slot = self.slots.get(request.slot as usize).filter(|slot| slot.started);
            let slot = slot.ok_or_else(|| bug("sample", format!("slot {} was not started", request.slot)))?;
            wants.push(slot.logprobs.map(|n| n as usize));
            let mut mask = -1i32;
            if request.mask.is_some() || slot.allowed.is_some() {
                mask = masks;
                let to = &mut bytes[masks as usize * words * 4..][..words * 4];
                for (w, out) in to.chunks_exact_mut(4).enumerate() {
                    let word = |m: &[u32]| m.get(w).copied().unwrap_or(0);
                    let grammar = request.mask.as_ref().map_or(u32::MAX, |m| word(&m.0));
                    out.copy_from_slice(&(grammar & slot.allowed.as_ref().map_or(u32::MAX, |m| word(m))).to_le_bytes());
                }
                masks += 1;
            }
            let cell = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
            cells.push(cell(request.logit_row as u32, request.slot));
            cells.push(cell(request.output_index, mask as u32));
        }
        if masks > 0 {
            staging.send(masks as usize * words * 4, self.masks.address, "sample")?;
        }
        // The kernel's parameter is as long for any number of requests.
        cells.resize(requests.len().next_multiple_of(REQUESTS) * REQUEST_CELLS, 0);
        let received = &self.received[ring];
        let launches = requests.chunks(REQUESTS).zip(cells.chunks(REQUESTS * REQUEST_CELLS));
        for (i, (some, cells)) in launches.enumerate() {
            let args = [
                logits.arg(),
                self.params.address.arg(),
                self.counts.address.arg(),
                self.masks.address.arg(),
                self.edits.address.arg(),
                self.words.address.arg(),
                self.history.address.arg(),
                self.last.address.arg(),
                (received.address() + (i * REQUESTS * SAMPLED_BYTES) as u64).arg(),
            ];
            self.launch("sample", some.len(), &args, cells)?;
        }
        let done = Some(device.mark()?);
        self.next += 1;
        self.pending.push_back(Pending { ring, wants, done });
        Ok(())
    }

    /// How a launch over `requests` rows shares each among blocks: as many as can all run at once, one on a multiprocessor.
    fn split(&self, requests: usize) -> Split {
        let mut blocks = if self.device.has_clusters { TEAM } else { 1 };
        while blocks > 1 && blocks * requests > self.device.multiprocessors {
            blocks /= 2;
        }
        let share = self.vocab.div_ceil(blocks).next_multiple_of(4);
        let room = self.device.shared_per_multiprocessor - OTHER_SHARED_BYTES;
        Split {
            blocks,
            share,
            kept_bytes: if share * 4 <= room { share * 4 } else { 0 },
        }
    }

    /// `args` and what follows from the split: V, a block's share of a row, whether it is kept; then `tail`.
    fn launch(&self, kernel: &'static str, requests: usize, args: &[u64], tail: &[u64]) -> Result<()> {
        let Split {
            blocks,
            share,
            kept_bytes,
        } = self.split(requests);
        let row = [self.vocab.arg(), share.arg(), (kept_bytes > 0).arg()];
        let args = [args, &row, tail].concat();
        let function = self.device.function(kernel, kept_bytes)?;
        self.device
            .launch_clusters(function, [requests * blocks, 1, 1], blocks, THREADS, kept_bytes, &args)
    }

    pub fn sampled(&mut self, out: &mut Vec<SampledToken>) -> Result<()> {
        let Pending { ring, wants, done } = self
            .pending
            .pop_front()
            .ok_or_else(|| bug("sampled", "nothing was sampled".into()))?;
        out.clear();
        let Some(done) = done else { return Ok(()) };
        done.wait("sample")?;
        let received = &self.received[ring];
        for (record, want) in received.bytes().chunks_exact(SAMPLED_BYTES).zip(wants) {
            let logprobs = want.map(|n| parse(record, n));
            out.push(SampledToken {
                id: word(record, 0),
                logprobs,
            });
        }
        Ok(())
    }

    pub fn score(
        &mut self,
        device: &Device,
        logits: Address,
        requests: &[ScoreRequest],
        out: &mut Vec<TokenLogprobs>,
    ) -> Result<()> {
        out.clear();
        for some in requests.chunks(self.max_rows) {
            let mut raw = Vec::with_capacity(some.len() * REQUEST_BYTES);
            let mut wants = Vec::with_capacity(some.len());
            for r in some {
                let slot = self
                    .slots
                    .get(r.slot as usize)
                    .ok_or_else(|| bug("score", format!("slot {}", r.slot)))?;
                let count = (slot.prompt_logprobs as usize).min(TOP);
                wants.push(count);
                for v in [r.logit_row as u32, r.next_token, count as u32] {
                    raw.extend_from_slice(&v.to_le_bytes());
                }
            }
            self.requests.upload(0, &raw, "score")?;
            let args = [logits.arg(), self.requests.address.arg(), self.results.address.arg()];
            self.launch("score", some.len(), &args, &[])?;
            let mut bytes = vec![0; some.len() * SAMPLED_BYTES];
            download(device, self.results.address, &mut bytes, "score")?;
            out.extend(
                bytes
                    .chunks_exact(SAMPLED_BYTES)
                    .zip(wants)
                    .map(|(record, n)| parse(record, n)),
            );
        }
        Ok(())
    }
}

fn word(record: &[u8], index: usize) -> u32 {
    u32::from_le_bytes([
        record[index * 4],
        record[index * 4 + 1],
        record[index * 4 + 2],
        record[index * 4 + 3],
    ])
}

fn parse(record: &[u8], alternatives: usize) -> TokenLogprobs {
    let n = alternatives.min(TOP).min(word(record, 3) as usize);
    TokenLogprobs {
        id: word(record, 0),
        logprob: f32::from_bits(word(record, 1)),
        rank: word(record, 2),
        top: (0..n)
            .map(|i| (word(record, 4 + i), f32::from_bits(word(record, 4 + TOP + i))))
            .collect(),
    }
}

/// Ids held back by min_tokens first, then biases; each id once in either part.
fn edit_list(p: &SamplingParams) -> (usize, Vec<(TokenId, f32)>) {
    let mut held: Vec<TokenId> = if p.min_tokens > 0 {
        p.min_tokens_suppressed.clone()
    } else {
        Vec::new()
    };
    held.sort_unstable();
    held.dedup();
    let mut biases = BTreeMap::new();
    for (id, bias) in &p.logit_bias {
        *biases.entry(*id).or_insert(0.0) += bias;
    }
    let mut edits: Vec<(TokenId, f32)> = held.iter().map(|id| (*id, f32::NEG_INFINITY)).collect();
    // An id may stand in both parts: originals are saved before any addend, so restoring it twice is harmless.
    edits.extend(biases);
    (held.len(), edits)
}

fn mask_of(ids: &[TokenId], vocab: usize) -> Arc<[u32]> {
    let mut words = vec![0u32; vocab.div_ceil(32)];
    for id in ids {
        if let Some(word) = words.get_mut(*id as usize / 32) {
            *word |= 1 << (id % 32);
        }
    }
    words.into()
}
