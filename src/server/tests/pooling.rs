//! The pooling endpoints, on a scripted engine whose hidden states are hashes.

use serde_json::json;

use super::*;
use crate::config::{Dimensions, Pooling};

pub fn last() -> PoolingConfig {
    PoolingConfig {
        pooling: Pooling::Last,
        normalize: true,
        dimensions: Dimensions::Full,
    }
}

fn server(change: impl FnOnce(&mut PoolingConfig)) -> Server {
    let mut pooling = last();
    change(&mut pooling);
    let mut setup = Setup {
        pooling: Some(pooling),
        ..Setup::default()
    };
    setup.chat.template = Some("{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}".into());
    setup.start()
}

fn vector(value: &Value) -> Vec<f32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|value| value.as_f64().unwrap() as f32)
        .collect()
}

fn length(vector: &[f32]) -> f32 {
    vector.iter().map(|value| value * value).sum::<f32>().sqrt()
}

#[tokio::test]
async fn whole_bodies() {
    let server = server(|_| {});
    let cases = [
        ("embeddings", "/v1/embeddings", r#"{"input":["one text","another"]}"#),
        (
            "pooling",
            "/pooling",
            r#"{"input":[5,6],"model":"alias","use_activation":false}"#,
        ),
        ("score", "/v1/score", r#"{"text_1":"a query","text_2":["one","two"]}"#),
        (
            "rerank",
            "/v2/rerank",
            r#"{"query":"a query","documents":["one","two","three"],"top_n":2}"#,
        ),
        (
            "cohere",
            "/v2/embed",
            r#"{"texts":["one"],"embedding_types":["float","binary","ubinary","base64"]}"#,
        ),
    ];
    for (name, path, body) in cases {
        let reply = server.post(path, body).await;
        assert_eq!(reply.status, 200, "{path}: {}", reply.text);
        insta::assert_snapshot!(name, reply.stable());
    }
}

#[tokio::test]
async fn embeddings_follow_their_options() {
    let server = server(|_| {});
    let embed = async |extra: &str| {
        let body = format!(r#"{{"input":[1,2,3,4]{extra}}}"#);
        server.post("/v1/embeddings", &body).await
    };
    let plain = vector(&embed("").await.json()["data"][0]["embedding"]);
    assert!((length(&plain) - 1.0).abs() < 1e-5);
    let raw = vector(&embed(r#","use_activation":false"#).await.json()["data"][0]["embedding"]);
    assert!(length(&raw) > 2.0);
    let cut = embed(r#","truncate_prompt_tokens":2"#).await.json();
    assert_eq!(cut["usage"]["prompt_tokens"], 2);
    let other_end = embed(r#","truncate_prompt_tokens":2,"truncation_side":"left""#)
        .await
        .json();
    assert_ne!(cut["data"][0]["embedding"], other_end["data"][0]["embedding"]);

    let text = embed(r#","encoding_format":"base64""#).await.json()["data"][0]["embedding"].clone();
    let bytes = embed(r#","encoding_format":"bytes""#).await;
    let metadata: Value = serde_json::from_str(bytes.headers["metadata"].to_str().unwrap()).unwrap();
    assert_eq!(metadata["data"][0]["shape"], json!([8]));
    assert_eq!(
        (&metadata["data"][0]["start"], &metadata["data"][0]["end"]),
        (&json!(0), &json!(32))
    );
    assert_eq!(bytes.headers["content-type"], "application/octet-stream");
    use base64::Engine;
    let decoded = base64::prelude::BASE64_STANDARD.decode(text.as_str().unwrap()).unwrap();
    let floats: Vec<f32> = decoded
        .chunks(4)
        .map(|four| f32::from_le_bytes(four.try_into().unwrap()))
        .collect();
    assert_eq!(floats, plain);
    let only = embed(r#","encoding_format":"bytes_only","embed_dtype":"float16""#).await;
    assert!(only.headers.get("metadata").is_none() && only.headers["content-length"] == "16");
}

#[tokio::test]
async fn conversations_are_rendered_and_means_differ() {
    let server = server(|pooling| pooling.pooling = Pooling::Mean);
    let one = r#"{"messages":[{"role":"user","content":"hi"}]}"#;
    let several = r#"{"messages":[[{"role":"user","content":"hi"}],[{"role":"user","content":"ho"}]]}"#;
    let one = server.post("/v1/embeddings", one).await.json();
    let several = server.post("/v1/embeddings", several).await.json();
    assert_eq!(several["data"].as_array().unwrap().len(), 2);
    assert_eq!(one["data"][0]["embedding"], several["data"][0]["embedding"]);
    let text = server
        .post("/v1/embeddings", r#"{"input":"user: hi;","add_special_tokens":false}"#)
        .await
        .json();
    assert_eq!(one["data"][0]["embedding"], text["data"][0]["embedding"]);
}

#[tokio::test]
async fn a_model_of_many_sizes_gives_the_size_asked() {
    let server = server(|pooling| pooling.dimensions = Dimensions::Listed(vec![4]));
    let reply = server
        .post("/v1/embeddings", r#"{"input":[1,2],"dimensions":4}"#)
        .await
        .json();
    let vector = vector(&reply["data"][0]["embedding"]);
    assert!(vector.len() == 4 && (length(&vector) - 1.0).abs() < 1e-5);
    let error = server
        .post("/v1/embeddings", r#"{"input":[1,2],"dimensions":5}"#)
        .await
        .error();
    assert_eq!(error, (400, "BadRequestError".into(), json!("dimensions")));
}

#[tokio::test]
async fn what_does_not_fit_is_named() {
    let server = server(|_| {});
    let long = format!(r#"{{"input":[{}1]}}"#, "1,".repeat(512));
    let cases = [
        ("/v1/embeddings", "{}", json!("body.input")),
        ("/v1/embeddings", r#"{"input":[]}"#, json!("input")),
        (
            "/v1/embeddings",
            r#"{"input":"","add_special_tokens":false}"#,
            Value::Null,
        ),
        ("/v1/embeddings", r#"{"input":{"a":1}}"#, json!("body.input")),
        ("/v1/embeddings", r#"{"input":[99999]}"#, Value::Null),
        ("/v1/embeddings", long.as_str(), json!("input_tokens")),
        ("/v1/embeddings", r#"{"input":"a","dimensions":4}"#, json!("dimensions")),
        (
            "/v1/embeddings",
            r#"{"input":"a","encoding_format":"hex"}"#,
            json!("body.encoding_format"),
        ),
        (
            "/v1/embeddings",
            r#"{"input":"a","embed_dtype":"fp8_e4m3"}"#,
            json!("embed_dtype"),
        ),
        (
            "/v1/embeddings",
            r#"{"input":"a","truncate_prompt_tokens":513}"#,
            json!("truncate_prompt_tokens"),
        ),
        (
            "/v1/embeddings",
            r#"{"input":"a","padding":"max_length"}"#,
            json!("padding"),
        ),
        (
            "/v1/embeddings",
            r#"{"input":"a","cache_salt":""}"#,
            json!("cache_salt"),
        ),
        ("/v1/embeddings", r#"{"input":"a","model":"other"}"#, json!("model")),
        ("/v1/embeddings", r#"{"messages":[[],"x"]}"#, json!("messages")),
        ("/pooling", r#"{"input":"a","dimensions":4}"#, json!("dimensions")),
        ("/pooling", r#"{"input":"a","task":"token_embed"}"#, json!("task")),
        ("/score", "{}", json!("body.queries")),
        ("/score", r#"{"text_1":["a","b"],"text_2":["c","d","e"]}"#, Value::Null),
        ("/score", r#"{"text_1":[],"text_2":"c"}"#, Value::Null),
        ("/score", r#"{"text_1":{"content":[]},"text_2":"c"}"#, json!("text_1")),
        (
            "/score",
            r#"{"text_1":"a","text_2":"c","max_tokens_per_doc":-1}"#,
            json!("max_tokens_per_doc"),
        ),
        ("/rerank", r#"{"documents":["a"]}"#, json!("body.query")),
        ("/rerank", r#"{"query":["a"],"documents":["a"]}"#, json!("query")),
        (
            "/rerank",
            r#"{"query":"a","documents":["a"],"top_n":-1}"#,
            json!("top_n"),
        ),
        ("/v2/embed", "{}", Value::Null),
        ("/v2/embed", r#"{"images":["x"]}"#, json!("images")),
        (
            "/v2/embed",
            r#"{"texts":["x"],"input_type":"query"}"#,
            json!("input_type"),
        ),
        (
            "/v2/embed",
            r#"{"texts":["one two three four"],"truncate":"NONE","max_tokens":1}"#,
            json!("truncate"),
        ),
    ];
    for (path, body, param) in cases {
        let reply = server.post(path, body).await;
        assert!(
            matches!(reply.status.as_u16(), 400 | 404),
            "{path} {body}: {}",
            reply.text
        );
        assert_eq!(reply.error().2, param, "{path} {body}: {}", reply.text);
    }
    server.idle().await;
    assert_eq!(server.post("/v1/embeddings", r#"{"input":"a"}"#).await.status, 200);
    assert_eq!(server.post("/v1/completions", r#"{"prompt":"a"}"#).await.status, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disconnected_client_frees_what_runs() {
    let server = server(|_| {});
    server.control.hold();
    let body = format!(r#"{{"input":[{}[1]]}}"#, "[1,2,3],".repeat(40));
    let answer = tokio::spawn(server.router.clone().oneshot(post("/v1/embeddings", &body)));
    tokio::time::sleep(Duration::from_millis(50)).await;
    answer.abort();
    server.control.release();
    server.idle().await;
}
