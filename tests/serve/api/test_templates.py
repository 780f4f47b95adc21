"""Chat templates against transformers' `apply_chat_template`, and what a template may not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rooflight.errors import InvalidValue
from rooflight.models.tokenizer import Tokenizer
from rooflight.serve.api.errors import ApiError
from rooflight.serve.api.templates import ChatTemplate

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "You may call these:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
        {%- continue %}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") if false else "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "Functions:\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {{- '{"name": "' + message.tool_calls[0].function.name + '", "parameters": ' }}
        {{- message.tool_calls[0].function.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + message.content + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{%- set turns = messages | rejectattr("role", "equalto", "system") | list %}
{{- bos_token }}
{% for message in turns %}
    {% if (message.role == 'user') != (loop.index0 % 2 == 0) and message.role != 'tool' %}
        {{ raise_exception('roles must alternate user/assistant') }}
    {% endif %}
    {% if message.role == 'user' %}
        {% if tools is not none and loop.last %}
[AVAILABLE_TOOLS] {{ tools | map(attribute="function") | list | tojson }}[/AVAILABLE_TOOLS]
        {% endif %}
{{ ' [INST] ' + message.content + ' [/INST]' -}}
        {% if loop.index0 > 100 %}{% break %}{% endif %}
    {% elif message.role == 'assistant' %}
{{ ' ' + message.content + eos_token }}
    {% endif %}
{% endfor %}"""

TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather <now> & 'here' in Zürich",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
USER = {"role": "user", "content": "  What's <the> weather? ✓ "}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [{"role": "system", "content": "Be brief.\n"}, USER],
    "turns": [USER, {"role": "assistant", "content": "Fine."}, {"role": "user", "content": "Sure?"}],
    "called": [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "n": 1.5}}}
            ],
        },
        {"role": "tool", "content": "12 °C"},
    ],
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer of the same files."""
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.bytes().save(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return transformers.AutoTokenizer.from_pretrained(directory)


def ours(template: str) -> ChatTemplate:
    return ChatTemplate({"default": template}, {"bos_token": "<s>", "eos_token": "<|endoftext|>"})


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["bare", "tools"])
@pytest.mark.parametrize("prompt", [True, False])
def test_the_text_is_that_of_transformers(
    theirs: Any, kind: str, conversation: str, tools: list[dict[str, Any]] | None, prompt: bool
) -> None:
    messages = CONVERSATIONS[conversation]
    asked = {"tools": tools, "add_generation_prompt": prompt}
    if kind == "mistral" and conversation == "called":
        with pytest.raises(ApiError, match="roles must alternate"):
            ours(MISTRAL).render([USER, USER], tools)
        return
    expected = theirs.apply_chat_template(messages, chat_template=TEMPLATES[kind], tokenize=False, **asked)
    assert ours(TEMPLATES[kind]).render(messages, **asked) == expected
    assert len(expected) > 10


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("last", ["The answer is", "It says: Fine.", "Fine"])
def test_a_final_message_is_continued_as_transformers_does(theirs: Any, kind: str, last: str) -> None:
    messages = [*CONVERSATIONS["turns"], {"role": "assistant", "content": last}]
    expected = theirs.apply_chat_template(
        messages, chat_template=TEMPLATES[kind], tokenize=False, continue_final_message=True
    )
    found = ours(TEMPLATES[kind]).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert found == expected
    assert found.endswith(last)
    assert messages[-1]["content"] == last


def test_variables_reach_the_template(theirs: Any) -> None:
    expected = theirs.apply_chat_template(
        [USER], chat_template=CHATML, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert ours(CHATML).render([USER], variables={"enable_thinking": False}) == expected
    assert "</think>" in expected


def write(directory: Path, files: dict[str, Any]) -> Tokenizer:
    """A tokenizer's directory with more files in it, loaded."""
    Tokenizer.bytes().save(directory)
    for name, content in files.items():
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return Tokenizer.load(directory)


NAMED = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]


@pytest.mark.parametrize(
    ("files", "expected", "with_tools"),
    [
        ({"tokenizer_config.json": {"eos_token": "<|endoftext|>", "chat_template": "config"}}, "config", None),
        ({"chat_template.jinja": "{{ eos_token }}{{ bos_token }}"}, "<|endoftext|>", None),
        ({"chat_template.json": {"chat_template": "of json"}}, "of json", None),
        (
            {
                "chat_template.jinja": "jinja",
                "tokenizer_config.json": {"eos_token": "<|endoftext|>", "chat_template": "config"},
            },
            "jinja",
            None,
        ),
        ({"tokenizer_config.json": {"eos_token": "<|endoftext|>", "chat_template": NAMED}}, "plain", "1 tools"),
        (
            {
                "tokenizer_config.json": {
                    "eos_token": {"content": "<|endoftext|>"},
                    "bos_token": {"content": "<s>"},
                    "chat_template": "{{ bos_token }}-{{ eos_token }}",
                }
            },
            "<s>-<|endoftext|>",
            None,
        ),
    ],
)
def test_where_a_template_comes_from(
    tmp_path: Path, files: dict[str, Any], expected: str, with_tools: str | None
) -> None:
    template = ChatTemplate.of(write(tmp_path, files))
    assert template.render([USER]) == expected
    if with_tools:
        assert template.render([USER], TOOLS) == with_tools
    given = tmp_path / "given.jinja"
    given.write_text("given")
    assert ChatTemplate.of(write(tmp_path, files), str(given)).render([USER]) == "given"


def test_a_directory_serves_where_the_tokenizer_brings_none(tmp_path: Path) -> None:
    write(tmp_path, {"chat_template.jinja": "from the checkpoint"})
    assert ChatTemplate.of(Tokenizer.bytes(), directory=tmp_path).render([USER]) == "from the checkpoint"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ range(10**9) | list }}",
        "{{ raise_exception('no\nsuch thing') }}",
        "{{ messages[0].nothing.deeper }}",
        "{{ 1 // 0 }}",
    ],
)
def test_what_a_template_may_not_do_is_an_error_of_the_request(template: str) -> None:
    with pytest.raises(ApiError) as caught:
        ours(template).render([USER])
    assert caught.value.status == 400
    assert "\n" not in caught.value.message


def test_a_template_that_cannot_be_read_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="--chat-template .*nowhere: No such file"):
        ChatTemplate.of(None, str(tmp_path / "nowhere"))
    (tmp_path / "bad.jinja").write_text("{% if %}")
    with pytest.raises(InvalidValue, match="no valid Jinja"):
        ChatTemplate.of(None, str(tmp_path / "bad.jinja"))
