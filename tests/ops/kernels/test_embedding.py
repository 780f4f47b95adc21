"""The embedding's backward kernels under the interpreter against the reference in fp64."""

from __future__ import annotations

import pytest
import torch

from .oracle import assert_close, bits_equal, exact, takes

VOCABULARY = 37


def _random(count: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(count))


# Runs within a chunk of 32, over its border, over many chunks, exactly as long as one, and of one token alone.
TOKENS = {
    "one": torch.tensor([36]),
    "distinct": torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0)),
    "mixed": _random(300),
    "one token": torch.full((97,), 5),
    "half of all": torch.where(torch.arange(300) % 2 == 0, 7, _random(300)),
    "chunks": torch.arange(128) // 32,
    "borders": torch.cat((torch.full((31,), 0), torch.full((2,), 1), torch.full((63,), 2), torch.full((64,), 3))),
    "long": torch.cat((torch.full((5,), 1), torch.full((32 * 33,), 2), torch.full((40,), 3))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", TOKENS)
def test_sums(interpret, name, dtype):
    tokens = TOKENS[name][torch.randperm(TOKENS[name].numel(), generator=torch.Generator().manual_seed(1))]
    grad = torch.randn(tokens.numel(), 9, generator=torch.Generator().manual_seed(2)).to(dtype)
    args = (grad, tokens, VOCABULARY, 1.0)
    out = interpret("embedding.embedding_backward", *args)
    assert out.dtype == dtype
    assert_close(out, exact("embedding_backward", *args), dtype)
    assert bits_equal(out, interpret("embedding.embedding_backward", *args))


def test_scale_batches_strides_and_blocks_of_columns(interpret):
    tokens = _random(80).view(2, 40)
    wide = torch.randn(2, 40, 1300, generator=torch.Generator().manual_seed(2))
    for grad in (wide, wide[..., 3:1203], wide[..., :4].transpose(0, 1).contiguous().transpose(0, 1)):
        args = (grad, tokens, VOCABULARY, 2.5)
        out = interpret("embedding.embedding_backward", *args)
        assert_close(out, exact("embedding_backward", *args), torch.float32)


def test_no_tokens(interpret):
    out = interpret("embedding.embedding_backward", torch.empty(0, 4), torch.empty(0, dtype=torch.int64), 3, 1.0)
    assert torch.equal(out, torch.zeros(3, 4))


def test_what_the_kernel_leaves_to_the_reference():
    grad, tokens = torch.empty(3, 4), torch.zeros(3, dtype=torch.int64)
    assert takes("embedding_backward", grad, tokens, 5, 1.0)
    assert not takes("embedding_backward", grad.double(), tokens, 5, 1.0)
    assert not takes("embedding_backward", grad, tokens, 2**31, 1.0)
