//! Chat templates and their arguments: any template and any JSON give text or an error, in bounded time and memory.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use rvllm::chat::template::{ChatTemplate, TemplateInput};
use serde_json::{Map, Value};

const TEMPLATES: [&str; 3] = [
    include_str!("../../goldens/templates/LFM2.5-8B-A1B.jinja"),
    include_str!("../../goldens/templates/LFM2.5-2.6B.jinja"),
    include_str!("../../goldens/templates/LFM2-leap-finetune.jinja"),
];

fuzz_target!(|data: &[u8]| {
    static KNOWN: OnceLock<Vec<ChatTemplate>> = OnceLock::new();
    let known = KNOWN.get_or_init(|| {
        let compile = |source: &&str| ChatTemplate::new(source, Map::new()).expect("a good template");
        TEMPLATES.iter().map(compile).collect()
    });
    let Some((&which, data)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(data) else { return };
    // A template from a request, or a known one with arguments from a request.
    if which % 4 == 3 {
        if let Ok(template) = ChatTemplate::untrusted(text, Map::new()) {
            let _ = template.render(input(&Map::new()));
        }
        return;
    }
    if let Ok(Value::Object(fields)) = serde_json::from_str(text) {
        let _ = known[usize::from(which % 4)].render(input(&fields));
    }
});

fn input(fields: &Map<String, Value>) -> TemplateInput {
    let list = |name: &str| fields.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
    let flag = |name: &str| fields.get(name).and_then(Value::as_bool).unwrap_or_default();
    TemplateInput {
        messages: list("messages"),
        tools: list("tools"),
        documents: list("documents"),
        add_generation_prompt: flag("add_generation_prompt"),
        continue_final_message: flag("continue_final_message"),
        kwargs: fields.get("kwargs").and_then(Value::as_object).cloned().unwrap_or_default(),
    }
}
