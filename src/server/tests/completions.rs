//! Whole bodies of `/v1/completions`, `/tokenize` and `/detokenize`.

use serde_json::json;

use super::*;

#[tokio::test]
async fn a_whole_answer() {
    let server = Setup::default().start();
    let reply = server
        .post(
            "/v1/completions",
            r#"{"model":"alias","prompt":"Say hello","max_tokens":"20"}"#,
        )
        .await;
    assert_eq!(reply.status, 200);
    assert_eq!(
        reply.stable(),
        concat!(
            r#"{"id":"cmpl-test","object":"text_completion","created":0,"model":"alias","choices":[{"index":0,"#,
            r#""text":"Hello there","logprobs":null,"finish_reason":"stop","stop_reason":null,"token_ids":null,"#,
            r#""prompt_logprobs":null,"prompt_token_ids":null,"routed_experts":null,"weight_versions":null}],"#,
            r#""service_tier":null,"system_fingerprint":"vllm-test","usage":{"prompt_tokens":6,"total_tokens":11,"#,
            r#""completion_tokens":5,"prompt_tokens_details":null,"completion_tokens_details":null},"#,
            r#""kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}"#
        )
    );
}

#[tokio::test]
async fn a_stream() {
    let server = Setup::replying("Hi").start();
    server.control.deliver_one_by_one();
    let body = r#"{"prompt":[5,6],"stream":true,"stream_options":{"include_usage":true}}"#;
    let reply = server.post("/v1/completions", body).await;
    assert_eq!(reply.headers["content-type"], "text/event-stream; charset=utf-8");
    let text = streamed_text(&reply);
    assert_eq!(text, "Hi");
    let frames: Vec<String> = reply.stable().split("\n\n").map(str::to_owned).collect();
    assert_eq!(
        frames[frames.len() - 4..],
        [
            concat!(
                r#"data: {"id":"cmpl-test","object":"text_completion","created":0,"model":"tiny","choices":[{"index":0,"#,
                r#""text":"","logprobs":null,"finish_reason":"stop","stop_reason":null,"prompt_token_ids":null,"#,
                r#""token_ids":null,"weight_versions":null}],"kv_transfer_params":null}"#
            ),
            concat!(
                r#"data: {"id":"cmpl-test","object":"text_completion","created":0,"model":"tiny","choices":[],"#,
                r#""usage":{"prompt_tokens":2,"total_tokens":5,"completion_tokens":3},"system_fingerprint":"vllm-test"}"#
            ),
            "data: [DONE]",
            ""
        ]
    );
}

#[tokio::test]
async fn a_whole_stream_with_logprobs() {
    let server = Setup::replying("Hi").start();
    server.control.deliver_one_by_one();
    let options = r#""logprobs":1,"echo":true,"stream_options":{"include_usage":true,"continuous_usage_stats":true}"#;
    let body = format!(r#"{{"prompt":[5,6],"stream":true,{options}}}"#);
    insta::assert_snapshot!(server.post("/v1/completions", &body).await.stable());
}

fn streamed_text(reply: &Reply) -> String {
    let frames = reply
        .text
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .filter(|data| *data != "[DONE]");
    frames
        .map(|data| {
            let chunk: Value = serde_json::from_str(data).unwrap();
            chunk["choices"][0]["text"].as_str().unwrap_or_default().to_owned()
        })
        .collect()
}

#[tokio::test]
async fn batches_number_their_choices_over_all_prompts() {
    let server = Setup::default().start();
    let body = r#"{"prompt":["a","b c"],"n":2,"temperature":1,"max_tokens":3,"return_token_ids":true}"#;
    let answer = server.post("/v1/completions", body).await.json();
    let choices = answer["choices"].as_array().unwrap();
    let indices: Vec<u64> = choices.iter().map(|choice| choice["index"].as_u64().unwrap()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert_eq!(choices[0]["prompt_token_ids"], choices[1]["prompt_token_ids"]);
    assert_ne!(choices[1]["prompt_token_ids"], choices[2]["prompt_token_ids"]);
    assert!(
        choices
            .iter()
            .all(|choice| choice["token_ids"].as_array().unwrap().len() == 3)
    );
    assert!(choices.iter().all(|choice| choice["finish_reason"] == "length"));
    assert_eq!(answer["usage"]["completion_tokens"], 12);
}

#[tokio::test]
async fn echo_puts_the_prompt_before_text_and_logprobs() {
    let server = Setup::replying("Hi").start();
    let body = r#"{"prompt":"Say hello","echo":true,"logprobs":1,"max_tokens":1}"#;
    let choice = server.post("/v1/completions", body).await.json()["choices"][0].clone();
    assert!(choice["text"].as_str().unwrap().starts_with("Say hello"), "{choice}");
    let logprobs = &choice["logprobs"];
    let tokens = logprobs["tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), 7);
    assert_eq!(logprobs["token_logprobs"][0], Value::Null);
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);
    assert!(logprobs["token_logprobs"][1].is_number());
    assert_eq!(logprobs["text_offset"][1], tokens[0].as_str().unwrap().chars().count());

    let body = r#"{"prompt":"Say hello","echo":true,"max_tokens":0}"#;
    let answer = server.post("/v1/completions", body).await.json();
    assert_eq!(answer["choices"][0]["text"], "Say hello");
    // One token is computed, and counted: as in vLLM, and as in the metrics.
    assert_eq!(answer["usage"]["completion_tokens"], 1);
}

#[tokio::test]
async fn stop_strings_and_truncation() {
    let server = Setup::replying("one two three").start();
    let body = r#"{"prompt":[1,2,3,4],"max_tokens":50,"stop":" two","truncate_prompt_tokens":2,"truncation_side":"left","return_token_ids":true}"#;
    let choice = server.post("/v1/completions", body).await.json()["choices"][0].clone();
    assert_eq!(choice["text"], "one");
    assert_eq!(
        (&choice["finish_reason"], &choice["stop_reason"]),
        (&json!("stop"), &json!(" two"))
    );
    assert_eq!(choice["prompt_token_ids"], json!([3, 4]));
}

#[tokio::test]
async fn text_becomes_tokens_and_back() {
    let server = Setup::default().start();
    let reply = server
        .post(
            "/tokenize",
            r#"{"prompt":"Say hello","return_token_strs":true,"add_special_tokens":false}"#,
        )
        .await;
    insta::assert_snapshot!("tokenize", reply.text);
    let answer = reply.json();
    assert_eq!(answer["max_model_len"], MAX_MODEL_LEN);
    assert_eq!(answer["count"], answer["tokens"].as_array().unwrap().len());
    assert_eq!(answer["count"], answer["token_strs"].as_array().unwrap().len());
    let body = json!({"model": "tiny", "tokens": answer["tokens"]}).to_string();
    assert_eq!(
        server.post("/detokenize", &body).await.json(),
        json!({"prompt": "Say hello"})
    );
    assert_eq!(
        server.post("/detokenize", r#"{"tokens":[99999999999]}"#).await.json(),
        json!({"prompt": ""})
    );
    assert_eq!(
        server.post("/detokenize", r#"{"tokens":[-1]}"#).await.error(),
        (400, "BadRequestError".into(), json!("tokens"))
    );
    assert_eq!(
        server.post("/tokenize", "{}").await.error(),
        (400, "Bad Request".into(), json!("body.prompt"))
    );
}
