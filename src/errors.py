"""The errors that a user can correct, and the nearest name to a mistyped one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

_FARTHER = 0.25  # of two strings' similarity, from 0 to 1


class UserError(ValueError):
    """A mistake the user can correct; the message says what is wrong and what to type instead. Ends a command with
    its message and exit code 2, without a trace."""

    def __init__(self, message: object = "") -> None:
        super().__init__(without_trace(str(message)))


class SettingError(UserError):
    """An argument or configuration value that cannot be used; the message names its key."""


def without_trace(message: str) -> str:
    """Returns the message of an error that was raised in a loader's worker. PyTorch raises it again in the run, with
    the worker's whole trace before it."""
    if not (message.startswith("Caught ") and "\nOriginal Traceback (most recent call last):\n" in message):
        return message
    # the last line that does not belong to the trace is "<module>.<Class>: <message>"
    *_, own = re.split(r"^[\w.]+: ", message, flags=re.MULTILINE)
    return own.strip()


def printable(text: object) -> str:
    """Returns ``text`` with escapes for what UTF-8 cannot hold, such as file names in another encoding, which neither a
    log in a file nor another program takes."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def nearest(word: str, options: Sequence[str], *, most: int = 40) -> str:
    """``; did you mean …?`` with up to three names close to ``word``, or what there is, if that is not more than
    ``most``. A name that is much farther from it than the closest one is not meant."""
    close = difflib.get_close_matches(word, options, n=3, cutoff=0.5)
    if close:
        likeness = [difflib.SequenceMatcher(None, each, word).ratio() for each in close]
        meant = [each for each, ratio in zip(close, likeness, strict=True) if ratio > likeness[0] - _FARTHER]
        return f"; did you mean {' or '.join(meant)}?"
    return f"; there are {', '.join(options)}" if len(options) <= most else ""
