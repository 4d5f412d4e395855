//! Conversations in, assistant events out.

use std::sync::Arc;

use futures_util::stream::{BoxStream, StreamExt};
use serde_json::{Map, Value};
use tokio::sync::Semaphore;

use super::constrain::{self, Calls};
use super::messages::for_template;
use super::template::{ChatTemplate, ContentFormat, TemplateError, TemplateInput};
use super::{ChatEvent, ChatRequest, ChoiceParsers, ToolChoice, events};
use crate::config::StructuredOutputsConfig;
use crate::grammar::{Constraint, GrammarOptions, Start};
use crate::parsers::reasoning::Prompt;
use crate::parsers::{Parsers, Turn};
use crate::step::TokenId;
use crate::text::{TextEngine, TextError};

/// Renderings at a time; more wait. They share the machine with the engine's own threads.
const CONCURRENT_RENDERINGS: usize = 4;

/// The request cannot be answered.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ChatError {
    /// The client's fault; no single field that vLLM names.
    #[error("{0}")]
    Invalid(String),
    #[error(transparent)]
    Text(#[from] TextError),
    /// Ours: a rendering died.
    #[error("the chat template could not be rendered: {0}")]
    Internal(String),
}

impl From<TemplateError> for ChatError {
    fn from(error: TemplateError) -> Self {
        Self::Invalid(error.0)
    }
}

/// The part of a [`ChatRequest`] that makes the prompt; `/tokenize` has nothing else.
#[derive(Clone, Debug, Default)]
pub struct RenderRequest {
    pub messages: Vec<Value>,
    pub tools: Vec<Value>,
    pub documents: Vec<Value>,
    pub add_generation_prompt: bool,
    pub continue_final_message: bool,
    pub template_kwargs: Map<String, Value>,
    pub chat_template: Option<String>,
    /// Beside those that the template writes; templates write BOS themselves.
    pub add_special_tokens: bool,
    /// The prompt may be longer than the context.
    pub will_be_cut: bool,
}

impl ChatRequest {
    /// Moves out the part that makes the prompt.
    pub fn take_render_request(&mut self) -> RenderRequest {
        RenderRequest {
            messages: std::mem::take(&mut self.messages),
            tools: std::mem::take(&mut self.tools),
            documents: std::mem::take(&mut self.documents),
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
            template_kwargs: std::mem::take(&mut self.template_kwargs),
            chat_template: self.chat_template.take(),
            add_special_tokens: self.add_special_tokens,
            will_be_cut: self.truncation.is_some(),
        }
    }
}

/// A conversation as a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenderedChat {
    pub text: String,
    pub token_ids: Arc<[TokenId]>,
}

/// Events of all choices, interleaved.
pub type ChatStream = BoxStream<'static, Result<ChatEvent, TextError>>;

/// A started answer.
pub struct Chat {
    pub prompt: RenderedChat,
    pub events: ChatStream,
}

/// Answers conversations. Clones share everything.
#[derive(Clone, Debug)]
pub struct ChatEngine {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    text: TextEngine,
    template: Option<ChatTemplate>,
    /// None = as each template wants it.
    content_format: Option<ContentFormat>,
    parsers: Parsers,
    /// How forced calls are written.
    grammar_options: GrammarOptions,
    /// Grammars begin with the first token, in reasoning too.
    constrain_reasoning: bool,
    renderings: Arc<Semaphore>,
}

impl ChatEngine {
    /// Without a template only requests that bring one can be answered.
    pub fn new(
        text: TextEngine,
        template: Option<ChatTemplate>,
        content_format: Option<ContentFormat>,
        parsers: Parsers,
        structured_outputs: &StructuredOutputsConfig,
    ) -> Self {
        let renderings = Arc::new(Semaphore::new(CONCURRENT_RENDERINGS));
        Self {
            shared: Arc::new(Shared {
                text,
                template,
                content_format,
                parsers,
                grammar_options: GrammarOptions {
                    disable_any_whitespace: structured_outputs.disable_any_whitespace,
                    disable_additional_properties: structured_outputs.disable_additional_properties,
                    whitespace_pattern: None,
                },
                constrain_reasoning: structured_outputs.enable_in_reasoning,
                renderings,
            }),
        }
    }

    pub fn text(&self) -> &TextEngine {
        &self.shared.text
    }

    pub fn parsers(&self) -> Parsers {
        self.shared.parsers
    }

    /// Renders and tokenizes on the blocking pool.
    ///
    /// # Errors
    /// The messages, the template or its arguments are unusable, or the prompt is far too long: the client's fault.
    pub async fn render(&self, request: RenderRequest) -> Result<RenderedChat, ChatError> {
        let engine = self.clone();
        // The permit moves into the work: a client that leaves does not free the slot before the work ends.
        let permit = self.shared.renderings.clone().acquire_owned().await;
        let work = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            engine.render_blocking(request)
        });
        work.await.map_err(|error| ChatError::Internal(error.to_string()))?
    }

    fn render_blocking(&self, request: RenderRequest) -> Result<RenderedChat, ChatError> {
        let model_template = self.shared.template.as_ref();
        let special_tokens = || self.shared.text.tokenizer().special_names().clone();
        let own_template = request
            .chat_template
            .as_deref()
            .map(|source| ChatTemplate::untrusted(source, special_tokens()))
            .transpose()?;
        let template = own_template.as_ref().or(model_template).ok_or_else(|| {
            ChatError::Invalid(
                "the model has no chat template; the server can be given one with --chat-template".into(),
            )
        })?;
        let format = self.shared.content_format.unwrap_or(template.content_format());
        let messages = for_template(request.messages, format).map_err(|error| ChatError::Invalid(error.0))?;
        let text = template.render(TemplateInput {
            messages,
            tools: request.tools,
            documents: request.documents,
            add_generation_prompt: request.add_generation_prompt,
            continue_final_message: request.continue_final_message,
            kwargs: request.template_kwargs,
        })?;
        let token_ids = match request.will_be_cut {
            true => self.shared.text.encode(&text, request.add_special_tokens)?,
            false => self.shared.text.encode_prompt(&text, request.add_special_tokens)?,
        };
        Ok(RenderedChat {
            text,
            token_ids: token_ids.into(),
        })
    }

    /// Renders the conversation and starts all choices. Dropping the events aborts what still runs.
    ///
    /// # Errors
    /// As [`render`](Self::render) and [`TextEngine::generate`]; nothing runs then.
    pub async fn chat(&self, mut request: ChatRequest) -> Result<Chat, ChatError> {
        let tool_choice = request.tool_choice.clone();
        let forced = tool_choice.forced();
        let parse_tools = !request.tools.is_empty() && tool_choice == ToolChoice::Auto;
        let spec = match forced {
            Some(forced) => {
                let options = self.shared.grammar_options.clone();
                let parallel = request.parallel_tool_calls;
                Some(constrain::calls_grammar(forced, &request.tools, parallel, options))
            }
            None => request.grammar.take(),
        };
        let grammar = match spec {
            Some(spec) => Some(self.shared.text.compile_grammar(spec).await?),
            None => None,
        };
        let enable_thinking = request.template_kwargs.get("enable_thinking") != Some(&Value::Bool(false));
        let mut prompt = self.render(request.take_render_request()).await?;
        let mut generate = request.generate;
        if let Some(truncation) = request.truncation {
            let mut ids = prompt.token_ids.to_vec();
            if truncation.apply(&mut ids) {
                prompt.token_ids = ids.into();
            }
        }
        let parsers = self.shared.parsers;
        if parsers.needs_special_tokens(parse_tools || forced.is_some()) {
            generate.skip_special_tokens = false;
        }
        generate.prompt = prompt.token_ids.clone();
        let tokenizer = self.shared.text.tokenizer();
        let turn_prompt = Prompt {
            text: &prompt.text,
            token_ids: &prompt.token_ids,
            enable_thinking,
            also_end: &[],
        };
        let calls = match (forced, parse_tools) {
            (Some(_), _) => Calls::Grammar,
            (None, true) => Calls::Model,
            (None, false) => Calls::None,
        };
        let start = match self.shared.constrain_reasoning {
            true => Start::Now,
            false => constrain::start(parsers, &turn_prompt, calls, tokenizer),
        };
        let also_end = match grammar {
            Some(_) => constrain::also_end(&start, self.shared.text.eos_token_ids(), tokenizer),
            None => Vec::new(),
        };
        generate.extensions.constraint = grammar.map(|grammar| Constraint { grammar, start });
        let n = generate.n;
        let deltas = self.shared.text.generate(generate)?;
        let turn = Turn {
            prompt: Prompt {
                also_end: &also_end,
                ..turn_prompt
            },
            parse_tools,
            forced,
            parallel_tool_calls: request.parallel_tool_calls,
        };
        let choices = ChoiceParsers::new(n, request.include_reasoning, || {
            parsers.assistant(&turn, &|token| tokenizer.token_to_id(token))
        })
        .forcing(forced);
        let events = events(deltas, choices).boxed();
        Ok(Chat { prompt, events })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::chat::collect;
    use crate::engine::scripted::{ScriptedExecutor, capacity, engine};
    use crate::step::SamplingParams;
    use crate::text::tokenizer::testing::{text_file, tokenizer};
    use crate::text::{GenerateExtensions, GenerateRequest, TextLimits};

    /// tiny-moe's tokenizer, the 8B template, every parser it asks for; says `reply`.
    fn saying(reply: &str) -> ChatEngine {
        let tokenizer = tokenizer("tiny-moe");
        let eos = tokenizer.named_special("eos_token").unwrap();
        let reply = [tokenizer.encode(reply, false).unwrap(), vec![eos]].concat();
        let executor = ScriptedExecutor::replying(capacity(2048), move |_| reply.clone());
        let limits = TextLimits {
            max_model_len: 2000,
            vocab_size: 2048,
            eos: Some(eos),
            extra_eos: vec![],
        };
        let source = text_file("templates/LFM2.5-8B-A1B.jinja");
        let template = ChatTemplate::new(&source, tokenizer.special_names().clone()).unwrap();
        let parsers = Parsers::resolve(Some("qwen3"), Some("lfm2"), &source, &|token| {
            tokenizer.token_to_id(token)
        })
        .unwrap();
        ChatEngine::new(
            TextEngine::new(engine(executor), tokenizer, limits),
            Some(template),
            None,
            parsers,
            &StructuredOutputsConfig::default(),
        )
    }

    fn request(messages: Value) -> ChatRequest {
        ChatRequest {
            messages: messages.as_array().unwrap().clone(),
            tools: vec![],
            tool_choice: ToolChoice::Auto,
            parallel_tool_calls: true,
            grammar: None,
            add_generation_prompt: true,
            continue_final_message: false,
            add_special_tokens: false,
            documents: vec![],
            template_kwargs: Map::new(),
            chat_template: None,
            include_reasoning: true,
            truncation: None,
            generate: GenerateRequest {
                id: "test".into(),
                prompt: Arc::from([]),
                sampling: SamplingParams {
                    temperature: 0.0,
                    ..SamplingParams::default()
                },
                n: 1,
                max_tokens: None,
                min_tokens: 0,
                ignore_eos: false,
                stop_token_ids: vec![],
                stop: vec![],
                include_stop_str_in_output: false,
                skip_special_tokens: true,
                spaces_between_special_tokens: true,
                priority: 0,
                cache_salt: None,
                extensions: GenerateExtensions::default(),
            },
        }
    }

    fn hello() -> ChatRequest {
        request(json!([{"role": "user", "content": "Hello!"}]))
    }

    fn invalid(result: Result<Chat, ChatError>) -> String {
        match result {
            Err(ChatError::Invalid(message)) => message,
            Err(other) => panic!("{other:?}"),
            Ok(_) => panic!("it was answered"),
        }
    }

    #[tokio::test]
    async fn reasoning_and_calls_are_told_apart() {
        let engine = saying("<think>hm</think>Let me see.<|tool_call_start|>[f(a=1)]<|tool_call_end|>");
        let tool = json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}});
        let chat = engine
            .chat(ChatRequest {
                tools: vec![tool],
                ..hello()
            })
            .await
            .unwrap();
        assert!(chat.prompt.text.contains("List of tools: [{\"type\": \"function\""));
        let choice = collect(1, chat.events).await.unwrap().remove(0);
        assert_eq!(choice.reasoning.as_deref(), Some("hm"));
        assert_eq!(choice.tool_calls.len(), 1);
        assert_eq!(choice.tool_calls[0].name, "f");
    }

    #[tokio::test]
    async fn the_prompt_is_the_goldens() {
        let chat = saying("Hi").chat(hello()).await.unwrap();
        let golden = crate::text::tokenizer::testing::json_file("chat/rendered.LFM2.5-8B-A1B.json");
        assert_eq!(chat.prompt.text, golden["rendered"]["user"]["text"].as_str().unwrap());
        assert_eq!(
            chat.prompt.token_ids[..],
            crate::text::tokenizer::testing::ids(&golden["rendered"]["user"]["ids"])
        );
    }

    #[tokio::test]
    async fn unusable_requests_are_the_clients_fault() {
        let engine = saying("Hi");
        assert!(invalid(engine.chat(request(json!([]))).await).contains("empty"));
        let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]);
        assert!(invalid(engine.chat(request(image)).await).contains("is not a multimodal model"));
        let raising = ChatRequest {
            chat_template: Some("{{ raise_exception('no!') }}".into()),
            ..hello()
        };
        assert_eq!(invalid(engine.chat(raising).await), "no!");
        let endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}";
        let endless = ChatRequest {
            chat_template: Some(endless.into()),
            ..hello()
        };
        assert!(invalid(engine.chat(endless).await).contains("too much work"));
        let kwargs = json!({"tokenize": true}).as_object().unwrap().clone();
        assert!(
            invalid(
                engine
                    .chat(ChatRequest {
                        template_kwargs: kwargs,
                        ..hello()
                    })
                    .await
            )
            .contains("tokenize")
        );
        let long = request(json!([{"role": "user", "content": "word ".repeat(3000)}]));
        match engine.chat(long).await {
            Err(ChatError::Text(TextError::Invalid { param, .. })) => assert_eq!(param, Some("input_tokens")),
            other => panic!("{:?}", other.err()),
        }
        // And the engine still answers.
        assert_eq!(
            collect(1, engine.chat(hello()).await.unwrap().events)
                .await
                .unwrap()
                .len(),
            1
        );
    }
}
