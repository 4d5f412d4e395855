//! Tokens in and out, rendering, batches, `/invocations` and `/generative_scoring`.

use serde_json::json;

use super::*;

const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}";

fn setup() -> Setup {
    let mut setup = Setup::replying("Hello there");
    setup.server.routes.scale_out = true;
    setup.chat.template = Some(TEMPLATE.into());
    setup
}

#[tokio::test]
async fn tokens_in_tokens_out() {
    let server = setup().start();
    let whole = server
        .post(
            "/inference/v1/generate",
            r#"{"token_ids":[5,6],"sampling_params":{"logprobs":1,"max_tokens":20},"return_token_ids":true}"#,
        )
        .await;
    assert_eq!(whole.status, 200, "{}", whole.text);
    insta::assert_snapshot!("generate_tokens", whole.stable());
    let text = server
        .post(
            "/inference/v1/generate",
            r#"{"token_ids":[5,6],"sampling_params":{},"output_mode":"text"}"#,
        )
        .await;
    insta::assert_snapshot!("generate_text", text.stable());
    let stream = server
        .post(
            "/inference/v1/generate",
            r#"{"token_ids":[5,6],"sampling_params":{},"stream":true,"stream_options":{"include_usage":true}}"#,
        )
        .await;
    assert_eq!(stream.headers["content-type"], "text/event-stream; charset=utf-8");
    let frames: Vec<&str> = stream
        .text
        .split("\n\n")
        .map(|frame| frame.trim_start_matches("data: "))
        .collect();
    let [chunks @ .., usage, "[DONE]", ""] = &frames[..] else {
        panic!("{}", stream.text);
    };
    let chunks: Vec<Value> = chunks
        .iter()
        .map(|chunk| serde_json::from_str(chunk).unwrap())
        .collect();
    let choices: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]).collect();
    let ids: Vec<&Value> = choices
        .iter()
        .flat_map(|choice| choice["token_ids"].as_array().unwrap())
        .collect();
    assert_eq!(json!(ids), text.json()["choices"][0]["token_ids"]);
    assert_eq!(choices.last().unwrap()["finish_reason"], "stop");
    assert_eq!(chunks[0]["usage"], Value::Null);
    insta::assert_snapshot!(
        usage,
        @r#"{"request_id":"generate-tokens-test","usage":{"prompt_tokens":2,"total_tokens":7,"completion_tokens":5},"output_mode":"tokens","choices":[]}"#
    );
}

#[tokio::test]
async fn what_is_rendered_generates_what_was_asked() {
    let server = setup().start();
    let chat = r#"{"messages":[{"role":"user","content":"hi"}],"max_tokens":7,"stop":["x"],"seed":3}"#;
    let rendered = server.post("/v1/chat/completions/render", chat).await;
    assert_eq!(rendered.status, 200, "{}", rendered.text);
    insta::assert_snapshot!("render_chat", rendered.stable());
    let tokens = server.post("/inference/v1/generate", &rendered.text).await.json();
    let answer = server.post("/v1/chat/completions", chat).await.json();
    assert_eq!(tokens["usage"]["prompt_tokens"], answer["usage"]["prompt_tokens"]);
    assert_eq!(
        tokens["usage"]["completion_tokens"],
        answer["usage"]["completion_tokens"]
    );

    let completions = server
        .post("/v1/completions/render", r#"{"prompt":["a",[5,6]]}"#)
        .await
        .json();
    assert_eq!(completions.as_array().unwrap().len(), 2);
    assert_eq!(completions[1]["token_ids"], json!([5, 6]));
    assert_eq!(completions[0]["sampling_params"]["max_tokens"], 16);
}

#[tokio::test]
async fn scale_out_refuses_by_name() {
    let server = setup().start();
    let path = "/inference/v1/generate";
    let cases = [
        (path, "{}", 400, json!("body.token_ids")),
        (path, r#"{"token_ids":[1]}"#, 400, json!("body.sampling_params")),
        (path, r#"{"token_ids":[],"sampling_params":{}}"#, 400, Value::Null),
        (
            path,
            r#"{"token_ids":[-1],"sampling_params":{}}"#,
            400,
            json!("token_ids"),
        ),
        (
            path,
            r#"{"token_ids":[1],"sampling_params":{"temperature":9}}"#,
            400,
            json!("temperature"),
        ),
        (
            path,
            r#"{"token_ids":[1],"sampling_params":{"flat_logprobs":true}}"#,
            400,
            json!("flat_logprobs"),
        ),
        (
            path,
            r#"{"token_ids":[1],"sampling_params":{},"features":{}}"#,
            400,
            json!("features"),
        ),
        (
            path,
            r#"{"token_ids":[1],"sampling_params":{},"output_mode":"derender"}"#,
            400,
            json!("output_mode"),
        ),
        ("/v1/chat/completions/derender", "{}", 501, Value::Null),
        (
            "/v1/completions/render",
            r#"{"prompt":"a","use_beam_search":true}"#,
            400,
            json!("use_beam_search"),
        ),
        ("/inference/v1/abort_requests", "{}", 400, Value::Null),
    ];
    for (path, body, status, param) in cases {
        let reply = server.post(path, body).await;
        let (found, _, found_param) = reply.error();
        assert_eq!((found, found_param), (status, param), "{path} {body}: {}", reply.text);
    }
    let closed = Setup::default().start();
    let body = r#"{"token_ids":[1],"sampling_params":{}}"#;
    insta::assert_snapshot!(
        closed.post(path, body).await.text,
        @r#"{"error":{"message":"This route needs --enable-scale-out","type":"PermissionDeniedError","param":null,"code":403}}"#
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_only_aborts_by_id() {
    let mut setup = setup();
    setup.server.routes.scale_out = false;
    setup.server.routes.tokens_only = true;
    let server = Arc::new(setup.start());
    server.control.set_step_delay(Duration::from_millis(5));
    for path in ["/abort_requests", "/inference/v1/abort_requests"] {
        let answer = tokio::spawn({
            let server = server.clone();
            let body = r#"{"token_ids":[1],"sampling_params":{"ignore_eos":true,"max_tokens":400}}"#;
            async move { server.post("/inference/v1/generate", body).await }
        });
        server.running(1).await;
        let aborted = server.post(path, r#"{"request_ids":["generate-tokens-test"]}"#).await;
        assert_eq!((aborted.status.as_u16(), aborted.text.as_str()), (200, ""), "{path}");
        assert_eq!(answer.await.unwrap().json()["choices"][0]["finish_reason"], "abort");
        server.idle().await;
    }
}

#[tokio::test]
async fn a_batch_has_one_choice_for_each_conversation() {
    let server = setup().start();
    let body = r#"{"messages":[[{"role":"user","content":"a"}],[{"role":"user","content":"b b"}]],"max_tokens":3}"#;
    let reply = server.post("/v1/chat/completions/batch", body).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    insta::assert_snapshot!("batch", reply.stable());
    let message = r#"[{"role":"user","content":"a"}]"#;
    for (body, param) in [
        ("{}".to_owned(), json!("body.messages")),
        (r#"{"messages":[]}"#.to_owned(), json!("messages")),
        (r#"{"messages":[{"role":"user"}]}"#.to_owned(), json!("body.messages.0")),
        (format!(r#"{{"messages":[{message}],"stream":true}}"#), json!("stream")),
        (format!(r#"{{"messages":[{message}],"n":2}}"#), json!("n")),
        (format!(r#"{{"messages":[{message}],"tools":[]}}"#), json!("tools")),
        (
            format!(r#"{{"messages":[{message}],"temperature":"hot"}}"#),
            json!("body.temperature"),
        ),
        (format!(r#"{{"messages":[{message}],"model":"x"}}"#), json!("model")),
    ] {
        let reply = server.post("/v1/chat/completions/batch", &body).await;
        assert_eq!(reply.error().2, param, "{body}: {}", reply.text);
    }
    server.idle().await;
}

#[tokio::test]
async fn invocations_go_where_the_body_belongs() {
    let server = setup().start();
    let chat = server
        .post("/invocations", r#"{"messages":[{"role":"user","content":"a"}]}"#)
        .await
        .json();
    assert_eq!(chat["object"], "chat.completion");
    let completion = server.post("/invocations", r#"{"prompt":"a","stream":true}"#).await;
    assert!(completion.text.contains(r#""object":"text_completion""#) && completion.text.ends_with("[DONE]\n\n"));
    let wrong = server
        .post("/invocations", r#"{"prompt":"a","temperature":"hot"}"#)
        .await;
    assert_eq!(wrong.error().2, "body.temperature");
    let unknown = server.post("/invocations", r#"{"input":"a"}"#).await;
    assert_eq!(unknown.error(), (400, "BadRequestError".into(), Value::Null));
    assert!(
        unknown
            .text
            .contains("Expected one of: ['ChatCompletionRequest', 'CompletionRequest']")
    );
    let named = Request::post("/invocations")
        .header("content-type", "application/json")
        .header("x-amzn-sagemaker-adapter-identifier", "alias")
        .body(Body::from(r#"{"prompt":"a"}"#))
        .unwrap();
    assert_eq!(server.send(named).await.json()["model"], "alias");

    let pooling = Setup {
        pooling: Some(pooling::last()),
        ..Setup::default()
    };
    let server = pooling.start();
    for (body, object) in [
        (r#"{"input":"a"}"#, json!("list")),
        (r#"{"text_1":"a","text_2":"b"}"#, json!("list")),
        (r#"{"query":"a","documents":["b"]}"#, Value::Null),
    ] {
        let reply = server.post("/invocations", body).await;
        assert_eq!(
            (reply.status.as_u16(), &reply.json()["object"]),
            (200, &object),
            "{body}"
        );
    }
    assert_eq!(server.post("/invocations", r#"{"prompt":"a"}"#).await.status, 400);
}

#[tokio::test]
async fn labels_are_scored() {
    let server = setup().start();
    let body = r#"{"query":"Is it?","items":["a","b"],"label_token_ids":[7,9]}"#;
    let reply = server.post("/generative_scoring", body).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let answer = reply.json();
    assert_eq!(answer["id"], "generative-scoring-test");
    assert_eq!(answer["usage"]["completion_tokens"], 2);
    for item in answer["data"].as_array().unwrap() {
        let score = item["score"].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&score), "{score}");
    }
    for (body, param) in [
        ("{}", json!("body.label_token_ids")),
        (r#"{"label_token_ids":[]}"#, json!("label_token_ids")),
        (r#"{"label_token_ids":[999999]}"#, json!("label_token_ids")),
        (r#"{"label_token_ids":[1]}"#, json!("body.query")),
        (r#"{"label_token_ids":[1],"query":"q"}"#, json!("body.items")),
        (r#"{"label_token_ids":[1],"query":"q","items":[]}"#, json!("items")),
        (r#"{"label_token_ids":[1],"query":{},"items":["a"]}"#, json!("query")),
        (r#"{"label_token_ids":[1],"query":"q","items":[7]}"#, json!("items")),
    ] {
        let reply = server.post("/generative_scoring", body).await;
        assert_eq!(reply.error().2, param, "{body}: {}", reply.text);
    }
}
