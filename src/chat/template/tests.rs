use chrono::NaiveDate;
use serde_json::json;

use super::*;
use crate::text::tokenizer::testing::{ids, json_file, text_file, tokenizer};

fn frozen() -> Clock {
    let now = NaiveDate::from_ymd_opt(2026, 1, 15)
        .and_then(|day| day.and_hms_opt(12, 34, 56))
        .unwrap();
    Arc::new(move || now)
}

fn template(source: &str) -> ChatTemplate {
    let specials = json!({"bos_token": "<s>"}).as_object().unwrap().clone();
    ChatTemplate::with_clock(source, specials, frozen()).unwrap()
}

/// Renders with one variable `v`.
fn render(source: &str, v: Value) -> Result<String, TemplateError> {
    let kwargs = json!({ "v": v }).as_object().unwrap().clone();
    template(source).render(TemplateInput {
        kwargs,
        ..TemplateInput::default()
    })
}

fn list(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}

#[test]
fn every_golden_rendering_is_exact() {
    let cases = json_file("chat/cases.json");
    let mut compared = 0;
    for name in [
        "LFM2-leap-finetune",
        "LFM2.5-2.6B",
        "LFM2.5-8B-A1B",
        "LFM2.5-VL-3B",
        "LFM2.5-VL-450M",
        "LFM2.5-leap-finetune",
    ] {
        let golden = json_file(&format!("chat/rendered.{name}.json"));
        let tokenizer = tokenizer(golden["tokenizer"].as_str().unwrap());
        let source = text_file(&format!("templates/{name}.jinja"));
        let template = ChatTemplate::with_clock(&source, tokenizer.special_names().clone(), frozen()).unwrap();
        for (case_name, expected) in golden["rendered"].as_object().unwrap() {
            let case = &cases["cases"][case_name];
            let rendered = template.render(TemplateInput {
                messages: list(&case["messages"]),
                tools: list(&case["tools"]),
                documents: vec![],
                add_generation_prompt: case["add_generation_prompt"] == true,
                continue_final_message: case["continue_final_message"] == true,
                kwargs: case["chat_template_kwargs"].as_object().cloned().unwrap_or_default(),
            });
            match expected["text"].as_str() {
                Some(text) => {
                    let rendered = rendered.unwrap_or_else(|error| panic!("{name} {case_name}: {error}"));
                    assert_eq!(rendered, text, "{name} {case_name}");
                    assert_eq!(
                        tokenizer.encode(&rendered, false).unwrap(),
                        ids(&expected["ids"]),
                        "{name} {case_name}"
                    );
                }
                None => assert!(rendered.is_err(), "{name} {case_name}: {rendered:?}"),
            }
            compared += 1;
        }
    }
    assert_eq!(compared, 240);
}

#[test]
fn raised_messages_come_through() {
    let error = render(
        "{% if true %}{{ raise_exception('Roles must alternate') }}{% endif %}",
        json!(0),
    )
    .unwrap_err();
    assert_eq!(error.0, "Roles must alternate");
}

#[test]
fn values_print_as_in_python() {
    let v = json!({"items": [1], "f": 1e16, "n": null, "t": true, "s": "it's"});
    assert_eq!(
        render(
            "{{ v }}|{{ v.f }}|{{ v.n }}|{{ v.t|string }}|{{ v.missing }}",
            v.clone()
        )
        .unwrap(),
        r#"{'items': [1], 'f': 1e+16, 'n': None, 't': True, 's': "it's"}|1e+16|None|True|"#
    );
    // A method wins over a key of the same name.
    assert_eq!(
        render("{% for k, x in v.items() %}{{ k }},{% endfor %}", v).unwrap(),
        "items,f,n,t,s,"
    );
}

#[test]
fn missing_keys_are_false_and_their_attributes_errors() {
    assert_eq!(
        render("{% if v.a %}x{% else %}y{% endif %}{{ nothing }}", json!({})).unwrap(),
        "y"
    );
    assert!(render("{{ v.a.b }}", json!({})).is_err());
    assert!(render("{{ nothing() }}", json!({})).is_err());
    assert_eq!(render("{% for x in nothing %}x{% endfor %}", json!({})).unwrap(), "");
    assert!(render("{% for x in v if x %}x{% endfor %}", json!(null)).is_err());
}

#[test]
fn tojson_takes_pythons_arguments() {
    let v = json!({"b": "<é>", "a": [1, 2]});
    assert_eq!(
        render("{{ v | tojson }}", v.clone()).unwrap(),
        r#"{"b": "<é>", "a": [1, 2]}"#
    );
    assert_eq!(
        render(
            "{{ v | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=True) }}",
            v.clone()
        )
        .unwrap(),
        r#"{"a":[1,2],"b":"<\u00e9>"}"#
    );
    assert_eq!(
        render("{{ v | tojson(indent=2) }}", v.clone()).unwrap(),
        "{\n  \"b\": \"<é>\",\n  \"a\": [\n    1,\n    2\n  ]\n}"
    );
    assert!(render("{{ v | tojson(colour=2) }}", v).is_err());
}

#[test]
fn tests_answer_as_jinja2s() {
    let source = "{{ v.n is iterable }}{{ v.s is iterable }}{{ v.m is iterable }}{{ v.x is iterable }}{{ v.i is iterable }}\
        {{ v.s is sequence }}{{ v.n is sequence }}";
    let v = json!({"n": null, "s": "x", "m": {}, "i": 1});
    assert_eq!(render(source, v).unwrap(), "FalseTrueTrueTrueFalseTrueFalse");
}

#[test]
fn blocks_are_trimmed_as_transformers_sets_it() {
    assert_eq!(
        render("a\n  {% if true %}\nb\n  {% endif %}\nc\n", json!(0)).unwrap(),
        "a\nb\nc"
    );
    assert_eq!(
        render(
            "{% generation %}\n{% set x = 1 %}\n{{ x }}{% endgeneration %}\n{{ x }}",
            json!(0)
        )
        .unwrap(),
        "1"
    );
}

#[test]
fn time_and_loop_controls() {
    assert_eq!(
        render("{{ strftime_now('%d %b %Y %H:%M%Z') }}", json!(0)).unwrap(),
        "15 Jan 2026 12:34"
    );
    assert!(render("{{ strftime_now('%!') }}", json!(0)).is_err());
    let source = "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}";
    assert_eq!(render(source, json!(0)).unwrap(), "023");
}

#[test]
fn hostile_templates_end_as_errors() {
    for source in [
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{{ 'x' * 1000000000 }}",
        "{{ v | no_such_filter }}",
        "{% include 'other' %}",
    ] {
        let started = std::time::Instant::now();
        let rendered = render(source, json!(0)).map(|text| text.len());
        assert!(rendered.is_err(), "{source} gave {rendered:?}");
        assert!(
            started.elapsed().as_secs() < 20,
            "{source} took {:?}",
            started.elapsed()
        );
    }
    let deep = "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}done";
    let deep = ChatTemplate::untrusted(deep, Map::new())
        .unwrap()
        .render(TemplateInput::default());
    assert_eq!(deep.unwrap(), "done");
    eprintln!("if");
    assert!(ChatTemplate::new("{% if %}", Map::new()).is_err());
    assert!(ChatTemplate::new(&"{{ x ".repeat(10_000), Map::new()).is_err());
    assert!(ChatTemplate::new(&("{{ ".to_owned() + &"(".repeat(100_000)), Map::new()).is_err());
    assert!(ChatTemplate::new(&"{% if 1 %}".repeat(50_000), Map::new()).is_err());
}

#[test]
fn reserved_arguments_are_refused_or_without_effect() {
    let source = "{{ add_generation_prompt }}{{ bos_token }}{{ strftime_now('%Y') }}";
    let with = |name: &str| TemplateInput {
        kwargs: json!({name: "overridden"}).as_object().unwrap().clone(),
        ..TemplateInput::default()
    };
    for name in REFUSED_KWARGS {
        assert!(template(source).render(with(name)).unwrap_err().0.contains(name));
    }
    for name in OVERRULED_KWARGS {
        assert_eq!(template(source).render(with(name)).unwrap(), "False<s>2026");
    }
}

#[test]
fn continuing_needs_a_final_text_in_the_prompt() {
    let input = |messages: Value| TemplateInput {
        messages: list(&messages),
        continue_final_message: true,
        ..TemplateInput::default()
    };
    let source = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}";
    let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}]);
    assert_eq!(template(source).render(input(messages.clone())).unwrap(), "[a][b");
    assert!(template("nothing").render(input(messages)).is_err());
    assert!(template(source).render(input(json!([]))).is_err());
    assert!(
        template(source)
            .render(input(json!([{"role": "assistant", "content": null}])))
            .is_err()
    );
    let parts = json!([{"role": "assistant", "content": [{"type": "text", "text": "p"}, {"type": "image"}]}]);
    let source = "{% for m in messages %}{% for p in m.content %}{{ p.text }};{% endfor %}{% endfor %}";
    assert_eq!(template(source).render(input(parts)).unwrap(), "p");
}
