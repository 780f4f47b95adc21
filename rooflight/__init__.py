"""Rooflight: a transformer system that can be run dry. It trains, serves and prices models from one program."""

__version__ = "0.1.0"
