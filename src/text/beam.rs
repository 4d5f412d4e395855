//! Beam search over the engine, which knows nothing of it: every step of every beam is a request for one token.
//!
//! A step costs one decode row per beam and, because the prefix cache shares whole blocks only, recomputes what lies
//! behind the last full block. A search of width n thus costs more than n samples of the same length.
//!
//! # Source
//! vLLM 0.33: the 2n best tokens of each beam are candidates; EOS completes a beam without taking its place; a score is the
//! log-probability over the length, prompt included, to the power of `length_penalty`. As there, the request's stop
//! strings, stop ids, penalties and biases have no part in it. Differs from vLLM: a token that was sampled by chance is no
//! candidate, so the same request gives the same beams; and the search ends once no beam can still win, with the same
//! result.

use std::cmp::Ordering;
use std::sync::Arc;
use std::time::Instant;

use futures_util::stream::{self, BoxStream, StreamExt, TryStreamExt};

use super::detokenizer::Detokenizer;
use super::logprobs::text_logprobs;
use super::{BeamSearch, GenerateRequest, TextDelta, TextEngine, TextError, TextFinish};
use crate::engine::{ChoiceGroup, EngineError, EngineRequest, FinishReason, SequenceStream, StopConditions};
use crate::step::{LogprobsMode, SamplingParams, TokenId, TokenLogprobs};

/// Starts a search; its deltas come at its end, one per choice, the best first. Dropping the stream ends it.
///
/// # Errors
/// The engine refuses the first step.
pub(super) fn search(
    engine: &TextEngine,
    request: GenerateRequest,
    search: BeamSearch,
    max_tokens: u32,
) -> Result<BoxStream<'static, Result<TextDelta, TextError>>, TextError> {
    let rules = Rules {
        width: request.n as usize,
        max_tokens: max_tokens as usize,
        prompt_tokens: request.prompt.len(),
        length_penalty: search.length_penalty,
        eos: engine.limits().eos,
        ignore_eos: request.ignore_eos,
        keep_eos: request.include_stop_str_in_output,
        scores_only_fall: matches!(
            request.sampling.logprobs_mode,
            LogprobsMode::RawLogprobs | LogprobsMode::ProcessedLogprobs
        ),
    };
    let steps = Steps {
        engine: engine.clone(),
        sampling: Arc::new(SamplingParams {
            temperature: request.sampling.temperature,
            seed: request.sampling.seed,
            logprobs: Some(2 * request.n),
            logprobs_mode: request.sampling.logprobs_mode,
            ..SamplingParams::default()
        }),
        request,
    };
    let first = steps.submit(&[])?;
    let deltas = async move { steps.run(rules, first).await.map(|deltas| stream::iter(deltas).map(Ok)) };
    Ok(stream::once(deltas).try_flatten().boxed())
}

/// The engine's part of a search.
struct Steps {
    engine: TextEngine,
    request: GenerateRequest,
    sampling: Arc<SamplingParams>,
}

impl Steps {
    /// Asks for the token after the prompt and `tokens`.
    fn submit(&self, tokens: &[TokenId]) -> Result<SequenceStream, EngineError> {
        let prompt = &self.request.prompt;
        self.engine.engine().submit(EngineRequest {
            id: self.request.id.clone(),
            prompt: prompt.iter().chain(tokens).copied().collect(),
            sampling: self.sampling.clone(),
            stop: StopConditions {
                max_tokens: 1,
                ..StopConditions::default()
            },
            priority: self.request.priority,
            cache_salt: self.request.cache_salt.clone(),
            read_prefix_cache: true,
            constraint: None,
            pooling: None,
            thinking_budget: None,
            arrival: Instant::now(),
            group: ChoiceGroup::new(1),
        })
    }

    async fn run(&self, rules: Rules, first: SequenceStream) -> Result<Vec<TextDelta>, TextError> {
        let mut beams = Beams::new(rules);
        let mut running = vec![first];
        let mut num_cached_tokens = None;
        loop {
            let mut answers = Vec::with_capacity(running.len());
            for mut sequence in running {
                let event = sequence.next_event().await.ok_or(EngineError::Stopped)??;
                num_cached_tokens.get_or_insert(event.num_cached_tokens);
                if event.finish == Some(FinishReason::Abort) {
                    return Ok(self.deltas(beams, num_cached_tokens, true));
                }
                let logprobs = event.tokens.into_iter().next().and_then(|token| token.logprobs);
                answers.push(logprobs.ok_or(EngineError::Stopped)?);
            }
            beams.advance(&answers);
            if beams.is_over() {
                return Ok(self.deltas(beams, num_cached_tokens, false));
            }
            running = beams
                .active
                .iter()
                .map(|beam| self.submit(&beam.tokens))
                .collect::<Result<_, _>>()?;
        }
    }

    fn deltas(&self, beams: Beams, num_cached_tokens: Option<usize>, aborted: bool) -> Vec<TextDelta> {
        let eos = beams.rules.eos;
        let tokenizer = self.engine.tokenizer();
        let best = beams.best().into_iter().zip(0..);
        best.map(|(beam, index)| {
            let mut text = String::new();
            let mut detokenizer = Detokenizer::new(self.request.skip_special_tokens);
            let stops = !self.request.ignore_eos && beam.tokens.last().copied() == eos;
            for &id in &beam.tokens[..beam.tokens.len() - usize::from(stops)] {
                detokenizer.push(tokenizer, id, &mut text);
            }
            detokenizer.finish(&mut text);
            let asked = self.request.sampling.logprobs.is_some();
            TextDelta {
                index,
                text,
                logprobs: beam
                    .logprobs
                    .iter()
                    .take(if asked { beam.tokens.len() } else { 0 })
                    .map(|logprobs| text_logprobs(tokenizer, logprobs))
                    .collect(),
                token_ids: beam.tokens,
                num_cached_tokens: num_cached_tokens.unwrap_or(0),
                finish: Some(match (beam.completed, eos) {
                    (true, Some(eos)) => TextFinish::StopToken(eos),
                    _ if aborted => TextFinish::Abort,
                    _ => TextFinish::Length,
                }),
                ..TextDelta::default()
            }
        })
        .collect()
    }
}

#[derive(Clone, Copy, Debug)]
struct Rules {
    width: usize,
    max_tokens: usize,
    prompt_tokens: usize,
    length_penalty: f64,
    eos: Option<TokenId>,
    ignore_eos: bool,
    /// A completed beam's tokens end with EOS.
    keep_eos: bool,
    /// Tokens never add to a beam's value: log-probabilities, not logits.
    scores_only_fall: bool,
}

#[derive(Clone, Debug, Default)]
struct Beam {
    tokens: Vec<TokenId>,
    /// By token; of a completed beam also EOS's.
    logprobs: Vec<TokenLogprobs>,
    /// Sum over the tokens, EOS included.
    value: f64,
    completed: bool,
}

/// The search itself: log-probabilities in, beams out.
#[derive(Debug)]
struct Beams {
    rules: Rules,
    /// As many as the width, after the first step.
    active: Vec<Beam>,
    completed: Vec<Beam>,
    steps: usize,
}

impl Beams {
    fn new(rules: Rules) -> Self {
        Self {
            rules,
            active: vec![Beam::default()],
            completed: Vec::new(),
            steps: 0,
        }
    }

    /// `answers`: for each active beam, the best tokens that may follow it.
    fn advance(&mut self, answers: &[TokenLogprobs]) {
        self.steps += 1;
        let mut candidates: Vec<(f64, usize, TokenId, usize)> = Vec::new();
        for (at, (beam, answer)) in self.active.iter().zip(answers).enumerate() {
            for (rank, &(id, logprob)) in answer.top.iter().enumerate() {
                let value = beam.value + f64::from(logprob);
                if self.rules.eos != Some(id) || self.rules.ignore_eos {
                    candidates.push((value, at, id, rank));
                    continue;
                }
                let mut ended = beam.then(answer, rank, value);
                ended.completed = true;
                if !self.rules.keep_eos {
                    ended.tokens.pop();
                }
                self.completed.push(ended);
            }
        }
        candidates.sort_by(|a, b| descending(a.0, b.0));
        candidates.truncate(self.rules.width);
        self.active = candidates
            .into_iter()
            .map(|(value, at, _, rank)| self.active[at].then(&answers[at], rank, value))
            .collect();
    }

    fn is_over(&self) -> bool {
        self.active.is_empty() || self.steps >= self.rules.max_tokens || self.cannot_improve()
    }

    /// Enough beams are complete, and no active one can still get a better score than theirs.
    fn cannot_improve(&self) -> bool {
        if !self.rules.scores_only_fall || self.completed.len() < self.rules.width {
            return false;
        }
        let mut scores: Vec<f64> = self.completed.iter().map(|beam| self.score(beam)).collect();
        scores.sort_by(|a, b| descending(*a, *b));
        let worst_kept = scores[self.rules.width - 1];
        self.active.iter().all(|beam| {
            // A value below zero weighs least over the length that the penalty favours.
            let tokens = match self.rules.length_penalty > 0.0 {
                true => self.rules.max_tokens,
                false => beam.tokens.len(),
            };
            self.over_length(beam.value, tokens) <= worst_kept
        })
    }

    fn score(&self, beam: &Beam) -> f64 {
        let ends_with_eos = beam.tokens.last().is_some_and(|last| self.rules.eos == Some(*last));
        self.over_length(beam.value, beam.tokens.len() - usize::from(ends_with_eos))
    }

    fn over_length(&self, value: f64, tokens: usize) -> f64 {
        value / ((self.rules.prompt_tokens + tokens) as f64).powf(self.rules.length_penalty)
    }

    /// As many as the width, if there are; of equals the completed, and the earlier.
    fn best(mut self) -> Vec<Beam> {
        let mut all = std::mem::take(&mut self.completed);
        all.append(&mut self.active);
        all.sort_by(|a, b| descending(self.score(a), self.score(b)));
        all.truncate(self.rules.width);
        all
    }
}

impl Beam {
    /// The beam and one more token, the answer's `rank`-th.
    fn then(&self, answer: &TokenLogprobs, rank: usize, value: f64) -> Self {
        let mut next = self.clone();
        let (id, logprob) = answer.top[rank];
        next.tokens.push(id);
        next.logprobs.push(TokenLogprobs {
            id,
            logprob,
            rank: rank as u32 + 1,
            top: answer.top.clone(),
        });
        next.value = value;
        next
    }
}

fn descending(a: f64, b: f64) -> Ordering {
    b.total_cmp(&a)
}

#[cfg(test)]
mod tests;
