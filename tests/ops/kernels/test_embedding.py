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
    # Runs in two pieces, as long as two, over three; begun at a piece's first and last position; over groups' borders.
    "two pieces": torch.cat([torch.full((n,), i) for i, n in enumerate((31, 33, 32, 33, 31, 64, 65, 63, 1, 66, 62))]),
    "groups": torch.cat([torch.full((32 * n,), i) for i, n in enumerate((1, 31, 32, 33, 3, 64))]),
    "off groups": torch.cat([torch.full((n,), i) for i, n in enumerate((31, 32 * 31 + 2, 32 * 32 - 1, 2, 32 * 65))]),
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
    assert not takes("embedding_backward", grad, tokens, 2**22, 1.0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_tokens_outside_the_vocabulary_are_written_nowhere(interpret, dtype):
    tokens = torch.tensor([4, -1, 5, 0, 7, -(2**31), 2**31 - 1, 4]).repeat(20).to(dtype)
    grad = torch.randn(tokens.numel(), 3, generator=torch.Generator().manual_seed(2))
    kept = (tokens >= 0) & (tokens < 5)
    out = interpret("embedding.embedding_backward", grad, tokens, 5, 1.0)
    assert_close(out, exact("embedding_backward", grad[kept], tokens[kept], 5, 1.0), torch.float32)


def test_a_value_that_is_no_number_stays_with_its_token(interpret):
    grad = torch.ones(40, 2)
    grad[3], grad[4] = torch.inf, torch.nan
    out = interpret("embedding.embedding_backward", grad, torch.arange(40) // 2, 21, 1.0)
    assert out[1].isinf().all() and out[2].isnan().all()
    assert torch.equal(out[3:20], torch.full((17, 2), 2.0)) and not out[20].any()


# Less than a stretch of 256 positions, some, one of many steps' worth each; tokens of one digit and of two.
@pytest.mark.parametrize(("count", "vocabulary"), [(7, 1), (700, 1), (700, 31), (1000, 5000), (33001, 128256)])
def test_positions_come_in_the_order_of_their_tokens(interpret, count, vocabulary):
    generator = torch.Generator().manual_seed(count)
    tokens = torch.randint(0, vocabulary, (count,), generator=generator)
    tokens[torch.rand(count, generator=generator) < 0.3] = vocabulary // 2
    counter = torch.full((600,), 9, dtype=torch.int32)
    (entries, marks), (*_, counter, _) = interpret.call("token_order.order", tokens, vocabulary, counter, False)
    wanted, positions = tokens.sort(stable=True)
    assert torch.equal(entries >> 32, wanted) and torch.equal(entries & (2**32 - 1), positions)
    # What is no position, or another token's, marks nothing.
    real = (marks >= 0) & (marks < count) & (tokens[marks.clamp(0, count - 1).long()] == torch.arange(vocabulary))
    assert torch.equal(real, torch.zeros(vocabulary, dtype=torch.bool).index_fill_(0, tokens, True))
    assert not counter.any()
