//! Request fields, each with what it does to the answer. Whole bodies and streams are snapshots.

use serde_json::json;

use super::*;
use crate::config::{ContentFormat, Dimensions};
use crate::server::fields;
use crate::server::routes::{ROUTES, When};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn ask(extra: &str) -> String {
    format!(r#"{{"messages":[{{"role":"user","content":"Say hello"}}]{extra}}}"#)
}

/// A server that takes templates from requests.
fn trusting() -> Setup {
    let mut setup = Setup::replying("Hi");
    setup.chat.trust_request_template = true;
    setup
}

fn chunks(reply: &Reply) -> Vec<Value> {
    reply
        .text
        .lines()
        .filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok())
        .collect()
}

#[tokio::test]
async fn every_field_behaves_as_its_row_says() {
    let mut setup = trusting();
    setup.chat.reasoning_parser = ParserChoice::Named("qwen3".into());
    setup.server.routes.scale_out = true;
    let generating = setup.start();
    let mut setup = trusting();
    setup.pooling = Some(PoolingConfig {
        dimensions: Dimensions::Any,
        ..pooling::last()
    });
    let pooling = setup.start();
    let makes_vectors = |path: &str| {
        let route = ROUTES.iter().find(|route| route.path == path);
        route.is_some_and(|route| route.when == When::Pooling)
    };
    let mut wrong = Vec::new();
    for example in fields::examples() {
        let server = if makes_vectors(&example.route) {
            &pooling
        } else {
            &generating
        };
        let reply = server.post(&example.route, &example.body.to_string()).await;
        let as_said = match example.refused {
            // Anthropic's envelope names a field in the message only.
            true => reply.status == 400 && reply.text.contains(&format!("(parameter={}", example.field)),
            false => reply.status == 200,
        };
        if !as_said {
            wrong.push(format!(
                "{} {}: {} {}",
                example.route, example.field, reply.status, reply.text
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn echo_continues_the_last_message() {
    let server = Setup::replying("Hi").start();
    let body = json!({
        "messages": [{"role": "user", "content": "Say hello"}, {"role": "assistant", "content": "Well, "}],
        "echo": true, "add_generation_prompt": false, "continue_final_message": true,
        "logprobs": true, "top_logprobs": 1, "truncate_prompt_tokens": 3,
    });
    insta::assert_snapshot!("chat_echo", server.post(CHAT, &body.to_string()).await.stable());
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    let reply = server.post(CHAT, &streamed.to_string()).await;
    assert_eq!(chunks(&reply)[1]["choices"][0]["delta"], json!({"content": "Well, "}));
    // Another role's message is not repeated, but content is a text.
    let answer = server.post(CHAT, &ask(r#","echo":true"#)).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "Hi");
}

#[tokio::test]
async fn tokens_are_named_by_id_where_that_is_asked() {
    let server = Setup::replying("Hi").start();
    server.control.deliver_one_by_one();
    let body = ask(
        r#","stream":true,"logprobs":true,"top_logprobs":1,"return_token_ids":true,"return_tokens_as_token_ids":true,
           "truncate_prompt_tokens":3,"return_prompt_text":true,"chat_template_kwargs":{"enable_thinking":false}"#,
    );
    insta::assert_snapshot!("chat_token_ids_stream", server.post(CHAT, &body).await.stable());
}

#[tokio::test]
async fn completions_echo_the_prompt_once() {
    let server = Setup::replying("Hi").start();
    let body = |extra: &str| format!(r#"{{"prompt":"Say hello","echo":true,"max_tokens":2,"logprobs":1{extra}}}"#);
    insta::assert_snapshot!("completion_echo", server.post(COMPLETIONS, &body("")).await.stable());
    let streamed = server.post(COMPLETIONS, &body(r#","stream":true"#)).await;
    let first = &chunks(&streamed)[0]["choices"][0];
    assert!(first["text"].as_str().unwrap().starts_with("Say hello"), "{first}");
    assert!(
        first["prompt_token_ids"].is_array() && first["token_ids"].is_null(),
        "{first}"
    );
    let with_ids = server
        .post(COMPLETIONS, &body(r#","return_token_ids":true"#))
        .await
        .json();
    assert_eq!(with_ids["choices"][0]["text"], "Hi");

    let nothing = r#"{"prompt":"Say hello","echo":true,"max_tokens":0,"logprobs":0,"return_token_ids":true}"#;
    let answer = server.post(COMPLETIONS, nothing).await.json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["logprobs"]["tokens"].as_array().unwrap().len(), 6);
    // One token is computed, counted and listed by id, as in vLLM.
    assert_eq!(
        (&choice["text"], choice["token_ids"].as_array().unwrap().len()),
        (&json!(""), 1)
    );
    assert_eq!(answer["usage"]["completion_tokens"], 1);
}

#[tokio::test]
async fn beams_are_choices() {
    let server = Setup::replying("Hi").start();
    let body = ask(
        r#","use_beam_search":true,"n":2,"max_tokens":2,"logprobs":true,"top_logprobs":2,"return_token_ids":true,"truncate_prompt_tokens":3"#,
    );
    let reply = server.post(CHAT, &body).await;
    insta::assert_snapshot!("chat_beams", reply.stable());
    let streamed = server
        .post(CHAT, &body.replacen(r#""n":2"#, r#""n":2,"stream":true"#, 1))
        .await;
    let whole: Vec<Value> = chunks(&streamed)
        .iter()
        .filter(|chunk| !chunk["choices"][0]["finish_reason"].is_null())
        .map(|chunk| chunk["choices"][0]["delta"]["content"].clone())
        .collect();
    let choices = reply.json()["choices"].clone();
    assert_eq!(
        whole,
        [
            choices[0]["message"]["content"].clone(),
            choices[1]["message"]["content"].clone()
        ]
    );

    let body = r#"{"prompt":["a","b"],"use_beam_search":true,"n":2,"max_tokens":3,"logprobs":1,"length_penalty":0.5}"#;
    let answer = server.post(COMPLETIONS, body).await.json();
    let indices: Vec<u64> = answer["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| choice["index"].as_u64().unwrap())
        .collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert_eq!(answer["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len(), 3);
    server.idle().await;
}

#[tokio::test]
async fn a_beam_search_is_as_wide_as_logprobs_are() {
    let server = Setup::default().start();
    let body = |n: u32| format!(r#"{{"prompt":"a","use_beam_search":true,"max_tokens":1,"n":{n}}}"#);
    assert_eq!(server.post(COMPLETIONS, &body(10)).await.status, 200);
    let reply = server.post(COMPLETIONS, &body(11)).await;
    assert_eq!(reply.error(), (400, "BadRequestError".into(), json!("n")));
}

#[tokio::test]
async fn repetition_ends_an_answer() {
    let server = Setup::replying("ha ha ha ha ha ha ha ha").start();
    let extra =
        r#","repetition_detection":{"max_pattern_size":2,"min_pattern_size":1,"min_count":3},"return_token_ids":true"#;
    let chat = server.post(CHAT, &ask(extra)).await.json();
    let choice = &chat["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["stop_reason"]),
        (&json!("repetition"), &json!("repetition_detected"))
    );
    let whole = server.post(CHAT, &ask("")).await.json();
    assert!(
        choice["token_ids"].as_array().unwrap().len() < whole["usage"]["completion_tokens"].as_u64().unwrap() as usize
    );
    let completion = server
        .post(COMPLETIONS, &format!(r#"{{"prompt":"a","max_tokens":50{extra}}}"#))
        .await;
    assert_eq!(completion.json()["choices"][0]["finish_reason"], "repetition");
    let streamed = server.post(CHAT, &ask(&format!(r#"{extra},"stream":true"#))).await;
    assert_eq!(
        chunks(&streamed).last().unwrap()["choices"][0]["stop_reason"],
        "repetition_detected"
    );
}

#[tokio::test]
async fn chunks_gather_tokens() {
    let mut setup = Setup::replying("one two three four five six seven eight");
    setup.server.stream_interval = 2;
    let server = setup.start();
    server.control.deliver_one_by_one();
    for (asked, least) in [("", 2), (r#","stream_interval":4"#, 4), (r#","stream_interval":1"#, 2)] {
        let body = ask(&format!(r#","stream":true,"return_token_ids":true{asked}"#));
        let reply = server.post(CHAT, &body).await;
        let sizes: Vec<usize> = chunks(&reply)
            .iter()
            .filter_map(|chunk| Some(chunk["choices"][0]["token_ids"].as_array()?.len()))
            .collect();
        let middle = &sizes[1..sizes.len() - 1];
        assert!(
            !middle.is_empty() && middle.iter().all(|size| *size >= least),
            "{sizes:?}"
        );
        assert!(sizes[0] < least, "the first token waits for no others: {sizes:?}");
    }
}

#[tokio::test]
async fn usage_tells_what_the_prefix_cache_did() {
    let mut setup = Setup::replying("Hi");
    setup.server.prompt_tokens_details = true;
    let server = setup.start();
    let body = json!({"messages": [{"role": "user", "content": "word ".repeat(60)}]}).to_string();
    let first = server.post(CHAT, &body).await.json()["usage"].clone();
    let tokens = first["prompt_tokens"].as_u64().unwrap();
    assert_eq!(
        first["prompt_tokens_details"],
        json!({"cached_tokens": 0, "created_cache_tokens": tokens / 16 * 16, "multimodal_tokens": null})
    );
    let second = server.post(CHAT, &body).await.json()["usage"]["prompt_tokens_details"].clone();
    let cached = second["cached_tokens"].as_u64().unwrap();
    assert!(cached > 0, "{second}");
    assert_eq!(second["created_cache_tokens"], tokens / 16 * 16 - cached);
    let salted = body.replacen('{', r#"{"cache_salt":"mine","#, 1);
    let salted = server.post(CHAT, &salted).await.json()["usage"]["prompt_tokens_details"].clone();
    assert_eq!(salted["cached_tokens"], 0);
}

#[tokio::test]
async fn metrics_of_a_request_are_sent_where_the_flag_says_so() {
    let mut setup = Setup::replying("Hi");
    setup.server.per_request_metrics = true;
    let server = setup.start();
    let usage = r#","stream":true,"stream_options":{"include_usage":true}"#;
    for path in [CHAT, COMPLETIONS] {
        let request = |extra: &str| match path {
            CHAT => ask(extra),
            _ => format!(r#"{{"prompt":"a"{extra}}}"#),
        };
        let metrics = server.post(path, &request("")).await.json()["metrics"].clone();
        for name in [
            "time_to_first_token_ms",
            "generation_time_ms",
            "queue_time_ms",
            "mean_itl_ms",
            "tokens_per_second",
        ] {
            assert!(metrics[name].as_f64().unwrap() >= 0.0, "{path} {name}: {metrics}");
        }
        assert!(metrics["speculative_decoding"].is_null() && metrics.get("speculative_decoding").is_some());
        let streamed = server.post(path, &request(usage)).await;
        let chunks = chunks(&streamed);
        assert!(chunks.last().unwrap()["metrics"]["queue_time_ms"].is_number());
        assert!(
            chunks[..chunks.len() - 1]
                .iter()
                .all(|chunk| chunk.get("metrics").is_none())
        );
        // The times of several choices are not one request's.
        let two = server.post(path, &request(r#","n":2,"temperature":1"#)).await.json();
        assert_eq!(two["metrics"], Value::Null);
    }
}

#[tokio::test]
async fn a_messages_content_has_the_form_that_the_flag_names() {
    let template = "{% for m in messages %}{{ m.content is string }}{% for c in m.content %}{% endfor %}{% endfor %}";
    let body = ask(r#","return_prompt_text":true,"max_tokens":1"#);
    for (format, text) in [
        (None, "False"),
        (Some(ContentFormat::String), "True"),
        (Some(ContentFormat::Parts), "False"),
    ] {
        let mut setup = Setup::default();
        setup.chat.template = Some(template.into());
        setup.chat.content_format = format;
        let reply = setup.start().post(CHAT, &body).await;
        assert_eq!(reply.json()["prompt_text"], text, "{}", reply.text);
    }
}

#[tokio::test]
async fn templates_see_what_the_request_says() {
    let mut setup = trusting();
    setup.chat.reasoning_effort_map = [("high".to_owned(), "deep".to_owned())].into();
    setup.chat.template_kwargs = json!({"tone": "calm"}).as_object().unwrap().clone();
    let server = setup.start();
    let shown = |fields: &str| {
        let template = "{{ reasoning_effort }}|{{ enable_thinking }}|{{ tone }}|{% if documents %}{% for d in documents %}{{ d.text }}{% endfor %}{% endif %}";
        ask(&format!(
            r#","return_prompt_text":true,"chat_template":{}{fields}"#,
            Value::from(template)
        ))
    };
    for (fields, expected) in [
        ("", "||calm|"),
        (r#","reasoning_effort":"high""#, "deep|True|calm|"),
        (r#","reasoning_effort":"none""#, "none|False|calm|"),
        (
            r#","reasoning_effort":"low","chat_template_kwargs":{"enable_thinking":false,"reasoning_effort":"x","tone":"loud"}"#,
            "low|False|loud|",
        ),
        (r#","chat_template_kwargs":{"tone":null}"#, "||calm|"),
        (r#","documents":[{"text":"a"},{"text":"b"}]"#, "||calm|ab"),
        (r#","chat_template_kwargs":{"documents":[{"text":"c"}]}"#, "||calm|c"),
    ] {
        let answer = server.post(CHAT, &shown(fields)).await.json();
        assert_eq!(answer["prompt_text"], expected, "{fields}");
    }
}

#[tokio::test]
async fn a_chat_may_ask_for_special_tokens() {
    let server = trusting().start();
    let ids = async |extra: &str| {
        let body = ask(&format!(r#","return_token_ids":true,"chat_template":"x"{extra}"#));
        server.post(CHAT, &body).await.json()["prompt_token_ids"].clone()
    };
    let (without, with) = (ids("").await, ids(r#","add_special_tokens":true"#).await);
    assert_eq!(with.as_array().unwrap()[1..], without.as_array().unwrap()[..]);
    let cut = ids(r#","add_special_tokens":true,"truncate_prompt_tokens":1"#).await;
    assert_eq!(cut, without, "the prompt's end is kept");
}

#[tokio::test]
async fn a_long_text_may_be_cut_to_fit() {
    let server = Setup::replying("Hi").start();
    let text = "word ".repeat(20_000);
    let body = |extra: &str| {
        json!({"prompt": text})
            .to_string()
            .replacen('{', &format!("{{{extra}"), 1)
    };
    assert_eq!(
        server.post(COMPLETIONS, &body("")).await.error(),
        (400, "BadRequestError".into(), json!("input_text"))
    );
    let cut = server
        .post(COMPLETIONS, &body(r#""truncate_prompt_tokens":-1,"#))
        .await
        .json();
    assert_eq!(cut["usage"]["prompt_tokens"], MAX_MODEL_LEN - 16);
    let chat = json!({"messages": [{"role": "user", "content": text}], "truncate_prompt_tokens": 20}).to_string();
    assert_eq!(server.post(CHAT, &chat).await.json()["usage"]["prompt_tokens"], 20);
}

#[tokio::test]
async fn ids_and_priorities_come_by_header_or_body() {
    let mut setup = Setup::replying("Hi");
    setup.server.enable_request_id_headers = true;
    let server = setup.start();
    let send = |headers: &[(&str, &str)], body: &str| {
        let mut request = Request::post(CHAT).header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(Body::from(body.to_owned())).unwrap()
    };
    let body = ask(r#","request_id":"mine","priority":3"#);
    let reply = server.send(send(&[], &body)).await;
    assert_eq!(reply.json()["id"], "chatcmpl-mine");
    assert_eq!(reply.headers["x-request-id"].len(), 32);
    let reply = server
        .send(send(
            &[("x-request-id", "theirs"), ("x-vllm-priority", "no number")],
            &body,
        ))
        .await;
    assert_eq!(reply.json()["id"], "chatcmpl-theirs");
    assert_eq!(reply.headers["x-request-id"], "theirs");
}

#[tokio::test]
async fn a_thinking_budget_ends_reasoning() {
    let mut setup = Setup::replying("<think>one two three four five six</think>Seven");
    setup.chat.reasoning_parser = ParserChoice::Named("qwen3".into());
    let server = setup.start();
    let tokenized = server
        .post(
            "/tokenize",
            r#"{"prompt":"<think></think>","add_special_tokens":false}"#,
        )
        .await
        .json();
    let (open, close) = (&tokenized["tokens"][0], &tokenized["tokens"][1]);
    let free = server.post(CHAT, &ask(r#","return_token_ids":true"#)).await.json();
    for budget in [0, 1, 3] {
        let extra = format!(r#","thinking_token_budget":{budget},"return_token_ids":true"#);
        let answer = server.post(CHAT, &ask(&extra)).await.json();
        let choice = &answer["choices"][0];
        let ids = choice["token_ids"].as_array().unwrap();
        assert_eq!((&ids[0], &ids[budget + 1]), (open, close), "{ids:?}");
        assert_eq!(
            ids[..budget + 1],
            free["choices"][0]["token_ids"].as_array().unwrap()[..budget + 1]
        );
        assert_eq!(answer["usage"]["completion_tokens_details"]["reasoning_tokens"], budget);
        assert!(!choice["message"]["content"].as_str().unwrap().is_empty());
        let streamed = server.post(CHAT, &ask(&format!(r#"{extra},"stream":true"#))).await;
        let streamed: Vec<Value> = chunks(&streamed)
            .iter()
            .flat_map(|chunk| chunk["choices"][0]["token_ids"].as_array().cloned().unwrap_or_default())
            .collect();
        assert_eq!(streamed, *ids);
        let body = format!(r#"{{"prompt":"a","max_tokens":50{extra}}}"#);
        let completion = server.post(COMPLETIONS, &body).await.json();
        assert_eq!(
            completion["choices"][0]["token_ids"].as_array().unwrap()[budget + 1],
            *close
        );
    }
    // A budget that is not used up, and none.
    for extra in [r#","thinking_token_budget":100"#, r#","thinking_token_budget":-1"#] {
        let answer = server.post(CHAT, &ask(extra)).await.json();
        assert_eq!(answer["choices"][0]["message"], free["choices"][0]["message"]);
    }
    let body = ask(&format!(r#","thinking_token_budget":1,"allowed_token_ids":[{open}]"#));
    assert_eq!(
        server.post(CHAT, &body).await.error(),
        (400, "BadRequestError".into(), json!("thinking_token_budget"))
    );
    let without = Setup::default().start();
    let reply = without.post(CHAT, &ask(r#","thinking_token_budget":1"#)).await;
    assert!(
        reply.status == 400 && reply.text.contains("--reasoning-parser"),
        "{}",
        reply.text
    );
}

#[tokio::test]
async fn differences_on_purpose_hold() {
    let assistant = |reply: &str| {
        let mut setup = Setup::replying(reply);
        setup.chat.reasoning_parser = ParserChoice::Named("qwen3".into());
        setup.chat.tool_parser = ParserChoice::Named("lfm2".into());
        setup.start()
    };
    let tools = r#","tools":[{"type":"function","function":{"name":"ping","parameters":{"type":"object"}}}]"#;
    let streamed = format!(r#"{tools},"stream":true"#);
    // A call inside reasoning that is never closed is found, in whole answers and in streams.
    let server = assistant("<think>hm <|tool_call_start|>[ping(host='a')]<|tool_call_end|>");
    let message = server.post(CHAT, &ask(tools)).await.json()["choices"][0]["message"].clone();
    assert_eq!(message["tool_calls"][0]["function"]["name"], "ping");
    assert_eq!(
        (&message["reasoning"], &message["reasoning_content"]),
        (&json!("hm "), &json!("hm "))
    );
    let stream = server.post(CHAT, &ask(&streamed)).await;
    assert!(stream.text.contains(r#""name":"ping""#), "{}", stream.text);
    assert!(
        stream.text.contains(r#""finish_reason":"tool_calls""#),
        "{}",
        stream.text
    );
    // A block that is no list of calls is never lost.
    let server = assistant("<think>hm</think>So <|tool_call_start|>ping host a<|tool_call_end|>");
    let message = server.post(CHAT, &ask(tools)).await.json()["choices"][0]["message"].clone();
    assert!(
        message["content"].as_str().unwrap().contains("ping host a"),
        "{message}"
    );
    let stream = server.post(CHAT, &ask(&streamed)).await;
    let content: String = chunks(&stream)
        .iter()
        .filter_map(|chunk| Some(chunk["choices"][0]["delta"]["content"].as_str()?.to_owned()))
        .collect();
    assert!(content.contains("ping host a"), "{content}");
}
