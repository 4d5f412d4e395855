"""LangChain's and LiteLLM's clients against the demo model."""

import os

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no download of prices at import

import litellm  # noqa: E402
from langchain_core.messages import AIMessage, ToolMessage  # noqa: E402
from langchain_core.tools import tool  # noqa: E402
from langchain_openai import ChatOpenAI  # noqa: E402
from pydantic import BaseModel, Field  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # the clients' own

QUESTION, ANSWER = "What is 12 + 7?", "12 + 7 = 19."


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


@tool
def get_weather(city: str) -> str:
    """Get the current weather in a city."""
    return "sunny"


@pytest.fixture(scope="module")
def chain(demo):
    return ChatOpenAI(model="demo", base_url=demo.url + "/v1", api_key="none", temperature=0, max_tokens=400, max_retries=0)


@pytest.fixture(scope="module")
def lite(demo):
    return dict(model="hosted_vllm/demo", api_base=demo.url + "/v1", api_key="none")


def messages(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_langchain_invoke(chain):
    answer = chain.invoke(QUESTION)
    assert answer.content == ANSWER
    assert answer.response_metadata["finish_reason"] == "stop"
    usage = answer.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert 0 < usage["output_token_details"]["reasoning"] < usage["output_tokens"]


def test_langchain_stream(chain):
    pieces = list(chain.stream(QUESTION, stream_usage=True))
    assert len(pieces) > 3 and "".join(piece.content for piece in pieces) == ANSWER
    assert sum((piece.usage_metadata or {}).get("output_tokens", 0) for piece in pieces) > 10


@pytest.mark.parametrize("stream", [False, True])
def test_langchain_calls_a_tool_and_uses_its_result(chain, stream):
    bound = chain.bind_tools([get_weather])
    ask = "What is the weather in Oslo?"
    if stream:
        first = None
        for piece in bound.stream(ask):
            first = piece if first is None else first + piece
    else:
        first = bound.invoke(ask)
    (call,) = first.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Oslo"}) and call["id"]
    turns = [("user", ask), AIMessage("", tool_calls=[call]), ToolMessage("sunny, 21 degrees", tool_call_id=call["id"])]
    last = bound.invoke(turns)
    assert not last.tool_calls and "sunny" in last.content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_structured_output(chain, method):
    person = chain.with_structured_output(Person, method=method).invoke("Give me a person.")
    assert isinstance(person, Person)


def test_litellm_completion(lite):
    r = litellm.completion(messages=messages(QUESTION), temperature=0, max_tokens=400, **lite)
    assert r.choices[0].message.content == ANSWER and r.choices[0].finish_reason == "stop"
    assert "19" in r.choices[0].message.reasoning_content
    assert r.usage.total_tokens == r.usage.prompt_tokens + r.usage.completion_tokens


def test_litellm_stream(lite):
    text, reasoning, usage = "", "", None
    options = dict(stream=True, stream_options={"include_usage": True}, temperature=0, max_tokens=400)
    for chunk in litellm.completion(messages=messages(QUESTION), **options, **lite):
        usage = getattr(chunk, "usage", None) or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
    assert text == ANSWER and "19" in reasoning and usage.completion_tokens > 10


def test_litellm_tools(lite):
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "get_weather", "description": "Get the current weather in a city.", "parameters": parameters}}]
    r = litellm.completion(messages=messages("What is the weather in Oslo?"), tools=tools, temperature=0, max_tokens=400, **lite)
    (call,) = r.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Oslo"}')
    assert r.choices[0].finish_reason == "tool_calls"


def test_litellm_response_format(lite):
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": Person.model_json_schema(), "strict": True}}
    # Thinking is free text, which at this temperature may take all the tokens there are.
    plain = {"chat_template_kwargs": {"enable_thinking": False}}
    r = litellm.completion(
        messages=messages("A person."), response_format=schema, temperature=2, max_tokens=400, extra_body=plain, **lite)
    Person.model_validate_json(r.choices[0].message.content)


def test_litellm_text_completion_and_responses(lite):
    assert litellm.text_completion(prompt="Hello", max_tokens=5, **lite).usage.completion_tokens == 5
    (message,) = litellm.responses(input="Hello!", max_output_tokens=50, temperature=0, **lite).output
    assert message.content[0].text == "Hello! How can I help you?"


def test_litellm_tells_a_bad_request_by_its_name(lite):
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(messages=messages("x"), temperature=-1, **lite)
