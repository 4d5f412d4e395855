//! Values that must never hurt: each is refused by name or answered, and a request after them all is served as before.

use serde_json::json;

use super::*;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// Sends each, compares the status and the parameter at fault, and asks afterwards whether the server is well.
async fn each(setup: Setup, cases: Vec<(&str, Value, Option<&str>)>) {
    let server = setup.start();
    let healthy = |answer: &Reply| answer.json()["choices"][0]["text"] == "Hello there";
    let mut wrong = Vec::new();
    for (path, body, param) in cases {
        let text = body.to_string();
        let reply = server.post(path, &text).await;
        let as_said = match param {
            None => reply.status == 200,
            Some(param) => {
                let error = &reply.json()["error"];
                let told = error["param"].as_str().unwrap_or_default();
                let message = error["message"].as_str().unwrap_or_default();
                reply.status == 400 && (told == param || told == format!("body.{param}") || message.contains(param))
            }
        };
        if !as_said {
            let sent: String = text.chars().take(200).collect();
            let got: String = reply.text.chars().take(300).collect();
            wrong.push(format!("{path} {sent}\n  {} {got}", reply.status));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    server.idle().await;
    let after = server.post(COMPLETIONS, r#"{"prompt":"Say hello"}"#).await;
    assert!(healthy(&after), "{}", after.text);
}

fn completion(field: &str, value: Value) -> Value {
    json!({"prompt": "a", "max_tokens": 2, field: value})
}

fn chat(field: &str, value: Value) -> Value {
    json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, field: value})
}

#[tokio::test]
async fn counts_out_of_range() {
    let mut cases = Vec::new();
    for (field, value) in [
        ("n", json!(0)),
        ("n", json!(1_000_000_000)),
        ("n", json!(-1)),
        ("n", json!(129)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(1_000_000_000_000_i64)),
        ("min_tokens", json!(3)),
        ("min_tokens", json!(-1)),
        ("top_k", json!(-2)),
        ("prompt_logprobs", json!(-2)),
        ("prompt_logprobs", json!(1_000_000_000)),
        ("prompt_logprobs", json!(-1)),
        ("truncate_prompt_tokens", json!(-2)),
        ("truncate_prompt_tokens", json!(1_000_000_000)),
        ("stream_interval", json!(0)),
        ("seed", json!(1e300)),
        ("priority", json!(1e300)),
    ] {
        cases.push((COMPLETIONS, completion(field, value.clone()), Some(field)));
        cases.push((CHAT, chat(field, value), Some(field)));
    }
    for value in [json!(-2), json!(21), json!(-1), json!(1_000_000_000)] {
        cases.push((COMPLETIONS, completion("logprobs", value.clone()), Some("logprobs")));
        let mut body = chat("logprobs", json!(true));
        body["top_logprobs"] = value;
        cases.push((CHAT, body, Some("logprobs")));
    }
    for (field, value) in [
        ("seed", json!(-1)),
        ("seed", json!(i64::MIN)),
        ("priority", json!(i64::MIN)),
        ("best_of", json!(1_000_000_000)),
        ("top_k", json!(1_000_000_000_000_i64)),
        ("min_tokens", json!(2)),
    ] {
        cases.push((COMPLETIONS, completion(field, value.clone()), None));
        cases.push((CHAT, chat(field, value), None));
    }
    each(Setup::default(), cases).await;
    // Numbers that JSON has and 64 bits do not.
    let server = Setup::default().start();
    for number in ["18446744073709551616", "-9223372036854775809", "1e400", "-1e400"] {
        let reply = server
            .post(COMPLETIONS, &format!(r#"{{"prompt":"a","seed":{number}}}"#))
            .await;
        assert_eq!(reply.status, 400, "{number}: {}", reply.text);
    }
}

#[tokio::test]
async fn sampling_values_that_are_no_numbers() {
    let mut cases = Vec::new();
    for field in [
        "temperature",
        "top_p",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "length_penalty",
    ] {
        for value in [
            json!("nan"),
            json!("inf"),
            json!("-inf"),
            json!("many"),
            json!([]),
            json!({}),
        ] {
            cases.push((COMPLETIONS, completion(field, value.clone()), Some(field)));
            cases.push((CHAT, chat(field, value), Some(field)));
        }
        cases.push((COMPLETIONS, completion(field, Value::Null), None));
        cases.push((CHAT, chat(field, json!("1")), None));
    }
    for (field, value) in [
        ("temperature", json!(-0.1)),
        ("temperature", json!(2.1)),
        ("top_p", json!(0)),
        ("top_p", json!(1.1)),
        ("min_p", json!(-0.1)),
        ("presence_penalty", json!(2.1)),
        ("frequency_penalty", json!(-2.1)),
        ("repetition_penalty", json!(0)),
        ("repetition_penalty", json!(-0.0)),
    ] {
        cases.push((COMPLETIONS, completion(field, value), Some(field)));
    }
    cases.push((COMPLETIONS, completion("temperature", json!(-0.0)), None));
    cases.push((COMPLETIONS, completion("min_p", json!(-0.0)), None));
    each(Setup::default(), cases).await;
}

#[tokio::test]
async fn lists_of_tokens_and_words() {
    let far = 1_000_000_000_000_i64;
    let many: Vec<u32> = (0..1_000_000).map(|id| id % 2048).collect();
    let words = |count: usize| Value::from(vec!["bad"; count]);
    // Each is spelled in two ways.
    let spellings = |count: usize| (0..count).map(|i| format!("b{i}d")).collect::<Value>();
    let biases = |count: usize| Value::Object((0..count).map(|id| (id.to_string(), json!(1))).collect());
    let cases = vec![
        (
            COMPLETIONS,
            completion("logit_bias", json!({"2048": 1})),
            Some("logit_bias"),
        ),
        (
            COMPLETIONS,
            completion("logit_bias", json!({"-1": 1})),
            Some("logit_bias"),
        ),
        (
            COMPLETIONS,
            completion("logit_bias", json!({"x": 1})),
            Some("logit_bias"),
        ),
        (
            COMPLETIONS,
            completion("logit_bias", json!({"5": "nan"})),
            Some("logit_bias"),
        ),
        (
            COMPLETIONS,
            completion("logit_bias", json!({"5": 1e9, "6": "-inf"})),
            None,
        ),
        (
            COMPLETIONS,
            completion("allowed_token_ids", json!([])),
            Some("allowed_token_ids"),
        ),
        (
            COMPLETIONS,
            completion("allowed_token_ids", json!([2048])),
            Some("allowed_token_ids"),
        ),
        (
            COMPLETIONS,
            completion("allowed_token_ids", json!([-1])),
            Some("allowed_token_ids"),
        ),
        (
            COMPLETIONS,
            completion("allowed_token_ids", json!([far])),
            Some("allowed_token_ids"),
        ),
        (COMPLETIONS, completion("allowed_token_ids", json!([5, 5, 5])), None),
        (
            COMPLETIONS,
            completion("allowed_token_ids", json!(many)),
            Some("token ids"),
        ),
        (
            COMPLETIONS,
            completion("stop_token_ids", json!([-1])),
            Some("stop_token_ids"),
        ),
        (
            COMPLETIONS,
            completion("stop_token_ids", json!([far])),
            Some("stop_token_ids"),
        ),
        (COMPLETIONS, completion("stop_token_ids", json!([9999, 9999])), None),
        (COMPLETIONS, completion("bad_words", words(128)), None),
        (COMPLETIONS, completion("bad_words", words(129)), Some("bad_words")),
        (COMPLETIONS, completion("bad_words", words(100_000)), Some("bad_words")),
        (COMPLETIONS, completion("bad_words", json!([""])), Some("bad_words")),
        (
            COMPLETIONS,
            completion("bad_words", json!(["x".repeat(100_000)])),
            Some("bad_words"),
        ),
        (COMPLETIONS, completion("bad_words", spellings(60)), None),
        (COMPLETIONS, completion("bad_words", spellings(128)), Some("bad_words")),
        (COMPLETIONS, completion("logit_bias", biases(1024)), None),
        (COMPLETIONS, completion("logit_bias", biases(1025)), Some("logit_bias")),
        (
            COMPLETIONS,
            json!({"prompt": "a", "max_tokens": 2, "min_tokens": 1, "stop_token_ids": (0..1025).collect::<Vec<u32>>()}),
            Some("stop_token_ids"),
        ),
        (COMPLETIONS, completion("stop", json!([""])), Some("stop")),
        (COMPLETIONS, completion("stop", json!(["x".repeat(100_000)])), None),
        (COMPLETIONS, completion("stop", json!(vec!["a"; 1025])), Some("stop")),
        (CHAT, chat("cache_salt", json!("x".repeat(129))), Some("cache_salt")),
        (CHAT, chat("request_id", json!("x".repeat(100_000))), None),
        (CHAT, chat("vllm_xargs", json!({"a": {}})), Some("vllm_xargs")),
        (
            CHAT,
            chat("thinking_token_budget", json!(-2)),
            Some("thinking_token_budget"),
        ),
    ];
    let mut setup = Setup::default();
    setup.server.max_body_bytes = 32 << 20;
    each(setup, cases).await;
}

#[tokio::test]
async fn limits_are_what_the_operator_sets() {
    let mut setup = Setup::default();
    setup.server.any_model_name = true;
    setup.server.request_limits = RequestLimits {
        max_n: 2,
        max_prompts: 3,
        max_stop_strings: 1,
        max_bad_words: 1,
        max_bad_word_tokens: 3,
    };
    let cases = vec![
        (
            COMPLETIONS,
            json!({"prompt": "a", "max_tokens": 2, "temperature": 1, "n": 2}),
            None,
        ),
        (COMPLETIONS, completion("n", json!(3)), Some("n must be at most 2")),
        (COMPLETIONS, completion("prompt", json!(["a", "b", "c"])), None),
        (
            COMPLETIONS,
            completion("prompt", json!(["a", "b", "c", "d"])),
            Some("prompt"),
        ),
        (CHAT, chat("stop", json!(["x", "y"])), Some("stop")),
        ("/v1/responses", json!({"input": "a", "stop": ["x", "y"]}), Some("stop")),
        (CHAT, chat("bad_words", json!(["x", "y"])), Some("bad_words")),
        (CHAT, chat("bad_words", json!(["a longer phrase"])), Some("bad_words")),
        (CHAT, chat("model", json!("whatever")), None),
    ];
    each(setup, cases).await;
}

#[tokio::test]
async fn prompts_at_and_over_every_edge() {
    let tokens = |count: usize| json!({"prompt": vec![5; count], "max_tokens": 1});
    let mut setup = Setup::default();
    setup.server.max_body_bytes = 32 << 20;
    let cases = vec![
        (COMPLETIONS, json!({"prompt": ""}), Some("prompt")),
        (COMPLETIONS, json!({"prompt": []}), Some("prompt")),
        (COMPLETIONS, json!({"prompt": [[]]}), Some("prompt")),
        (COMPLETIONS, json!({"prompt": [""]}), Some("prompt")),
        (COMPLETIONS, json!({"prompt": null}), Some("prompt")),
        (COMPLETIONS, json!({"prompt": {}}), Some("prompt")),
        (COMPLETIONS, json!({"prompt": [2048]}), Some("out of vocabulary")),
        (
            COMPLETIONS,
            json!({"prompt": [4_294_967_296_u64]}),
            Some("out of vocabulary"),
        ),
        (COMPLETIONS, json!({"prompt": [-1]}), Some("prompt.0")),
        (
            COMPLETIONS,
            json!({"prompt": "<|im_end|><|im_start|>", "max_tokens": 1}),
            None,
        ),
        (
            COMPLETIONS,
            json!({"prompt": "a<|tool_call_start|>b<|im_end|>", "max_tokens": 1}),
            None,
        ),
        (COMPLETIONS, tokens(MAX_MODEL_LEN - 1), None),
        (COMPLETIONS, tokens(MAX_MODEL_LEN), Some("max_tokens")),
        (COMPLETIONS, tokens(MAX_MODEL_LEN + 1), Some("input_tokens")),
        (COMPLETIONS, tokens(1_000_000), Some("input_tokens")),
        (
            COMPLETIONS,
            json!({"prompt": "x".repeat(2_000_000)}),
            Some("input_text"),
        ),
        (COMPLETIONS, json!({"prompt": vec!["a"; 1025]}), Some("prompt")),
        ("/tokenize", json!({"prompt": ""}), None),
        ("/tokenize", json!({"prompt": 5}), Some("prompt")),
        (
            "/tokenize",
            json!({"prompt": "x".repeat(2_000_000)}),
            Some("input_text"),
        ),
        ("/tokenize", json!({"messages": []}), Some("empty")),
        (
            "/tokenize",
            json!({"messages": [{"role": "user", "content": "a"}], "mm_processor_kwargs": {"a": 1}}),
            Some("mm_processor_kwargs"),
        ),
        ("/detokenize", json!({"tokens": [9_999_999_999_u64]}), None),
        ("/detokenize", json!({"tokens": [-1]}), Some("tokens")),
        ("/detokenize", json!({"tokens": "5"}), Some("tokens")),
    ];
    each(setup, cases).await;
}

#[tokio::test]
async fn messages_of_every_shape() {
    let messages = |messages: Value| json!({"messages": messages, "max_tokens": 1, "truncate_prompt_tokens": 9});
    let user = |content: Value| messages(json!([{"role": "user", "content": content}]));
    let deep = (0..100).fold(json!(1), |value, _| json!({"a": value}));
    let call = |arguments: Value| {
        messages(json!([
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": null, "tool_calls":
                [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]},
            {"role": "tool", "content": "x"}
        ]))
    };
    let mut setup = Setup::default();
    setup.server.max_body_bytes = 32 << 20;
    let cases = vec![
        (CHAT, messages(json!([])), Some("messages")),
        (CHAT, messages(json!({})), Some("messages")),
        (CHAT, messages(json!([null])), Some("messages")),
        (CHAT, messages(json!([{"content": "a"}])), Some("messages.0.role")),
        (
            CHAT,
            messages(json!([{"role": 1, "content": "a"}])),
            Some("messages.0.role"),
        ),
        (CHAT, messages(json!([{"role": "wizard", "content": "a"}])), None),
        (CHAT, user(Value::Null), None),
        (CHAT, user(json!(5)), Some("messages.0.content")),
        (
            CHAT,
            user(json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])),
            None,
        ),
        (
            CHAT,
            user(json!([{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}])),
            Some("multimodal"),
        ),
        (CHAT, user(json!([5])), Some("messages.0.content.0")),
        (
            CHAT,
            messages(json!(vec![json!({"role": "user", "content": "a"}); 100_000])),
            None,
        ),
        (CHAT, call(json!("{\"a\": 1}")), None),
        (CHAT, call(json!("not json")), None),
        (CHAT, call(Value::String(deep.to_string())), None),
        (CHAT, call(deep), None),
        (CHAT, call(json!(5)), Some("arguments")),
        (CHAT, json!({"messages": "a"}), Some("messages")),
        (CHAT, json!({}), Some("messages")),
    ];
    each(setup, cases).await;
}

#[tokio::test]
async fn templates_that_mean_harm() {
    let template = |template: &str| chat("chat_template", json!(template));
    let kwargs = |kwargs: Value| chat("chat_template_kwargs", kwargs);
    let mut setup = Setup::default();
    setup.chat.trust_request_template = true;
    let cases = vec![
        (
            CHAT,
            template("{% for i in range(1000000000) %}x{% endfor %}"),
            Some(""),
        ),
        (
            CHAT,
            template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
            Some(""),
        ),
        (CHAT, template("{{ 'x' * 1000000000 }}"), Some("")),
        (CHAT, template("{{ a|nosuchfilter }}"), Some("")),
        (CHAT, template("{% if %}"), Some("")),
        (CHAT, template("{{ undefined.attribute.of.nothing }}"), Some("")),
        (CHAT, template(""), Some("")),
        (CHAT, kwargs(json!({"tokenize": true})), Some("chat_template_kwargs")),
        (CHAT, kwargs(json!({"messages": []})), Some("chat_template_kwargs")),
        (CHAT, kwargs(json!({"conversation": []})), Some("chat_template_kwargs")),
        (CHAT, kwargs(json!({"tools": []})), Some("chat_template_kwargs")),
        (
            CHAT,
            kwargs(json!({"chat_template": "x"})),
            Some("chat_template_kwargs"),
        ),
        (CHAT, kwargs(json!({"documents": 5})), Some("chat_template_kwargs")),
        (
            CHAT,
            kwargs(json!({"add_generation_prompt": false, "range": 5, "raise_exception": 1})),
            None,
        ),
        (CHAT, kwargs(json!([])), Some("chat_template_kwargs")),
    ];
    each(setup, cases).await;
    let untrusting = vec![
        (CHAT, template("x"), Some("--trust-request-chat-template")),
        (
            CHAT,
            kwargs(json!({"chat_template": "x"})),
            Some("--trust-request-chat-template"),
        ),
    ];
    each(Setup::default(), untrusting).await;
}
