"""The demo model through the SDK: it stops, thinks, answers, calls tools and uses their results."""

import json
import pathlib

import pytest

CASES = json.loads((pathlib.Path(__file__).resolve().parents[1] / "demo-model" / "cases.json").read_text())


def check(expect: dict, message, finish_reason: str) -> None:
    known = {"tool_calls", "content_contains", "content", "reasoning", "finish_reason"}
    assert expect and set(expect) <= known, f"a case expects what this test cannot check: {set(expect) - known}"
    if "tool_calls" in expect:
        calls = [{"name": c.function.name, "arguments": json.loads(c.function.arguments)} for c in message.tool_calls or []]
        assert calls == expect["tool_calls"]
    if "content" in expect:
        assert message.content == expect["content"]
    for piece in [expect["content_contains"]] if isinstance(expect.get("content_contains"), str) else expect.get("content_contains", []):
        assert piece in (message.content or "")
    if "reasoning" in expect:
        assert bool(getattr(message, "reasoning", None)) == expect["reasoning"]
        assert getattr(message, "reasoning_content", None) == getattr(message, "reasoning", None)
    assert finish_reason == expect.get("finish_reason", "tool_calls" if expect.get("tool_calls") else "stop")


@pytest.mark.parametrize("case", CASES, ids=[c["id"] for c in CASES])
def test_case(client, case):
    extra = {"tools": case["tools"]} if case.get("tools") else {}
    r = client.chat.completions.create(model="demo", messages=case["messages"], temperature=0, max_tokens=400, **extra)
    check(case["expect"], r.choices[0].message, r.choices[0].finish_reason)


@pytest.mark.parametrize("case", CASES, ids=[c["id"] for c in CASES])
def test_stream_is_the_same_answer(client, case):
    extra = {"tools": case["tools"]} if case.get("tools") else {}
    request = dict(model="demo", messages=case["messages"], temperature=0, max_tokens=400, **extra)
    whole = client.chat.completions.create(**request).choices[0]
    content, reasoning, calls, finish = "", "", {}, None
    for chunk in client.chat.completions.create(stream=True, **request):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning", None) or ""
        for call in choice.delta.tool_calls or []:
            name, arguments = calls.get(call.index, ("", ""))
            calls[call.index] = (name + (call.function.name or ""), arguments + (call.function.arguments or ""))
        finish = choice.finish_reason or finish
    assert content.strip() == (whole.message.content or "").strip()
    assert reasoning == (getattr(whole.message, "reasoning", None) or "")
    assert [calls[i] for i in sorted(calls)] == [(c.function.name, c.function.arguments) for c in whole.message.tool_calls or []]
    assert finish == whole.finish_reason
