"""Errors that say where the value came from that they are about: a file, ``--set``, a recipe."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

from grpoforge.config import Origins
from grpoforge.errors import ConfigError, DataError, PluginError


@contextlib.contextmanager
def from_option(origins: Origins, path: Sequence[str]) -> Iterator[None]:
    """Errors from inside say where the option that they name first came from, or else the component's name."""
    try:
        yield
    except ConfigError as error:
        named = re.search(r"options? `(\w+)", error.message)
        with from_origin(origins.of(*path, named[1] if named else "name")):
            raise


@contextlib.contextmanager
def from_origin(origin: str) -> Iterator[None]:
    """Errors from inside say where the value came from, at the end of their first line."""
    try:
        yield
    except (ConfigError, DataError, PluginError) as error:
        first, newline, rest = error.message.partition("\n")
        colon = ":" if newline and first.endswith(":") else ""
        raise type(error)(f"{first.removesuffix(colon)}{origin}{colon}{newline}{rest}", error.hint) from error
