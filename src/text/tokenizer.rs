//! A checkpoint's tokenizer: text to ids, ids to bytes, special tokens by name.
//!
//! Only byte-level vocabularies (every LFM2): each id stands for fixed bytes, so decoding is concatenation.

use std::borrow::Cow;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::decoders::DecoderWrapper;

use crate::config::ModelFiles;
use crate::step::TokenId;

/// Texts longer than this are refused before the (backtracking) pre-tokenizer sees them.
pub const MAX_INPUT_BYTES: usize = 32 << 20;

/// Longest piece handed to the pre-tokenizer at once; see [`Tokenizer::encode`].
const MAX_WHITESPACE_RUN_CHARS: usize = 100_000;

/// tokenizer.json with what the checkpoint says about its special tokens.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Bytes of all tokens, id after id.
    bytes: Vec<u8>,
    /// Token i is `bytes[offsets[i]..offsets[i + 1]]`; ids without a token are empty.
    offsets: Vec<u32>,
    /// By id: left out by `skip_special_tokens`.
    special: Vec<bool>,
    /// By id: an added token rather than text, special or not.
    added: Vec<bool>,
    max_chars_per_token: usize,
    special_names: Map<String, Value>,
    chat_template: Option<String>,
}

/// The checkpoint's tokenizer cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("{file} is missing from {place}")]
    Missing { file: &'static str, place: String },
    #[error("{file} cannot be used: {reason}")]
    Malformed { file: &'static str, reason: String },
    #[error("the text has {bytes} bytes; at most {MAX_INPUT_BYTES} can be tokenized")]
    TooLong { bytes: usize },
    #[error("the text cannot be tokenized: {0}")]
    Encode(String),
}

impl Tokenizer {
    /// Reads tokenizer.json and, where present, tokenizer_config.json, special_tokens_map.json and the chat template.
    ///
    /// # Errors
    /// A missing tokenizer.json, a malformed file, or a vocabulary that is not byte-level; the file is named.
    pub fn load(files: &ModelFiles) -> Result<Self, TokenizerError> {
        let json = read(files, "tokenizer.json")?.ok_or_else(|| TokenizerError::Missing {
            file: "tokenizer.json",
            place: match files {
                ModelFiles::Directory(directory) => directory.display().to_string(),
                ModelFiles::Embedded(_) => "the embedded model".into(),
            },
        })?;
        let object = |file: &'static str| -> Result<Map<String, Value>, TokenizerError> {
            match read(files, file)? {
                None => Ok(Map::new()),
                Some(bytes) => serde_json::from_slice(&bytes).map_err(|error| TokenizerError::Malformed {
                    file,
                    reason: error.to_string(),
                }),
            }
        };
        let config = object("tokenizer_config.json")?;
        let special_tokens_map = object("special_tokens_map.json")?;
        let mut tokenizer = Self::from_bytes(&json, &config, &special_tokens_map)?;
        if let Some(source) = read(files, "chat_template.jinja")? {
            let source = String::from_utf8(source.into_owned()).map_err(|_| TokenizerError::Malformed {
                file: "chat_template.jinja",
                reason: "it is not UTF-8".into(),
            })?;
            tokenizer.chat_template = Some(source);
        }
        Ok(tokenizer)
    }

    /// From the contents of tokenizer.json, tokenizer_config.json and special_tokens_map.json.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_bytes(
        tokenizer_json: &[u8],
        tokenizer_config: &Map<String, Value>,
        special_tokens_map: &Map<String, Value>,
    ) -> Result<Self, TokenizerError> {
        let malformed = |reason: String| TokenizerError::Malformed {
            file: "tokenizer.json",
            reason,
        };
        let mut inner =
            tokenizers::Tokenizer::from_bytes(tokenizer_json).map_err(|error| malformed(error.to_string()))?;
        // The server truncates and never pads.
        inner
            .with_truncation(None)
            .map_err(|error| malformed(error.to_string()))?;
        inner.with_padding(None);
        if !matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            return Err(malformed(
                "its decoder is not ByteLevel; only byte-level vocabularies are supported".into(),
            ));
        }
        let vocabulary = inner.get_vocab(true);
        let num_ids = vocabulary.values().max().map_or(0, |&id| id as usize + 1);
        // A file can claim any id; tables must not follow it.
        if num_ids > 16 * vocabulary.len() + 1024 {
            return Err(malformed(format!("its highest id {} is absurd", num_ids - 1)));
        }
        let added = inner.get_added_tokens_decoder();
        let byte_of_char = bytes_of_characters();
        let (mut bytes, mut offsets) = (Vec::new(), Vec::with_capacity(num_ids + 1));
        let (mut special, mut is_added) = (Vec::with_capacity(num_ids), Vec::with_capacity(num_ids));
        let mut max_chars_per_token = 1;
        offsets.push(0);
        for id in 0..num_ids as u32 {
            if let Some(token) = inner.id_to_token(id) {
                max_chars_per_token = max_chars_per_token.max(token.chars().count());
                let start = bytes.len();
                for character in token.chars() {
                    match byte_of_char.get(character as usize).copied().flatten() {
                        Some(byte) => bytes.push(byte),
                        None => {
                            // As the decoder does: one foreign character and the token stands for itself.
                            bytes.truncate(start);
                            bytes.extend_from_slice(token.as_bytes());
                            break;
                        }
                    }
                }
            }
            offsets.push(u32::try_from(bytes.len()).map_err(|_| malformed("its vocabulary is too large".into()))?);
            special.push(added.get(&id).is_some_and(|token| token.special));
            is_added.push(added.contains_key(&id));
        }
        let mut special_names = Map::new();
        for source in [special_tokens_map, tokenizer_config] {
            for (name, value) in source.iter().filter(|(name, _)| name.ends_with("_token")) {
                let content = value.as_str().or_else(|| value.get("content").and_then(Value::as_str));
                if let Some(content) = content {
                    special_names.insert(name.clone(), content.into());
                }
            }
        }
        Ok(Self {
            inner,
            bytes,
            offsets,
            special,
            added: is_added,
            max_chars_per_token,
            special_names,
            chat_template: named_template(tokenizer_config.get("chat_template")),
        })
    }

    /// Ids of `text`. `add_special_tokens` runs the post-processor (LFM2: BOS first). Special tokens inside the text
    /// become their ids, as in Hugging Face and vLLM.
    ///
    /// # Errors
    /// A text above [`MAX_INPUT_BYTES`], or one on which the pre-tokenizer's regex would give up.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<TokenId>, TokenizerError> {
        if text.len() > MAX_INPUT_BYTES {
            return Err(TokenizerError::TooLong { bytes: text.len() });
        }
        // The regex library counts backtracking steps and, past its limit, silently stops splitting.
        if longest_whitespace_run(text) > MAX_WHITESPACE_RUN_CHARS {
            return Err(TokenizerError::Encode(format!(
                "it has more than {MAX_WHITESPACE_RUN_CHARS} whitespace characters in a row"
            )));
        }
        let encoding = self
            .inner
            .encode_fast(text, add_special_tokens)
            .map_err(|error| TokenizerError::Encode(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of a whole sequence; bytes that are no character read as U+FFFD, unknown ids as nothing.
    pub fn decode(&self, ids: &[TokenId], skip_special_tokens: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            if !(skip_special_tokens && self.is_special(id)) {
                bytes.extend_from_slice(self.token_bytes(id));
            }
        }
        match String::from_utf8_lossy(&bytes) {
            Cow::Borrowed(_) => String::from_utf8(bytes).unwrap_or_default(),
            Cow::Owned(text) => text,
        }
    }

    /// What the id stands for; empty for ids that the tokenizer does not know.
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        let id = id as usize;
        match (self.offsets.get(id), self.offsets.get(id + 1)) {
            (Some(&start), Some(&end)) => &self.bytes[start as usize..end as usize],
            _ => &[],
        }
    }

    /// The vocabulary's own spelling of an id (`Ġthe`).
    pub fn id_to_token(&self, id: TokenId) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token as the vocabulary spells it; specials by their text.
    pub fn token_to_id(&self, token: &str) -> Option<TokenId> {
        self.inner.token_to_id(token)
    }

    /// Left out by `skip_special_tokens`.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// One of the tokens that are looked for before text is split: markers, special or not.
    pub fn is_added(&self, id: TokenId) -> bool {
        self.added.get(id as usize).copied().unwrap_or(false)
    }

    /// Ids from 0 to the tokenizer's last; the model's vocabulary may be larger.
    pub fn num_ids(&self) -> usize {
        self.special.len()
    }

    /// Characters of the longest token.
    pub fn max_chars_per_token(&self) -> usize {
        self.max_chars_per_token
    }

    /// `bos_token`, `eos_token`, … with their texts, as chat templates see them.
    pub fn special_names(&self) -> &Map<String, Value> {
        &self.special_names
    }

    /// The id of `bos_token`, `eos_token`, `pad_token`, ….
    pub fn named_special(&self, name: &str) -> Option<TokenId> {
        self.token_to_id(self.special_names.get(name)?.as_str()?)
    }

    /// Of chat_template.jinja, else of tokenizer_config.json.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("num_ids", &self.num_ids())
            .finish_non_exhaustive()
    }
}

/// A file of the checkpoint, none where it has no such file.
fn read(files: &ModelFiles, name: &'static str) -> Result<Option<Cow<'static, [u8]>>, TokenizerError> {
    match files {
        ModelFiles::Embedded(files) => Ok(files
            .iter()
            .find(|(file, _)| *file == name)
            .map(|(_, bytes)| Cow::Borrowed(*bytes))),
        ModelFiles::Directory(directory) => match std::fs::read(Path::new(directory).join(name)) {
            Ok(bytes) => Ok(Some(Cow::Owned(bytes))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(TokenizerError::Malformed {
                file: name,
                reason: error.to_string(),
            }),
        },
    }
}

/// tokenizer_config.json holds one template, or a list of named ones of which `default` is the chat's.
fn named_template(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(source) => Some(source.clone()),
        Value::Array(named) => named
            .iter()
            .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|entry| entry.get("template")?.as_str().map(str::to_owned)),
        _ => None,
    }
}

fn longest_whitespace_run(text: &str) -> usize {
    let (mut longest, mut run) = (0, 0);
    for character in text.chars() {
        run = if character.is_whitespace() { run + 1 } else { 0 };
        longest = longest.max(run);
    }
    longest
}

/// GPT-2's byte alphabet, indexed by character: printable bytes stand for themselves, the others for U+0100 onwards.
fn bytes_of_characters() -> [Option<u8>; 0x144] {
    let mut table = [None; 0x144];
    let mut next = 0x100;
    for byte in 0..=255u8 {
        if matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
            table[byte as usize] = Some(byte);
        } else {
            table[next] = Some(byte);
            next += 1;
        }
    }
    table
}

#[cfg(test)]
mod tests;

/// The golden tokenizers.
#[cfg(test)]
pub(crate) mod testing {
    use std::path::PathBuf;
    use std::sync::{Arc, OnceLock};

    use super::*;

    fn goldens() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("compat-tests/goldens")
    }

    /// `tiny-dense` or `tiny-moe`, loaded once.
    pub fn tokenizer(model: &str) -> Arc<Tokenizer> {
        static LOADED: [OnceLock<Arc<Tokenizer>>; 2] = [OnceLock::new(), OnceLock::new()];
        let files = ModelFiles::Directory(goldens().join(model).join("checkpoint"));
        LOADED[usize::from(model == "tiny-moe")]
            .get_or_init(|| Arc::new(Tokenizer::load(&files).unwrap()))
            .clone()
    }

    pub fn golden(model: &str) -> Value {
        json_file(&format!("{model}/tokenizer.json"))
    }

    pub fn json_file(path: &str) -> Value {
        serde_json::from_slice(&std::fs::read(goldens().join(path)).unwrap()).unwrap()
    }

    pub fn text_file(path: &str) -> String {
        std::fs::read_to_string(goldens().join(path)).unwrap()
    }

    pub fn ids(value: &Value) -> Vec<TokenId> {
        value
            .as_array()
            .unwrap()
            .iter()
            .map(|id| id.as_u64().unwrap() as TokenId)
            .collect()
    }
}
