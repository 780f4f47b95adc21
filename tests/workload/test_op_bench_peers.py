"""Peers of `bench ops`: found or absent, and each one's adapter handed a stand-in of the real function's signature."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rooflight.ops import batch
from rooflight.workload.op_bench import BACKWARD, FORWARD, OPERATIONS, WHOLE, attend, installed
from rooflight.workload.op_bench.case import Absent, Draw, Peer
from rooflight.workload.op_bench.check import Check

HERE, GPU = torch.device("cpu"), torch.device("cuda")


def check_of(name: str, sizes: Any, which: str) -> Check:
    return Check(OPERATIONS[name], sizes, which, lambda: Draw(HERE, torch.float32, 1))


def right(name: str, peer: Peer, sizes: Any, which: str = FORWARD) -> bool:
    operation = OPERATIONS[name]
    force = batch.use(operation.batch(*sizes)) if operation.batch else contextlib.nullcontext()
    with torch.set_grad_enabled(which != FORWARD), force:
        return check_of(name, sizes, which).verdict(peer).right


def install(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    """A module of that name, its parents too."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        module = ModuleType(path)
        module.__spec__, module.__path__ = ModuleSpec(path, None), []
        monkeypatch.setitem(sys.modules, path, module)
    vars(sys.modules[name]).update(functions)


def rms(X: Tensor, W: Tensor, eps: float, offset: float = 0.0, casting_mode: str = "", in_place: bool = True) -> Tensor:
    assert (offset, casting_mode, in_place) == (0.0, "llama", False)
    return F.rms_norm(X, W.shape, W, eps)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Any = None, unsqueeze_dim: int = 1) -> Any:
    """q and k [B,H,T,E], cos and sin [B,T,E], each channel pair's numbers twice."""

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos.unsqueeze(1) + torch.cat((-b, a), -1) * sin.unsqueeze(1)

    return turned(q), turned(k)


LIGER = {
    "liger_rms_norm": rms,
    "liger_fused_add_rms_norm": lambda X, R, W, *rest: (rms(X + R, W, *rest), X + R),
    "liger_layer_norm": lambda X, W, B, eps: F.layer_norm(X, W.shape, W, B, eps),
    "liger_softmax": lambda x: x.softmax(-1),
    "liger_swiglu": lambda a, b: F.silu(a) * b,
    "liger_geglu": lambda a, b: F.gelu(a, approximate="tanh") * b,
    "liger_rope": rope,
    "liger_fused_linear_cross_entropy": lambda x, w, target: F.cross_entropy(F.linear(x, w), target),
}


@pytest.mark.parametrize(
    ("name", "sizes", "passes"),
    [
        ("rms_norm", (8, 16), (FORWARD, BACKWARD)),
        ("add_rms_norm", (8, 16), (FORWARD, BACKWARD)),
        ("layer_norm", (8, 16), (FORWARD, BACKWARD)),
        ("softmax", (8, 16), (FORWARD, BACKWARD)),
        ("gated_activation", ("silu", 8, 16), (FORWARD, BACKWARD)),
        ("gated_activation", ("gelu_tanh", 8, 16), (FORWARD, BACKWARD)),
        ("rotary", (8, 4, 2, 16), (FORWARD, BACKWARD)),
        ("linear_cross_entropy", (8, 16, 32), (FORWARD, WHOLE)),
    ],
)
def test_liger(name: str, sizes: Any, passes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "liger_kernel.transformers.functional", **LIGER)
    peers = {peer.name: peer for peer in OPERATIONS[name].peers(GPU)}
    assert all(right(name, peers["liger"], sizes, which) for which in passes)
    assert "liger" not in {peer.name for peer in OPERATIONS[name].peers(HERE)}


def test_liger_has_no_gate_with_the_exact_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "liger_kernel.transformers.functional", **LIGER)
    with pytest.raises(Absent):
        right("gated_activation", OPERATIONS["gated_activation"].peers(GPU)[0], ("gelu", 8, 16))


def flash(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> Tensor:
    assert causal
    return installed.sdpa(q, k, v, softmax_scale)


def varlen(q: Any, k: Any, v: Any, cu_q: Tensor, cu_k: Tensor, most_q: int, most_k: int, **how: Any) -> Tensor:
    lengths = cu_q.diff().tolist()
    assert most_q == most_k == max(lengths) and torch.equal(cu_q, cu_k)
    return attend._each(installed.sdpa, q, k, v, cu_q, lengths, how["softmax_scale"])


def cached(
    q: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, page_table: Tensor, softmax_scale: float, causal: bool
) -> Tensor:
    groups = ((q.shape[0], q.shape[1], int(cache_seqlens[0])),)
    out = attend._each_group(installed.sdpa, q.flatten(0, 1), k, v, page_table, softmax_scale, groups)
    return out.unflatten(0, q.shape[:2])


def test_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn", flash_attn_func=flash, flash_attn_varlen_func=varlen)
    with_lse: dict[str, Any] = {"flash_attn_func": lambda *args, **how: (flash(*args, **how), None)}
    install(monkeypatch, "flash_attn_interface", flash_attn_with_kvcache=cached, **with_lse)
    peers = {peer.name: peer for peer in OPERATIONS["attention"].peers(GPU)}
    for name in ("fa2", "fa3"):
        assert right("attention", peers[name], (2, 4, 2, 24, 16), BACKWARD)
    peers = {peer.name: peer for peer in OPERATIONS["packed_attention"].peers(GPU)}
    assert "fa3" not in peers
    assert right("packed_attention", peers["fa2"], (((1, 16), (2, 5)), 4, 2, 16), BACKWARD)
    peers = {peer.name: peer for peer in OPERATIONS["paged_attention"].peers(GPU)}
    assert set(peers) == {"cudnn", "flash", "fa3"}
    for groups in (((2, 1, 40),), ((2, 24, 24),), ((1, 4, 20),)):
        assert right("paged_attention", peers["fa3"], (groups, 4, 2, 16))
    # Two kinds of sequences are no one call; of a chunk torch's causal kernels have the other corner.
    for name, groups in (("fa3", ((1, 1, 40), (1, 4, 4))), ("flash", ((1, 4, 20),))):
        with pytest.raises(Absent):
            right("paged_attention", peers[name], (groups, 4, 2, 16))
    assert right("paged_attention", peers["flash"], (((2, 1, 40),), 4, 2, 16))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "compiled", lambda call: call)
    for name, sizes in (("attention", (1, 4, 2, 24, 16)), ("packed_attention", (((1, 16), (2, 5)), 4, 2, 16))):
        peers = {peer.name: peer for peer in OPERATIONS[name].peers(GPU)}
        assert right(name, peers["flex"], sizes)


def test_torchs_fused_adamw() -> None:
    (peer,) = OPERATIONS["adamw"].peers(HERE)
    assert right("adamw", peer, ("fp32", 1, 16)) and right("adamw", peer, ("bf16", 1, 16))
    with pytest.raises(Absent):
        right("adamw", peer, ("bf16, fp32 states", 1, 16))


def test_modules_that_are_missing_or_broken_are_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed.find("no_such_module_at_all.inside", "x") is None
    (tmp_path / "built_for_another_torch.py").write_text("raise OSError('undefined symbol')")
    (tmp_path / "an_old_version.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installed.find("built_for_another_torch", "x") is None
    assert installed.find("an_old_version", "x") is None
    assert [peer.name for peer in OPERATIONS["attention"].peers(HERE)] == ["flash", "math"]


def test_backends_that_refuse_are_absent() -> None:
    backends = {peer.name: peer for peer in installed.sdpa_backends(GPU)}
    assert set(backends) == {"cudnn", "flash", "efficient", "math"}
    for name in ("cudnn", "efficient"):
        with pytest.raises(Absent):
            right("attention", backends[name], (2, 4, 2, 24, 16))
    assert right("attention", backends["math"], (2, 4, 2, 24, 16))


def test_flash_attention_3_says_how_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    # The module's own import asks for its file by another way.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "rooflight.workload.op_bench.flash3", raising=False)
    with pytest.raises(ImportError, match="pip install --no-deps xformers"):
        importlib.import_module("rooflight.workload.op_bench.flash3")
