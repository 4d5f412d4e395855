//! Which prompts are sent.
//!
//! Tokenizing is asked of the server (`/tokenize`, `/detokenize`), so that lengths are its own and no tokenizer is needed here.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::client::{Client, ClientError};
use crate::config::args::{BenchServeArgs, Dataset};

/// Questions to the tokenizer at once.
const CONCURRENT_QUESTIONS: usize = 64;
/// A conversation is taken when prompt and answer are this long at least, and no longer than this, as in vLLM.
const MIN_TOKENS: usize = 4;
const MAX_PROMPT_TOKENS: usize = 1024;
const MAX_TOKENS: usize = 2048;
/// A text whose token ids show how far a vocabulary reaches: common words have low ids, rare ones and other scripts high ones.
const PROBE: &str = "The quick brown fox jumps over the lazy dog while seventeen philosophers discuss thermodynamics, \
    jurisprudence and chrysanthemums in Reykjavík; def quicksort(xs): return sorted(xs) # 3.14159 \
    Die Straßenbahnhaltestelle, l'anticonstitutionnellement, desenvolvimento, обслуживание, 深層学習, 인공지능, مرحبا";

/// What one request asks.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub prompt: Prompt,
    pub prompt_tokens: usize,
    /// Tokens to generate.
    pub output_tokens: usize,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

/// `args.num_prompts` samples.
///
/// # Errors
/// The file cannot be read or holds nothing usable, or the server has no `/tokenize`.
pub async fn load(args: &BenchServeArgs, client: &Client, model: &str) -> anyhow::Result<Vec<Sample>> {
    let tokenizer = ServerTokenizer {
        client,
        base_url: &args.base_url,
        model,
    };
    let mut random = StdRng::seed_from_u64(args.seed);
    let count = args.num_prompts;
    let mut samples = match &args.dataset {
        dataset @ (Dataset::Random { .. } | Dataset::PrefixRepetition { .. }) => {
            let ids = tokenizer.usable_ids().await?;
            random_ids(dataset, count, ids, &mut random)
        }
        Dataset::ShareGpt {
            path,
            output_len,
            shuffle,
            ..
        } => {
            let mut turns = read_sharegpt(path)?;
            if *shuffle {
                turns.shuffle(&mut random);
            }
            tokenizer.conversations(turns, *output_len, count).await?
        }
        Dataset::Custom {
            path,
            output_len,
            shuffle,
            ..
        } => {
            let mut lines = read_custom(path, *output_len)?;
            if *shuffle {
                lines.shuffle(&mut random);
            }
            lines.truncate(count);
            lines
        }
    };
    let (Dataset::ShareGpt { oversample, .. } | Dataset::Custom { oversample, .. }) = &args.dataset else {
        if args.chat {
            samples = tokenizer.as_texts(samples).await?;
        }
        return Ok(samples);
    };
    ensure!(
        !samples.is_empty(),
        "--dataset-path: the file has no prompt that can be used"
    );
    let found = samples.len();
    if found < count {
        ensure!(
            *oversample,
            "--num-prompts {count}: the file has {found} prompts that can be used"
        );
        samples = samples.into_iter().cycle().take(count).collect();
    }
    Ok(samples)
}

/// Random prompts, reproducible from the generator.
fn random_ids(dataset: &Dataset, count: usize, ids: std::ops::RangeInclusive<u32>, random: &mut StdRng) -> Vec<Sample> {
    let draw = |random: &mut StdRng, length: usize| -> Vec<u32> {
        std::iter::repeat_with(|| random.random_range(ids.clone()))
            .take(length)
            .collect()
    };
    let sample = |prompt: Vec<u32>, output_tokens: usize| Sample {
        prompt_tokens: prompt.len(),
        prompt: Prompt::Ids(prompt),
        output_tokens,
    };
    match *dataset {
        Dataset::PrefixRepetition {
            prefix_len,
            suffix_len,
            num_prefixes,
            output_len,
        } => {
            let prefixes: Vec<Vec<u32>> = (0..num_prefixes).map(|_| draw(random, prefix_len)).collect();
            let mut samples: Vec<Sample> = (0..count)
                .map(|i| {
                    let prefix = &prefixes[i % num_prefixes];
                    sample([&prefix[..], &draw(random, suffix_len)].concat(), output_len)
                })
                .collect();
            samples.shuffle(random);
            samples
        }
        Dataset::Random {
            input_len,
            output_len,
            range_ratio,
            prefix_len,
        } => {
            let prefix = draw(random, prefix_len);
            let length = |random: &mut StdRng, middle: usize| {
                let low = (middle as f64 * (1.0 - range_ratio)).floor().max(1.0) as usize;
                let high = (middle as f64 * (1.0 + range_ratio)).ceil() as usize;
                random.random_range(low..=high.max(low))
            };
            (0..count)
                .map(|_| {
                    let (input, output) = (length(random, input_len), length(random, output_len));
                    sample([&prefix[..], &draw(random, input)].concat(), output)
                })
                .collect()
        }
        Dataset::ShareGpt { .. } | Dataset::Custom { .. } => Vec::new(),
    }
}

/// The first question and answer of each conversation.
fn read_sharegpt(path: &Path) -> anyhow::Result<Vec<(String, String)>> {
    #[derive(Deserialize)]
    struct Conversation {
        #[serde(default, alias = "conversation")]
        conversations: Vec<Turn>,
    }
    #[derive(Deserialize)]
    struct Turn {
        value: String,
    }
    let failed = || format!("--dataset-path {}", path.display());
    let file = std::fs::File::open(path).with_context(failed)?;
    let all: Vec<Conversation> = serde_json::from_reader(std::io::BufReader::new(file)).with_context(failed)?;
    let first_two = |conversation: Conversation| {
        let mut turns = conversation.conversations.into_iter().map(|turn| turn.value);
        Some((turns.next()?, turns.next()?))
    };
    Ok(all.into_iter().filter_map(first_two).collect())
}

/// One prompt a line.
fn read_custom(path: &Path, output_len: usize) -> anyhow::Result<Vec<Sample>> {
    #[derive(Deserialize)]
    struct Line {
        prompt: String,
        output_tokens: Option<usize>,
    }
    let failed = || format!("--dataset-path {}", path.display());
    let text = std::fs::read_to_string(path).with_context(failed)?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(number, line)| {
            let line: Line =
                serde_json::from_str(line).with_context(|| format!("{}: line {}", failed(), number + 1))?;
            Ok(Sample {
                prompt: Prompt::Text(line.prompt),
                // The server's usage says it.
                prompt_tokens: 0,
                output_tokens: line.output_tokens.unwrap_or(output_len),
            })
        })
        .collect()
}

/// The server's tokenizer.
struct ServerTokenizer<'a> {
    client: &'a Client,
    base_url: &'a str,
    model: &'a str,
}

impl ServerTokenizer<'_> {
    async fn ask(&self, path: &str, mut body: Value) -> anyhow::Result<Value> {
        body["model"] = json!(self.model);
        match self.client.post_json(&format!("{}{path}", self.base_url), &body).await {
            Ok(answer) => Ok(answer),
            Err(ClientError::Status { status, .. }) if status == 404 => bail!(
                "{}{path}: the server does not have it; use --dataset-name custom with --dataset-path",
                self.base_url
            ),
            Err(error) => Err(error.into()),
        }
    }

    async fn tokenize(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        let answer = self
            .ask("/tokenize", json!({"prompt": text, "add_special_tokens": false}))
            .await?;
        let tokens = answer
            .get("tokens")
            .cloned()
            .context("/tokenize answers without tokens")?;
        Ok(serde_json::from_value(tokens)?)
    }

    /// Ids that are surely in the vocabulary: from the lower end of what a text uses, above the special tokens, to its highest.
    async fn usable_ids(&self) -> anyhow::Result<std::ops::RangeInclusive<u32>> {
        let mut seen = self.tokenize(PROBE).await?;
        seen.sort_unstable();
        match (seen.get(seen.len() / 10), seen.last()) {
            (Some(&low), Some(&high)) => Ok(low..=high),
            _ => bail!("/tokenize answers without tokens"),
        }
    }

    async fn as_texts(&self, samples: Vec<Sample>) -> anyhow::Result<Vec<Sample>> {
        stream::iter(samples)
            .map(|sample| async move {
                let Prompt::Ids(ids) = &sample.prompt else {
                    return Ok(sample);
                };
                let answer = self.ask("/detokenize", json!({"tokens": ids})).await?;
                let text = answer
                    .get("prompt")
                    .and_then(Value::as_str)
                    .context("/detokenize answers without prompt")?;
                Ok(Sample {
                    prompt: Prompt::Text(text.to_owned()),
                    ..sample
                })
            })
            .buffered(CONCURRENT_QUESTIONS)
            .try_collect()
            .await
    }

    /// The first `count` conversations of usable length.
    async fn conversations(
        &self,
        turns: Vec<(String, String)>,
        output_len: Option<usize>,
        count: usize,
    ) -> anyhow::Result<Vec<Sample>> {
        let measured = stream::iter(turns).map(|(prompt, answer)| async move {
            let prompt_tokens = self.tokenize(&prompt).await?.len();
            let output_tokens = match output_len {
                Some(length) => length,
                None => self.tokenize(&answer).await?.len(),
            };
            anyhow::Ok(Sample {
                prompt: Prompt::Text(prompt),
                prompt_tokens,
                output_tokens,
            })
        });
        let usable = |sample: &Sample| {
            let (prompt, output) = (sample.prompt_tokens, sample.output_tokens);
            prompt >= MIN_TOKENS
                && (output >= MIN_TOKENS || output_len.is_some())
                && prompt <= MAX_PROMPT_TOKENS
                && prompt + output <= MAX_TOKENS
        };
        let in_order = measured.buffered(CONCURRENT_QUESTIONS);
        in_order
            .try_filter(|sample| std::future::ready(usable(sample)))
            .take(count)
            .try_collect()
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(dataset: &Dataset, count: usize, seed: u64) -> Vec<Sample> {
        random_ids(dataset, count, 10..=99, &mut StdRng::seed_from_u64(seed))
    }

    fn ids(sample: &Sample) -> &[u32] {
        match &sample.prompt {
            Prompt::Ids(ids) => ids,
            Prompt::Text(_) => panic!("{sample:?}"),
        }
    }

    #[test]
    fn random_prompts_are_reproducible_and_in_range() {
        let dataset = Dataset::Random {
            input_len: 20,
            output_len: 10,
            range_ratio: 0.5,
            prefix_len: 3,
        };
        let samples = random(&dataset, 200, 1);
        assert_eq!(samples, random(&dataset, 200, 1));
        assert_ne!(samples, random(&dataset, 200, 2));
        let lengths: Vec<usize> = samples.iter().map(|sample| sample.prompt_tokens).collect();
        assert_eq!((lengths.iter().min(), lengths.iter().max()), (Some(&13), Some(&33)));
        for sample in &samples {
            assert_eq!(sample.prompt_tokens, ids(sample).len());
            assert!(ids(sample).iter().all(|id| (10..=99).contains(id)));
            assert_eq!(ids(sample)[..3], ids(&samples[0])[..3]);
            assert!((5..=15).contains(&sample.output_tokens));
        }
        assert_ne!(ids(&samples[0])[3..9], ids(&samples[1])[3..9]);
    }

    #[test]
    fn prefixes_are_shared_evenly() {
        let dataset = Dataset::PrefixRepetition {
            prefix_len: 8,
            suffix_len: 2,
            num_prefixes: 4,
            output_len: 5,
        };
        let samples = random(&dataset, 40, 0);
        let mut prefixes: Vec<&[u32]> = samples.iter().map(|sample| &ids(sample)[..8]).collect();
        prefixes.sort_unstable();
        let runs = prefixes.chunk_by(|a, b| a == b);
        assert_eq!(runs.map(<[_]>::len).collect::<Vec<_>>(), [10; 4]);
        assert!(
            samples
                .iter()
                .all(|sample| (sample.prompt_tokens, sample.output_tokens) == (10, 5))
        );
    }

    #[test]
    fn files_are_read_or_named() {
        let directory = tempfile::tempdir().unwrap();
        let write = |text: &str| {
            let path = directory.path().join("set");
            std::fs::write(&path, text).unwrap();
            path
        };
        let turn = |text: &str| json!({"from": "human", "value": text});
        let conversations = json!([
            {"conversations": [turn("q"), turn("a"), turn("more")]},
            {"conversations": [turn("alone")]},
            {"conversation": [turn("x"), turn("y")]},
        ]);
        let read = read_sharegpt(&write(&conversations.to_string())).unwrap();
        assert_eq!(read, [("q".into(), "a".into()), ("x".into(), "y".into())]);
        assert!(format!("{:#}", read_sharegpt(&write("{}")).unwrap_err()).contains("--dataset-path"));

        let lines = "{\"prompt\": \"p\"}\n\n{\"prompt\": \"q\", \"output_tokens\": 3}\n";
        let read = read_custom(&write(lines), 256).unwrap();
        assert_eq!(
            read.iter().map(|sample| sample.output_tokens).collect::<Vec<_>>(),
            [256, 3]
        );
        let error = read_custom(&write("{\"prompt\": \"p\"}\n{}"), 1).unwrap_err();
        assert!(format!("{error:#}").contains("line 2"), "{error:#}");
    }
}
