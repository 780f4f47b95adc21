"""Checkpoints: what is saved comes back bit for bit, the newest are kept, other tensors are refused."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rooflight.errors import InvalidValue, WeightsMismatch
from rooflight.train.checkpoint import Checkpoints
from rooflight.train.checkpoint import storage as storage_module
from tests.train.states import assert_same, blank, names, raw, state

META = {
    "step": 7,
    "loss": 0.1 + 0.2,
    "big": 2**70,
    "rng": {"cpu": "00ff"},
    "skipped": [],
    "note": "Größe",
    "none": None,
}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_round_trip_bit_for_bit(asynchronous: bool, tmp_path: Path) -> None:
    saved = state()
    with Checkpoints(tmp_path / "checkpoints", asynchronous=asynchronous) as store:
        path = store.save(100, saved, META)
    assert path.name == "step-00000100"
    fresh = Checkpoints(tmp_path / "checkpoints")
    assert fresh.latest() == path
    assert fresh.problems == []
    target = blank(saved)
    places = {name: tensor.data_ptr() for name, tensor in target.items()}
    assert fresh.load(path, target) == META
    assert_same(target, saved)
    assert {name: tensor.data_ptr() for name, tensor in target.items()} == places, "filled in place"
    assert fresh.meta(path) == META


def test_without_tensors(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    assert store.latest() is None
    assert store.load(store.save(0, {}, {}), {}) == {}


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    whole_XY = torch.arange(24.0).view(6, 4)
    saved = {"tied": whole_XY, "head": whole_XY, "upper": whole_XY[:3], "lower": whole_XY[3:]}
    store = Checkpoints(tmp_path)
    target = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    store.load(store.save(1, saved, {}), target)
    assert_same(target, saved)


def test_files_keep_to_their_size_and_any_safetensors_tool_reads_them(tmp_path: Path) -> None:
    saved = {f"w{i}": torch.full((10,), float(i)) for i in range(7)} | {"large": torch.ones(100)}
    storage_module.write(tmp_path, saved, file_bytes=100)
    seen: dict[str, torch.Tensor] = {}
    files = list(tmp_path.iterdir())
    assert len(files) == 5
    for file in files:
        with safe_open(file, "pt") as handle:
            held = {name: handle.get_tensor(name) for name in list(handle.keys())}
        assert len(held) == 1 or storage_module.size_bytes(held) <= 100
        seen |= held
    assert_same(dict(sorted(seen.items())), dict(sorted(saved.items())))


def test_saving_synchronously_copies_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the writer are the tensors themselves; asynchronously one copy of them, made once for all saves."""
    given: list[dict[str, int]] = []
    original = storage_module.write

    def watched(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
        given.append({name: tensor.data_ptr() for name, tensor in tensors.items()})
        original(directory, tensors)

    monkeypatch.setattr(storage_module, "write", watched)
    saved = {"a": torch.randn(1000), "b": torch.randn(50)}
    Checkpoints(tmp_path / "sync").save(1, saved, {})
    assert given.pop() == {name: tensor.data_ptr() for name, tensor in saved.items()}
    with Checkpoints(tmp_path / "async", asynchronous=True) as store:
        store.save(1, saved, {})
        store.save(2, saved, {})
    assert given[0] == given[1]
    assert not set(given[0].values()) & {tensor.data_ptr() for tensor in saved.values()}


def test_asynchronous_saves_what_stood_when_save_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    original = storage_module.write

    def held_up(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
        assert gate.wait(20)
        original(directory, tensors)

    monkeypatch.setattr(storage_module, "write", held_up)
    live, meta = state(3), {"numbers": [1, 2]}
    with Checkpoints(tmp_path, asynchronous=True) as store:
        path = store.save(5, live, meta)
        assert not path.exists()
        meta["numbers"].append(3)
        for tensor in live.values():
            tensor.detach().zero_()
        gate.set()
        assert store.latest() == path, "it waits for the write"
        target = blank(live)
        assert store.load(path, target) == {"numbers": [1, 2]}
    assert_same(target, state(3))


def test_a_second_asynchronous_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = 0, 0
    original = storage_module.write

    def counted(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.02)
        original(directory, tensors)
        running -= 1

    monkeypatch.setattr(storage_module, "write", counted)
    value = torch.zeros(4)
    with Checkpoints(tmp_path, keep=5, asynchronous=True) as store:
        paths = [store.save(step, {"x": value.fill_(step)}, {"step": step}) for step in range(4)]
        store.wait()
        assert most == 1
        for step, path in enumerate(paths):
            assert store.load(path, {"x": value}) == {"step": step}
            assert value.tolist() == [step] * 4


def test_the_newest_are_kept(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30, 40):
        store.save(step, state(step), {})
    assert names(tmp_path) == ["step-00000030", "step-00000040"]


def test_newest_is_what_was_saved_last_not_the_highest_step(tmp_path: Path) -> None:
    """A run resumed from an older checkpoint goes on from there, and must not lose what it then saves."""
    store = Checkpoints(tmp_path, keep=2)
    for step in (100, 200, 300):
        store.save(step, state(step), {})
    again = Checkpoints(tmp_path, keep=2)
    assert again.save(250, state(1), {}) == again.latest()
    assert names(tmp_path) == ["step-00000250", "step-00000300"]
    assert again.save(300, state(2), {"second": True}).name == "step-00000300.2"
    target = blank(state())
    newest = again.latest()
    assert newest is not None
    assert again.load(newest, target) == {"second": True}
    assert_same(target, state(2))


def test_the_old_goes_only_after_the_new_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    original = Path.rename

    def watched(self: Path, target: Path) -> Path:
        out = original(self, target)
        seen.append(names(tmp_path))
        return out

    store = Checkpoints(tmp_path, keep=1)
    store.save(1, state(), {})
    monkeypatch.setattr(Path, "rename", watched)
    store.save(2, state(), {})
    assert seen[0] == ["step-00000001", "step-00000002"]
    assert names(tmp_path) == ["step-00000002"]


NAME = "layers.0.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.pop(NAME), [NAME, "is in the checkpoint, not in this run"]),
        (lambda t: t.update(more=torch.ones(1)), ["more", "missing from the checkpoint"]),
        (lambda t: t.update({NAME: torch.ones(3, 5)}), [NAME, "float32 [5, 3]", "[3, 5]"]),
        (lambda t: t.update({NAME: torch.ones(5, 3).bfloat16()}), [NAME, "float32 [5, 3]", "bfloat16 [5, 3]"]),
    ],
)
def test_other_tensors_are_refused_before_any_is_written(change, parts: list[str], tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    path = store.save(1, state(), {})
    target = blank(state())
    change(target)
    before = {name: raw(tensor) for name, tensor in target.items()}
    with pytest.raises(WeightsMismatch) as caught:
        store.load(path, target)
    assert all(part in str(caught.value) for part in parts)
    assert before == {name: raw(tensor) for name, tensor in target.items()}


@pytest.mark.parametrize(
    ("meta", "part"),
    [
        ({"a": {1: 2}}, "meta['a'] has the key 1"),
        ({"a": [0, torch.ones(1)]}, "meta['a'][1] is a Tensor"),
        ({"a": b"x"}, "meta['a'] is a bytes"),
    ],
)
def test_meta_that_json_would_change_is_refused(meta: dict, part: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue) as caught:
        Checkpoints(tmp_path / "checkpoints").save(1, {}, meta)
    assert part in str(caught.value)
    assert not (tmp_path / "checkpoints").exists()


def test_keep_and_step_must_make_sense(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(InvalidValue, match="step is -1"):
        Checkpoints(tmp_path).save(-1, {}, {})


def test_sharded_tensors_are_put_together_anew(tmp_path: Path) -> None:
    """Saved by a mesh of one rank, loaded plain and the other way round: the planners know DTensors."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        saved = {"w": torch.randn(6, 4), "b": torch.randn(3)}
        spread = {
            "w": distribute_tensor(saved["w"], mesh, [Shard(0)]),
            "b": distribute_tensor(saved["b"], mesh, [Replicate()]),
        }
        store = Checkpoints(tmp_path)
        plain = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
        store.load(store.save(1, spread, {}), plain)
        assert_same(plain, saved)
        target = {"w": distribute_tensor(torch.zeros(6, 4), mesh, [Shard(1)]), "b": torch.zeros(3)}
        store.load(store.save(2, saved, {}), target)
        assert isinstance(target["w"], DTensor)
        assert torch.equal(target["w"].full_tensor(), saved["w"])
    finally:
        dist.destroy_process_group()
