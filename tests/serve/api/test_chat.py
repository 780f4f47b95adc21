"""/v1/chat/completions by the official client: messages, streams, tools, log-probabilities."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import BadRequestError

from rooflight.serve.api.tools import ToolCalls
from tests.serve.api.conftest import Running, Starter, with_template
from tests.serve.api.fake_engine import SAYS, FakeEngine, logprob

HI: Any = [{"role": "user", "content": "Hi"}]
RENDERED = b"<|user|>Hi\n<|assistant|>"
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}}\n</tool_call>'


def test_messages_go_through_the_template_and_the_rest_of_the_context_is_free(plain: Running) -> None:
    plain.engine.seen.clear()
    answer = plain.client().chat.completions.create(model="fake", messages=HI)
    ids, params, name, _ = plain.engine.seen[0]
    assert bytes(ids) == RENDERED
    assert params.max_tokens is None
    assert name.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == SAYS.encode()[: 512 - len(RENDERED)].decode()
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.tool_calls is None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(RENDERED)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit(plain: Running, field: str) -> None:
    limit: dict[str, Any] = {field: 9}
    answer = plain.client().chat.completions.create(model="fake", messages=HI, **limit)
    assert answer.choices[0].message.content == SAYS[:9]


def test_text_parts_become_one_text(plain: Running) -> None:
    plain.engine.seen.clear()
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    plain.client().chat.completions.create(model="fake", messages=parts, max_tokens=1)
    assert bytes(plain.engine.seen[0][0]) == b"<|user|>a\nb\n<|assistant|>"


def test_a_stream_begins_with_the_role_and_ends_with_usage(plain: Running) -> None:
    chunks = list(
        plain.client().chat.completions.create(
            model="fake", messages=HI, max_tokens=6, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.role for chunk in chunks[1:-1]] == [None] * 6
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == SAYS[:6]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 6 + ["length"]
    assert all(chunk.object == "chat.completion.chunk" and chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6


def test_many_choices_stream_side_by_side(start: Starter) -> None:
    server = start(FakeEngine(tokenizer=with_template(), says=lambda ids, index: f"choice {index}"))
    texts = ["", "", ""]
    roles = []
    for chunk in server.client().chat.completions.create(model="fake", messages=HI, n=3, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.index] if choice.delta.role else []
    assert texts == ["choice 0", "choice 1", "choice 2"]
    assert sorted(roles) == [0, 1, 2]
    whole = server.client().chat.completions.create(model="fake", messages=HI, n=3)
    assert [choice.message.content for choice in whole.choices] == texts


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_their_tokens_bytes_and_rivals(start: Starter, stream: bool) -> None:
    server = start(FakeEngine(tokenizer=with_template(), says="aé"))
    asked: dict[str, Any] = {"model": "fake", "messages": HI, "logprobs": True, "top_logprobs": 2}
    content: list[Any] = []
    if stream:
        for chunk in server.client().chat.completions.create(**asked, stream=True):
            logprobs = chunk.choices[0].logprobs
            content += (logprobs.content or []) if logprobs else []
    else:
        logprobs = server.client().chat.completions.create(**asked).choices[0].logprobs
        assert logprobs is not None
        content = logprobs.content or []
    assert [entry.bytes for entry in content] == [[token] for token in "aé".encode()]
    assert [entry.logprob for entry in content] == [logprob(token) for token in "aé".encode()]
    assert content[0].token == "a"
    assert [(rival.token, rival.logprob) for rival in content[0].top_logprobs] == [("a", logprob(97)), ("b", -5.0)]


def test_logprobs_alone_have_no_rivals(plain: Running) -> None:
    answer = plain.client().chat.completions.create(model="fake", messages=HI, logprobs=True, max_tokens=2)
    assert answer.choices[0].logprobs is not None
    assert [entry.top_logprobs for entry in answer.choices[0].logprobs.content or []] == [[], []]


def test_a_message_is_continued(plain: Running) -> None:
    plain.engine.seen.clear()
    plain.client().chat.completions.create(
        model="fake", messages=[*HI, {"role": "assistant", "content": "The quick "}], max_tokens=2,
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )  # fmt: skip
    assert bytes(plain.engine.seen[0][0]) == b"<|user|>Hi\n<|assistant|>The quick "


@pytest.fixture(scope="module")
def caller(start: Starter) -> Running:
    return start(FakeEngine(tokenizer=with_template(), says=f"Let me look.\n{CALL}\n{CALL}", max_model_len=1024))


def arguments_of(call: Any) -> Any:
    return json.loads(call.function.arguments)


def test_tool_calls_are_parsed(caller: Running) -> None:
    caller.engine.seen.clear()
    choice = caller.client().chat.completions.create(model="fake", messages=HI, tools=TOOLS).choices[0]
    assert b"<|tools|>" + json.dumps(TOOLS).encode() in bytes(caller.engine.seen[0][0])
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look.\n"
    calls: list[Any] = list(choice.message.tool_calls or [])
    assert [call.function.name for call in calls] == ["weather", "weather"]
    assert arguments_of(calls[0]) == {"city": "Zürich", "days": [1, 2]}
    assert len({call.id for call in calls}) == 2


def test_tool_calls_are_streamed_whole(caller: Running) -> None:
    content, calls, reasons = "", [], []
    for chunk in caller.client().chat.completions.create(model="fake", messages=HI, tools=TOOLS, stream=True):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        calls += choice.delta.tool_calls or []
        reasons.append(choice.finish_reason)
    assert content == "Let me look.\n"
    assert [call.index for call in calls] == [0, 1]
    assert arguments_of(calls[1]) == {"city": "Zürich", "days": [1, 2]}
    assert reasons[-1] == "tool_calls"
    assert set(reasons[:-1]) == {None}


def test_no_tools_no_parsing(caller: Running) -> None:
    asked: list[dict[str, Any]] = [{}, {"tools": TOOLS, "tool_choice": "none"}]
    for extra in asked:
        caller.engine.seen.clear()
        choice = caller.client().chat.completions.create(model="fake", messages=HI, **extra).choices[0]
        assert choice.message.content == f"Let me look.\n{CALL}\n{CALL}"
        assert choice.finish_reason == "stop"
        assert bytes(caller.engine.seen[0][0]) == RENDERED


def test_the_answers_of_tools_go_back_into_the_template(plain: Running) -> None:
    plain.engine.seen.clear()
    messages: Any = [
        *HI,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "12 C"},
    ]
    plain.client().chat.completions.create(model="fake", messages=messages, tools=TOOLS, max_tokens=1)
    text = bytes(plain.engine.seen[0][0]).decode()
    # The template gets arguments as an object, as the templates of the hub expect.
    assert '"arguments": {"city": "Bern"}' in text
    assert text.endswith("<|tool|>12 C\n<|assistant|>")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        ("plain < text <tool", "plain < text <tool", []),
        ("a <tool_call>not json</tool_call> b", "a <tool_call>not json</tool_call> b", []),
        ('x<tool_call>{"name": "f"}</tool_call>', "x", ["f"]),
        ('<tool_call>{"name": "f", "arguments": {}}', "", ["f"]),
        ('<tool_call>{"name": "f"}</tool_call>\n<tool_call>{"name": "g"}</tool_call>\n', "", ["f", "g"]),
        ('<tool_call>{"name": "f"}</tool_call> and so on', " and so on", ["f"]),
        ('<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
        ("<tool_call>{", "<tool_call>{", []),
    ],
)
def test_calls_do_not_depend_on_how_the_text_is_cut(size: int, text: str, content: str, names: list[str]) -> None:
    parser, said, found = ToolCalls(), "", []
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    for number, piece in enumerate(pieces):
        new, calls = parser.feed(piece, last=number == len(pieces) - 1)
        said += new
        found += [call["function"]["name"] for call in calls]
    assert (said, found) == (content, names)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "text parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
            "'image_url'",
        ),
        ({"messages": [{"role": "user", "content": "y" * 600}]}, "messages", "context is 512"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs", "allows 20"),
        ({"tool_choice": "required", "tools": TOOLS}, "tool_choice", "auto"),
        ({"chat_template": "x"}, "chat_template", "--chat-template"),
        ({"chat_template_kwargs": {"messages": []}}, "messages", "field of its own"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "exclude"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages",
            "valid JSON",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages", "without function"),
    ],
)
def test_a_bad_field_is_one_line_that_names_it(plain: Running, fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        plain.client().post("/chat/completions", body={"model": "fake", "messages": HI, **fields}, cast_to=object)
    assert caught.value.param == param, caught.value.message
    assert words in caught.value.message


def test_a_model_without_a_template_says_so(start: Starter) -> None:
    server = start(FakeEngine())
    with pytest.raises(BadRequestError, match="no chat template; start the server with --chat-template"):
        server.client().chat.completions.create(model="fake", messages=HI)


def test_a_template_without_tools_says_so(start: Starter) -> None:
    server = start(FakeEngine(tokenizer=with_template("{{ messages[0].content }}")))
    with pytest.raises(BadRequestError, match="knows no tools"):
        server.client().chat.completions.create(model="fake", messages=HI, tools=TOOLS)
