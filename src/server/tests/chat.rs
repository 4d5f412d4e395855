//! Whole bodies of `/v1/chat/completions`.

use serde_json::json;

use super::*;

const CHAT: &str = "/v1/chat/completions";

fn ask(extra: &str) -> String {
    format!(r#"{{"messages":[{{"role":"user","content":"Say hello"}}]{extra}}}"#)
}

fn frames(reply: &Reply) -> Vec<String> {
    reply
        .stable()
        .split("\n\n")
        .filter(|frame| !frame.is_empty())
        .map(|frame| frame.to_owned())
        .collect()
}

#[tokio::test]
async fn a_whole_answer() {
    let server = Setup::default().start();
    let reply = server.post(CHAT, &ask("")).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let prompt_tokens = reply.json()["usage"]["prompt_tokens"].as_u64().unwrap();
    let expected = concat!(
        r#"{"id":"chatcmpl-test","object":"chat.completion","created":0,"model":"tiny","choices":[{"index":0,"#,
        r#""message":{"role":"assistant","content":"Hello there","refusal":null,"annotations":null,"audio":null,"#,
        r#""function_call":null,"reasoning":null,"reasoning_content":null},"logprobs":null,"finish_reason":"stop","#,
        r#""stop_reason":null,"token_ids":null,"routed_experts":null,"weight_versions":null}],"service_tier":null,"#,
        r#""system_fingerprint":"vllm-test","usage":{"prompt_tokens":PROMPT,"total_tokens":TOTAL,"completion_tokens":5,"#,
        r#""prompt_tokens_details":null,"completion_tokens_details":null},"prompt_logprobs":null,"#,
        r#""prompt_token_ids":null,"prompt_text":null,"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}"#
    );
    let expected = expected
        .replace("PROMPT", &prompt_tokens.to_string())
        .replace("TOTAL", &(prompt_tokens + 5).to_string());
    assert_eq!(reply.stable(), expected);
}

#[tokio::test]
async fn a_stream() {
    let server = Setup::replying("Hi").start();
    server.control.deliver_one_by_one();
    let reply = server.post(CHAT, &ask(r#","stream":true"#)).await;
    let frames = frames(&reply);
    let head = r#"data: {"id":"chatcmpl-test","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[{"index":0,"#;
    assert_eq!(
        frames[0],
        format!(
            "{head}{}",
            concat!(
                r#""delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"#,
                r#""prompt_token_ids":null,"prompt_text":null}"#
            )
        )
    );
    assert_eq!(
        frames[1],
        format!(
            "{head}{}",
            r#""delta":{"content":"H"},"logprobs":null,"finish_reason":null,"token_ids":null}],"kv_transfer_params":null}"#
        )
    );
    assert_eq!(
        frames[frames.len() - 2],
        format!(
            "{head}{}",
            concat!(
                r#""delta":{"content":""},"logprobs":null,"finish_reason":"stop","stop_reason":null,"token_ids":null,"#,
                r#""weight_versions":null}],"system_fingerprint":"vllm-test","kv_transfer_params":null}"#
            )
        )
    );
    assert_eq!(frames[frames.len() - 1], "data: [DONE]");
}

#[tokio::test]
async fn usage_in_streams() {
    let server = Setup::replying("Hi").start();
    let options = r#","stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":true}"#;
    let reply = server.post(CHAT, &ask(options)).await;
    let chunks: Vec<Value> = frames(&reply)
        .iter()
        .filter_map(|frame| serde_json::from_str(frame.strip_prefix("data: ")?).ok())
        .collect();
    assert_eq!(chunks[0]["usage"]["completion_tokens"], 0);
    assert!(chunks.iter().all(|chunk| chunk["usage"]["prompt_tokens"].is_u64()));
    let last = chunks.last().unwrap();
    assert_eq!(
        (&last["choices"], &last["usage"]["completion_tokens"]),
        (&json!([]), &json!(3))
    );
    assert_eq!(last["system_fingerprint"], "vllm-test");
    assert!(
        chunks[..chunks.len() - 1]
            .iter()
            .all(|chunk| chunk.get("system_fingerprint").is_none())
    );
}

#[tokio::test]
async fn logprobs_list_the_chosen_token_first() {
    let server = Setup::replying("Hi").start();
    let answer = server
        .post(CHAT, &ask(r#","logprobs":true,"top_logprobs":2"#))
        .await
        .json();
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 3);
    for entry in content {
        assert_eq!(entry["top_logprobs"][0]["token"], entry["token"]);
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 2);
        let text = entry["token"].as_str().unwrap();
        assert_eq!(entry["bytes"], json!(text.as_bytes()));
    }
    let answer = server
        .post(CHAT, &ask(r#","logprobs":true,"return_tokens_as_token_ids":true"#))
        .await
        .json();
    let first = &answer["choices"][0]["logprobs"]["content"][0];
    assert!(first["token"].as_str().unwrap().starts_with("token_id:"));
    assert_eq!(first["top_logprobs"], json!([]));
}

#[tokio::test]
async fn choices_prompts_and_their_logprobs() {
    let server = Setup::default().start();
    let body = ask(r#","n":2,"temperature":1,"prompt_logprobs":1,"return_token_ids":true,"max_completion_tokens":2"#);
    let answer = server.post(CHAT, &body).await.json();
    let ids = answer["prompt_token_ids"].as_array().unwrap();
    let positions = answer["prompt_logprobs"].as_array().unwrap();
    assert_eq!(positions.len(), ids.len());
    assert_eq!(positions[0], Value::Null);
    assert!(positions[1].get(ids[1].to_string()).is_some());
    assert_eq!(answer["choices"][1]["token_ids"].as_array().unwrap().len(), 2);
    assert_eq!(answer["choices"][1]["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 4);
}

/// A server that reads reasoning and tool calls.
fn assistant(reply: &str) -> Server {
    let mut setup = Setup::replying(reply);
    setup.chat.reasoning_parser = ParserChoice::Named("qwen3".into());
    setup.chat.tool_parser = ParserChoice::Named("lfm2".into());
    setup.start()
}

const TOOLS: &str = r#","tools":[{"type":"function","function":{"name":"ping","parameters":{"type":"object"}}}]"#;
const CALL: &str = "<think>hm</think>Now <|tool_call_start|>[ping(host='a')]<|tool_call_end|>";

#[tokio::test]
async fn reasoning_and_calls_of_a_whole_answer() {
    let server = assistant(CALL);
    let reply = server.post(CHAT, &ask(TOOLS)).await;
    let answer = reply.json();
    let choice = &answer["choices"][0];
    assert_eq!(
        serde_json::from_str::<Value>(&reply.stable()).unwrap()["choices"][0]["message"],
        json!({
            "role": "assistant", "content": "Now", "refusal": null, "annotations": null, "audio": null,
            "function_call": null,
            "tool_calls": [{"id": "chatcmpl-tool-X", "type": "function",
                "function": {"name": "ping", "arguments": "{\"host\": \"a\"}"}}],
            "reasoning": "hm", "reasoning_content": "hm",
        })
    );
    let id = choice["message"]["tool_calls"][0]["id"].as_str().unwrap();
    assert_eq!(id.len(), "chatcmpl-tool-".len() + 16);
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert!(
        answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
            .as_u64()
            .unwrap()
            > 0
    );
}

#[tokio::test]
async fn reasoning_and_calls_of_a_stream() {
    let server = assistant(CALL);
    let reply = server.post(CHAT, &ask(&format!(r#"{TOOLS},"stream":true"#))).await;
    let (mut content, mut reasoning, mut old_reasoning, mut arguments) =
        (String::new(), String::new(), String::new(), String::new());
    let (mut starts, mut finish) = (Vec::new(), Value::Null);
    for frame in frames(&reply) {
        let Some(chunk) = frame
            .strip_prefix("data: ")
            .and_then(|json| serde_json::from_str::<Value>(json).ok())
        else {
            continue;
        };
        let delta = &chunk["choices"][0]["delta"];
        content += delta["content"].as_str().unwrap_or_default();
        reasoning += delta["reasoning"].as_str().unwrap_or_default();
        old_reasoning += delta["reasoning_content"].as_str().unwrap_or_default();
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            assert_eq!(call["index"], 0);
            assert_eq!(call["id"].is_null(), call.get("type").is_none());
            starts.extend(call["function"]["name"].as_str().map(str::to_owned));
            arguments += call["function"]["arguments"].as_str().unwrap_or_default();
        }
        finish = chunk["choices"][0]["finish_reason"].clone();
    }
    assert_eq!(
        (content.trim(), reasoning.as_str(), old_reasoning.as_str()),
        ("Now", "hm", "hm")
    );
    assert_eq!(
        (starts, arguments.as_str()),
        (vec!["ping".to_owned()], r#"{"host": "a"}"#)
    );
    assert_eq!(finish, "tool_calls");
}

#[tokio::test]
async fn a_whole_stream_of_reasoning_text_and_a_call() {
    let server = assistant(CALL);
    server.control.deliver_one_by_one();
    let body = ask(&format!(
        r#"{TOOLS},"stream":true,"stream_options":{{"include_usage":true}}"#
    ));
    insta::assert_snapshot!(server.post(CHAT, &body).await.stable());
}

#[tokio::test]
async fn tool_choice_none_and_hidden_reasoning() {
    let server = assistant(CALL);
    let message = |answer: Value| answer["choices"][0]["message"].clone();
    let none = message(
        server
            .post(CHAT, &ask(&format!(r#"{TOOLS},"tool_choice":"none""#)))
            .await
            .json(),
    );
    assert!(
        none.get("tool_calls").is_none() && none["content"].as_str().unwrap().contains("ping(host='a')"),
        "{none}"
    );
    let body = ask(r#","include_reasoning":false,"logprobs":true,"return_token_ids":true"#);
    let answer = server.post(CHAT, &body).await.json();
    assert_eq!(answer["choices"][0]["message"]["reasoning"], Value::Null);
    assert_eq!(
        (&answer["choices"][0]["logprobs"], &answer["choices"][0]["token_ids"]),
        (&Value::Null, &Value::Null)
    );
    assert!(
        answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
            .as_u64()
            .unwrap()
            > 0
    );
}

#[tokio::test]
async fn tools_without_a_parser_are_refused_with_the_flags() {
    let server = Setup::default().start();
    let reply = server.post(CHAT, &ask(TOOLS)).await;
    assert_eq!(reply.error(), (400, "BadRequestError".into(), Value::Null));
    assert!(reply.text.contains("--tool-call-parser"), "{}", reply.text);
}

#[tokio::test]
async fn prompts_are_shown_cut_and_tokenized_alike() {
    let server = Setup::default().start();
    let body = ask(r#","return_token_ids":true,"return_prompt_text":true"#);
    let answer = server.post(CHAT, &body).await.json();
    let text = answer["prompt_text"].as_str().unwrap();
    assert!(
        text.contains("Say hello") && text.ends_with("<|im_start|>assistant\n"),
        "{text}"
    );
    let tokenized = server.post("/tokenize", &ask("")).await.json();
    assert_eq!(tokenized["tokens"], answer["prompt_token_ids"]);

    let cut = ask(r#","return_token_ids":true,"truncate_prompt_tokens":3,"truncation_side":"left""#);
    let answer = server.post(CHAT, &cut).await.json();
    let whole = tokenized["tokens"].as_array().unwrap();
    assert_eq!(
        answer["prompt_token_ids"].as_array().unwrap(),
        &whole[whole.len() - 3..]
    );
}
