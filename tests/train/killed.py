"""A process that has imported everything and forks another for each line "directory moment" that it reads.

moment sync or async: the child saves until it is killed from outside. A number: it saves once and kills itself before
that file operation. The child's process id is printed, and its exit status when it has ended.
"""

from __future__ import annotations

import os
import signal
import sys

import torch
import torch.distributed.checkpoint.staging  # as every save would

from rooflight.train.checkpoint import Checkpoints

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir")
TENSORS = {f"t{i}": torch.zeros(200 + i) for i in range(8)}


def save(store: Checkpoints, step: int) -> None:
    for tensor in TENSORS.values():
        tensor.fill_(step)
    store.save(step, TENSORS, {"step": step})


def forever(directory: str, asynchronous: bool) -> None:
    store = Checkpoints(directory, asynchronous=asynchronous)
    newest = store.latest()
    step = store.load(newest, TENSORS)["step"] if newest else 0
    finished = os.open(os.path.join(directory, "finished"), os.O_WRONLY | os.O_CREAT)
    while True:
        step += 1
        save(store, step)
        os.pwrite(finished, b"%8d" % step, 0)


def once(directory: str, moment: int) -> None:
    count = 0

    def watch(event: str, _: object) -> None:
        nonlocal count
        if event in OPERATIONS:
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    store = Checkpoints(directory)
    sys.addaudithook(watch)
    save(store, 3)


if __name__ == "__main__":
    for line in sys.stdin:
        place, when = line.split()
        child = os.fork()
        if not child:
            if when.isdigit():
                once(place, int(when))
            else:
                forever(place, when == "async")
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
