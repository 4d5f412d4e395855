//! Sends the requests and takes the times of what comes back.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use indicatif::{ProgressBar, ProgressDrawTarget};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::dataset::{Prompt, Sample};
use crate::client::{Client, ClientError};
use crate::config::args::BenchServeArgs;

/// How one request fared; seconds.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Why it failed; none = it did not.
    pub error: Option<String>,
    pub prompt_tokens: usize,
    pub output_tokens: usize,
    /// From the start of the run to the sending.
    pub start_s: f64,
    /// How long `--max-concurrency` held it back.
    pub queue_s: f64,
    /// From the sending to the first token.
    pub ttft_s: f64,
    /// Between tokens; of tokens that come in one chunk only the first counts.
    pub itl_s: Vec<f64>,
    /// From the sending to the last token.
    pub latency_s: f64,
    pub text: String,
}

/// A measured run.
#[derive(Debug)]
pub struct Run {
    pub outcomes: Vec<Outcome>,
    pub duration_s: f64,
    /// Processor time of this process meanwhile.
    pub client_cpu_s: f64,
}

/// Where requests go and what they have in common.
#[derive(Clone, Debug)]
pub struct Target {
    client: Client,
    url: String,
    chat: bool,
    /// The body without prompt and length.
    fields: Map<String, Value>,
}

impl Target {
    pub fn new(client: Client, model: &str, args: &BenchServeArgs) -> Self {
        let mut fields = Map::new();
        fields.insert("model".into(), json!(model));
        fields.insert("stream".into(), json!(true));
        fields.insert("stream_options".into(), json!({"include_usage": true}));
        if let Some(logprobs) = args.logprobs {
            if args.chat {
                fields.insert("logprobs".into(), json!(true));
                fields.insert("top_logprobs".into(), json!(logprobs));
            } else {
                fields.insert("logprobs".into(), json!(logprobs));
            }
        }
        if !args.chat {
            fields.insert("repetition_penalty".into(), json!(1.0));
        }
        if args.ignore_eos {
            fields.insert("ignore_eos".into(), json!(true));
        }
        fields.extend(args.sampling.clone());
        fields.extend(args.extra_body.clone());
        Self {
            client,
            url: format!("{}{}", args.base_url, args.endpoint),
            chat: args.chat,
            fields,
        }
    }

    fn body(&self, sample: &Sample) -> Bytes {
        let mut body = self.fields.clone();
        let prompt = match &sample.prompt {
            Prompt::Text(text) => json!(text),
            Prompt::Ids(ids) => json!(ids),
        };
        if self.chat {
            body.insert("messages".into(), json!([{"role": "user", "content": prompt}]));
            body.entry("max_completion_tokens")
                .or_insert(json!(sample.output_tokens));
        } else {
            body.insert("prompt".into(), prompt);
            body.entry("max_tokens").or_insert(json!(sample.output_tokens));
        }
        Value::Object(body).to_string().into()
    }

    /// Sends a body and follows the answer to its end. Times count from now; `start_s` and `queue_s` are the caller's.
    async fn send(&self, body: Bytes, prompt_tokens: usize, id: &str) -> Outcome {
        let mut outcome = Outcome {
            prompt_tokens,
            ..Outcome::default()
        };
        outcome.error = match self.follow(body, id, &mut outcome).await {
            Err(error) => Some(error.to_string()),
            Ok(Some(error)) => Some(error),
            Ok(None) if outcome.latency_s == 0.0 => Some("the answer had no token".to_owned()),
            Ok(None) => None,
        };
        outcome
    }

    /// The server's in-stream error, if it sent one.
    async fn follow(&self, body: Bytes, id: &str, outcome: &mut Outcome) -> Result<Option<String>, ClientError> {
        let start = Instant::now();
        let mut events = self.client.post(&self.url, body, Some(id)).await?.events();
        let mut chunks = 0;
        while let Some(data) = events.next().await? {
            if &data[..] == b"[DONE]" {
                continue;
            }
            let chunk: Chunk = serde_json::from_slice(&data).map_err(|error| ClientError::Json(error.to_string()))?;
            if let Some(error) = chunk.error {
                return Ok(Some(error.to_string()));
            }
            if let Some(choice) = chunk.choices.first() {
                let now_s = start.elapsed().as_secs_f64();
                match chunks {
                    0 => outcome.ttft_s = now_s,
                    _ => outcome.itl_s.push(now_s - outcome.latency_s),
                }
                outcome.latency_s = now_s;
                chunks += 1;
                outcome.text += choice.text();
            }
            if let Some(usage) = chunk.usage {
                outcome.output_tokens = usage.completion_tokens;
                outcome.prompt_tokens = usage.prompt_tokens;
            }
        }
        if outcome.output_tokens == 0 {
            // A server that counts nothing: as many as chunks.
            outcome.output_tokens = chunks;
        }
        Ok(None)
    }
}

/// What of a chunk is looked at; nothing is copied that need not be.
#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(default, borrow)]
    choices: Vec<Choice<'a>>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow)]
    text: Option<Cow<'a, str>>,
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    content: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: usize,
    #[serde(default)]
    completion_tokens: usize,
}

impl Choice<'_> {
    fn text(&self) -> &str {
        let content = self.delta.as_ref().and_then(|delta| delta.content.as_deref());
        self.text.as_deref().or(content).unwrap_or_default()
    }
}

/// All requests of a run.
#[derive(Debug)]
pub struct Load {
    pub target: Target,
    pub samples: Vec<Sample>,
    /// When each is sent, in seconds after the start.
    pub delays_s: Vec<f64>,
    pub max_concurrency: Option<usize>,
    pub id_prefix: String,
    pub progress: bool,
}

impl Load {
    /// Sends the first request; its error, if any.
    pub async fn try_first(&self) -> Option<String> {
        let sample = self.samples.first()?;
        let body = self.target.body(sample);
        self.target
            .send(body, sample.prompt_tokens, &format!("{}test", self.id_prefix))
            .await
            .error
    }

    /// Sends the first request `count` times, as many at once as the run does.
    pub async fn warm_up(&self, count: usize) {
        let Some(sample) = self.samples.first() else { return };
        let requests = (0..count).map(|i| (0.0, sample, format!("{}warmup-{i}", self.id_prefix)));
        self.send_all(requests, &ProgressBar::hidden()).await;
    }

    /// Sends all requests at their times and waits for all answers.
    pub async fn run(&self) -> Run {
        let bar = ProgressBar::with_draw_target(Some(self.samples.len() as u64), ProgressDrawTarget::stderr());
        if !self.progress {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        let requests = self.samples.iter().zip(&self.delays_s).enumerate();
        let requests = requests.map(|(i, (sample, &delay_s))| (delay_s, sample, format!("{}{i}", self.id_prefix)));
        let run = self.send_all(requests, &bar).await;
        bar.finish_and_clear();
        run
    }

    async fn send_all<'a>(&self, requests: impl Iterator<Item = (f64, &'a Sample, String)>, bar: &ProgressBar) -> Run {
        let limit = self.max_concurrency.map(|limit| Arc::new(Semaphore::new(limit)));
        // Made before the clock starts: bodies of long prompts take time.
        let requests: Vec<(f64, usize, Bytes, String)> = requests
            .map(|(delay_s, sample, id)| (delay_s, sample.prompt_tokens, self.target.body(sample), id))
            .collect();
        let mut running = JoinSet::new();
        let mut outcomes: Vec<Outcome> = vec![Outcome::default(); requests.len()];
        let cpu_before_s = processor_seconds();
        let start = Instant::now();
        for (index, (delay_s, prompt_tokens, body, id)) in requests.into_iter().enumerate() {
            let due = start + Duration::from_secs_f64(delay_s);
            if due > Instant::now() {
                tokio::time::sleep_until(due.into()).await;
            }
            let (target, limit, bar, arrival) = (self.target.clone(), limit.clone(), bar.clone(), Instant::now());
            running.spawn(async move {
                let _permit = match limit {
                    // The semaphore is never closed.
                    Some(limit) => limit.acquire_owned().await.ok(),
                    None => None,
                };
                let sent = Instant::now();
                let mut outcome = target.send(body, prompt_tokens, &id).await;
                outcome.start_s = (sent - start).as_secs_f64();
                outcome.queue_s = (sent - arrival).as_secs_f64();
                bar.inc(1);
                (index, outcome)
            });
        }
        while let Some(done) = running.join_next().await {
            match done {
                Ok((index, outcome)) => outcomes[index] = outcome,
                Err(error) => tracing::error!("a request's task died: {error}"),
            }
        }
        Run {
            outcomes,
            duration_s: start.elapsed().as_secs_f64(),
            client_cpu_s: processor_seconds() - cpu_before_s,
        }
    }
}

/// User and system time of this process so far.
fn processor_seconds() -> f64 {
    // SAFETY: all zero is a value of the struct, and the call only writes it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::http::StatusCode;
    use axum::response::IntoResponse;
    use axum::routing::post;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::cli::{self, Invocation};

    fn args(line: &str) -> BenchServeArgs {
        let argv: Vec<String> = format!("bench serve {line}")
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        match cli::parse(&argv) {
            Ok(Invocation::BenchServe(args)) => *args,
            other => panic!("{other:?}"),
        }
    }

    fn sample(ids: &[u32]) -> Sample {
        Sample {
            prompt: Prompt::Ids(ids.to_vec()),
            prompt_tokens: ids.len(),
            output_tokens: 3,
        }
    }

    #[test]
    fn bodies_are_vllms() {
        let client = Client::new(None, &[]).unwrap();
        let target = Target::new(
            client.clone(),
            "m",
            &args("--temperature 0 --logprobs 2 --extra-body.seed 5"),
        );
        let body: Value = serde_json::from_slice(&target.body(&sample(&[1, 2]))).unwrap();
        assert_eq!(
            body,
            json!({"model": "m", "stream": true, "stream_options": {"include_usage": true}, "logprobs": 2,
                   "repetition_penalty": 1.0, "ignore_eos": true, "temperature": 0.0, "seed": 5, "prompt": [1, 2],
                   "max_tokens": 3})
        );
        let chat =
            "--backend openai-chat --logprobs 2 --dataset-name prefix_repetition --extra-body.max_completion_tokens 9";
        let text = Sample {
            prompt: Prompt::Text("hi".into()),
            ..sample(&[])
        };
        let body: Value = serde_json::from_slice(&Target::new(client, "m", &args(chat)).body(&text)).unwrap();
        assert_eq!(
            body,
            json!({"model": "m", "stream": true, "stream_options": {"include_usage": true}, "logprobs": true,
                   "top_logprobs": 2, "max_completion_tokens": 9, "messages": [{"role": "user", "content": "hi"}]})
        );
    }

    /// A server that streams two tokens to every request, after the last of as many as it wants together has come.
    async fn serve(together: usize) -> (String, Arc<AtomicUsize>) {
        let most = Arc::new(AtomicUsize::new(0));
        let running = Arc::new(AtomicUsize::new(0));
        let barrier = Arc::new(tokio::sync::Barrier::new(together));
        let seen = most.clone();
        let handler = move |headers: axum::http::HeaderMap| {
            let (running, most, barrier) = (running.clone(), most.clone(), barrier.clone());
            async move {
                most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                barrier.wait().await;
                running.fetch_sub(1, Ordering::SeqCst);
                if headers["x-request-id"].as_bytes().ends_with(b"-3") {
                    return (StatusCode::BAD_REQUEST, "no fourth").into_response();
                }
                "data: {\"choices\": [{\"text\": \"a\\n\"}]}\n\n: ping\n\ndata: {\"choices\": [{\"text\": \"b\"}]}\n\n\
                 data: {\"choices\": [], \"usage\": {\"prompt_tokens\": 7, \"completion_tokens\": 2}}\n\ndata: [DONE]\n\n"
                    .into_response()
            }
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().route("/v1/completions", post(handler));
        tokio::spawn(async move { axum_serve(listener, router).await });
        (url, seen)
    }

    async fn axum_serve(listener: tokio::net::TcpListener, router: Router) {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                return;
            };
            let service = hyper_util::service::TowerToHyperService::new(router.clone());
            let io = hyper_util::rt::TokioIo::new(stream);
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(io, service));
        }
    }

    async fn run(base_url: &str, line: &str, count: usize) -> Run {
        let args = args(&format!("--base-url {base_url} {line}"));
        let load = Load {
            target: Target::new(Client::new(None, &[]).unwrap(), "m", &args),
            samples: vec![sample(&[1]); count],
            delays_s: vec![0.0; count],
            max_concurrency: args.max_concurrency,
            id_prefix: "bench-".into(),
            progress: false,
        };
        load.run().await
    }

    #[tokio::test]
    async fn answers_are_followed_and_failures_counted() {
        let (url, most) = serve(2).await;
        let run = run(&url, "--max-concurrency 2", 6).await;
        assert_eq!((run.outcomes.len(), most.load(Ordering::SeqCst)), (6, 2));
        for (i, outcome) in run.outcomes.iter().enumerate() {
            if i == 3 {
                assert!(
                    outcome.error.as_ref().unwrap().contains("400 Bad Request: no fourth"),
                    "{outcome:?}"
                );
                continue;
            }
            assert_eq!((&outcome.error, outcome.text.as_str()), (&None, "a\nb"));
            assert_eq!(
                (outcome.prompt_tokens, outcome.output_tokens, outcome.itl_s.len()),
                (7, 2, 1)
            );
            assert!(outcome.ttft_s > 0.0 && outcome.ttft_s <= outcome.latency_s && outcome.latency_s <= run.duration_s);
        }
    }

    #[tokio::test]
    async fn without_a_bound_all_are_in_flight() {
        let (url, most) = serve(16).await;
        let run = run(&url, "", 16).await;
        assert_eq!(most.load(Ordering::SeqCst), 16);
        assert_eq!(
            run.outcomes.iter().filter(|outcome| outcome.error.is_none()).count(),
            15
        );
    }

    #[tokio::test]
    async fn no_server_is_an_error_of_each_request() {
        let run = run("http://127.0.0.1:1", "", 2).await;
        assert!(run.outcomes.iter().all(|outcome| outcome.error.is_some()));
    }
}
