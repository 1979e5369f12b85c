"""Runs a case in a process of its own, so that neither its state nor its end reaches the next."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence

from src.configuration import run_main

LONGEST = 120  # seconds of one case


def in_fork(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> str:
    """Runs a command as the command line does, in an empty working folder.

    Returns:
        "" if it ended well, with exit code 2 and a sentence, or with 1 and its reason; else what went wrong: a trace, a
        hang, the end of the process.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(LONGEST)
        os.write(writer, _outcome(main, argv).encode(errors="replace")[:4000] or b"ok")
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read().decode(errors="replace")
    os.waitpid(child, 0)
    return "" if answer == "ok" else answer or f"no answer within {LONGEST} s, or the process died"


def _outcome(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> str:
    os.environ.pop("PRETEXT_RUN_DIR", None)
    sys.argv = ["command", *argv]
    said = io.StringIO()
    try:
        # a value may be taken for a relative path
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.chdir(folder),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(said),
        ):
            run_main(main)
    except SystemExit as end:
        if end.code == 0:
            return ""
        sentence = said.getvalue().strip()
        if end.code in (1, 2) and "error: " in sentence and "Traceback" not in sentence:
            return ""
        return f"exit code {end.code}: {sentence[-500:]!r}"
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return "no exit code"
