"""Runs kernels under Triton's interpreter for conftest's `Interpreter`: calls come by stdin, results go by stdout.

A process of its own, because TRITON_INTERPRET counts when triton is imported and would hold for a whole test session.
"""

from __future__ import annotations

import importlib
import io
import os
import struct
import sys
import traceback

import torch


def main() -> None:
    # Whatever prints must not get between the messages.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    while header := sys.stdin.buffer.read(8):
        payload = sys.stdin.buffer.read(struct.unpack("<q", header)[0])
        module, name, args = torch.load(io.BytesIO(payload), weights_only=False)
        try:
            answer = ("result", getattr(importlib.import_module(module), name)(*args), args)
        except Exception:
            answer = ("error", traceback.format_exc(), ())
        out = io.BytesIO()
        torch.save(answer, out)
        answers.write(struct.pack("<q", out.tell()) + out.getvalue())
        answers.flush()


if __name__ == "__main__":
    main()
