"""`rooflight serve` from the command line: where settings come from, its help, bad input in one line."""

from __future__ import annotations

from dataclasses import fields

import pytest

from rooflight.cli import serve
from rooflight.cli.parser import Parser
from rooflight.errors import InvalidValue
from rooflight.serve.settings import EngineSettings, ServerSettings


def parser() -> Parser:
    found = Parser(prog="rooflight serve", description=serve.SUMMARY, epilog=serve.EXAMPLES)
    serve.add_options(found)
    return found


def settings(*arguments: str) -> tuple[EngineSettings, ServerSettings]:
    return serve.settings_of(parser().parse_args(arguments))


def test_defaults_need_a_model_and_nothing_else() -> None:
    assert settings("./model") == (EngineSettings(model="./model"), ServerSettings())
    assert settings("./model")[1].host == "127.0.0.1"


def test_flags_come_before_the_environment_and_the_environment_before_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment = {
        "MODEL": "from-environment", "PORT": "9000", "API_KEY": "secret", "SERVED_MODEL_NAME": "a,b",
        "ENABLE_PREFIX_CACHING": "0", "MAX_NUM_SEQS": "2K", "GPU_MEMORY_UTILIZATION": "0.5",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(f"ROOFLIGHT_{name}", value)
    engine, server = settings()
    assert (engine.model, engine.max_num_seqs, engine.gpu_memory_utilization) == ("from-environment", 2000, 0.5)
    assert not engine.enable_prefix_caching
    assert (server.port, server.api_key, server.served_model_name) == (9000, "secret", ("a", "b"))
    engine, server = settings(
        "given", "--port", "0", "--max-num-seqs", "8", "--enable-prefix-caching", "--served-model-name", "x", "y", "z"
    )
    assert (engine.model, engine.max_num_seqs, engine.enable_prefix_caching) == ("given", 8, True)
    assert (server.port, server.api_key, server.served_model_name) == (0, "secret", ("x", "y", "z"))


def test_every_setting_has_a_flag_but_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    text = capsys.readouterr().out
    for entry in (*fields(EngineSettings), *fields(ServerSettings)):
        flag = "--" + entry.name.replace("_", "-")
        assert (flag in text.replace("--model-", "")) == (entry.name != "model"), entry.name
    for group in ("memory:", "scheduler:", "server:", "limits:"):
        assert group in text
    assert "ROOFLIGHT_PORT" in text


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        ((), {}, ("no model given",)),
        (("m", "--port", "70000"), {}, ("--port 70000", "at most 65535")),
        (("m", "--port", "http"), {}, ("--port 'http'", "whole number")),
        (("m", "--dtype", "int3"), {}, ("--dtype 'int3'", "bf16")),
        (("m", "--max-queue", "0"), {}, ("--max-queue 0", "at least 1")),
        (("m", "--max-prompt", "nan"), {}, ("nan",)),
        (("m",), {"ROOFLIGHT_PORT": "-1"}, ("--port -1", "at least 0")),
        (("m",), {"ROOFLIGHT_ENFORCE_EAGER": "maybe"}, ("ROOFLIGHT_ENFORCE_EAGER 'maybe'", "1 or 0")),
        (("m", "n"), {}, ("unrecognized arguments: n",)),
    ],
)
def test_bad_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], environment: dict[str, str], words: tuple[str, ...]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidValue) as caught:
        settings(*arguments)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_taken_port_is_told_before_anything_is_loaded() -> None:
    from rooflight.serve.api.server import listen

    with listen(ServerSettings(port=0)) as bound:
        bound.listen()
        port = str(bound.getsockname()[1])
        with pytest.raises(InvalidValue, match="Address already in use"):
            serve.run(parser().parse_args(["no-such-model", "--port", port]))
