//! Whole bodies and streams of `/v1/responses` and what is below it.

use insta::assert_snapshot;
use serde_json::json;

use super::*;
use crate::step::ExecutorError;

const RESPONSES: &str = "/v1/responses";

fn ask(extra: &str) -> String {
    format!(r#"{{"input":"Say hello"{extra}}}"#)
}

/// A server that reads reasoning and tool calls.
fn assistant(reply: &str) -> Setup {
    let mut setup = Setup::replying(reply);
    setup.chat.reasoning_parser = ParserChoice::Named("qwen3".into());
    setup.chat.tool_parser = ParserChoice::Named("lfm2".into());
    setup
}

/// A server that stores responses.
fn storing(reply: &str) -> Server {
    let mut setup = assistant(reply);
    setup.server.responses_store = true;
    setup.start()
}

/// The text with times and ids replaced.
fn stable(text: &str) -> String {
    let text = replace_run(text, "\"created_at\":", |c| c.is_ascii_digit(), "0");
    ["resp_", "rs_", "msg_", "fc_", "call_"]
        .iter()
        .fold(text, |text, prefix| {
            replace_run(&text, &format!(":\"{prefix}"), |c| c.is_ascii_hexdigit(), "X")
        })
}

fn events(text: &str) -> Vec<Value> {
    text.split("\n\n")
        .filter(|frame| !frame.is_empty())
        .map(|frame| {
            let (name, data) = frame.split_once('\n').unwrap();
            let event: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
            assert_eq!(name.strip_prefix("event: ").unwrap(), event["type"]);
            event
        })
        .collect()
}

/// A stream, one line per event, without the responses that three of them carry.
fn outline(text: &str) -> String {
    let mut out = String::new();
    for mut event in events(text) {
        if let Some(response) = event.get_mut("response") {
            *response = response["status"].take();
        }
        out += &stable(&event.to_string());
        out.push('\n');
    }
    out
}

/// The items of a response without their ids.
fn items(response: &Value) -> Value {
    let mut items = response["output"].clone();
    for item in items.as_array_mut().unwrap() {
        for id in ["id", "call_id"] {
            item.as_object_mut().unwrap().remove(id);
        }
    }
    items
}

const TOOLS: &str = r#","tools":[{"type":"function","name":"ping","parameters":{"type":"object"}}]"#;
const CALL: &str = "<think>hm</think>Now <|tool_call_start|>[ping(host='a')]<|tool_call_end|>";
/// Never stops by itself.
const ENDLESS: &str = r#","ignore_eos":true"#;

#[tokio::test]
async fn a_whole_response() {
    let server = Setup::default().start();
    let reply = server
        .post(RESPONSES, &ask(r#","metadata":{"a":"b"},"temperature":0"#))
        .await;
    assert_eq!(reply.status, 200);
    assert_snapshot!(stable(&reply.text));
}

#[tokio::test]
async fn a_streamed_response() {
    let server = Setup::replying("Hi").start();
    server.control.deliver_one_by_one();
    let reply = server.post(RESPONSES, &ask(r#","stream":true"#)).await;
    assert_eq!(reply.headers["content-type"], "text/event-stream; charset=utf-8");
    assert_snapshot!(stable(&reply.text));
}

#[tokio::test]
async fn reasoning_and_calls_of_a_whole_response() {
    let server = assistant(CALL).start();
    let reply = server.post(RESPONSES, &ask(TOOLS)).await;
    assert_snapshot!(stable(&reply.json()["output"].to_string()));
}

#[tokio::test]
async fn reasoning_and_calls_of_a_stream() {
    let server = assistant(CALL).start();
    server.control.deliver_one_by_one();
    let reply = server.post(RESPONSES, &ask(&format!(r#"{TOOLS},"stream":true"#))).await;
    assert_snapshot!(outline(&reply.text));
}

#[tokio::test]
async fn a_stream_ends_with_the_whole_response() {
    for reply in ["Hello there", "", CALL, "<think>so</think>", "<think>a</think>\n\nb"] {
        let server = assistant(reply).start();
        let whole = server.post(RESPONSES, &ask(TOOLS)).await.json();
        let stream = server.post(RESPONSES, &ask(&format!(r#"{TOOLS},"stream":true"#))).await;
        let events = events(&stream.text);
        for (number, event) in events.iter().enumerate() {
            assert_eq!(event["sequence_number"], number);
        }
        let last = &events[events.len() - 1];
        assert_eq!(last["type"], "response.completed");
        // A stream cannot know that the text before a call ends with it.
        let text = items(&last["response"]).to_string().replace("Now ", "Now");
        assert_eq!(text, items(&whole).to_string(), "{reply}");
        assert_eq!(
            last["response"]["usage"]["output_tokens_details"],
            whole["usage"]["output_tokens_details"]
        );
        let done: Vec<&Value> = events
            .iter()
            .filter(|event| event["type"] == "response.output_item.done")
            .map(|event| &event["item"])
            .collect();
        assert_eq!(json!(done), last["response"]["output"]);
    }
}

#[tokio::test]
async fn an_answer_that_was_cut_is_incomplete() {
    let server = Setup::default().start();
    let cut = server.post(RESPONSES, &ask(r#","max_output_tokens":1"#)).await.json();
    assert_eq!(cut["status"], "incomplete");
    assert_eq!(cut["incomplete_details"], json!({"reason": "max_output_tokens"}));
    assert_eq!(cut["max_output_tokens"], 1);
    let stream = server
        .post(RESPONSES, &ask(r#","max_output_tokens":1,"stream":true"#))
        .await;
    assert_eq!(events(&stream.text).last().unwrap()["type"], "response.incomplete");
    let room = server
        .post(RESPONSES, &ask(r#","max_output_tokens":100000"#))
        .await
        .json();
    let prompt_tokens = room["usage"]["input_tokens"].as_u64().unwrap();
    assert_eq!(room["max_output_tokens"], MAX_MODEL_LEN as u64 - prompt_tokens);
}

#[tokio::test]
async fn logprobs_are_included_on_request() {
    let server = Setup::replying("Hi").start();
    let asked = r#","include":["message.output_text.logprobs"],"top_logprobs":1"#;
    let whole = server.post(RESPONSES, &ask(asked)).await.json();
    let logprobs = whole["output"][0]["content"][0]["logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), 3);
    assert_eq!(logprobs[0]["top_logprobs"][0]["token"], logprobs[0]["token"]);
    let stream = server.post(RESPONSES, &ask(&format!(r#"{asked},"stream":true"#))).await;
    let delta = events(&stream.text)
        .into_iter()
        .find(|event| event["type"] == "response.output_text.delta")
        .unwrap();
    assert_eq!(delta["logprobs"][0], logprobs[0]);
}

#[tokio::test]
async fn instructions_items_and_tools_make_the_prompt_of_a_chat() {
    let server = assistant("Hi").start();
    let body = json!({
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Ping a"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "function_call", "call_id": "c", "name": "ping", "arguments": "{\"host\": \"a\"}"},
            {"type": "function_call_output", "call_id": "c", "output": "up"},
        ],
        "tools": [{"type": "function", "name": "ping", "parameters": {"type": "object"}}],
    });
    let chat = json!({
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Ping a"},
            {"role": "assistant", "thinking": "hm", "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "ping", "arguments": "{\"host\": \"a\"}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": "up"},
        ],
        "tools": [{"type": "function", "function": {"name": "ping", "parameters": {"type": "object"}}}],
    });
    let response = server.post(RESPONSES, &body.to_string()).await.json();
    let chat = server.post("/v1/chat/completions", &chat.to_string()).await.json();
    assert_eq!(response["usage"]["input_tokens"], chat["usage"]["prompt_tokens"]);
}

#[tokio::test]
async fn errors_name_the_field() {
    let server = Setup::default().start();
    let mut bodies = String::new();
    for extra in [
        r#","model":"nope""#,
        r#","temperature":-1"#,
        r#","background":true"#,
        r#","previous_response_id":"resp_none""#,
        r#","prompt":{"id":"p"}"#,
        r#","input":[{"type":"item_reference","id":"x"}]"#,
        r#","tools":[{"type":"web_search"}]"#,
        r#","tool_choice":"required""#,
        r#","watermarking":true"#,
        r#","input":[{"role":"user","content":[{"type":"input_image","image_url":"http://x"}]}]"#,
    ] {
        let reply = server.post(RESPONSES, &ask(extra)).await;
        bodies += &format!("{extra} {}\n{}\n", reply.status.as_u16(), reply.text);
    }
    assert_snapshot!(bodies);
}

#[tokio::test]
async fn a_broken_stream_ends_with_a_failed_response() {
    let server = Setup::default().start();
    server.control.fail_next(ExecutorError {
        message: "kernel attention failed".into(),
        fatal: true,
    });
    let reply = server.post(RESPONSES, &ask(r#","stream":true"#)).await;
    let last = events(&reply.text).pop().unwrap();
    assert_eq!(last["type"], "response.failed");
    assert_eq!(last["response"]["status"], "failed");
    assert_eq!(last["response"]["error"]["code"], "server_error");
}

#[tokio::test]
async fn without_the_flag_nothing_is_stored() {
    let server = Setup::default().start();
    let id = server.post(RESPONSES, &ask(r#","store":true"#)).await.json()["id"].clone();
    let reply = server.get(&format!("{RESPONSES}/{}", id.as_str().unwrap())).await;
    assert_eq!(
        reply.error(),
        (404, "invalid_request_error".into(), "response_id".into())
    );
}

#[tokio::test]
async fn a_stored_response_is_found_and_continued() {
    let server = storing(CALL);
    for streams in [false, true] {
        let first = server
            .post(
                RESPONSES,
                &ask(&format!(r#"{TOOLS},"instructions":"Be brief.","stream":{streams}"#)),
            )
            .await;
        let first = match streams {
            true => events(&first.text).pop().unwrap()["response"].clone(),
            false => first.json(),
        };
        let id = first["id"].as_str().unwrap();
        assert_eq!(server.get(&format!("{RESPONSES}/{id}")).await.json(), first);
        let call_id = first["output"][2]["call_id"].clone();
        let result = json!({"type": "function_call_output", "call_id": call_id, "output": "up"});
        let continued = json!({"previous_response_id": id, "input": [result]});
        let mut whole = vec![json!({"role": "user", "content": "Say hello"})];
        whole.extend(first["output"].as_array().unwrap().iter().cloned());
        whole.push(result);
        let whole = json!({"input": whole, "store": false});
        let continued = server.post(RESPONSES, &continued.to_string()).await.json();
        let whole = server.post(RESPONSES, &whole.to_string()).await.json();
        assert_eq!(continued["previous_response_id"], id);
        assert_eq!(continued["usage"]["input_tokens"], whole["usage"]["input_tokens"]);
        let unknown = server
            .get(&format!("{RESPONSES}/{}", whole["id"].as_str().unwrap()))
            .await;
        assert_eq!(unknown.status, 404);
    }
    let taken = server.post(RESPONSES, &ask(r#","request_id":"mine""#)).await;
    assert_eq!(taken.json()["id"], "mine");
    let again = server.post(RESPONSES, &ask(r#","request_id":"mine""#)).await;
    assert_eq!(again.error().2, "request_id");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_response_in_the_background_is_polled() {
    let server = storing("Hi");
    let queued = server.post(RESPONSES, &ask(r#","background":true"#)).await.json();
    assert_eq!((&queued["status"], &queued["output"]), (&json!("queued"), &json!([])));
    let path = format!("{RESPONSES}/{}", queued["id"].as_str().unwrap());
    let mut found = server.get(&path).await.json();
    for _ in 0..500 {
        if found["status"] != "queued" && found["status"] != "in_progress" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        found = server.get(&path).await.json();
    }
    assert_eq!(found["status"], "completed");
    assert_eq!(found["usage"]["output_tokens"], 3);
    let streamed = server.get(&format!("{path}?stream=true")).await;
    assert_eq!(streamed.error().2, "response_id");
    let refused = server.post(&format!("{path}/cancel"), "").await;
    assert_eq!(
        refused.error(),
        (400, "invalid_request_error".into(), "response_id".into())
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_from_the_background_is_replayed() {
    let server = storing("Hi");
    let stream = server
        .post(RESPONSES, &ask(r#","background":true,"stream":true"#))
        .await;
    let first = events(&stream.text);
    let id = first[0]["response"]["id"].as_str().unwrap();
    let again = server.get(&format!("{RESPONSES}/{id}?stream=true")).await;
    assert_eq!(again.text, stream.text);
    let rest = server
        .get(&format!("{RESPONSES}/{id}?stream=true&starting_after=1"))
        .await;
    assert_eq!(events(&rest.text), first[2..]);
    let beyond = server
        .get(&format!("{RESPONSES}/{id}?stream=true&starting_after=999"))
        .await;
    assert_eq!(beyond.text, "");
    let malformed = server.get(&format!("{RESPONSES}/{id}?starting_after=x")).await;
    assert_eq!(malformed.error().2, "query.starting_after");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_response_frees_the_engine() {
    let server = storing("Hi");
    server.control.set_step_delay(Duration::from_millis(20));
    let queued = server
        .post(RESPONSES, &ask(&format!(r#"{ENDLESS},"background":true"#)))
        .await
        .json();
    server.running(1).await;
    let path = format!("{RESPONSES}/{}", queued["id"].as_str().unwrap());
    let early = json!({"input": "x", "previous_response_id": queued["id"]});
    assert_eq!(
        server.post(RESPONSES, &early.to_string()).await.error().2,
        "previous_response_id"
    );
    let cancelled = server.post(&format!("{path}/cancel"), "").await;
    assert_eq!(
        (cancelled.status.as_u16(), &cancelled.json()["status"]),
        (200, &json!("cancelled"))
    );
    server.idle().await;
    assert_eq!(server.get(&path).await.json()["status"], "cancelled");
}
