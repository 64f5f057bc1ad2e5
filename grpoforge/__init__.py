"""A GRPO post-training framework for language models in which every scientific choice is a plugin.

A plugin needs one name from here, ``hookimpl``; its hooks are documented in ``grpoforge.hookspecs``.
"""

from __future__ import annotations

import pluggy

__all__ = ["__version__", "hookimpl"]

__version__ = "0.1.0"

hookimpl = pluggy.HookimplMarker("grpoforge")
