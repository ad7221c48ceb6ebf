"""The end of a command: its exit code, also where nobody reads its output any more."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

__all__ = ["finish"]

_BROKEN_PIPE = 141  # as shells report it, 128 + SIGPIPE


def finish(main: Callable[[], int]) -> NoReturn:
    """Runs a command and exits; a closed pipe (`| head`) ends it without a word."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = _BROKEN_PIPE
    sys.exit(code)
