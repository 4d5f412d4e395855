//! Text deltas become assistant events; events become whole choices.

use std::pin::pin;

use futures_util::{Stream, StreamExt};

use super::event::Collector;
use super::{ChatChoice, ChatEvent, ChatFinish, Parsing};
use crate::engine::EngineError;
use crate::parsers::{AssistantDelta, AssistantParser, ForcedCalls, ToolBlock};
use crate::text::{TextDelta, TextError, TextFinish};

/// The parsers of one request, a fresh one for each of its choices.
pub struct ChoiceParsers {
    choices: Vec<Choice>,
    include_reasoning: bool,
    /// In place of what the parsers themselves tell.
    forced: Option<Parsing>,
}

struct Choice {
    parser: AssistantParser,
    /// A call has been begun in the stream.
    has_calls: bool,
}

impl ChoiceParsers {
    /// `include_reasoning`: false hides reasoning from the events; it is counted all the same.
    pub fn new(n: u32, include_reasoning: bool, new_parser: impl Fn() -> AssistantParser) -> Self {
        let choices = (0..n)
            .map(|_| Choice {
                parser: new_parser(),
                has_calls: false,
            })
            .collect();
        ChoiceParsers {
            choices,
            include_reasoning,
            forced: None,
        }
    }

    /// For output that a grammar makes calls.
    pub fn forcing(mut self, calls: Option<ForcedCalls<'_>>) -> Self {
        self.forced = calls.map(|calls| match calls {
            ForcedCalls::Any => Parsing::RequiredCalls,
            ForcedCalls::Named(_) => Parsing::NamedCall,
        });
        self
    }

    /// The event of the next delta of its choice.
    ///
    /// # Panics
    /// When the delta's index is not below `n`: a bug of the text layer.
    pub fn event(&mut self, delta: TextDelta) -> ChatEvent {
        let choice = &mut self.choices[delta.index as usize];
        let sampled = match (&delta.finish, delta.token_ids.split_last()) {
            (Some(TextFinish::Eos), Some((_stopping, sampled))) => sampled,
            // A beam's tokens may leave it out.
            (Some(TextFinish::StopToken(id)), Some((stopping, sampled))) if id == stopping => sampled,
            _ => &delta.token_ids,
        };
        let mut parts = choice.parser.push(&delta.text, sampled);
        if delta.finish.is_some() {
            parts.extend(choice.parser.finish());
        }
        if !self.include_reasoning {
            parts.retain(|part| !matches!(part, AssistantDelta::Reasoning(_)));
        }
        choice.has_calls |= parts.iter().any(|part| {
            matches!(
                part,
                AssistantDelta::ToolCallStart { .. } | AssistantDelta::ToolBlock(ToolBlock::Calls(_))
            )
        });
        let parsing = match (self.forced, choice.parser.parses_tools(), choice.parser.is_active()) {
            (Some(forced), ..) => forced,
            (None, true, _) => Parsing::Tools,
            (None, false, true) => Parsing::Reasoning,
            (None, false, false) => Parsing::Plain,
        };
        ChatEvent {
            index: delta.index,
            parts,
            reasoning_tokens: choice.parser.reasoning_tokens(),
            finish: delta
                .finish
                .as_ref()
                .map(|finish| ChatFinish::new(finish, choice.has_calls && parsing != Parsing::NamedCall)),
            parsing,
            delta,
        }
    }
}

/// The events of a stream of deltas, one each.
pub fn events<S>(deltas: S, mut parsers: ChoiceParsers) -> impl Stream<Item = Result<ChatEvent, TextError>>
where
    S: Stream<Item = Result<TextDelta, TextError>>,
{
    deltas.map(move |delta| delta.map(|delta| parsers.event(delta)))
}

/// Adds a whole stream of events up to its `n` choices, in order of their index.
///
/// # Errors
/// The stream's own, and [`EngineError::Stopped`] when it ends before every choice has finished.
pub async fn collect<S>(n: u32, events: S) -> Result<Vec<ChatChoice>, TextError>
where
    S: Stream<Item = Result<ChatEvent, TextError>>,
{
    let mut events = pin!(events);
    let mut choices: Vec<Collector> = (0..n).map(|_| Collector::default()).collect();
    while let Some(event) = events.next().await {
        let event = event?;
        if let Some(choice) = choices.get_mut(event.index as usize) {
            choice.add(event);
        }
    }
    choices
        .into_iter()
        .map(|choice| choice.finish().ok_or(TextError::Engine(EngineError::Stopped)))
        .collect()
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, stream};
    use serde_json::{Value, json};

    use super::super::{FinishReason, StopReason};
    use super::*;
    use crate::parsers::cases;

    /// Runs a case's pieces through the adapter, with the stopping token where the engine stops by itself.
    fn run(group: &str, case: &Value, pieces: &[&str]) -> Vec<ChatEvent> {
        let include_reasoning = case.pointer("/request/include_reasoning") != Some(&json!(false));
        let mut parsers = ChoiceParsers::new(1, include_reasoning, || cases::parser(group, case));
        let text_delta = |text: &str| TextDelta {
            text: text.into(),
            token_ids: cases::ids(text),
            ..Default::default()
        };
        let mut deltas: Vec<TextDelta> = pieces.iter().map(|piece| text_delta(piece)).collect();
        deltas.push(match case["engine_finish_reason"].as_str() {
            Some("length") => TextDelta {
                finish: Some(TextFinish::Length),
                ..Default::default()
            },
            _ => TextDelta {
                token_ids: vec![7],
                finish: Some(TextFinish::Eos),
                ..Default::default()
            },
        });
        deltas.into_iter().map(|delta| parsers.event(delta)).collect()
    }

    fn collected(events: Vec<ChatEvent>) -> ChatChoice {
        let events = stream::iter(events.into_iter().map(Ok));
        collect(1, events).now_or_never().unwrap().unwrap().remove(0)
    }

    #[test]
    fn collected_streams_are_vllms_whole_answers() {
        let mut wrong = Vec::new();
        cases::each_case(|group, case| {
            let mut want = cases::expected(group, case, "nonstream");
            want.as_object_mut()
                .unwrap()
                .retain(|key, _| !["tools_called", "reasoning_tokens"].contains(&key.as_str()));
            if group == "tool" && want["content"] == "" {
                want["content"] = Value::Null; // Over HTTP, see the file's meta.
            }
            let input = case["input"].as_str().unwrap();
            for pieces in [vec![input], cases::pieces(input)] {
                let choice = collected(run(group, case, &pieces));
                let calls = choice
                    .tool_calls
                    .iter()
                    .map(|c| json!({"name": c.name, "arguments": c.arguments}));
                let mut got = json!({"content": choice.content, "tool_calls": calls.collect::<Vec<_>>()});
                if group != "tool" {
                    got["reasoning"] = json!(choice.reasoning);
                    got["finish_reason"] = choice.finish.reason.as_str().into();
                }
                if got != want {
                    wrong.push(format!(
                        "{group}/{} in {}\n  got  {got}\n  want {want}",
                        case["id"],
                        pieces.len()
                    ));
                }
            }
        });
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn streams_finish_as_vllms_do() {
        cases::each_case(|group, case| {
            let want = cases::expected(group, case, "stream");
            let Some(want) = want["finish_reason"].as_str() else {
                return;
            };
            let events = run(group, case, &cases::pieces(case["input"].as_str().unwrap()));
            let finishes: Vec<&str> = events
                .iter()
                .filter_map(|e| Some(e.finish.as_ref()?.reason.as_str()))
                .collect();
            assert_eq!(finishes, [want], "{group}/{}", case["id"]);
        });
    }

    #[test]
    fn a_delta_merges_what_one_event_carries() {
        let case = json!({});
        let pieces = ["Before. <|tool_call_start|>[ping(), ping(host='a')]<|tool_call_end|> After."];
        let delta = run("tool", &case, &pieces)[0].to_delta();
        let names: Vec<_> = delta
            .tool_calls
            .iter()
            .map(|c| (c.index, c.name.as_deref(), c.arguments.as_str()))
            .collect();
        assert_eq!(names, [(0, Some("ping"), "{}"), (1, Some("ping"), "{\"host\": \"a\"}")]);
        assert_eq!(delta.content.as_deref(), Some("Before.  After."));
        let bad = run("tool", &case, &["<|tool_call_start|>[1]<|tool_call_end|>"])[0].to_delta();
        assert_eq!(bad.content.as_deref(), Some("<|tool_call_start|>[1]<|tool_call_end|>"));
        assert!(run("tool", &case, &["<|tool_call_start|>[pi"])[0].to_delta().is_empty());
    }

    #[test]
    fn finishes_keep_their_stop_reason() {
        let stop = |finish, calls| ChatFinish::new(&finish, calls);
        assert_eq!(stop(TextFinish::Length, true).reason, FinishReason::Length);
        assert_eq!(stop(TextFinish::Abort, true).reason, FinishReason::Abort);
        let by_token = stop(TextFinish::StopToken(5), true);
        assert_eq!(
            by_token,
            ChatFinish {
                reason: FinishReason::ToolCalls,
                stop: Some(StopReason::Token(5))
            }
        );
        let by_text = stop(TextFinish::StopString("\n".into()), false);
        assert_eq!(
            by_text,
            ChatFinish {
                reason: FinishReason::Stop,
                stop: Some(StopReason::Text("\n".into()))
            }
        );
    }

    #[test]
    fn the_stopping_token_is_no_reasoning_and_choices_stay_apart() {
        let case = json!({});
        let mut parsers = ChoiceParsers::new(2, true, || cases::parser("reasoning", &case));
        let end = cases::ids("</think>");
        let mut delta = |index, text: &str, token_ids, finish| {
            parsers.event(TextDelta {
                index,
                text: text.into(),
                token_ids,
                finish,
                ..Default::default()
            })
        };
        let events = vec![
            delta(0, "a", vec![70], None),
            delta(1, "b</think>", [vec![71], end].concat(), None),
            delta(0, "", vec![7], Some(TextFinish::Eos)),
            delta(1, "c", vec![72], Some(TextFinish::Length)),
        ];
        let choices = collect(2, stream::iter(events.into_iter().map(Ok)))
            .now_or_never()
            .unwrap()
            .unwrap();
        let summary: Vec<_> = choices
            .iter()
            .map(|c| {
                (
                    c.reasoning.as_deref(),
                    c.content.as_deref(),
                    c.reasoning_tokens,
                    c.token_ids.len(),
                )
            })
            .collect();
        assert_eq!(summary, [(Some("a"), None, 1, 2), (Some("b"), Some("c"), 1, 3)]);
    }

    #[test]
    fn an_unfinished_choice_is_an_error_not_an_answer() {
        let mut parsers = ChoiceParsers::new(1, true, || AssistantParser::new(None, None, true));
        let event = parsers.event(TextDelta {
            text: "a".into(),
            ..Default::default()
        });
        let result = collect(1, stream::iter([Ok(event)])).now_or_never().unwrap();
        assert!(matches!(result, Err(TextError::Engine(EngineError::Stopped))));
    }

    #[test]
    fn without_parsers_empty_content_is_empty() {
        let mut parsers = ChoiceParsers::new(1, true, || AssistantParser::new(None, None, true));
        let event = parsers.event(TextDelta {
            finish: Some(TextFinish::Eos),
            ..Default::default()
        });
        let choice = collected(vec![event]);
        assert_eq!((choice.content.as_deref(), choice.reasoning), (Some(""), None));
    }
}
