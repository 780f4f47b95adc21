"""Documents packed in one row of tokens: the model sees each of them as if it stood alone."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rooflight.errors import InvalidValue
from rooflight.models.layout import KVCache, Layout, Paged
from rooflight.models.recompute import Recompute
from rooflight.models.transformer import Transformer
from rooflight.models.weights import load_pretrained
from rooflight.ops import batch
from tests.models.families import VOCAB, checkpoint

LENGTHS = (9, 2, 14)  # the windows of these families are 6
IGNORED = -100
FAMILIES = ["llama3", "gemma2", "gpt_oss", "deepseek_v2", "gpt2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Transformer]:
    def load(name: str) -> Transformer:
        return load_pretrained(checkpoint(name, tmp_path_factory.mktemp(name))[1], dtype=torch.float32)

    return {name: load(name) for name in FAMILIES}


def documents() -> list[Tensor]:
    return list(torch.randint(0, VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2)).split(LENGTHS))


def targets_of(tokens: Tensor) -> Tensor:
    """The next token of each; what follows a document is none of its business."""
    return torch.cat((tokens[1:], torch.tensor([IGNORED])))


def run(
    model: Transformer, tokens: Tensor, positions: Tensor, layout: Layout, targets: Tensor, recompute: Recompute
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(tokens, positions, layout, targets, recompute=recompute)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed(
    model: Transformer, only: int | None, recompute: Recompute = "none", max_length: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one document of the row, or of all, the row's last tokens a document of one token."""
    layout, _ = Layout.of_documents((*LENGTHS, 1), max_length=max_length)
    pieces = documents()
    targets = [targets_of(piece) for piece in pieces]
    if only is not None:
        targets = [t if i == only else torch.full_like(t, IGNORED) for i, t in enumerate(targets)]
    tokens = torch.cat((*pieces, torch.tensor([3])))
    positions = torch.cat([torch.arange(length) for length in (*LENGTHS, 1)])
    return run(model, tokens, positions, layout, torch.cat((*targets, torch.tensor([IGNORED]))), recompute)


def alone(model: Transformer, index: int) -> tuple[Tensor, dict[str, Tensor]]:
    piece = documents()[index]
    layout = Layout(dense=(1, len(piece)), attention="naive")
    return run(model, piece, torch.arange(len(piece)), layout, targets_of(piece), "none")


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for key, gradient in wanted.items():
        # An expert that no token of the document goes to has no gradient alone, and zeros in the row.
        torch.testing.assert_close(found[key], gradient, atol=1e-5, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    assert all(not gradient.any() for key, gradient in found.items() if key not in wanted)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("index", range(len(LENGTHS)))
def test_each_document_is_trained_as_if_alone(models: dict[str, Transformer], name: str, index: int) -> None:
    loss, gradients = packed(models[name], index)
    wanted, wanted_gradients = alone(models[name], index)
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=0)
    same(gradients, wanted_gradients)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_the_mean_of_its_documents(models: dict[str, Transformer], name: str) -> None:
    loss, gradients = packed(models[name], None)
    weights = [(length - 1) / (sum(LENGTHS) - len(LENGTHS)) for length in LENGTHS]
    losses, parts = zip(*(alone(models[name], i) for i in range(len(LENGTHS))), strict=True)
    torch.testing.assert_close(loss, sum(w * x for w, x in zip(weights, losses, strict=True)), atol=1e-5, rtol=0)
    total = {key: torch.zeros_like(p) for key, p in models[name].named_parameters()}
    for weight, part in zip(weights, parts, strict=True):
        for key, gradient in part.items():
            total[key] += weight * gradient
    same(gradients, total)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_and_a_looser_bound_change_no_bit(models: dict[str, Transformer], recompute: Recompute) -> None:
    loss, gradients = packed(models["gemma2"], None)
    again, recomputed = packed(models["gemma2"], None, recompute, max_length=64)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradient, recomputed[key]) for key, gradient in gradients.items())


@torch.no_grad()
def test_logits_are_those_that_transformers_gives_each_document(tmp_path: Path) -> None:
    theirs, folder = checkpoint("llama3", tmp_path)
    layout, _ = Layout.of_documents(LENGTHS)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    ours = load_pretrained(folder, dtype=torch.float32)(torch.cat(documents()), positions, layout)
    for found, piece in zip(ours.split(LENGTHS), documents(), strict=True):
        torch.testing.assert_close(found, theirs(piece.unsqueeze(0)).logits[0], atol=1e-4, rtol=1e-4)


def test_the_layout_and_its_batch() -> None:
    layout, facts = Layout.of_documents([5, 3, 0, 5], "cpu")
    assert layout.documents is not None and layout.whole
    assert layout.documents.starts_N1.dtype == torch.int32
    assert layout.documents.starts_N1.tolist() == [0, *accumulate([5, 3, 0, 5])]
    assert layout.documents.max_length == 5
    assert facts == batch.Batch.of([5, 3, 0, 5], [5, 3, 0, 5])
    bounded = Layout.of_documents([5, 3], max_length=9)[0].documents
    assert bounded is not None and bounded.max_length == 9


@pytest.mark.parametrize(
    ("lengths", "longest", "message"),
    [
        ([], 0, r"document lengths \[\] need a token"),
        ([0, 0], 0, r"document lengths \[0, 0\] need a token"),
        ([4, -1], 0, r"document lengths \[4, -1\] .* none may be negative"),
        ([4, 9], 8, "a document of 9 tokens exceeds max_length 8"),
    ],
)
def test_lengths_that_are_none(lengths: list[int], longest: int, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        Layout.of_documents(lengths, max_length=longest)


def test_layouts_that_contradict_themselves(models: dict[str, Transformer]) -> None:
    model, tokens, positions = models["llama3"], torch.arange(6), torch.arange(6)
    documents = Layout.of_documents([4, 2])[0].documents
    with pytest.raises(InvalidValue, match="attention 'naive' cannot keep packed documents apart; use flash"):
        model(tokens, positions, Layout(documents=documents, attention="naive"))
    with pytest.raises(InvalidValue, match="neither dense nor paged"):
        model(tokens, positions, Layout(dense=(1, 6), documents=documents))
    one = torch.zeros(1, dtype=torch.int32)
    cache = KVCache.allocate(model.config, 1, 16, torch.float32, "cpu")
    paged = Paged(cache, one.unsqueeze(0), one + 6, torch.tensor([0, 6], dtype=torch.int32), torch.arange(6), 6)
    with pytest.raises(InvalidValue, match="neither dense nor paged"):
        model(tokens, positions, Layout(paged=paged, documents=documents))


def test_a_row_runs_dry(models: dict[str, Transformer]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Transformer(models["gemma2"].config)
        layout, _ = Layout.of_documents(LENGTHS)
        tokens = torch.empty(sum(LENGTHS), dtype=torch.int64)
        model(tokens, tokens, layout, tokens).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
