"""`rooflight serve` as a process, asked by the official client; `LLM` and the chat template are the oracle."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, OpenAI

from rooflight.serve.llm import LLM
from rooflight.serve.params import SamplingParams
from tests.serve.checkpoints import CONTEXT, WIDTH, checkpoint, text

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {"device": "cpu", "on": "cloud-cpu", "num_blocks": 200, "block_size": 8}
FLAGS = [part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value))]


class Server:
    """A process that serves; what it says is kept."""

    def __init__(self, directory: Path, *flags: str):
        command = [sys.executable, "-m", "rooflight", "serve", str(directory), "--port", "0", *FLAGS, *flags]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.said: list[str] = []
        self._there = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._there.wait(60), self.said
        found = re.search(r" at (http://127\.0\.0\.1:\d+)/v1", self.said[-1])
        assert found, self.said
        self.url = found[1]
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if line.startswith("serving "):
                self._there.set()
        self._there.set()

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return answer.read().decode()

    def end(self) -> int:
        code = self.process.wait(20)
        self._reader.join(5)
        return code

    def close(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()
        self._reader.join(5)
        for pipe in (self.process.stderr, self.process.stdout):
            if pipe is not None:
                pipe.close()


def metric(page: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", page, re.M))


def test_a_server_from_its_begin_to_its_end(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "model", generation={"temperature": 0.0, "eos_token_id": [0, 351]})
    llm = LLM(str(directory), **SETTINGS)
    server = Server(directory, "--served-model-name", "small", "--drain-seconds", "20")
    try:
        plan = server.said.index("memory plan for model, fp32:\n")
        assert plan < server.said.index(f"loading weights from {directory}\n") < len(server.said)
        client = server.client
        assert [model.id for model in client.models.list().data] == ["small"]

        # Text in, text out; temperature 0 is what generation_config.json recommends.
        prompts = [text(words, words) for words in (3, 11)]
        wanted = [one.outputs[0] for one in llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=24))]
        answer = client.completions.create(model="small", prompt=prompts, max_tokens=24)
        assert [choice.text for choice in answer.choices] == [one.text for one in wanted]
        assert [choice.finish_reason for choice in answer.choices] == [one.finish_reason for one in wanted]
        assert answer.usage is not None
        assert answer.usage.completion_tokens == sum(len(one.token_ids) for one in wanted)
        streamed = ["", ""]
        for chunk in client.completions.create(model="small", prompt=prompts, max_tokens=24, stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == [one.text for one in wanted]

        # A chat is its template's text.
        messages: Any = [{"role": "system", "content": "winter"}, {"role": "user", "content": "river stone"}]
        whole = "<system>winter\n<user>river stone\n<assistant>"
        params = SamplingParams(temperature=1.0, seed=5, max_tokens=20)
        expected = llm.generate(whole, params)[0]
        asked: Any = {"model": "small", "messages": messages, "temperature": 1.0, "seed": 5, "max_tokens": 20}
        chat = client.chat.completions.create(**asked)
        assert chat.choices[0].message.content == expected.outputs[0].text
        assert chat.usage is not None and chat.usage.prompt_tokens == len(expected.prompt_token_ids)
        pieces = [
            chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)
        ]
        assert "".join(pieces) == expected.outputs[0].text and len(pieces) > 3

        vectors = client.embeddings.create(model="small", input=prompts, encoding_format="float").data
        for entry, vector in zip(vectors, llm.embed(prompts), strict=True):
            assert len(entry.embedding) == WIDTH
            assert entry.embedding == pytest.approx(vector, abs=1e-5)

        with pytest.raises(APIStatusError, match=f"context is {CONTEXT} tokens") as caught:
            client.completions.create(model="small", prompt=[1] * 20, max_tokens=CONTEXT)
        assert caught.value.status_code == 400

        page = server.get("/metrics")
        tokens = 2 * sum(len(one.token_ids) for one in wanted) + 2 * len(expected.outputs[0].token_ids)
        assert metric(page, "vllm:generation_tokens_total") == tokens
        assert metric(page, "vllm:num_requests_running") == 0
        assert "<html" in server.get("/") and server.get("/live").startswith("{")

        # What runs goes on to its end after the signal.
        long: Any = {"model": "small", "prompt": "river", "max_tokens": 180, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(**long, stream=True)
        first = next(iter(stream))
        server.process.send_signal(signal.SIGTERM)
        rest = [chunk for chunk in stream if chunk.choices]
        assert rest[-1].choices[0].finish_reason == "length"
        found = first.choices[0].text + "".join(chunk.choices[0].text for chunk in rest)
        params = SamplingParams(temperature=0.0, max_tokens=180, ignore_eos=True)
        assert found == llm.generate("river", params)[0].outputs[0].text
        assert server.end() == 0
        assert any(line.startswith("SIGTERM: no new requests; up to 20 s") for line in server.said)
        assert not any("Traceback" in line or "Error" in line for line in server.said)
    finally:
        server.close()


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-m", "rooflight", "serve", str(tmp_path), "--port", "0", "--device", "cpu"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.count("\n") == 1 and "model_type" in ran.stderr
