"""Model text made safe to look at: in a terminal, in a log, in a file that a person opens.

A completion is hostile data. Printed raw it can clear the screen, set the window title, overwrite the line
above, reorder what is read or hide what is there; a lone surrogate stops the writer of a UTF-8 file.
`sanitize` shows every such character as a visible escape (``\\x1b``, ``\\u202e``), so nothing acts and
nothing is lost. It does not make text safe for HTML, Markdown or a shell: quote for those where they are
written.
"""

from __future__ import annotations

import re

__all__ = ["one_line", "sanitize"]

# The zero-width joiner and non-joiner (200c, 200d) and the plain variation selectors stay: emoji, Persian and
# the Indic scripts are spelled with them. Escaping the ESC (or its C1 twin) alone disarms a whole CSI or OSC
# sequence, the rest of which is ordinary text.
_UNSAFE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and newline, DEL, C1
    "\xad\u061c\u180e\u200b\u200e\u200f\u2060-\u206f\ufeff"  # invisible, or turning the direction
    "\u2028-\u202e"  # line and paragraph separators, bidi embeddings and overrides
    "\ufff9-\ufffb\U0001d173-\U0001d17a"  # interlinear and musical format controls
    "\U000e0000-\U000e0fff"  # tags and supplementary variation selectors: text hidden in text
    "\ud800-\udfff"  # lone surrogates: cannot be encoded
    "]"
)


def sanitize(text: str, *, max_chars: int | None = None) -> str:
    """`text` with every character that acts on a terminal, hides or cannot be encoded shown as an escape.

    Newlines and tabs stay. The result encodes to UTF-8, and sanitizing it again changes nothing. A backslash
    is not escaped: ``\\x1b`` in the result may also have been four characters of the text. With `max_chars`,
    at least 1, the result has at most that many characters, the last one ``…`` when something was cut. Linear
    in ``min(len(text), max_chars)``.
    """
    if max_chars is None:
        return _UNSAFE.sub(_escape, text)
    assert max_chars >= 1, "max_chars counts the `…` too"
    # An escape is never shorter than its character, so nothing beyond max_chars + 1 characters can matter.
    return _cut(_UNSAFE.sub(_escape, text[: max_chars + 1]), max_chars)


def one_line(text: str, max_chars: int) -> str:
    """`text` sanitized on a single line of at most `max_chars` characters.

    A newline is shown as `` ⏎ ``, a tab as ``\\t``.
    """
    line = sanitize(text[: max_chars + 1]).replace("\n", " ⏎ ").replace("\t", "\\t")
    return _cut(line, max_chars)


def _cut(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
