"""Reports of an `Explanation`: for a terminal, for programs, and as one HTML page."""

from __future__ import annotations

from rooflight.report.files import to_csv, to_json, to_markdown
from rooflight.report.html import to_html
from rooflight.report.terminal import console_for, render

__all__ = ["console_for", "render", "to_csv", "to_html", "to_json", "to_markdown"]
