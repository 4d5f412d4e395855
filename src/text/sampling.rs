//! What a request asks of sampling, checked and completed: one rule book for all endpoints.

use super::{TextError, Tokenizer};
use crate::config::{GenerationDefaults, RequestLimits};
use crate::step::{LogprobsMode, MAX_BAD_WORDS, MAX_EDITED_TOKENS, SamplingParams, TokenId};

/// Entries of `logit_bias`, `allowed_token_ids` and `stop_token_ids` together.
const MAX_LISTED_TOKENS: usize = 1 << 18;
/// Temperatures below are greedy.
const GREEDY_TEMPERATURE: f32 = 1e-5;
/// Other temperatures are raised to this.
const MIN_TEMPERATURE: f32 = 1e-2;
const MAX_TEMPERATURE: f32 = 2.0;

/// Sampling fields of a request as they came, none = absent or null. Integers are wide so that out-of-range values can
/// be named.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingOptions {
    pub n: Option<i64>,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<i64>,
    pub min_p: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub presence_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    /// -1 = absent.
    pub seed: Option<i64>,
    pub max_tokens: Option<i64>,
    /// The field that `max_tokens` came in, for errors: `max_tokens` (also where empty) or `max_completion_tokens`.
    pub max_tokens_param: &'static str,
    pub min_tokens: Option<i64>,
    pub ignore_eos: bool,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<i64>,
    /// Token ids as the request's JSON keys.
    pub logit_bias: Vec<(String, f64)>,
    pub allowed_token_ids: Option<Vec<i64>>,
    pub bad_words: Vec<String>,
    /// Alternatives per token; -1 = the whole vocabulary.
    pub logprobs: Option<i64>,
    pub prompt_logprobs: Option<i64>,
    /// `n` is the width of a beam search, not a number of samples.
    pub beam_search: bool,
}

/// What the model and the server allow.
#[derive(Clone, Debug)]
pub struct SamplingRules<'a> {
    pub limits: RequestLimits,
    pub defaults: &'a GenerationDefaults,
    pub tokenizer: &'a Tokenizer,
    pub vocab_size: usize,
    pub max_model_len: usize,
    /// `--max-logprobs`; -1 = the vocabulary's size.
    pub max_logprobs: i64,
    pub logprobs_mode: LogprobsMode,
    /// `max_tokens` where the request names none: completions 16, chat none.
    pub default_max_tokens: Option<u32>,
}

/// The sampling half of a [`GenerateRequest`](super::GenerateRequest).
#[derive(Clone, Debug, PartialEq)]
pub struct ResolvedSampling {
    pub sampling: SamplingParams,
    pub n: u32,
    pub max_tokens: Option<u32>,
    pub min_tokens: u32,
    pub ignore_eos: bool,
    pub stop_token_ids: Vec<TokenId>,
    pub stop: Vec<String>,
}

/// A seed for requests that bring none.
pub fn fresh_seed() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0
}

/// Request over generation config over vLLM's neutral values, each within vLLM's bounds.
///
/// `min_tokens_suppressed` stays empty: [`TextEngine`](super::TextEngine) knows the EOS ids.
///
/// # Errors
/// [`TextError::Invalid`], the client's fault. As vLLM, only temperature, top_p, max_tokens, logprobs, prompt_logprobs,
/// logit_bias and allowed_token_ids name their field.
pub fn resolve_sampling(options: SamplingOptions, rules: &SamplingRules<'_>) -> Result<ResolvedSampling, TextError> {
    let defaults = rules.defaults;
    let n = options.n.unwrap_or(1);
    if n < 1 {
        return Err(TextError::invalid(format!("n must be at least 1, got {n}.")));
    }
    let max_n = rules.limits.max_n;
    if n > max_n as i64 {
        return Err(TextError::parameter("n", n, format!("n must be at most {max_n}.")));
    }
    let temperature = temperature(pick(options.temperature, defaults.temperature, 1.0))?;
    let top_p = pick(options.top_p, defaults.top_p, 1.0);
    if !(top_p > 0.0 && top_p <= 1.0) {
        return Err(TextError::parameter(
            "top_p",
            top_p,
            format!("top_p must be in (0, 1], got {top_p}."),
        ));
    }
    let top_k = options.top_k.or(defaults.top_k).unwrap_or(0);
    if top_k < -1 {
        return Err(TextError::invalid(format!(
            "top_k must be 0 or -1 (off) or at least 1, got {top_k}."
        )));
    }
    let min_p = within("min_p", pick(options.min_p, defaults.min_p, 0.0), 0.0, 1.0)?;
    let repetition_penalty = pick(options.repetition_penalty, defaults.repetition_penalty, 1.0);
    if !(repetition_penalty > 0.0 && repetition_penalty.is_finite()) {
        return Err(TextError::invalid(format!(
            "repetition_penalty must be greater than zero, got {repetition_penalty}."
        )));
    }
    let presence_penalty = within(
        "presence_penalty",
        pick(options.presence_penalty, defaults.presence_penalty, 0.0),
        -2.0,
        2.0,
    )?;
    let frequency_penalty = within(
        "frequency_penalty",
        pick(options.frequency_penalty, defaults.frequency_penalty, 0.0),
        -2.0,
        2.0,
    )?;
    let greedy = temperature < GREEDY_TEMPERATURE;
    if options.beam_search {
        check_beam_width(n, rules)?;
    } else if greedy && n > 1 {
        return Err(TextError::invalid(format!(
            "n must be 1 when using greedy sampling, got {n}."
        )));
    }

    let max_tokens = max_tokens(&options, rules)?;
    let min_tokens = options.min_tokens.unwrap_or(0);
    if min_tokens < 0 {
        return Err(TextError::invalid(format!(
            "min_tokens must be greater than or equal to 0, got {min_tokens}."
        )));
    }
    let largest_min_tokens = max_tokens.map_or(rules.max_model_len as i64, i64::from);
    if min_tokens > largest_min_tokens {
        return Err(TextError::invalid(format!(
            "min_tokens must be less than or equal to max_tokens={largest_min_tokens}, got {min_tokens}."
        )));
    }

    if options.stop.iter().any(String::is_empty) {
        return Err(TextError::invalid("stop cannot contain an empty string."));
    }
    let listed = options.logit_bias.len()
        + options.stop_token_ids.len()
        + options.allowed_token_ids.as_ref().map_or(0, Vec::len);
    if listed > MAX_LISTED_TOKENS {
        return Err(TextError::invalid(format!(
            "at most {MAX_LISTED_TOKENS} token ids may be listed, got {listed}."
        )));
    }
    let stop_token_ids = options
        .stop_token_ids
        .iter()
        .map(|&id| {
            // One outside the vocabulary never comes, but must be an id.
            TokenId::try_from(id).map_err(|_| TextError::invalid(format!("stop_token_ids contains {id}, no token id.")))
        })
        .collect::<Result<_, _>>()?;

    let sampling = SamplingParams {
        temperature: if greedy { 0.0 } else { temperature.max(MIN_TEMPERATURE) },
        top_p: if greedy { 1.0 } else { top_p },
        top_k: if greedy {
            0
        } else {
            u32::try_from(top_k.max(0)).unwrap_or(0)
        },
        min_p: if greedy { 0.0 } else { min_p },
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        seed: options
            .seed
            .filter(|&seed| seed != -1)
            .map_or_else(fresh_seed, |seed| seed as u64),
        logit_bias: logit_bias(&options.logit_bias, rules)?,
        allowed_token_ids: options
            .allowed_token_ids
            .as_deref()
            .map(|ids| allowed_token_ids(ids, rules))
            .transpose()?,
        bad_words: bad_words(&options.bad_words, rules)?,
        min_tokens: min_tokens as u32,
        min_tokens_suppressed: Vec::new(),
        logprobs: options
            .logprobs
            .map(|k| num_logprobs("logprobs", k, rules))
            .transpose()?,
        prompt_logprobs: options
            .prompt_logprobs
            .map(|k| num_logprobs("prompt_logprobs", k, rules))
            .transpose()?,
        logprobs_mode: rules.logprobs_mode,
    };
    Ok(ResolvedSampling {
        sampling,
        n: n as u32,
        max_tokens,
        min_tokens: min_tokens as u32,
        ignore_eos: options.ignore_eos,
        stop_token_ids,
        stop: options.stop,
    })
}

/// A search looks at twice its width of alternatives per token, which `--max-logprobs` bounds as it does for clients.
fn check_beam_width(n: i64, rules: &SamplingRules<'_>) -> Result<(), TextError> {
    let max = if rules.max_logprobs < 0 {
        rules.vocab_size as i64
    } else {
        rules.max_logprobs
    };
    if 2 * n <= max {
        return Ok(());
    }
    Err(TextError::parameter(
        "n",
        n,
        format!(
            "use_beam_search with n={n} needs {} logprobs, the server allows {max} (--max-logprobs)",
            2 * n
        ),
    ))
}

fn pick(request: Option<f64>, default: Option<f32>, neutral: f32) -> f32 {
    request.map(|value| value as f32).or(default).unwrap_or(neutral)
}

fn temperature(value: f32) -> Result<f32, TextError> {
    let error = |rule: &str| {
        TextError::parameter(
            "temperature",
            value,
            format!("temperature must be {rule}, got {value}."),
        )
    };
    if !value.is_finite() {
        return Err(error("a finite number"));
    }
    if value < 0.0 {
        return Err(error("non-negative"));
    }
    if value > MAX_TEMPERATURE {
        return Err(error("at most 2"));
    }
    Ok(value)
}

fn within(name: &str, value: f32, low: f32, high: f32) -> Result<f32, TextError> {
    // NaN is in no range.
    if (low..=high).contains(&value) {
        Ok(value)
    } else {
        Err(TextError::invalid(format!(
            "{name} must be in [{low}, {high}], got {value}."
        )))
    }
}

fn max_tokens(options: &SamplingOptions, rules: &SamplingRules<'_>) -> Result<Option<u32>, TextError> {
    let param = if options.max_tokens_param.is_empty() {
        "max_tokens"
    } else {
        options.max_tokens_param
    };
    let asked = match options.max_tokens {
        None => rules.default_max_tokens.or(rules.defaults.max_new_tokens),
        Some(asked) if asked < 1 => {
            return Err(TextError::parameter(
                param,
                asked,
                format!("{param} must be at least 1, got {asked}."),
            ));
        }
        Some(asked) if asked > rules.max_model_len as i64 => {
            return Err(TextError::parameter(
                param,
                asked,
                format!(
                    "{param} is too large: {asked}. This model's maximum context length is {} tokens.",
                    rules.max_model_len
                ),
            ));
        }
        Some(asked) => Some(asked as u32),
    };
    let cap = rules
        .defaults
        .max_new_tokens
        .filter(|_| rules.defaults.max_new_tokens_is_cap);
    Ok(match (asked, cap) {
        (Some(asked), Some(cap)) => Some(asked.min(cap)),
        (asked, cap) => asked.or(cap),
    })
}

fn num_logprobs(param: &'static str, asked: i64, rules: &SamplingRules<'_>) -> Result<u32, TextError> {
    let vocab_size = rules.vocab_size as i64;
    if asked < -1 {
        return Err(TextError::parameter(
            param,
            asked,
            format!("{param} must be non-negative or -1 (the whole vocabulary), got {asked}."),
        ));
    }
    let count = if asked == -1 { vocab_size } else { asked };
    let max = if rules.max_logprobs < 0 {
        vocab_size
    } else {
        rules.max_logprobs
    };
    if count > max {
        return Err(TextError::parameter(
            param,
            asked,
            format!("Requested {param} of {count}, which is greater than max allowed: {max}"),
        ));
    }
    // More than the vocabulary holds no more.
    Ok(count.min(vocab_size) as u32)
}

fn logit_bias(entries: &[(String, f64)], rules: &SamplingRules<'_>) -> Result<Vec<(TokenId, f32)>, TextError> {
    let mut biases = Vec::with_capacity(entries.len());
    for (key, value) in entries {
        let error = |message: String| Err(TextError::parameter("logit_bias", key, message));
        let Ok(id) = key.trim().parse::<i64>() else {
            return error(format!("Invalid key in logit_bias: {key:?} is no integer token id."));
        };
        match TokenId::try_from(id) {
            Ok(token) if (token as usize) < rules.vocab_size => {
                if value.is_nan() {
                    return error(format!("The logit_bias of token {id} is not a number."));
                }
                biases.push((token, value.clamp(-100.0, 100.0) as f32));
            }
            _ => {
                return error(format!(
                    "token_id {id} in logit_bias is out of vocabulary. Vocabulary size: {}",
                    rules.vocab_size
                ));
            }
        }
    }
    Ok(biases)
}

fn allowed_token_ids(ids: &[i64], rules: &SamplingRules<'_>) -> Result<Vec<TokenId>, TextError> {
    if ids.is_empty() {
        return Err(TextError::parameter(
            "allowed_token_ids",
            "[]",
            "allowed_token_ids must not be empty.",
        ));
    }
    ids.iter()
        .map(|&id| match TokenId::try_from(id) {
            Ok(token) if (token as usize) < rules.vocab_size => Ok(token),
            _ => Err(TextError::parameter(
                "allowed_token_ids",
                id,
                format!("allowed_token_ids contains the out-of-vocabulary id {id}."),
            )),
        })
        .collect()
}

/// Each word as it is tokenized at a text's start and, where that differs, after a space.
fn bad_words(words: &[String], rules: &SamplingRules<'_>) -> Result<Vec<Vec<TokenId>>, TextError> {
    let (len, max_len) = (words.len(), rules.limits.max_bad_words);
    if len > max_len {
        return Err(TextError::parameter(
            "bad_words",
            len,
            format!("at most {max_len} bad_words are allowed, got {len}."),
        ));
    }
    let mut sequences: Vec<Vec<TokenId>> = Vec::new();
    for word in words {
        let word = word.trim_start();
        let encode = |text: &str| {
            rules
                .tokenizer
                .encode(text, false)
                .map_err(|error| TextError::invalid(format!("bad_words: {error}")))
        };
        let plain = encode(word)?;
        if plain.is_empty() {
            return Err(TextError::invalid("bad_words cannot contain an empty string."));
        }
        let spaced = encode(&format!(" {word}"))?;
        let differs = spaced.len() == plain.len() && spaced.first() != plain.first();
        sequences.push(plain);
        if differs {
            sequences.push(spaced);
        }
    }
    // Ids of added tokens may lie above the model's vocabulary; such a word cannot be sampled.
    sequences.retain(|ids| ids.iter().all(|&id| (id as usize) < rules.vocab_size));
    sequences.sort_unstable();
    sequences.dedup();
    let num_tokens: usize = sequences.iter().map(Vec::len).sum();
    let max_tokens = rules.limits.max_bad_word_tokens;
    if sequences.len() > MAX_BAD_WORDS || num_tokens > max_tokens {
        return Err(TextError::invalid(format!(
            "bad_words must come to at most {MAX_BAD_WORDS} spellings (with and without a space before) of {max_tokens} \
             tokens, got {} of {num_tokens}.",
            sequences.len()
        )));
    }
    Ok(sequences)
}

/// # Errors
/// The request biases and holds back more tokens than an executor keeps.
pub(super) fn check_edited_tokens(sampling: &SamplingParams) -> Result<(), TextError> {
    let mut biased: Vec<TokenId> = sampling.logit_bias.iter().map(|(id, _)| *id).collect();
    biased.sort_unstable();
    biased.dedup();
    let num_edited = biased.len() + sampling.min_tokens_suppressed.len();
    if num_edited <= MAX_EDITED_TOKENS {
        return Ok(());
    }
    let message = format!(
        "logit_bias and, with min_tokens, stop_token_ids may name at most {MAX_EDITED_TOKENS} tokens, got {num_edited}."
    );
    Err(TextError::parameter("logit_bias", num_edited, message))
}

#[cfg(test)]
mod tests;
