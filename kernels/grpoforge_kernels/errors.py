"""The errors of this package that a user can fix."""

from __future__ import annotations


class KernelError(Exception):
    """A use of a kernel that cannot work. ``message`` shows the value, ``hint`` says what to do."""

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[KernelError], tuple[str, str]]:
        return type(self), (self.message, self.hint)
