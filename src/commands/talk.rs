//! `rvllm chat` and `rvllm complete`: a person, a terminal and a running server.

use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use serde::Deserialize;
use serde_json::{Value, json};

use super::print;
use crate::client::Client;
use crate::config::args::{ChatArgs, ClientArgs, CompleteArgs};
use crate::config::environment::Environment;

/// Key that servers without one are sent, as the OpenAI clients do it.
const NO_KEY: &str = "EMPTY";

/// Talks until the input ends.
///
/// # Errors
/// The server cannot be reached, or refuses a request.
pub fn chat(args: &ChatArgs, env: &Environment) -> anyhow::Result<ExitCode> {
    let mut messages: Vec<Value> = Vec::new();
    if let Some(text) = &args.system_prompt {
        messages.push(json!({"role": "system", "content": text}));
    }
    converse(
        &args.client,
        env,
        "Please enter a message for the chat model:",
        |talk, text| {
            messages.push(json!({"role": "user", "content": text}));
            let answer = talk.ask("/chat/completions", json!({"messages": messages}))?;
            messages.push(json!({"role": "assistant", "content": answer}));
            Ok(())
        },
    )
}

/// Continues texts until the input ends.
///
/// # Errors
/// As [`chat`].
pub fn complete(args: &CompleteArgs, env: &Environment) -> anyhow::Result<ExitCode> {
    converse(&args.client, env, "Please enter prompt to complete:", |talk, text| {
        let mut body = json!({"prompt": text});
        if let Some(max_tokens) = args.max_tokens {
            body["max_tokens"] = json!(max_tokens);
        }
        talk.ask("/completions", body).map(|_| ())
    })
}

/// Runs `turn` on the `--quick` text, or on each line of the input.
fn converse(
    args: &ClientArgs,
    env: &Environment,
    invitation: &str,
    mut turn: impl FnMut(&Talk, &str) -> anyhow::Result<()>,
) -> anyhow::Result<ExitCode> {
    let talk = Talk::new(args, env)?;
    print(&format!("Using model: {}\n", talk.model));
    if let Some(text) = &args.quick {
        turn(&talk, text)?;
        return Ok(ExitCode::SUCCESS);
    }
    print(&format!("{invitation}\n"));
    let mut lines = std::io::stdin().lock().lines();
    loop {
        print("> ");
        let Some(line) = lines.next().transpose().context("the input cannot be read")? else {
            return Ok(ExitCode::SUCCESS);
        };
        turn(&talk, &line)?;
    }
}

/// A connection to a server, and the model that is asked.
struct Talk {
    client: Client,
    url: String,
    model: String,
    stats: bool,
    runtime: tokio::runtime::Runtime,
}

/// What a chunk of either endpoint has that matters.
#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    text: Option<String>,
    delta: Option<Delta>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    completion_tokens: u64,
}

impl Talk {
    fn new(args: &ClientArgs, env: &Environment) -> anyhow::Result<Self> {
        let key = args.api_key.as_deref().or_else(|| env.get("OPENAI_API_KEY"));
        let client = Client::new(Some(key.unwrap_or(NO_KEY)), &[])?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let model = match &args.model_name {
            Some(name) => name.clone(),
            None => runtime.block_on(first_model(&client, &args.url))?.0,
        };
        Ok(Self {
            client,
            url: args.url.clone(),
            model,
            stats: args.stats,
            runtime,
        })
    }

    /// Asks, prints the answer as it comes, and returns it.
    fn ask(&self, path: &str, mut body: Value) -> anyhow::Result<String> {
        body["model"] = json!(self.model);
        body["stream"] = json!(true);
        if self.stats {
            body["stream_options"] = json!({"include_usage": true});
        }
        let url = format!("{}{path}", self.url);
        let start = Instant::now();
        let (mut answer, mut first, mut tokens) = (String::new(), None, 0);
        self.runtime.block_on(async {
            let mut events = self.client.post(&url, body.to_string().into(), None).await?.events();
            while let Some(data) = events.next().await? {
                if &data[..] == b"[DONE]" {
                    break;
                }
                let chunk: Chunk = serde_json::from_slice(&data)?;
                if let Some(error) = chunk.error {
                    anyhow::bail!("the server ended the answer: {error}");
                }
                tokens = chunk.usage.map_or(tokens, |usage| usage.completion_tokens);
                let Some(choice) = chunk.choices.into_iter().next() else {
                    continue;
                };
                let text = choice
                    .text
                    .or(choice.delta.and_then(|delta| delta.content))
                    .unwrap_or_default();
                if !text.is_empty() {
                    first.get_or_insert_with(|| start.elapsed());
                    print(&text);
                    answer += &text;
                }
            }
            anyhow::Ok(())
        })?;
        print("\n");
        let seconds = start.elapsed().as_secs_f64();
        if let (true, Some(first)) = (self.stats, first) {
            let mut stdout = std::io::stdout().lock();
            let _ = writeln!(stdout, "TTFT: {:.2} ms", first.as_secs_f64() * 1e3);
            let _ = writeln!(
                stdout,
                "TPS:  {:.2} tokens/s ({tokens} tokens in {seconds:.2}s)",
                tokens as f64 / seconds
            );
        }
        Ok(answer)
    }
}

/// Id and root of the first model that a server lists; `url` ends in `/v1`.
///
/// # Errors
/// The server cannot be reached or lists none.
pub async fn first_model(client: &Client, url: &str) -> anyhow::Result<(String, String)> {
    let list = client.get_json(&format!("{url}/models")).await?;
    let text = |key: &str| {
        list.pointer(&format!("/data/0/{key}"))
            .and_then(Value::as_str)
            .map(str::to_owned)
    };
    let id = text("id").with_context(|| format!("{url}/models lists no model"))?;
    let root = text("root").unwrap_or_else(|| id.clone());
    Ok((id, root))
}
