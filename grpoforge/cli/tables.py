"""Standard output as a person reads it: a console without markup, tables, counts."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def make_console() -> Console:
    """Standard output, without markup; lines are not broken."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, soft_wrap=True, markup=False, emoji=False)


def make_table(title: str) -> Table:
    """An empty table; of plain ASCII where the lines of a box may not arrive as such."""
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", box=box.HEAVY_HEAD if _shows_boxes() else box.ASCII)


def _shows_boxes() -> bool:
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    # Python writes UTF-8 in the C locale too, whatever the terminal can show.
    locale = os.environ.get("LC_ALL") or os.environ.get("LANG", "")
    return sys.stdout.isatty() and encoding == "utf8" and locale not in ("C", "POSIX")


def count_of(number: int, one: str, many: str = "") -> str:
    """``1 step``, ``2 steps``."""
    return f"{number} {one if number == 1 else many or one + 's'}"
