"""Text and bars as a given console can show them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

BAR_WIDTH = 10
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_ASCII = str.maketrans({"µ": "u", "×": "x", "–": "-", "·": "*", "≤": "<=", "≥": ">=", "∞": "inf", "²": "^2", "³": "^3"})


class Ink:
    """Writes text as this console can show it: control characters out, and ASCII alone where that is all there is."""

    def __init__(self, console: Console):
        self.ascii = console.options.ascii_only

    def clean(self, text: str) -> str:
        shown = "".join(character if character.isprintable() else "?" for character in text)
        return shown.translate(_ASCII).encode("ascii", "replace").decode() if self.ascii else shown

    def text(self, text: str, style: str = "") -> Text:
        return Text(self.clean(text), style=style)

    def flow(self, items: Sequence[str], width: int, style: str = "") -> Text:
        """Items in a row with a dot between them, each line broken between two items where that is possible."""
        lines: list[str] = []
        for item in map(self.clean, items):
            longer = f"{lines[-1]} {self.clean('·')} {item}" if lines else item
            if lines and cell_len(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(item)
        return Text("\n".join(lines), style=style)

    def bar(self, fraction: float, width: int = BAR_WIDTH) -> str:
        if self.ascii:
            return "#" * round(fraction * width)
        eighths = round(fraction * width * 8)
        return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()
