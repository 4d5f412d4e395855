//! The test double of a device: answers from a script, and distrusts the engine.
//!
//! [`ScriptedExecutor`] keeps a pretended KV cache and conv states. Each KV entry stands for all tokens up to its
//! position; every row is checked against what the slot's sequence must be, through the block table it brought. A mistake
//! in the engine's accounting thus becomes a fatal error or another text, never a silent pass. It also serves the tests of
//! the layers above, which need an engine that says what they want to hear.

#[cfg(test)]
use std::cell::Cell;
use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{EngineConfig, EngineHandle};
use crate::config::{SchedulerConfig, SchedulingPolicy};
use crate::metrics::Metrics;
use crate::step::{
    BlockId, Capacity, Executor, ExecutorError, HiddenRow, RowOutput, RowTokens, SampledToken, SamplingParams, SlotId,
    StartedSlot, StepOutput, StepPlan, StepRow, Ticket, TokenId, TokenLogprobs, TokenMask,
};

/// Values of a pretended hidden state.
pub const HIDDEN: usize = 8;

/// Gives the output for a prompt; after its end the last token repeats.
pub type Script = Arc<dyn Fn(&[TokenId]) -> Vec<TokenId> + Send + Sync>;

/// A roomy capacity for tests: 256 blocks of 16 tokens, 64 slots, 512 tokens a step, one step ahead.
pub fn capacity(vocab_size: usize) -> Capacity {
    Capacity {
        num_blocks: 256,
        block_size: 16,
        max_num_seqs: 64,
        max_num_batched_tokens: 512,
        conv_replay_tokens: 36,
        vocab_size,
        max_in_flight: 2,
    }
}

/// An engine's configuration for tests: FCFS, chunked prefill, prefix caching, no queue limit, a context of 4096.
pub fn config() -> EngineConfig {
    let scheduler = SchedulerConfig {
        max_num_batched_tokens: 512,
        max_num_seqs: 64,
        max_queued_requests: None,
        max_queued_tokens: None,
        policy: SchedulingPolicy::Fcfs,
        long_prefill_token_threshold: 0,
        chunked_prefill: true,
    };
    EngineConfig::new(scheduler, true, 4096)
}

/// An engine with the default test configuration.
///
/// # Panics
/// The operating system gives no thread.
pub fn engine(executor: ScriptedExecutor) -> EngineHandle {
    EngineHandle::start(Box::new(executor), config(), Arc::new(Metrics::new("scripted", 4096)))
        .expect("the engine's thread starts")
}

#[cfg(test)]
thread_local! {
    /// Of an engine's thread: what its executor was told by `deliver_one_by_one`.
    static ONE_BY_ONE: Cell<bool> = const { Cell::new(false) };
}

/// Waits on an engine's thread that delivers one by one, until `is_read`.
#[cfg(test)]
pub(super) fn wait_for_reader(is_read: impl Fn() -> bool) {
    while ONE_BY_ONE.get() && !is_read() {
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// See the module's documentation.
pub struct ScriptedExecutor {
    capacity: Capacity,
    script: Option<Script>,
    control: ScriptControl,
    blocks: Vec<Block>,
    slots: Vec<Option<Slot>>,
    pending: VecDeque<Pending>,
    next_ticket: u64,
    next_generation: u64,
}

/// A pretended KV block: one entry per position, the hash of all tokens up to it.
#[derive(Clone)]
struct Block {
    entries: Vec<Option<u64>>,
    /// Generation of the slot that writes it.
    owner: u64,
}

struct Slot {
    /// Tells this use of the slot from others.
    generation: u64,
    sampling: Arc<SamplingParams>,
    num_prompt_tokens: usize,
    /// Prompt, output, and what has been sampled here.
    tokens: Vec<TokenId>,
    /// `prefix_hashes[p]` covers `tokens[..=p]`.
    prefix_hashes: Vec<u64>,
    reply: Vec<TokenId>,
    /// Position of the next token.
    next: usize,
    /// Tokens fed since the conv states were zero.
    fed_since_reset: usize,
    /// They were zero at the sequence's start, where zero is right.
    reset_at_start: bool,
    sampled_here: bool,
}

struct Pending {
    ticket: u64,
    plan: StepPlan,
    masks: Vec<Option<TokenMask>>,
    /// A step before it failed.
    lost: Option<ExecutorError>,
}

/// Steers an executor that the engine owns, and tells what it has done.
#[derive(Clone, Default)]
pub struct ScriptControl(Arc<(Mutex<ControlState>, Condvar)>);

#[derive(Default)]
struct ControlState {
    held: bool,
    step_delay: Duration,
    #[cfg(test)]
    one_by_one: bool,
    failure: Option<ExecutorError>,
    mask_failure: Option<ExecutorError>,
    panic: bool,
    ignore_masks: bool,
    counters: ScriptCounters,
}

/// What the executor has been asked to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScriptCounters {
    pub steps: u64,
    pub computed_tokens: u64,
    pub replayed_tokens: u64,
    /// Most rows in one step.
    pub max_rows: usize,
    /// Rows whose token the host had not seen.
    pub fed_back_rows: u64,
}

impl ScriptControl {
    /// Steps wait in `collect` until [`release`](Self::release).
    pub fn hold(&self) {
        self.lock().held = true;
    }

    pub fn release(&self) {
        self.lock().held = false;
        self.0.1.notify_all();
    }

    /// Each step takes at least this long.
    pub fn set_step_delay(&self, delay: Duration) {
        self.lock().step_delay = delay;
    }

    /// Every event of a sequence waits until the one before has been read, so that none are merged. Set it before the first step.
    #[cfg(test)]
    pub fn deliver_one_by_one(&self) {
        self.lock().one_by_one = true;
    }

    /// The next collected step fails with this.
    pub fn fail_next(&self, error: ExecutorError) {
        self.lock().failure = Some(error);
    }

    /// The next mask is refused with this.
    pub fn refuse_next_mask(&self, error: ExecutorError) {
        self.lock().mask_failure = Some(error);
    }

    /// The next collected step panics.
    pub fn panic_next(&self) {
        self.lock().panic = true;
    }

    /// Rows are sampled as if their mask allowed everything.
    pub fn ignore_masks(&self, ignore: bool) {
        self.lock().ignore_masks = ignore;
    }

    pub fn counters(&self) -> ScriptCounters {
        self.lock().counters
    }

    fn lock(&self) -> MutexGuard<'_, ControlState> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `collect` does before the step itself.
    fn before_step(&self) -> Result<(), ExecutorError> {
        let mut state = self.lock();
        while state.held {
            state = self.0.1.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        #[cfg(test)]
        ONE_BY_ONE.set(state.one_by_one);
        let delay = state.step_delay;
        let failure = state.failure.take();
        let panic = std::mem::take(&mut state.panic);
        drop(state);
        std::thread::sleep(delay);
        assert!(!panic, "the script asked for a panic");
        failure.map_or(Ok(()), Err)
    }
}

impl ScriptedExecutor {
    /// Answers with a hash of the whole context as it reads it back from the KV cache, and of the seed unless greedy.
    pub fn new(capacity: Capacity) -> Self {
        let block = Block {
            entries: vec![None; capacity.block_size],
            owner: u64::MAX,
        };
        Self {
            blocks: vec![block; capacity.num_blocks],
            slots: (0..capacity.max_num_seqs).map(|_| None).collect(),
            capacity,
            script: None,
            control: ScriptControl::default(),
            pending: VecDeque::new(),
            next_ticket: 0,
            next_generation: 0,
        }
    }

    /// Answers each prompt with the script's tokens.
    pub fn replying(capacity: Capacity, script: impl Fn(&[TokenId]) -> Vec<TokenId> + Send + Sync + 'static) -> Self {
        Self {
            script: Some(Arc::new(script)),
            ..Self::new(capacity)
        }
    }

    pub fn control(&self) -> ScriptControl {
        self.control.clone()
    }

    fn start(&mut self, started: &StartedSlot) -> Result<(), String> {
        let slot = self
            .slots
            .get_mut(started.slot as usize)
            .ok_or("a started slot is outside the capacity")?;
        let tokens: Vec<TokenId> = started.prompt.iter().chain(&started.output).copied().collect();
        self.next_generation += 1;
        *slot = Some(Slot {
            generation: self.next_generation,
            sampling: started.sampling.clone(),
            num_prompt_tokens: started.prompt.len(),
            prefix_hashes: Vec::new(),
            reply: self
                .script
                .as_ref()
                .map(|script| script(&started.prompt))
                .unwrap_or_default(),
            next: usize::MAX,
            fed_since_reset: 0,
            reset_at_start: false,
            sampled_here: false,
            tokens,
        });
        if let Some(slot) = slot {
            slot.extend_hashes();
        }
        Ok(())
    }

    /// Runs a step: all rows read what was there before, then all write, then all are read back.
    fn run(&mut self, pending: &Pending) -> Result<StepOutput, String> {
        let plan = &pending.plan;
        for started in &plan.started {
            self.start(started)?;
            let reset = plan.rows.iter().any(|row| row.slot == started.slot && row.reset_conv);
            ensure(reset, || {
                format!("slot {} starts without a row that resets its conv states", started.slot)
            })?;
        }
        for row in &plan.rows {
            self.check_row(row).map_err(|why| describe(row, &why))?;
        }
        for row in &plan.rows {
            self.write_row(row).map_err(|why| describe(row, &why))?;
        }
        let mut output = StepOutput::default();
        for (row, mask) in plan.rows.iter().zip(&pending.masks) {
            let context = self
                .read_back(row, row.start + row.tokens.len())
                .map_err(|why| describe(row, &why))?;
            output.rows.push(
                self.answer_row(row, context, mask.as_ref())
                    .map_err(|why| describe(row, &why))?,
            );
        }
        self.count(plan);
        Ok(output)
    }

    fn slot(&self, id: SlotId) -> Result<&Slot, String> {
        self.slots
            .get(id as usize)
            .and_then(Option::as_ref)
            .ok_or_else(|| "the slot was never started".into())
    }

    fn check_row(&mut self, row: &StepRow) -> Result<(), String> {
        let slot = self.slot(row.slot)?;
        let end = row.start + row.tokens.len();
        match &row.tokens {
            RowTokens::Known(ids) => {
                ensure(slot.tokens.get(row.start..end) == Some(ids), || {
                    "its tokens are not the sequence's".into()
                })?;
            }
            RowTokens::LastSampled => {
                ensure(slot.sampled_here, || "nothing has been sampled in its slot".into())?;
                ensure(end == slot.tokens.len(), || {
                    "the last sampled token stands elsewhere".into()
                })?;
            }
        }
        ensure(row.reset_conv || row.start == slot.next, || {
            format!("position {} comes next", slot.next)
        })?;
        ensure(row.replay <= row.tokens.len(), || "it replays more than it has".into())?;
        if let Some(sample) = &row.sample {
            ensure(end == slot.tokens.len(), || {
                "it samples before the sequence's end".into()
            })?;
            let index = slot.tokens.len() - slot.num_prompt_tokens;
            ensure(sample.output_index as usize == index, || {
                format!("the next output token is {index}")
            })?;
        }
        let unique: HashSet<BlockId> = row.block_table.iter().copied().collect();
        ensure(unique.len() == row.block_table.len(), || {
            "its block table repeats a block".into()
        })?;
        ensure(unique.iter().all(|&b| (b as usize) < self.blocks.len()), || {
            "a block is outside the capacity".into()
        })?;
        ensure(row.block_table.len() * self.capacity.block_size >= end, || {
            "its block table is too short".into()
        })?;
        self.read_back(row, row.start + row.replay).map(drop)
    }

    fn write_row(&mut self, row: &StepRow) -> Result<(), String> {
        let block_size = self.capacity.block_size;
        let replay_needed = self.capacity.conv_replay_tokens;
        let slot = self
            .slots
            .get_mut(row.slot as usize)
            .and_then(Option::as_mut)
            .ok_or("the slot vanished")?;
        if row.reset_conv {
            slot.fed_since_reset = 0;
            slot.reset_at_start = row.start == 0;
        }
        for (i, position) in (row.start..row.start + row.tokens.len()).enumerate() {
            if i >= row.replay {
                let exact = slot.reset_at_start || slot.fed_since_reset >= replay_needed;
                ensure(exact, || {
                    format!("the conv states are not exact at position {position}")
                })?;
                let block = &mut self.blocks[row.block_table[position / block_size] as usize];
                if position % block_size == 0 {
                    block.owner = slot.generation;
                    block.entries.fill(None);
                }
                ensure(block.owner == slot.generation, || {
                    "it writes to a block of another sequence".into()
                })?;
                block.entries[position % block_size] = Some(slot.prefix_hashes[position]);
            }
            slot.fed_since_reset += 1;
        }
        slot.next = row.start + row.tokens.len();
        Ok(())
    }

    /// The hash of the row's context `0..end`, read through its block table.
    fn read_back(&self, row: &StepRow, end: usize) -> Result<u64, String> {
        let slot = self.slot(row.slot)?;
        let mut last = 0;
        for position in 0..end {
            let block = &self.blocks[row.block_table[position / self.capacity.block_size] as usize];
            let entry = block.entries[position % self.capacity.block_size];
            last = entry.ok_or_else(|| format!("the KV at position {position} was never written"))?;
            let right = slot.prefix_hashes[position];
            ensure(last == right, || {
                format!("the KV at position {position} is another sequence's")
            })?;
        }
        Ok(last)
    }

    fn answer_row(&mut self, row: &StepRow, context: u64, mask: Option<&TokenMask>) -> Result<RowOutput, String> {
        let vocab_size = self.capacity.vocab_size as u64;
        let slot = self
            .slots
            .get_mut(row.slot as usize)
            .and_then(Option::as_mut)
            .ok_or("the slot vanished")?;
        let mut output = RowOutput::default();
        if let Some(count) = slot.sampling.prompt_logprobs {
            let computed = row.start + row.replay + 1..(row.start + row.tokens.len() + 1).min(slot.num_prompt_tokens);
            output.prompt_logprobs = computed
                .map(|p| logprobs(slot.tokens[p], slot.prefix_hashes[p], count, vocab_size))
                .collect();
        }
        if let Some(hidden) = row.hidden {
            let end = row.start + row.tokens.len();
            let positions = match hidden {
                HiddenRow::Last => end - 1..end,
                HiddenRow::Sum => row.start..end,
            };
            ensure(row.replay == 0 || hidden == HiddenRow::Last, || {
                "it sums replayed tokens".into()
            })?;
            output.hidden = vec![0.0; HIDDEN];
            for position in positions {
                for (sum, value) in output.hidden.iter_mut().zip(hidden_state(slot.prefix_hashes[position])) {
                    *sum += value;
                }
            }
        }
        let Some(sample) = &row.sample else { return Ok(output) };
        let index = sample.output_index as usize;
        let seed = if slot.sampling.temperature == 0.0 {
            0
        } else {
            slot.sampling.seed
        };
        let mut id = match slot.reply.get(index).or(slot.reply.last()) {
            Some(&id) => id,
            None => (mix(context, seed) % vocab_size) as TokenId,
        };
        let suppressed: &[TokenId] = if sample.output_index < slot.sampling.min_tokens {
            &slot.sampling.min_tokens_suppressed
        } else {
            &[]
        };
        let mask = mask.filter(|_| !self.control.lock().ignore_masks);
        let allowed = |id: TokenId| {
            let in_mask = mask.is_none_or(|TokenMask(words)| {
                words
                    .get(id as usize / 32)
                    .is_some_and(|word| word & (1 << (id % 32)) != 0)
            });
            in_mask && !suppressed.contains(&id)
        };
        for _ in 0..vocab_size {
            if allowed(id) {
                break;
            }
            id = (id + 1) % vocab_size as TokenId;
        }
        output.sampled = Some(SampledToken {
            id,
            logprobs: slot
                .sampling
                .logprobs
                .map(|count| logprobs(id, context, count, vocab_size)),
        });
        slot.tokens.push(id);
        slot.sampled_here = true;
        slot.extend_hashes();
        Ok(output)
    }

    fn count(&self, plan: &StepPlan) {
        let counters = &mut self.control.lock().counters;
        counters.steps += 1;
        counters.max_rows = counters.max_rows.max(plan.rows.len());
        for row in &plan.rows {
            counters.replayed_tokens += row.replay as u64;
            counters.computed_tokens += (row.tokens.len() - row.replay) as u64;
            counters.fed_back_rows += u64::from(row.tokens == RowTokens::LastSampled);
        }
    }
}

impl Executor for ScriptedExecutor {
    fn capacity(&self) -> &Capacity {
        &self.capacity
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<Ticket, ExecutorError> {
        let num_tokens: usize = plan.rows.iter().map(|row| row.tokens.len()).sum();
        let slots: HashSet<SlotId> = plan.rows.iter().map(|row| row.slot).collect();
        ensure(self.pending.len() < self.capacity.max_in_flight, || {
            "too many steps in flight".into()
        })
        .and_then(|()| ensure(!plan.rows.is_empty(), || "an empty step".into()))
        .and_then(|()| {
            ensure(plan.rows.iter().all(|row| !row.tokens.is_empty()), || {
                "an empty row".into()
            })
        })
        .and_then(|()| ensure(slots.len() == plan.rows.len(), || "two rows for one slot".into()))
        .and_then(|()| {
            ensure(num_tokens <= self.capacity.max_num_batched_tokens, || {
                format!("{num_tokens} tokens")
            })
        })
        .map_err(bug)?;
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.pending.push_back(Pending {
            ticket,
            plan: plan.clone(),
            masks: vec![None; plan.rows.len()],
            lost: None,
        });
        Ok(Ticket(ticket))
    }

    fn set_mask(&mut self, ticket: &Ticket, row: usize, mask: TokenMask) -> Result<(), ExecutorError> {
        let mut pending = self.pending.iter_mut().find(|pending| pending.ticket == ticket.0);
        if let Some(error) = self.control.lock().mask_failure.take() {
            if let Some(pending) = &mut pending {
                pending.lost = Some(error.clone());
            }
            return Err(error);
        }
        match pending.and_then(|pending| pending.masks.get_mut(row)) {
            Some(place) => {
                *place = Some(mask);
                Ok(())
            }
            None => Err(bug("a mask for a row that is not in flight".into())),
        }
    }

    fn collect(&mut self, ticket: Ticket) -> Result<StepOutput, ExecutorError> {
        let failure = self.control.before_step().err();
        let pending = self
            .pending
            .pop_front()
            .ok_or_else(|| bug("nothing is in flight".into()))?;
        if pending.ticket != ticket.0 {
            return Err(bug("tickets are collected out of order".into()));
        }
        if let Some(error) = failure.or(pending.lost.clone()) {
            for later in &mut self.pending {
                later.lost = Some(error.clone());
            }
            return Err(error);
        }
        let unmasked = pending
            .plan
            .rows
            .iter()
            .zip(&pending.masks)
            .any(|(row, mask)| mask.is_none() && row.sample.as_ref().is_some_and(|sample| sample.needs_mask));
        if unmasked {
            return Err(bug("a row still waits for its mask".into()));
        }
        self.run(&pending).map_err(bug)
    }
}

impl Slot {
    fn extend_hashes(&mut self) {
        for (position, &token) in self.tokens.iter().enumerate().skip(self.prefix_hashes.len()) {
            let before = position.checked_sub(1).map_or(0, |before| self.prefix_hashes[before]);
            self.prefix_hashes.push(mix(before, u64::from(token)));
        }
    }
}

fn logprobs(id: TokenId, context: u64, count: u32, vocab_size: u64) -> TokenLogprobs {
    let top = (0..u64::from(count))
        .map(|i| (((u64::from(id) + i) % vocab_size) as TokenId, -0.5 - i as f32))
        .collect();
    TokenLogprobs {
        id,
        logprob: -0.5 - (context % 8) as f32 / 64.0,
        rank: 1,
        top,
    }
}

/// Small whole numbers that depend on all tokens up to a position: sums of them are exact in any order.
fn hidden_state(prefix_hash: u64) -> [f32; HIDDEN] {
    prefix_hash.to_le_bytes().map(|byte| f32::from(byte as i8))
}

/// A well-spread hash of two numbers (the finaliser of splitmix64).
fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.rotate_left(17) ^ b.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn ensure(holds: bool, why: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(why()) }
}

fn describe(row: &StepRow, why: &str) -> String {
    format!(
        "slot {} at {}..{}: {why}",
        row.slot,
        row.start,
        row.start + row.tokens.len()
    )
}

fn bug(why: String) -> ExecutorError {
    ExecutorError {
        message: format!("the step plan is wrong: {why}"),
        fatal: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::SampleRow;

    fn tiny() -> ScriptedExecutor {
        ScriptedExecutor::new(Capacity {
            num_blocks: 4,
            block_size: 2,
            conv_replay_tokens: 2,
            ..capacity(50)
        })
    }

    fn started(slot: SlotId, prompt: &[TokenId]) -> StartedSlot {
        StartedSlot {
            slot,
            sampling: Arc::default(),
            prompt: prompt.into(),
            output: Vec::new(),
        }
    }

    /// A first row over the whole of `prompt`, whose first `replay` tokens are replayed.
    fn row(slot: SlotId, prompt: &[TokenId], replay: usize, blocks: &[BlockId]) -> StepRow {
        StepRow {
            slot,
            start: 0,
            tokens: RowTokens::Known(prompt.to_vec()),
            replay,
            reset_conv: true,
            block_table: blocks.into(),
            sample: Some(SampleRow {
                output_index: 0,
                needs_mask: false,
            }),
            hidden: None,
        }
    }

    fn step(
        executor: &mut ScriptedExecutor,
        slot: SlotId,
        row: StepRow,
        prompt: &[TokenId],
    ) -> Result<TokenId, String> {
        let plan = StepPlan {
            started: vec![started(slot, prompt)],
            rows: vec![row],
        };
        let ticket = executor.submit(&plan).map_err(|error| error.message)?;
        let output = executor.collect(ticket).map_err(|error| error.message)?;
        output.rows[0]
            .sampled
            .as_ref()
            .map(|token| token.id)
            .ok_or_else(|| "no sample".into())
    }

    #[test]
    fn a_shared_block_gives_the_same_token_and_a_wrong_one_is_caught() {
        let mut executor = tiny();
        let (prompt, other) = ([1, 2, 3], [7, 2, 3]);
        let first = step(&mut executor, 0, row(0, &prompt, 0, &[0, 1]), &prompt);
        assert!(first.is_ok());
        assert_eq!(step(&mut executor, 1, row(1, &prompt, 2, &[0, 2]), &prompt), first);
        let wrong = step(&mut executor, 2, row(2, &other, 2, &[0, 3]), &other).unwrap_err();
        assert!(wrong.contains("another sequence's"), "{wrong}");
        let unwritten = step(&mut executor, 3, row(3, &prompt, 2, &[3, 2]), &prompt).unwrap_err();
        assert!(unwritten.contains("never written"), "{unwritten}");
    }

    #[test]
    fn a_cached_prefix_without_its_replay_is_caught() {
        let mut executor = tiny();
        let prompt = [1, 2, 3];
        step(&mut executor, 0, row(0, &prompt, 0, &[0, 1]), &prompt).unwrap();
        let short = StepRow {
            start: 1,
            tokens: RowTokens::Known(vec![2, 3]),
            ..row(1, &prompt, 1, &[0, 2])
        };
        let error = step(&mut executor, 1, short, &prompt).unwrap_err();
        assert!(error.contains("conv states are not exact"), "{error}");
    }

    #[test]
    fn writing_into_anothers_block_is_caught() {
        let mut executor = tiny();
        let prompt = [1, 2, 3];
        step(&mut executor, 0, row(0, &prompt, 0, &[0, 1]), &prompt).unwrap();
        step(&mut executor, 1, row(1, &prompt, 0, &[2, 3]), &prompt).unwrap();
        let decode = StepRow {
            start: 3,
            tokens: RowTokens::LastSampled,
            reset_conv: false,
            sample: None,
            ..row(0, &prompt, 0, &[0, 3])
        };
        let ticket = executor
            .submit(&StepPlan {
                started: Vec::new(),
                rows: vec![decode],
            })
            .unwrap();
        let error = executor.collect(ticket).unwrap_err();
        assert!(
            error.fatal && error.message.contains("block of another sequence"),
            "{error}"
        );
    }

    #[test]
    fn a_mask_and_min_tokens_bend_the_answer() {
        let mut executor = ScriptedExecutor::replying(capacity(50), |_| vec![9]);
        let sampling = SamplingParams {
            min_tokens: 1,
            min_tokens_suppressed: vec![9],
            ..SamplingParams::default()
        };
        let mut plan = StepPlan {
            started: vec![started(0, &[1])],
            rows: vec![row(0, &[1], 0, &[0])],
        };
        plan.started[0].sampling = Arc::new(sampling);
        plan.rows[0].sample = Some(SampleRow {
            output_index: 0,
            needs_mask: true,
        });
        let ticket = executor.submit(&plan).unwrap();
        executor
            .set_mask(&ticket, 0, TokenMask(Arc::new([1 << 9 | 1 << 20])))
            .unwrap();
        let output = executor.collect(ticket).unwrap();
        assert_eq!(output.rows[0].sampled.as_ref().unwrap().id, 20);
        let ticket = executor.submit(&plan).unwrap();
        assert!(
            executor
                .collect(ticket)
                .unwrap_err()
                .message
                .contains("waits for its mask")
        );
    }
}
