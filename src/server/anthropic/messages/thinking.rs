//! What `thinking: {"type": "disabled"}` means to the served model.

use serde_json::{Value, json};

use crate::chat::RenderRequest;
use crate::server::App;
use crate::server::openai::chat_completions::convert::template_kwargs;

/// The effort that stands for "off": `--anthropic-disabled-thinking-effort`, or what the template can do.
pub async fn disabled_effort(app: &App) -> &str {
    match &app.chat_config.anthropic_disabled_thinking_effort {
        Some(effort) => effort,
        None => app.disabled_thinking_effort.get_or_init(|| probe(app)).await,
    }
}

/// `none` where the template writes another prompt for it than for no effort and for the greatest; else `low`: a
/// model that thinks all the same must not have its thoughts read as the answer.
async fn probe(app: &App) -> &'static str {
    let Some(none) = prompt(app, Some("none")).await else {
        return "low";
    };
    for other in [None, Some("max")] {
        if prompt(app, other).await.as_ref() == Some(&none) {
            return "low";
        }
    }
    "none"
}

/// A short conversation's prompt at this effort; none where it cannot be rendered.
async fn prompt(app: &App, effort: Option<&str>) -> Option<String> {
    let kwargs = template_kwargs(&app.chat_config.template_kwargs, None, effort.map(str::to_owned));
    let request = RenderRequest {
        messages: vec![json!({"role": "user", "content": Value::String("Hello".to_owned())})],
        add_generation_prompt: true,
        template_kwargs: kwargs,
        ..RenderRequest::default()
    };
    app.chat.render(request).await.ok().map(|prompt| prompt.text)
}
