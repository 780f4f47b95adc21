"""One run at a time in a directory, held by an advisory lock that the kernel drops when the process ends."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rooflight.errors import InvalidValue

LOCK = ".lock"


@contextmanager
def run_lock(directory: str | Path) -> Iterator[None]:
    """Hold `directory`/.lock while the block runs; the directory is made if need be.

    Raises InvalidValue, naming the process that holds it, when another run works in the directory. The file stays:
    removing it would let a third run lock a new file while a second holds the old one.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InvalidValue(
            f"{directory}: cannot hold a run ({error.strerror}); give a directory to write to"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 256, 0).decode(errors="replace").strip() or "unknown"
            raise InvalidValue(
                f"{directory}: another run works here (process {holder}); wait for it, stop it, or give another --out"
            ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        try:
            yield
        finally:
            # Explicitly, for a forked child may still hold a copy of the handle.
            fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)
