//! `response_format`, `structured_outputs` and forced tool calls, whole bodies.

use serde_json::json;

use super::*;

const CHAT: &str = "/v1/chat/completions";
const TOOLS: &str = r##""tools":[
    {"type":"function","function":{"name":"weather","parameters":{"type":"object","properties":{"city":{"$ref":"#/$defs/city"}},
     "required":["city"],"$defs":{"city":{"type":"string","maxLength":20}}}}},
    {"type":"function","function":{"name":"now"}}]"##;

fn ask(extra: &str) -> String {
    format!(r#"{{"messages":[{{"role":"user","content":"Say hello"}}],{extra}}}"#)
}

/// A server that wants to say `reply`, whatever it is asked.
fn saying(reply: &str) -> Setup {
    let mut setup = Setup::replying(reply);
    setup.chat.tool_parser = ParserChoice::Named("lfm2".into());
    setup
}

fn choice(reply: &Reply) -> Value {
    assert_eq!(reply.status, 200, "{}", reply.text);
    reply.json()["choices"][0].clone()
}

/// The deltas of a stream, and its finish reason.
fn deltas(reply: &Reply) -> (Vec<Value>, String) {
    let mut finish = String::new();
    let mut deltas = Vec::new();
    for frame in reply
        .text
        .split("\n\n")
        .filter_map(|frame| frame.strip_prefix("data: {"))
    {
        let chunk: Value = serde_json::from_str(&format!("{{{frame}")).unwrap();
        let choice = &chunk["choices"][0];
        if let Some(reason) = choice["finish_reason"].as_str() {
            finish = reason.into();
        }
        deltas.push(choice["delta"].clone());
    }
    (deltas, finish)
}

#[tokio::test]
async fn a_schema_lets_pass_what_meets_it() {
    let text = r#"{"name": "Ann", "tags": ["a", "b"]}"#;
    let format = r#""response_format":{"type":"json_schema","json_schema":{"name":"p","strict":true,"schema":{"type":"object",
        "properties":{"name":{"type":"string"},"tags":{"type":"array","items":{"type":"string"}}},"required":["name","tags"]}}}"#;
    let server = saying(text).start();
    let choice = choice(&server.post(CHAT, &ask(format)).await);
    assert_eq!(choice["message"]["content"], text);
    assert_eq!(
        (&choice["finish_reason"], &choice["stop_reason"]),
        (&json!("stop"), &Value::Null)
    );
    let stream = server.post(CHAT, &ask(&format!(r#"{format},"stream":true"#))).await;
    let (deltas, finish) = deltas(&stream);
    let content: String = deltas.iter().filter_map(|delta| delta["content"].as_str()).collect();
    assert_eq!((content.as_str(), finish.as_str()), (text, "stop"));
}

#[tokio::test]
async fn what_does_not_meet_it_is_bent() {
    let server = saying("Hello there").start();
    for (constraint, accepts) in [
        (
            r#""structured_outputs":{"regex":"[0-9]{4}"}"#,
            (|text| text.len() == 4) as fn(&str) -> bool,
        ),
        (r#""structured_outputs":{"choice":["yes","no"]}"#, |text| {
            text == "yes" || text == "no"
        }),
        (
            r#""structured_outputs":{"grammar":"root ::= \"<\" root? \">\""},"max_tokens":90"#,
            |text| text.starts_with('<'),
        ),
        (r#""structured_outputs":{"json":{"enum":[1,null,"x"]}}"#, |text| {
            serde_json::from_str::<Value>(text).is_ok()
        }),
        (
            r#""structured_outputs":{"structural_tag":"{\"type\":\"structural_tag\",\"format\":{\"type\":\"const_string\",\"value\":\"ok\"}}"}"#,
            |text| text == "ok",
        ),
    ] {
        let reply = server.post(CHAT, &ask(constraint)).await;
        let choice = choice(&reply);
        let text = choice["message"]["content"].as_str().unwrap();
        assert!(accepts(text), "{constraint}: {text}");
    }
    let body = r#"{"prompt":["a","b"],"n":2,"temperature":0.5,"max_tokens":20,"structured_outputs":{"choice":["left","right"]}}"#;
    let reply = server.post("/v1/completions", body).await.json();
    for choice in reply["choices"].as_array().unwrap() {
        assert!(
            ["left", "right"].contains(&choice["text"].as_str().unwrap()),
            "{choice}"
        );
        assert_eq!(choice["finish_reason"], "stop");
    }
    assert_eq!(reply["choices"].as_array().unwrap().len(), 4);
}

#[tokio::test]
async fn required_calls_are_read_from_json() {
    let calls = r#"[{"name": "weather", "parameters": {"city":"Rome"}}, {"name": "now", "parameters": {}}]"#;
    let server = saying(calls).start();
    let required = format!(r#"{TOOLS},"tool_choice":"required""#);
    let whole = choice(&server.post(CHAT, &ask(&required)).await);
    let call = |name: &str, arguments: &str| json!({"name": name, "arguments": arguments});
    assert_eq!(whole["finish_reason"], "tool_calls");
    assert_eq!(whole["message"]["content"], "");
    let tool_calls = whole["message"]["tool_calls"].as_array().unwrap();
    assert_eq!(tool_calls[0]["function"], call("weather", r#"{"city": "Rome"}"#));
    assert_eq!(tool_calls[1]["function"], call("now", "{}"));
    assert!(tool_calls[0]["id"].as_str().unwrap().starts_with("chatcmpl-tool-"));

    let stream = server.post(CHAT, &ask(&format!(r#"{required},"stream":true"#))).await;
    let (deltas, finish) = deltas(&stream);
    assert_eq!(finish, "tool_calls");
    let (mut names, mut arguments) = (Vec::new(), vec![String::new(); 2]);
    for call in deltas
        .iter()
        .filter_map(|delta| delta["tool_calls"].as_array())
        .flatten()
    {
        let index = call["index"].as_u64().unwrap() as usize;
        assert_eq!(call["function"]["name"].is_null(), call["id"].is_null());
        names.extend(call["function"]["name"].as_str().map(str::to_owned));
        arguments[index] += call["function"]["arguments"].as_str().unwrap();
    }
    assert_eq!(names, ["weather", "now"]);
    assert_eq!(arguments, [r#"{"city":"Rome"}"#, "{}"]);

    let one = choice(
        &server
            .post(CHAT, &ask(&format!(r#"{required},"parallel_tool_calls":false"#)))
            .await,
    );
    assert_eq!(one["message"]["tool_calls"].as_array().unwrap().len(), 1);
    assert_eq!(one["finish_reason"], "tool_calls");
}

#[tokio::test]
async fn a_named_function_gets_its_arguments() {
    let named = format!(r#"{TOOLS},"tool_choice":{{"type":"function","function":{{"name":"weather"}}}}"#);
    let server = saying(r#"{"city":"Rome"}"#).start();
    let whole = choice(&server.post(CHAT, &ask(&named)).await);
    assert_eq!(
        (&whole["finish_reason"], &whole["message"]["content"]),
        (&json!("stop"), &json!(""))
    );
    let function = &whole["message"]["tool_calls"][0]["function"];
    assert_eq!(function, &json!({"name": "weather", "arguments": r#"{"city":"Rome"}"#}));
    let (deltas, finish) = deltas(&server.post(CHAT, &ask(&format!(r#"{named},"stream":true"#))).await);
    let arguments: String = deltas
        .iter()
        .filter_map(|delta| delta["tool_calls"][0]["function"]["arguments"].as_str())
        .collect();
    assert_eq!((arguments.as_str(), finish.as_str()), (r#"{"city":"Rome"}"#, "stop"));
}

#[tokio::test]
async fn reasoning_comes_before_the_grammar() {
    let format = r#""response_format":{"type":"json_object"}"#;
    for (parser, reply, reasoning, content) in [
        ("qwen3", "hm</think>{\"a\":1}", json!("hm"), "{\"a\":1}"),
        ("lfm2", "<think>hm</think>{\"a\":1}", json!("hm"), "{\"a\":1}"),
        ("lfm2", "{\"a\":1}", Value::Null, "{\"a\":1}"),
    ] {
        let mut setup = saying(reply);
        setup.chat.reasoning_parser = ParserChoice::Named(parser.into());
        let server = setup.start();
        let choice = choice(&server.post(CHAT, &ask(format)).await);
        assert_eq!(choice["message"]["reasoning"], reasoning, "{parser}: {reply}");
        assert_eq!(choice["message"]["content"], content, "{parser}: {reply}");
    }
    // Thinking is off: the grammar begins with the first token.
    let mut setup = saying("{\"a\":1}");
    setup.chat.reasoning_parser = ParserChoice::Named("qwen3".into());
    let server = setup.start();
    let off = format!(r#"{format},"chat_template_kwargs":{{"enable_thinking":false}}"#);
    assert_eq!(
        choice(&server.post(CHAT, &ask(&off)).await)["message"]["content"],
        "{\"a\":1}"
    );
    let mut setup = saying("[{\"name\": \"now\", \"parameters\": {}}]");
    setup.chat.reasoning_parser = ParserChoice::Named("lfm2".into());
    let server = setup.start();
    let required = format!(r#"{TOOLS},"tool_choice":"required""#);
    let answer = choice(&server.post(CHAT, &ask(&required)).await);
    assert_eq!(answer["message"]["tool_calls"][0]["function"]["name"], "now");
}

/// vLLM's answer is all reasoning then.
#[tokio::test]
async fn a_turn_that_ends_in_reasoning_is_answered_all_the_same() {
    let format = r#""response_format":{"type":"json_schema","json_schema":{"name":"n","schema":{"enum":["ok"]}}}"#;
    let required = format!(r#"{TOOLS},"tool_choice":"required","parallel_tool_calls":false,"max_tokens":90"#);
    let own_call = "<|tool_call_start|>[now()]<|tool_call_end|>";
    let thought = format!("<think>hm{own_call}");
    for (parser, reply, ask_for, reasoning) in [
        ("qwen3", "Hello there", format.to_owned(), json!("Hello there")),
        ("lfm2", "<think>hm", format.to_owned(), json!("hm")),
        ("lfm2", thought.as_str(), required.clone(), json!("hm")),
        ("qwen3", thought.as_str(), required.clone(), json!("hm")),
        ("qwen3", own_call, required.clone(), Value::Null),
        ("lfm2", own_call, required.clone(), Value::Null),
        ("lfm2", thought.as_str(), format!("{format},{TOOLS}"), json!("hm")),
    ] {
        let mut setup = saying(reply);
        setup.chat.reasoning_parser = ParserChoice::Named(parser.into());
        let server = setup.start();
        let whole = choice(&server.post(CHAT, &ask(&ask_for)).await);
        let message = &whole["message"];
        assert_eq!(message["reasoning"], reasoning, "{parser}: {reply}: {message}");
        let (deltas, finish) = deltas(&server.post(CHAT, &ask(&format!(r#"{ask_for},"stream":true"#))).await);
        assert_eq!(whole["finish_reason"], finish);
        let streamed = |key: &str| -> String { deltas.iter().filter_map(|delta| delta[key].as_str()).collect() };
        assert_eq!(streamed("reasoning"), reasoning.as_str().unwrap_or(""));
        if ask_for == format {
            assert_eq!((&message["content"], finish.as_str()), (&json!("\"ok\""), "stop"));
            assert_eq!(streamed("content"), "\"ok\"");
        } else {
            assert_eq!(finish, "tool_calls", "{parser}: {reply}: {message}");
            let arguments = message["tool_calls"][0]["function"]["arguments"].as_str().unwrap();
            assert!(
                serde_json::from_str::<Value>(arguments).unwrap().is_object(),
                "{arguments}"
            );
            assert_eq!(streamed("content"), "");
        }
        server.idle().await;
    }
}

#[tokio::test]
async fn a_grammar_that_cannot_be_is_a_400_before_the_stream() {
    let server = saying("Hello").start();
    for (constraint, part) in [
        (
            r#""response_format":{"type":"json_schema","json_schema":{"name":"n","schema":{"properties":{"a":{"not":{}}}}}}"#,
            "#/properties/a/not",
        ),
        (r#""structured_outputs":{"regex":"("}"#, "regular expression"),
        (r#""structured_outputs":{"grammar":"root ::= other"}"#, "other"),
        (r#""response_format":{"type":"structural_tag"}"#, "structural tag"),
        (r#""structured_outputs":{"json":{},"regex":"a"}"#, "exactly one kind"),
    ] {
        for stream in ["", r#","stream":true"#] {
            let reply = server.post(CHAT, &ask(&format!("{constraint}{stream}"))).await;
            let (status, kind, _) = reply.error();
            assert_eq!((status, kind.as_str()), (400, "BadRequestError"), "{constraint}");
            assert!(reply.text.contains(part), "{}", reply.text);
        }
    }
    let tools = r#""tool_choice":"required","tools":[{"type":"function","function":{"name":"f","parameters":{"type":"objekt"}}}]"#;
    assert_eq!(server.post(CHAT, &ask(tools)).await.status, 400);
    server.idle().await;
    assert_eq!(server.post(CHAT, &ask(r#""max_tokens":3"#)).await.status, 200);
}
