"""Exported models as transformers and as Rooflight load them, and directories that must not be touched."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rooflight.errors import InvalidValue, RooflightError
from rooflight.models.huggingface import config_from_hf
from rooflight.models.naming import tensors
from rooflight.models.transformer import Transformer
from rooflight.models.weights import load_pretrained
from rooflight.train import export as module
from rooflight.train.data import Tokenizer
from rooflight.train.export import MARKER, export
from tests.models.families import CASES
from tests.models.test_families import our_logits

TEXT = "A checkpoint is written whole or not at all, and 1,234 tokens — naïve ones too — come back.\n"
VOCABULARY = 300


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT] * 4, 290)


def a_model(name: str = "llama2", seed: int = 0) -> Transformer:
    """A family's small model with every tensor random, in fp32; its vocabulary is padded beyond the tokenizer's."""
    model = Transformer(config_from_hf({**CASES[name].config(), "vocab_size": VOCABULARY, "torch_dtype": "float32"}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors(model).values():
            tensor.copy_(0.12 * torch.randn(tensor.shape, generator=generator))
    return model


def same(a: Transformer, b: Transformer) -> bool:
    left, right = tensors(a), tensors(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("shard", [1 << 40, 40_000])
@pytest.mark.parametrize("name", ["llama2", "llama-yarn", "qwen3", "gemma2", "gemma3", "qwen3_moe"])
def test_transformers_and_rooflight_load_it(name: str, shard: int, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = a_model(name)
    folder = export(model, tmp_path / "out", tokenizer, max_shard_bytes=shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard < 1 << 40)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens_BQ = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = theirs(tokens_BQ).logits
    assert wanted.std() > 0.05
    torch.testing.assert_close(our_logits(model, tokens_BQ), wanted, atol=1e-5, rtol=1e-5)
    back = load_pretrained(folder)
    assert same(back, model)
    assert (back.head.weight is back.embedding.weight) == model.config.tied
    assert theirs.config.eos_token_id == tokenizer.eos_id
    assert theirs.config.bos_token_id is None
    assert theirs.generation_config.eos_token_id == tokenizer.eos_id
    assert theirs.generation_config.bos_token_id is None


def test_transformers_encodes_as_the_run_did(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = export(a_model("gemma3"), tmp_path / "out", tokenizer)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs(TEXT)["input_ids"] == tokenizer.encode_batch([TEXT])[0]
    assert theirs.decode(theirs(TEXT)["input_ids"]) == TEXT
    assert theirs.eos_token_id == tokenizer.eos_id
    settings = GenerationConfig.from_pretrained(folder)
    assert (settings.eos_token_id, settings.pad_token_id, settings.do_sample) == (tokenizer.eos_id,) * 2 + (False,)


def test_generation_from_text_to_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """transformers' own greedy generation ends at our end of text without being told."""
    model = a_model("qwen3")
    folder = export(model, tmp_path / "out", tokenizer)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(TEXT[:20], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = theirs.generate(ids, max_new_tokens=6)[0, ids.shape[1] :].tolist()
    first = int(our_logits(model, ids)[0, -1].argmax())
    assert out[0] == first
    # The same model, had this token been the end of text.
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": first}))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        out = theirs.generate(ids, max_new_tokens=6)
    assert out[0, ids.shape[1] :].tolist() == [first]


@pytest.mark.parametrize("name", ["llama-yarn", "deepseek_v3"])
def test_conversion_leaves_the_model_as_it_is(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = a_model(name)
    before = {key: tensor.clone() for key, tensor in tensors(model).items()}
    back = load_pretrained(export(model, tmp_path / "half", tokenizer, dtype=torch.bfloat16))
    assert back.config.dtype == "bfloat16"
    for key, tensor in tensors(back).items():
        kept = key.endswith("choice_bias_X")
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16)
        assert torch.equal(tensor, before[key] if kept else before[key].bfloat16())
    assert all(torch.equal(tensor, before[key]) for key, tensor in tensors(model).items())
    whole = load_pretrained(export(back, tmp_path / "whole", tokenizer, dtype=torch.float32))
    assert whole.config.dtype == "float32"
    assert all(torch.equal(tensor, tensors(back)[key].float()) for key, tensor in tensors(whole).items())


def test_a_tokenizer_on_disk_keeps_its_beginning_and_its_chat_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    given = tmp_path / "given"
    tokenizer.save(given)
    data = json.loads((given / "tokenizer.json").read_text())
    begin = {"id": 290, "content": "<s>", "special": True, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    data["added_tokens"].append({**begin, **flags})
    special = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [290], "tokens": ["<s>"]}},
    }
    (given / "tokenizer.json").write_text(json.dumps(data))
    (given / "chat_template.jinja").write_text("{{ messages[0].content }}")
    folder = export(a_model(), tmp_path / "out", given)
    assert json.loads((folder / "config.json").read_text())["bos_token_id"] == 290
    assert json.loads((folder / "generation_config.json").read_text())["bos_token_id"] == 290
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs("a")["input_ids"][0] == 290
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_without_a_tokenizer(tmp_path: Path) -> None:
    model = a_model("gemma3")
    folder = export(model, tmp_path / "out", None)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert (theirs.config.eos_token_id, theirs.generation_config.eos_token_id) == (None, None)
    assert not (folder / "tokenizer.json").exists()
    assert same(load_pretrained(folder), model)


def test_a_previous_export_is_replaced_and_nothing_else(tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export(a_model(seed=1), out, tokenizer, max_shard_bytes=40_000)
    other = a_model(seed=2)
    export(other, out, tokenizer)
    assert same(load_pretrained(out), other)
    assert len(list(out.glob("*.safetensors"))) == 1
    assert sorted(json.loads((out / MARKER).read_text())["files"]) == sorted(path.name for path in out.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing left behind"

    (out / "notes.txt").write_text("mine")
    with pytest.raises(InvalidValue, match=r"holds notes\.txt, which the previous export did not write"):
        export(a_model(seed=3), out, tokenizer)
    assert same(load_pretrained(out), other)
    export(a_model(seed=3), out, tokenizer, overwrite=True)
    assert same(load_pretrained(out), a_model(seed=3))

    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InvalidValue, match=r"holds thesis\.txt, which is no export"):
            export(other, home, tokenizer, overwrite=overwrite)
    with pytest.raises(InvalidValue, match="is a file"):
        export(other, home / "thesis.txt", tokenizer)
    assert (home / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("where", ["save", "sync", "_put_in_place", "rename"])
def test_a_full_disk_leaves_the_previous_export(where: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch) -> None:
    def full(*args: Any, **_: Any) -> Any:
        if where == "rename" and not str(args[0]).rpartition("/")[2].startswith(".out.partial"):
            return renamed(*args)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    renamed = Path.rename
    out = export(a_model(), tmp_path / "out", tokenizer)
    monkeypatch.setattr(*((Path, "rename") if where == "rename" else (module, where)), full)
    with pytest.raises(RooflightError) as caught:
        export(a_model(seed=1), out, tokenizer)
    monkeypatch.undo()
    for part in (str(out), "not written", "No space left", "GiB are free", "make room"):
        assert part in str(caught.value)
    assert same(load_pretrained(out), a_model())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_exported_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="float64; use one of float32, bfloat16, float16"):
        export(a_model(), tmp_path / "out", tokenizer, dtype=torch.float64)
    config = config_from_hf({**CASES["llama2"].config(), "vocab_size": 200})
    with pytest.raises(InvalidValue, match=f"has {tokenizer.vocab_size} tokens, the model 200"):
        export(Transformer(config), tmp_path / "out", tokenizer)
    with pytest.raises(InvalidValue, match="there is no such file"):
        export(a_model(), tmp_path / "out", tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
