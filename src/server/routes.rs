//! Every route of vLLM 0.33, and what it is here: the router, the API key's reach, `/openapi.json` and the routes part of
//! docs/compatibility.md are made from this table.
//!
//! A route that vLLM registers only under a flag exists under the same flag; without it the path is unknown, 404, as in
//! vLLM. `tests` holds the table against the list in `vllm_routes.txt`.

use std::sync::Arc;

use axum::routing::{MethodRouter, delete, get, post};
use serde_json::Value;

use super::anthropic::messages::types::{MessagesRequest, PromptFields};
use super::openai::chat_completions::batch;
use super::openai::chat_completions::types::ChatCompletionRequest;
use super::openai::completions::types::CompletionRequest;
use super::openai::responses::types::ResponsesRequest;
use super::openai::tokenize::types::{DetokenizeRequest, TokenizeRequest};
use super::pooling::types::{CohereEmbedRequest, EmbeddingRequest, RerankRequest, ScoreRequest};
use super::pooling::{cohere, embeddings, score};
use super::scale_out::types::GenerateBody;
use super::scale_out::{self, render};
use super::vllm::generative_scoring::{self, GenerativeScoringRequest};
use super::vllm::{control, docs, info, invocations, lora, rl};
use super::{App, anthropic, field, openai, vllm};

/// When a route exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    Always,
    /// The model makes tokens.
    Generate,
    /// `--runner pooling`: it makes vectors.
    Pooling,
    Docs,
    TokenizerInfo,
    DevMode,
    DevModeOrTokensOnly,
    LoraUpdates,
    /// What vLLM ties it to cannot be had here: it never exists. The words name the condition.
    Never(&'static str),
}

impl When {
    pub fn holds(self, app: &App) -> bool {
        let routes = &app.config.routes;
        match self {
            When::Always => true,
            When::Generate => app.model.pooling.is_none(),
            When::Pooling => app.model.pooling.is_some(),
            When::Docs => routes.docs,
            When::TokenizerInfo => routes.tokenizer_info,
            When::DevMode => routes.dev_mode,
            When::DevModeOrTokensOnly => routes.dev_mode || routes.tokens_only,
            When::LoraUpdates => routes.lora_updates,
            When::Never(_) => false,
        }
    }

    fn words(self) -> &'static str {
        match self {
            When::Always => "always",
            When::Generate => "the model generates",
            When::Pooling => "`--runner pooling`",
            When::Docs => "unless `--disable-fastapi-docs`",
            When::TokenizerInfo => "`--enable-tokenizer-info-endpoint`",
            When::DevMode => "`VLLM_SERVER_DEV_MODE=1`",
            When::DevModeOrTokensOnly => "`VLLM_SERVER_DEV_MODE=1`, `--tokens-only`",
            When::LoraUpdates => "`VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`",
            When::Never(words) => words,
        }
    }
}

/// How a route compares with vLLM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Here {
    Same,
    Better,
    /// It does what it can of vLLM's meaning.
    InPart,
    /// It answers and changes nothing: there is nothing to change.
    Accepted,
    /// It answers with a refusal by name, or never exists.
    Refused,
}

impl Here {
    fn word(self) -> &'static str {
        match self {
            Here::Same => "same",
            Here::Better => "better",
            Here::InPart => "in part",
            Here::Accepted => "accepted",
            Here::Refused => "refused",
        }
    }
}

/// The name and the JSON schema of a request body.
pub type Body = (&'static str, fn() -> Value);

pub struct Route {
    /// As vLLM's documentation writes them: `GET|POST`.
    pub methods: &'static str,
    pub path: &'static str,
    pub when: When,
    /// It needs an API key although vLLM leaves it open.
    pub keyed: bool,
    /// `/load` counts its requests.
    pub tracked: bool,
    pub body: Option<Body>,
    pub here: Here,
    pub text: &'static str,
    handler: fn() -> MethodRouter<Arc<App>>,
}

const fn route(methods: &'static str, path: &'static str, handler: fn() -> MethodRouter<Arc<App>>) -> Route {
    Route {
        methods,
        path,
        when: When::Always,
        keyed: false,
        tracked: false,
        body: None,
        here: Here::Same,
        text: "",
        handler,
    }
}

/// A route that this server never has.
const fn never(methods: &'static str, path: &'static str, condition: &'static str, text: &'static str) -> Route {
    route(methods, path, MethodRouter::new)
        .when(When::Never(condition))
        .is(Here::Refused, text)
}

/// A route of models that make vectors.
const fn vectors(path: &'static str, handler: fn() -> MethodRouter<Arc<App>>) -> Route {
    route("POST", path, handler)
        .when(When::Pooling)
        .is(Here::InPart, POOLING)
}

/// A route of models that make tokens.
const fn generating(methods: &'static str, path: &'static str, handler: fn() -> MethodRouter<Arc<App>>) -> Route {
    route(methods, path, handler).when(When::Generate)
}

/// A route of the development mode.
const fn dev(methods: &'static str, path: &'static str, handler: fn() -> MethodRouter<Arc<App>>) -> Route {
    route(methods, path, handler).when(When::DevMode).keyed()
}

impl Route {
    const fn when(mut self, when: When) -> Self {
        self.when = when;
        self
    }

    const fn keyed(mut self) -> Self {
        self.keyed = true;
        self
    }

    /// Without a key: it only tells a state.
    const fn open(mut self) -> Self {
        self.keyed = false;
        self
    }

    const fn tracked(mut self) -> Self {
        self.tracked = true;
        self
    }

    const fn body(mut self, name: &'static str, schema: fn() -> Value) -> Self {
        self.body = Some((name, schema));
        self
    }

    const fn is(mut self, here: Here, text: &'static str) -> Self {
        self.here = here;
        self.text = text;
        self
    }

    pub fn handler(&self) -> MethodRouter<Arc<App>> {
        (self.handler)()
    }

    /// Whether `path` is this route's or lies below it.
    fn covers(&self, path: &str) -> bool {
        let fixed = self.path.split("/{").next().unwrap_or(self.path);
        path.strip_prefix(fixed)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

const KEYED: &str = "needs the API key, which vLLM does not ask for here";
const NO_TRANSFER: &str = "501: weights come from the checkpoint alone";

/// In the order of vLLM's documentation.
pub static ROUTES: &[Route] = &[
    route("GET", "/health", || get(vllm::health)).is(
        Here::Better,
        "503 also when there is work and no progress for five minutes",
    ),
    route("GET|POST", "/ping", || get(vllm::health).post(vllm::health)).is(Here::Better, "as /health"),
    route("GET", "/version", || get(vllm::version)).is(Here::Better, "adds `rvllm_version`"),
    route("GET", "/load", || get(vllm::load)),
    route("GET", "/metrics", || get(vllm::metrics)),
    route("GET", "/metrics/", || get(vllm::metrics)),
    route("GET", "/metrics/{*rest}", || get(vllm::metrics)),
    route("GET", "/kv_event_sources", || get(vllm::kv_event_sources)).is(Here::Same, "no publishers"),
    route("GET", "/v1/models", || get(openai::models::list)),
    route("POST", "/tokenize", || post(openai::tokenize::tokenize))
        .body("TokenizeRequest", field::schema_of::<TokenizeRequest>),
    route("POST", "/detokenize", || post(openai::tokenize::detokenize))
        .body("DetokenizeRequest", field::schema_of::<DetokenizeRequest>),
    route("GET", "/tokenizer_info", || get(info::tokenizer_info)).when(When::TokenizerInfo),
    route("POST", "/invocations", || post(invocations::invoke)).keyed().is(
        Here::Better,
        "no stateful sessions; an invalid body of a known kind names its field",
    ),
    route("GET|HEAD", "/docs", || get(docs::page))
        .when(When::Docs)
        .is(Here::Better, DOCS),
    route("GET|HEAD", "/redoc", || get(docs::page))
        .when(When::Docs)
        .is(Here::Better, DOCS),
    route("GET|HEAD", "/openapi.json", || get(docs::openapi)).when(When::Docs),
    route("GET|HEAD", "/docs/oauth2-redirect", || get(docs::oauth2_redirect))
        .when(When::Docs)
        .is(Here::Accepted, "an empty page: there is no OAuth2"),
    generating("POST", "/v1/chat/completions", || {
        post(openai::chat_completions::create)
    })
    .tracked()
    .body("ChatCompletionRequest", field::schema_of::<ChatCompletionRequest>),
    generating("POST", "/v1/chat/completions/batch", || post(batch::create)).is(
        Here::InPart,
        "fields as in chat, from 1 to 1024 conversations; no streams, tools, beams or n, as in vLLM",
    ),
    generating("POST", "/v1/completions", || post(openai::completions::create))
        .tracked()
        .body("CompletionRequest", field::schema_of::<CompletionRequest>),
    generating("POST", "/v1/responses", || post(openai::responses::create))
        .tracked()
        .body("ResponsesRequest", field::schema_of::<ResponsesRequest>)
        .is(Here::InPart, RESPONSES),
    generating("GET", "/v1/responses/{response_id}", || {
        get(openai::responses::stored::retrieve)
    })
    .tracked()
    .is(Here::Better, STORED),
    generating("POST", "/v1/responses/{response_id}/cancel", || {
        post(openai::responses::stored::cancel)
    })
    .tracked()
    .is(Here::Better, "streams of the response end too"),
    generating("POST", "/v1/messages", || post(anthropic::messages::create))
        .tracked()
        .body("AnthropicMessagesRequest", field::schema_of::<MessagesRequest>)
        .is(Here::Better, MESSAGES),
    generating("POST", "/v1/messages/count_tokens", || {
        post(anthropic::count_tokens::create)
    })
    .body("AnthropicCountTokensRequest", field::schema_of::<PromptFields>)
    .is(Here::Better, MESSAGES),
    generating("POST", "/generative_scoring", || post(generative_scoring::score))
        .keyed()
        .body("GenerativeScoringRequest", field::schema_of::<GenerativeScoringRequest>),
    route("POST", "/v1/systemone", || post(vllm::no_decisions)).is(
        Here::Same,
        "501, as for every language model: it needs a structured-decision model",
    ),
    route("POST", "/v1/decisions", || post(vllm::no_decisions)).is(
        Here::Same,
        "501, as for every language model: it needs a structured-decision model",
    ),
    generating("POST", "/scale_elastic_ep", || post(rl::scale_elastic_ep))
        .keyed()
        .is(Here::Accepted, "a size of 1 is what there is; another is a 400"),
    generating("POST", "/is_scaling_elastic_ep", || post(rl::is_scaling_elastic_ep)),
    generating("POST", "/inference/v1/generate", || post(scale_out::generate))
        .body("GenerateRequest", field::schema_of::<GenerateBody>)
        .is(Here::InPart, "no media, no derendering, no text in streams"),
    generating("POST", "/inference/v1/abort_requests", || {
        post(scale_out::abort_requests)
    })
    .is(Here::Same, SCALE_OUT),
    dev("POST", "/abort_requests", || post(control::abort_requests))
        .when(When::DevModeOrTokensOnly)
        .is(Here::Better, "counts what it ended"),
    generating("POST", "/v1/chat/completions/render", || post(render::chat))
        .body("ChatCompletionRequest", field::schema_of::<ChatCompletionRequest>)
        .is(Here::InPart, "not with structured outputs or a forced tool call"),
    generating("POST", "/v1/completions/render", || post(render::completion))
        .body("CompletionRequest", field::schema_of::<CompletionRequest>)
        .is(Here::InPart, "not with structured outputs or a forced tool call"),
    generating("POST", "/v1/messages/render", || post(scale_out::not_built)).is(Here::Refused, NO_DERENDER),
    generating("POST", "/v1/responses/render", || post(scale_out::not_built)).is(Here::Refused, NO_DERENDER),
    generating("POST", "/v1/chat/completions/derender", || post(scale_out::not_built)).is(Here::Refused, NO_DERENDER),
    generating("POST", "/v1/completions/derender", || post(scale_out::not_built)).is(Here::Refused, NO_DERENDER),
    never("POST", "/v1/audio/transcriptions", "a transcription model", AUDIO),
    never("POST", "/v1/audio/translations", "a transcription model", AUDIO),
    never("WEBSOCKET", "/v1/realtime", "a realtime model", AUDIO),
    vectors("/v1/embeddings", || post(embeddings::embeddings))
        .tracked()
        .body("EmbeddingRequest", EMBEDDING),
    vectors("/v2/embed", || post(cohere::embed)).body("CohereEmbedRequest", field::schema_of::<CohereEmbedRequest>),
    vectors("/pooling", || post(embeddings::pooling))
        .tracked()
        .keyed()
        .body("EmbeddingRequest", EMBEDDING),
    never("POST", "/classify", "a classification head", "404, as without one").keyed(),
    vectors("/score", || post(score::score))
        .tracked()
        .keyed()
        .body("ScoreRequest", SCORE),
    vectors("/v1/score", || post(score::score))
        .tracked()
        .body("ScoreRequest", SCORE),
    vectors("/rerank", || post(score::rerank))
        .tracked()
        .keyed()
        .body("RerankRequest", RERANK),
    vectors("/v1/rerank", || post(score::rerank))
        .tracked()
        .body("RerankRequest", RERANK),
    vectors("/v2/rerank", || post(score::rerank))
        .tracked()
        .body("RerankRequest", RERANK),
    route("POST", "/v1/load_lora_adapter", || post(lora::load))
        .when(When::LoraUpdates)
        .body("LoadLoRAAdapterRequest", field::schema_of::<lora::LoadRequest>)
        .is(Here::Refused, "501: merge the adapter into the model"),
    route("POST", "/v1/unload_lora_adapter", || post(lora::unload))
        .when(When::LoraUpdates)
        .body("UnloadLoRAAdapterRequest", field::schema_of::<lora::UnloadRequest>)
        .is(Here::Same, "404: none is loaded"),
    route("POST", "/adapters", || post(lora::load_adapter))
        .when(When::LoraUpdates)
        .keyed()
        .body("AdapterRequest", field::schema_of::<lora::AdapterRequest>)
        .is(Here::Refused, "501: merge the adapter into the model"),
    route("DELETE", "/adapters/{adapter_name}", || delete(lora::unload_adapter))
        .when(When::LoraUpdates)
        .keyed()
        .is(Here::Same, "404: none is loaded"),
    dev("POST", "/sleep", || post(control::sleep)).is(
        Here::InPart,
        "requests wait and the prefix cache is dropped; the memory stays allocated",
    ),
    dev("POST", "/wake_up", || post(control::wake_up)),
    dev("GET", "/is_sleeping", || get(control::is_sleeping)).open(),
    dev("POST", "/release_kv_cache_memory", || post(rl::release_kv_cache_memory))
        .is(Here::Refused, "501: the KV cache is allocated once"),
    dev("POST", "/reset_prefix_cache", || post(control::reset_prefix_cache)),
    dev("POST", "/reset_mm_cache", || post(control::nothing_to_reset)).is(Here::Accepted, "nothing is cached"),
    dev("POST", "/reset_encoder_cache", || post(control::nothing_to_reset)).is(Here::Accepted, "nothing is cached"),
    dev("GET", "/server_info", || get(info::server_info)).is(Here::Better, "no variable that looks like a secret"),
    dev("POST", "/collective_rpc", || post(rl::collective_rpc)).is(Here::Refused, "501: there are no workers to call"),
    dev("POST", "/pause", || post(control::pause)),
    dev("POST", "/resume", || post(control::resume)),
    dev("GET", "/is_paused", || get(control::is_paused)).open(),
    dev("GET", "/get_world_size", || get(rl::get_world_size)).open(),
    dev("POST", "/init_weight_transfer_engine", || {
        post(rl::init_weight_transfer_engine)
    })
    .is(Here::Refused, NO_TRANSFER),
    dev("POST", "/shutdown_weight_transfer_engine", || {
        post(rl::no_weight_transfer)
    })
    .is(Here::Refused, NO_TRANSFER),
    dev("POST", "/start_weight_update", || post(rl::no_weight_transfer)).is(Here::Refused, NO_TRANSFER),
    dev("POST", "/start_draft_weight_update", || post(rl::no_weight_transfer)).is(Here::Refused, NO_TRANSFER),
    dev("POST", "/update_weights", || post(rl::update_weights)).is(Here::Refused, NO_TRANSFER),
    dev("POST", "/finish_weight_update", || post(rl::no_weight_transfer)).is(Here::Refused, NO_TRANSFER),
    dev("POST", "/update_weight_version", || post(rl::update_weight_version)),
    dev("POST", "/weight_checker", || post(rl::weight_checker))
        .is(Here::Refused, "501: weights are neither hashed nor overwritten"),
    dev("GET", "/weight_info", || get(rl::weight_info)).open(),
    never(
        "POST",
        "/start_profile",
        "`--profiler-config`, which is refused",
        "use a system profiler",
    )
    .keyed(),
    never(
        "POST",
        "/stop_profile",
        "`--profiler-config`, which is refused",
        "use a system profiler",
    )
    .keyed(),
    never(
        "POST",
        "/fault_tolerance/apply",
        "`--enable-fault-tolerance`, which is refused",
        RESTART,
    )
    .keyed(),
    never(
        "GET",
        "/fault_tolerance/status",
        "`--enable-fault-tolerance`, which is refused",
        RESTART,
    ),
    never(
        "POST",
        "/cohere/v2/chat",
        "the Python package cohere",
        "use /v1/chat/completions",
    ),
    never(
        "POST",
        "/cohere/v2/chat/render",
        "the Python package cohere",
        "use /v1/chat/completions",
    ),
];

const MESSAGES: &str = "takes `x-api-key`; thinking of earlier turns reaches LFM2 templates. Images, Anthropic's own tools, \
                        `defer_loading` and changes of tools are a 400; `thinking.budget_tokens`, `thinking.display` and a last \
                        message as prefill have no effect, as in vLLM by default";
const RESPONSES: &str = "calls and reasoning of a previous response are part of the conversation; a failure is a \
                         `response.failed` event. Tools that are no functions, `prompt`, `item_reference`, encrypted reasoning, \
                         `enable_response_messages`, `previous_input_messages` are a 400; `reasoning.summary` and \
                         `text.verbosity` have no effect, as in vLLM";
const STORED: &str = "with `VLLM_ENABLE_RESPONSES_API_STORE=1`; at most 4096 responses or 128 MiB, the oldest go first; a stream \
                      ends also after a failure";
const DOCS: &str = "a page that needs nothing from the network";
const SCALE_OUT: &str = "403 without `--enable-scale-out` or `--tokens-only`";
const NO_DERENDER: &str = "501 with `--enable-scale-out`, 403 without";
const AUDIO: &str = "404, as for every text model";
const POOLING: &str = "the last token's or the mean hidden state of an LFM2 checkpoint, texts only, no fp8";
const EMBEDDING: fn() -> Value = field::schema_of::<EmbeddingRequest>;
const SCORE: fn() -> Value = field::schema_of::<ScoreRequest>;
const RERANK: fn() -> Value = field::schema_of::<RerankRequest>;
const RESTART: &str = "let the orchestrator restart the server";

/// Prefixes that vLLM guards itself, known path or not.
const GUARDED_PREFIXES: [&str; 4] = ["/v1", "/v2", "/inference", "/cohere"];

/// Whether a path is behind `--api-key`: where vLLM asks for one, and wherever a route generates or changes state.
pub fn needs_key(path: &str) -> bool {
    GUARDED_PREFIXES.iter().any(|prefix| path.starts_with(prefix))
        || ROUTES.iter().any(|route| route.keyed && route.covers(path))
}

/// Whether HEAD is one of the path's methods; elsewhere it is refused as vLLM refuses it.
pub fn answers_head(path: &str) -> bool {
    ROUTES
        .iter()
        .any(|route| route.path == path && route.methods.contains("HEAD"))
}

/// Whether `/load` counts requests of the route with this path.
pub fn is_tracked(path: &str) -> bool {
    ROUTES.iter().any(|route| route.path == path && route.tracked)
}

pub const BEGIN: &str = "<!-- routes: generated from src/server/routes.rs -->\n";
pub const END: &str = "<!-- end of routes -->\n";

/// The routes part of docs/compatibility.md.
pub fn routes_markdown() -> String {
    let mut out = String::from(BEGIN);
    out += "## Routes\n\n";
    out += "Every route of vLLM's server. Same: as in vLLM. Better: as in vLLM, and more. In part: see the remark. Accepted: \
            answered, and there is nothing to do. Refused: answered by a refusal, or unknown (404) as in vLLM without the \
            condition.\n\n| route | exists | here | |\n|---|---|---|---|\n";
    for route in ROUTES {
        let text = match (route.keyed, route.text) {
            (false, text) => text.to_owned(),
            (true, "") => KEYED.to_owned(),
            (true, text) => format!("{text}; {KEYED}"),
        };
        let here = match (route.here, route.keyed) {
            (Here::Same, true) => Here::Better,
            (here, _) => here,
        };
        out += &format!(
            "| `{} {}` | {} | {} | {} |\n",
            route.methods.replace('|', "/"),
            route.path,
            route.when.words(),
            here.word(),
            text.replace('|', "\\|"),
        );
    }
    out + END
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::config::document;

    fn rows() -> BTreeSet<String> {
        ROUTES
            .iter()
            .map(|route| format!("{} {}", route.methods, route.path))
            .collect()
    }

    #[test]
    fn every_route_of_vllm_has_a_row() {
        let list: BTreeSet<String> = include_str!("vllm_routes.txt").lines().map(str::to_owned).collect();
        let rows = rows();
        assert_eq!(rows.len(), ROUTES.len(), "a route stands twice");
        let missing: Vec<_> = list.difference(&rows).collect();
        assert!(missing.is_empty(), "{missing:?}");
        let extra: Vec<_> = rows.difference(&list).collect();
        assert!(extra.is_empty(), "not vLLM's: {extra:?}");
    }

    #[test]
    fn whatever_generates_or_changes_state_needs_a_key() {
        let open = ["/ping", "/tokenize", "/detokenize", "/is_scaling_elastic_ep"];
        for route in ROUTES.iter().filter(|route| !route.methods.starts_with("GET")) {
            assert_eq!(
                needs_key(route.path),
                !open.contains(&route.path),
                "{} {}",
                route.methods,
                route.path
            );
        }
        for path in [
            "/health",
            "/metrics",
            "/load",
            "/version",
            "/docs",
            "/openapi.json",
            "/is_paused",
            "/is_sleeping",
        ] {
            assert!(!needs_key(path), "{path}");
        }
        assert!(needs_key("/adapters/x") && needs_key("/server_info") && needs_key("/v1/unknown"));
    }

    #[test]
    fn load_counts_the_routes_that_vllm_counts() {
        let counted = "/v1/responses /v1/messages /v1/chat/completions /v1/completions /v1/audio /v1/embeddings /pooling \
                       /classify /score /v1/score /rerank /v1/rerank /v2/rerank";
        for route in ROUTES.iter().filter(|route| route.tracked) {
            assert!(
                counted
                    .split_whitespace()
                    .any(|known| route.covers(known) || route.path.starts_with(known)),
                "{}",
                route.path
            );
        }
        assert!(is_tracked("/v1/chat/completions") && is_tracked("/v1/completions") && !is_tracked("/health"));
    }

    #[test]
    fn the_document_is_up_to_date() {
        document::assert_current(BEGIN, END, &routes_markdown());
    }

    #[test]
    #[ignore = "writes docs/compatibility.md"]
    fn write_the_document() {
        document::write(BEGIN, END, &routes_markdown());
    }
}
