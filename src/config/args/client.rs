//! What the subcommands that talk to a server, and the batch runner, were asked for.

use super::ServeArgs;

/// The server and the model.
#[derive(Clone, Debug)]
pub struct ClientArgs {
    /// Ends in `/v1`, as an OpenAI client's base URL.
    pub url: String,
    /// None = the first of `/v1/models`.
    pub model_name: Option<String>,
    /// None = the environment's.
    pub api_key: Option<String>,
    /// Ask this and leave; none = read questions from stdin.
    pub quick: Option<String>,
    /// Print timings after each answer.
    pub stats: bool,
}

/// What `rvllm chat` was asked for.
#[derive(Clone, Debug)]
pub struct ChatArgs {
    pub client: ClientArgs,
    pub system_prompt: Option<String>,
}

/// What `rvllm complete` was asked for.
#[derive(Clone, Debug)]
pub struct CompleteArgs {
    pub client: ClientArgs,
    pub max_tokens: Option<u32>,
}

/// What `rvllm run-batch` was asked for.
#[derive(Clone, Debug)]
pub struct RunBatchArgs {
    /// A path or an http(s) URL.
    pub input_file: String,
    pub output_file: String,
    /// Where an output for a URL is kept until it is uploaded.
    pub output_tmp_dir: Option<String>,
    pub engine: ServeArgs,
}
