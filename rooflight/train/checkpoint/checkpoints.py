"""`Checkpoints`: the checkpoints of one run in one directory, from saving to finding the newest whole one.

A checkpoint is written under a hidden name, every file seen onto the disk, its manifest last, and then renamed: under
its own name it is whole, whenever the process or the machine stops. It is removed the same way backwards.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as settled
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from rooflight.errors import InvalidValue, RooflightError
from rooflight.train.checkpoint import storage
from rooflight.train.checkpoint.checks import check_json, check_tensors
from rooflight.train.checkpoint.manifest import META, Manifest, listed, sync, write_synced
from rooflight.train.checkpoint.naming import abandoned, free_name, partial_name, readable, removed_name

# Headers, manifest and meta beside the tensors, and what a file system rounds up.
_ROOM_BYTES = 1 << 20


class CheckpointNotSaved(RooflightError):
    """A checkpoint could not be written; those from before are whole."""


class Checkpoints:
    """Checkpoints in `directory`, of which the newest `keep` whole ones stay.

    One process and one object write to a directory at a time: hold `run_lock` on the run's directory. Asynchronous,
    `save` returns when the tensors are copied to host memory, and a thread writes them; its error is raised by the next
    `save`, by `wait` or by `close`. Raises InvalidValue when `keep` is not positive; with 1, nothing is left should the
    newest be damaged.
    """

    def __init__(self, directory: str | Path, keep: int = 2, asynchronous: bool = False):
        if keep < 1:
            raise InvalidValue(f"keep is {keep}; keep at least 1 checkpoint, better 2: the newest may be damaged")
        self.directory = Path(directory)
        self.keep = keep
        self.problems: list[str] = []
        # By sequence too: a name may be taken again.
        self._whole: set[tuple[Path, int]] = set()
        self._damaged: set[tuple[Path, int]] = set()
        self._stager = storage.Stager()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except CheckpointNotSaved:
            # An error on its way out of the block tells more.
            if kind is None:
                raise

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
        """Save tensors and `meta` (JSON-able, string keys) as of `step`; the path under which they will stand.

        Raises InvalidValue on a `meta` that JSON would change, and CheckpointNotSaved when the disk is full or fails.
        """
        if step < 0:
            raise InvalidValue(f"step is {step}; a checkpoint's step counts from 0")
        check_json(meta, "meta")
        self.wait()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path, _ in abandoned(self.directory):
                shutil.rmtree(path, ignore_errors=True)
            need = storage.size_bytes(tensors) + _ROOM_BYTES
            if shutil.disk_usage(self.directory).free < need:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._failure(step, tensors, error) from error
        sequence = max((manifest.sequence for _, manifest in readable(self.directory)[0]), default=0) + 1
        target = free_name(self.directory, step)
        if self._writer is None:
            self._write(target, step, sequence, tensors, dict(meta))
            return target
        try:
            staged = self._stager.copy(tensors)
        except (MemoryError, RuntimeError) as error:
            raise CheckpointNotSaved(
                f"step {step}: an asynchronous checkpoint needs a copy of {_gib(storage.size_bytes(tensors))} in host "
                f"memory, which failed ({str(error).partition(chr(10))[0]}); save synchronously"
            ) from error
        # The caller may change meta too while the thread writes.
        kept = json.loads(json.dumps(dict(meta)))
        self._pending = self._writer.submit(self._write, target, step, sequence, staged, kept)
        return target

    def wait(self) -> None:
        """Return when nothing is being written; raises CheckpointNotSaved if the last asynchronous save failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, end the writing thread and give the host copy back; raises as `wait` does."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
            self._stager.close()

    def latest(self) -> Path | None:
        """The checkpoint saved last that is whole, every byte of it read; None when there is none.

        Each damaged or unfinished one that was passed over is named in `problems`, one line each.
        """
        if self._pending is not None:
            # Its error, if any, is raised where it belongs.
            settled([self._pending])
        found, self.problems = readable(self.directory)
        self.problems += [
            f"{path}: was not finished, the process that wrote it is gone; the next save removes it"
            for path, kind in abandoned(self.directory)
            if kind == "partial"
        ]
        for path, manifest in found:
            faults = self._verify(path, manifest)
            if not faults:
                return path
            self.problems += faults
        return None

    def meta(self, path: str | Path) -> dict[str, Any]:
        """The `meta` saved with a checkpoint; raises InvalidValue when the checkpoint is incomplete or damaged."""
        path = Path(path)
        self._require(path, Manifest.read(path))
        return json.loads((path / META).read_text(encoding="utf-8"))

    def load(self, path: str | Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fill the tensors in place, bit for bit, wherever they lie, and return the saved `meta`.

        Raises InvalidValue when the checkpoint is incomplete or damaged, and WeightsMismatch, before any tensor is
        written, unless names, shapes and dtypes are the saved ones.
        """
        path = Path(path)
        manifest = Manifest.read(path)
        check_tensors(path, manifest, tensors)
        meta = self.meta(path)
        storage.read(path, tensors)
        return meta

    def _require(self, path: Path, manifest: Manifest) -> None:
        if (path.resolve(), manifest.sequence) not in self._whole and (faults := self._verify(path, manifest)):
            raise InvalidValue(f"{faults[0]}; use another checkpoint")

    def _verify(self, path: Path, manifest: Manifest) -> list[str]:
        faults = manifest.problems(path)
        (self._damaged if faults else self._whole).add((path.resolve(), manifest.sequence))
        return faults

    def _write(
        self, target: Path, step: int, sequence: int, tensors: Mapping[str, Tensor], meta: dict[str, Any]
    ) -> None:
        partial = partial_name(target)
        try:
            partial.mkdir()
            storage.write(partial, tensors)
            write_synced(partial / META, json.dumps(meta, indent=1))
            kinds = {name: (str(x.dtype).removeprefix("torch."), tuple(x.shape)) for name, x in tensors.items()}
            Manifest(step, sequence, listed(partial), kinds).write(partial)
            sync(partial)
            partial.rename(target)
            sync(self.directory)
            sync(self.directory.parent)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise self._failure(step, tensors, error) from error
            raise
        self._retain()

    def _failure(self, step: int, tensors: Mapping[str, Tensor], error: OSError) -> CheckpointNotSaved:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return CheckpointNotSaved(
                f"step {step}: {self.directory} cannot be written to ({error.strerror or error}); mend it or give "
                "another --out; the checkpoints from before are whole"
            )
        there = next(path for path in (self.directory, *self.directory.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        return CheckpointNotSaved(
            f"step {step}: a checkpoint needs {_gib(storage.size_bytes(tensors) + _ROOM_BYTES)}, {self.directory} has "
            f"{_gib(free)} free ({error.strerror}); make room there, keep fewer checkpoints (now {self.keep}) or give "
            "another --out; the checkpoints from before are whole"
        )

    def _retain(self) -> None:
        """Remove what is older than the newest `keep` that are complete and not known to be damaged."""
        kept = 0
        for path, manifest in readable(self.directory)[0]:
            if kept >= self.keep:
                # The new checkpoint is whole: what cannot be removed now is tried again after the next one.
                with suppress(OSError):
                    shutil.rmtree(path.rename(removed_name(path)))
            elif (path.resolve(), manifest.sequence) not in self._damaged and manifest.complete(path):
                kept += 1


def _gib(size: int) -> str:
    return f"{size / storage.GIB:.3f} GiB"
