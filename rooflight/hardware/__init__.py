"""Machines as data: peaks, bandwidths, links, measured ceilings and the efficiency that follows from them."""

from rooflight.hardware.figures import Estimate, Figure, Link, Sample
from rooflight.hardware.machine import Machine
from rooflight.hardware.store import catalog, here_path, load, match_device, save

__all__ = [
    "Estimate", "Figure", "Link", "Machine", "Sample", "catalog", "here_path", "load", "match_device", "save",
]  # fmt: skip
