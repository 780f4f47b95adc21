"""The fused linear and cross-entropy as a CPU runs it: chunks of tokens for the products, blocks of rows in cache.

Legend: T tokens  V vocabulary  D width  N tokens of a chunk
"""

from __future__ import annotations

import torch
from torch import Tensor

from rooflight.ops.cpu_matmul import product
from rooflight.ops.loss import IGNORE

ROW_BYTES = 4096  # a chunk: 1024 tokens in fp32, 2048 in bf16
BLOCK = 2**19  # logits of the rows that are worked on together, so that they stay in cache
ROWS = 4096  # rows of the weight's gradient that are made at a time


def _divisor(targets_T: Tensor, ignore_index: int, count: int) -> Tensor | int:
    return count if count else (targets_T != ignore_index).sum()


def _rows_(
    z: Tensor, targets: Tensor, losses: Tensor, factor: Tensor | None, softcap: float, ignore_index: int
) -> None:
    """Losses of some rows of logits; with a factor the logits become their gradient times it, zero where ignored."""
    kept = targets != ignore_index
    column = torch.where(kept, targets, 0).unsqueeze(-1)
    work = z.float()  # z itself in fp32
    tanh = None
    if softcap:
        tanh = (work / softcap).tanh_()
        work = torch.mul(tanh, softcap, out=work)
    highest, picked = work.amax(-1), work.gather(-1, column).squeeze(-1)
    torch.softmax(work, -1, out=work)
    # The greatest probability is at least 1/V, so that its logarithm loses nothing.
    lse = highest - work.amax(-1).log_()
    losses.copy_(torch.where(kept, lse - picked, 0.0))
    if factor is None:
        return
    scale = torch.where(kept, factor, 0.0).unsqueeze(-1)
    work.mul_(scale).scatter_add_(-1, column, -scale)
    if tanh is not None:
        work.mul_(tanh.square_().neg_().add_(1.0))
    z.copy_(torch.where(kept.unsqueeze(-1), work, 0.0) if not kept.all() else work)


def _chunk_(z: Tensor, targets: Tensor, losses: Tensor, factor: Tensor | None, softcap: float, ignore: int) -> None:
    """`_rows_` over a chunk by blocks of rows: a dozen passes over what is in cache cost less than two that are not."""
    rows = max(BLOCK // z.shape[1], 1)
    for z_block, target_block, loss_block in zip(z.split(rows), targets.split(rows), losses.split(rows), strict=True):
        _rows_(z_block, target_block, loss_block, factor, softcap, ignore)


def _chunk_tokens(x_TD: Tensor) -> int:
    return ROW_BYTES // x_TD.element_size()


def _add_product_(total_VD: Tensor, z_NV: Tensor, x_ND: Tensor) -> None:
    """total += zᵀ·x by blocks of rows, so that no second weight-sized tensor stands beside the total."""
    for total, z in zip(total_VD.split(ROWS), z_NV.split(ROWS, dim=1), strict=True):
        total += product(z.t(), x_ND)


def linear_cross_entropy_reference(
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    softcap: float = 0.0,
    ignore_index: int = IGNORE,
    count: int = 0,
) -> Tensor:
    """The mean loss, as `fused_loss.linear_cross_entropy` without gradients."""
    losses_T = x_TD.new_empty(x_TD.shape[0], dtype=torch.float32)
    chunk = _chunk_tokens(x_TD)
    for x, targets, losses in zip(x_TD.split(chunk), targets_T.split(chunk), losses_T.split(chunk), strict=True):
        z = product(x, weight_VD.t())
        _chunk_(z, targets, losses, None, softcap, ignore_index)
    return losses_T.sum() / _divisor(targets_T, ignore_index, count)


def with_grad_reference(
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    softcap: float = 0.0,
    ignore_index: int = IGNORE,
    count: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss and its gradients with respect to x and the weight."""
    tokens, chunk = x_TD.shape[0], _chunk_tokens(x_TD)
    losses_T = x_TD.new_empty(tokens, dtype=torch.float32)
    divisor = torch.as_tensor(_divisor(targets_T, ignore_index, count), dtype=torch.float32, device=x_TD.device)
    factor = divisor.reciprocal()
    if 0 < tokens <= chunk:
        z_TV = product(x_TD, weight_VD.t())
        _chunk_(z_TV, targets_T, losses_T, factor, softcap, ignore_index)
        return losses_T.sum() / divisor, product(z_TV, weight_VD), product(z_TV.t(), x_TD)
    grad_x_TD = x_TD.new_empty(x_TD.shape)
    # Chunks add up in fp32: a bf16 sum would lose the small gradients of rare tokens.
    total_VD = weight_VD.new_zeros(weight_VD.shape, dtype=torch.float32)
    for start in range(0, tokens, chunk):
        rows = slice(start, min(start + chunk, tokens))
        x = x_TD[rows]
        z = product(x, weight_VD.t())
        _chunk_(z, targets_T[rows], losses_T[rows], factor, softcap, ignore_index)
        grad_x_TD[rows] = product(z, weight_VD)
        _add_product_(total_VD, z, x)
        del z  # before the next chunk's logits are made
    return losses_T.sum() / divisor, grad_x_TD, total_VD.to(weight_VD.dtype)
