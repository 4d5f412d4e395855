//! Whole bodies and streams of `/v1/messages` and `/v1/messages/count_tokens`.

use insta::assert_snapshot;

use super::*;
use crate::step::ExecutorError;

const MESSAGES: &str = "/v1/messages";
const COUNT: &str = "/v1/messages/count_tokens";

fn ask(extra: &str) -> String {
    format!(r#"{{"model":"tiny","max_tokens":100,"messages":[{{"role":"user","content":"Say hello"}}]{extra}}}"#)
}

/// A server that reads reasoning and tool calls.
fn assistant(reply: &str) -> Setup {
    let mut setup = Setup::replying(reply);
    setup.chat.reasoning_parser = ParserChoice::Named("qwen3".into());
    setup.chat.tool_parser = ParserChoice::Named("lfm2".into());
    setup
}

/// The body with ids and signatures replaced.
fn stable(reply: &Reply) -> String {
    replace_run(&reply.stable(), "\"signature\":\"", |c| c.is_ascii_hexdigit(), "X")
}

const TOOLS: &str = r#","tools":[{"name":"ping","description":"Ping a host","input_schema":{"properties":{"host":{"type":"string"}}}}]"#;
const CALL: &str = "<think>hm</think>Now <|tool_call_start|>[ping(host='a')]<|tool_call_end|>";

#[tokio::test]
async fn a_whole_message() {
    let server = Setup::default().start();
    let reply = server.post(MESSAGES, &ask("")).await;
    assert_eq!(reply.status, 200);
    assert_snapshot!(stable(&reply));
}

#[tokio::test]
async fn a_streamed_message() {
    let server = Setup::replying("Hi").start();
    server.control.deliver_one_by_one();
    let reply = server.post(MESSAGES, &ask(r#","stream":true"#)).await;
    assert_eq!(reply.headers["content-type"], "text/event-stream; charset=utf-8");
    assert_snapshot!(stable(&reply));
}

#[tokio::test]
async fn thinking_and_tools_of_a_whole_message() {
    let server = assistant(CALL).start();
    assert_snapshot!(stable(&server.post(MESSAGES, &ask(TOOLS)).await));
}

#[tokio::test]
async fn thinking_and_tools_of_a_stream() {
    let server = assistant(CALL).start();
    server.control.deliver_one_by_one();
    let reply = server.post(MESSAGES, &ask(&format!(r#"{TOOLS},"stream":true"#))).await;
    assert_snapshot!(stable(&reply));
}

/// The blocks of a stream, added up as Anthropic's SDKs do.
fn added_up(reply: &Reply) -> (Vec<Value>, Value) {
    let (mut blocks, mut arguments, mut last) = (Vec::<Value>::new(), String::new(), Value::Null);
    for frame in reply.text.split("\n\n").filter(|frame| !frame.is_empty()) {
        let (name, data) = frame.split_once('\n').unwrap();
        let event: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(name.strip_prefix("event: ").unwrap(), event["type"]);
        let append = |value: &mut Value, more: &Value| {
            *value = (value.as_str().unwrap().to_owned() + more.as_str().unwrap()).into();
        };
        match event["type"].as_str().unwrap() {
            "content_block_start" => {
                assert_eq!(event["index"], blocks.len());
                blocks.push(event["content_block"].clone());
                arguments.clear();
            }
            "content_block_delta" => {
                let block = blocks.last_mut().unwrap();
                let delta = &event["delta"];
                match delta["type"].as_str().unwrap() {
                    "text_delta" => append(&mut block["text"], &delta["text"]),
                    "thinking_delta" => append(&mut block["thinking"], &delta["thinking"]),
                    "signature_delta" => block["signature"] = "S".into(),
                    "input_json_delta" => arguments += delta["partial_json"].as_str().unwrap(),
                    other => panic!("{other}"),
                }
            }
            "content_block_stop" if !arguments.is_empty() => {
                blocks.last_mut().unwrap()["input"] = serde_json::from_str(&arguments).unwrap();
            }
            "message_delta" => last = event,
            _ => {}
        }
    }
    (blocks, last)
}

#[tokio::test]
async fn a_stream_adds_up_to_the_whole_message() {
    for reply in ["Hello there", "", CALL, "<think>so</think>", "<think>a</think>\n\nb"] {
        let server = assistant(reply).start();
        let whole = server.post(MESSAGES, &ask(TOOLS)).await.json();
        let stream = server.post(MESSAGES, &ask(&format!(r#"{TOOLS},"stream":true"#))).await;
        let (blocks, last) = added_up(&stream);
        let mut expected = whole["content"].as_array().unwrap().clone();
        for (block, expected) in blocks.iter().zip(&mut expected) {
            for id in ["id", "signature"] {
                if block.get(id).is_some() {
                    expected[id] = block[id].clone();
                }
            }
            // A stream cannot know that the text before a call ends with it.
            if let Some(text) = block["text"].as_str().filter(|text| text.trim() == expected["text"]) {
                expected["text"] = text.into();
            }
        }
        assert_eq!(blocks, expected, "{reply}");
        assert_eq!(last["usage"], whole["usage"]);
        assert_eq!(last["delta"]["stop_reason"], whole["stop_reason"]);
    }
}

#[tokio::test]
async fn reasons_to_stop() {
    let server = Setup::default().start();
    let reason = |answer: Value| (answer["stop_reason"].clone(), answer["stop_sequence"].clone());
    let cut = server.post(MESSAGES, &ask(r#","max_tokens":1"#)).await.json();
    assert_eq!(reason(cut), ("max_tokens".into(), Value::Null));
    let stopped = server.post(MESSAGES, &ask(r#","stop_sequences":["lo"]"#)).await.json();
    assert_eq!(stopped["content"][0]["text"], "Hel");
    assert_eq!(reason(stopped), ("stop_sequence".into(), "lo".into()));
    let stream = server
        .post(MESSAGES, &ask(r#","stop_sequences":["lo"],"stream":true"#))
        .await;
    let (_, last) = added_up(&stream);
    assert_eq!(
        (&last["delta"]["stop_reason"], &last["delta"]["stop_sequence"]),
        (&"stop_sequence".into(), &"lo".into())
    );
}

#[tokio::test]
async fn cached_tokens_are_counted_apart() {
    let mut setup = Setup::default();
    setup.server.prompt_tokens_details = true;
    let server = setup.start();
    let long = format!(r#","system":"{}""#, "word ".repeat(40));
    let usage = |answer: Value| answer["usage"].clone();
    let first = usage(server.post(MESSAGES, &ask(&long)).await.json());
    let second = usage(server.post(MESSAGES, &ask(&long)).await.json());
    let count = |usage: &Value, name: &str| usage[name].as_u64().unwrap();
    let whole = |usage: &Value| {
        count(usage, "input_tokens")
            + count(usage, "cache_read_input_tokens")
            + count(usage, "cache_creation_input_tokens")
    };
    assert_eq!(count(&first, "cache_read_input_tokens"), 0);
    let cached = count(&second, "cache_read_input_tokens");
    assert!(cached > 0 && cached % 16 == 0);
    assert_eq!(count(&first, "cache_creation_input_tokens"), cached);
    assert_eq!(whole(&second), whole(&first));
}

#[tokio::test]
async fn tokens_are_counted_as_they_are_sent() {
    let server = assistant(CALL).start();
    let more = format!(r#"{TOOLS},"system":"Be brief.","thinking":{{"type":"disabled"}}"#);
    let reply = server.post(COUNT, &ask(&more)).await;
    let answer = server.post(MESSAGES, &ask(&more)).await.json();
    assert_eq!(reply.json()["input_tokens"], answer["usage"]["input_tokens"]);
    assert_snapshot!(replace_run(&reply.text, "input_tokens\":", |c| c.is_ascii_digit(), "N"), @r#"{"input_tokens":N,"context_management":{"original_input_tokens":N}}"#);
}

#[tokio::test]
async fn errors_have_anthropics_envelope_once_the_body_is_read() {
    let server = Setup::default().start();
    let mut bodies = String::new();
    for (path, extra) in [
        (MESSAGES, r#","model":"nope""#),
        (MESSAGES, r#","temperature":-1"#),
        (MESSAGES, r#","max_tokens":100000"#),
        (MESSAGES, r#","watermarking":true"#),
        (MESSAGES, r#","messages":[]"#),
        (
            COUNT,
            r#","messages":[{"role":"user","content":[{"type":"image","source":{}}]}]"#,
        ),
        (MESSAGES, r#","max_tokens":"many""#),
        (MESSAGES, r#","max_tokens":0"#),
    ] {
        let reply = server.post(path, &ask(extra)).await;
        bodies += &format!("{extra} {}\n{}\n", reply.status.as_u16(), reply.text);
    }
    assert_snapshot!(bodies);
}

#[tokio::test]
async fn an_error_in_a_stream_is_its_last_event() {
    let server = Setup::default().start();
    server.control.fail_next(ExecutorError {
        message: "kernel attention failed".into(),
        fatal: true,
    });
    let reply = server.post(MESSAGES, &ask(r#","stream":true"#)).await;
    let last = reply.text.trim_end().rsplit("\n\n").next().unwrap();
    assert!(
        last.starts_with("event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"api_error\""),
        "{last}"
    );
}

#[tokio::test]
async fn thinking_turned_off_is_what_the_template_can_do() {
    const HONOURS: &str = "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}";
    const IGNORES: &str = "{% for m in messages %}{{ m.content }}{% endfor %}{{ reasoning_effort }}";
    const ALWAYS: &str = "{% for m in messages %}{{ m.content }}{% endfor %}";
    for (template, flag, expected) in [
        (HONOURS, None, "none"),
        (IGNORES, None, "none"),
        (ALWAYS, None, "low"),
        (HONOURS, Some("high"), "high"),
    ] {
        let mut setup = Setup::default();
        setup.chat.template = Some(template.into());
        setup.chat.anthropic_disabled_thinking_effort = flag.map(str::to_owned);
        let app = setup.app();
        let found = super::super::anthropic::messages::thinking::disabled_effort(&app).await;
        assert_eq!(found, expected, "{template}");
    }
}

#[tokio::test]
async fn anthropics_key_header_is_accepted() {
    let mut setup = Setup::default();
    setup.server.api_keys = vec!["secret".into()];
    let server = setup.start();
    let mut statuses = Vec::new();
    for (name, key) in [
        ("x-api-key", "secret"),
        ("x-api-key", "wrong"),
        ("authorization", "Bearer secret"),
    ] {
        let mut request = post(MESSAGES, &ask(""));
        request.headers_mut().insert(name, key.parse().unwrap());
        statuses.push(server.send(request).await.status.as_u16());
    }
    assert_eq!(statuses, [200, 401, 200]);
}
