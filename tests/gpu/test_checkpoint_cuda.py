"""Checkpoints of CUDA tensors: bit for bit, also when training overwrites them while they are written."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from rooflight.train.checkpoint import Checkpoints, rng_state, set_rng_state
from rooflight.train.checkpoint import storage as storage_module
from tests.train.states import assert_same, blank, state

pytestmark = pytest.mark.gpu


def on_gpu(seed: int = 0) -> dict[str, torch.Tensor]:
    """The states of the CPU tests, a large tensor and one that stays on the CPU."""
    moved = {name: tensor.detach().cuda() for name, tensor in state(seed).items()}
    generator = torch.Generator(device="cuda").manual_seed(seed)
    moved["large"] = torch.randn(5000, 1001, device="cuda", generator=generator)
    moved["host"] = torch.arange(5) + seed
    return moved


@pytest.mark.parametrize("asynchronous", [False, True])
def test_round_trip_bit_for_bit(asynchronous: bool, tmp_path: Path) -> None:
    with Checkpoints(tmp_path, asynchronous=asynchronous) as store:
        path = store.save(1, on_gpu(), {"step": 1})
    target = blank(on_gpu(1))
    places = {name: tensor.data_ptr() for name, tensor in target.items()}
    store = Checkpoints(tmp_path)
    assert store.latest() == path
    assert store.load(path, target) == {"step": 1}
    assert_same(target, on_gpu())
    assert {name: tensor.data_ptr() for name, tensor in target.items()} == places
    assert target["large"].is_cuda
    # What a GPU saved, a CPU loads.
    host = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in target.items()}
    store.load(path, host)
    assert_same(host, on_gpu())


def test_asynchronous_saves_what_stood_when_save_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels queued before the save are in it, kernels queued after it are not; the pinned copy is made once."""
    gate = threading.Event()
    places: list[int] = []
    original = storage_module.write

    def held_up(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
        assert gate.wait(60)
        assert all(tensor.device.type == "cpu" for tensor in tensors.values())
        assert tensors["large"].is_pinned()
        places.append(tensors["large"].data_ptr())
        original(directory, tensors)

    monkeypatch.setattr(storage_module, "write", held_up)
    live = on_gpu()
    with Checkpoints(tmp_path, asynchronous=True) as store:
        for step in (1, 2):
            gate.clear()
            torch.cuda._sleep(100_000_000)
            for name, tensor in on_gpu(step).items():
                live[name].copy_(tensor)
            path = store.save(step, live, {})
            for tensor in live.values():
                tensor.zero_()
            assert not path.exists()
            gate.set()
            store.wait()
            target = blank(live)
            store.load(path, target)
            assert_same(target, on_gpu(step))
    assert places[0] == places[1]


def test_random_state() -> None:
    torch.cuda.manual_seed(5)
    kept = rng_state("cuda")
    first = torch.rand(100, device="cuda"), torch.rand(100)
    torch.rand(7, device="cuda")
    set_rng_state(kept, "cuda")
    assert torch.equal(torch.rand(100, device="cuda"), first[0])
    assert torch.equal(torch.rand(100), first[1])
