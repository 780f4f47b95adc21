"""What the operating system says of this machine: the processor's name, its caches and its memory."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import torch

from rooflight.errors import InvalidValue
from rooflight.hardware.machine import Machine
from rooflight.hardware.store import load, match_device

# glibc's names for what mallopt sets (malloc.h), and the most that it takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _MOST = -1, -3, 2**31 - 1

CPU_FOLDER = Path("/sys/devices/system/cpu")


def cpu_name() -> str:
    """The processor's marketing name, or its architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _bytes(text: str) -> float:
    units = {"K": 1024.0, "M": 1024.0**2, "G": 1024.0**3}
    text = text.strip()
    return float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text)


def cpu_caches() -> dict[str, float]:
    """Bytes of data cache by level, over the cores that this process may use; empty where the system hides it."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    seen: set[tuple[str, str]] = set()
    total: dict[str, float] = {}
    for core in sorted(cores):
        for index in sorted((CPU_FOLDER / f"cpu{core}" / "cache").glob("index*")):
            try:
                level, kind, size, shared = (
                    (index / name).read_text(encoding="utf-8").strip()
                    for name in ("level", "type", "size", "shared_cpu_list")
                )
                if kind == "Instruction" or (level, shared) in seen:
                    continue
                total[f"l{level}"] = total.get(f"l{level}", 0.0) + _bytes(size)
            except (OSError, ValueError):
                continue
            seen.add((level, shared))
    return {level: size for level, size in total.items() if level in ("l1", "l2", "l3")}


def memory_bytes(device: torch.device) -> float:
    """Bytes of memory of the device, or of this host for the CPU."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def device_title(device: torch.device) -> str:
    """The name by which its owner knows the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def find_machine(name: str, device: torch.device) -> Machine | None:
    """The machine to predict for: the one named, else this one as probed, else this GPU's of the catalog, else none."""
    if name:
        return load(name)
    try:
        return load("here")
    except InvalidValue:
        return match_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def versions(device: torch.device) -> str:
    """The software that a measurement depends on, for the source of its figures."""
    cuda = f", CUDA {torch.version.cuda}" if device.type == "cuda" else ""
    return f"torch {torch.__version__}{cuda}"


def keep_freed_memory() -> bool:
    """Ask glibc to keep what is freed for the next allocation; returns whether it could be asked.

    By default it hands large blocks back to the system, and every tensor then pays for fresh, zeroed pages: a GPT-2
    training step on 2 cores took 0.9 to 1.5 s, and 0.6 to 0.9 s without that (docs/performance-log.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MOST)) and bool(mallopt(_M_TRIM_THRESHOLD, _MOST))
