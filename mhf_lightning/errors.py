"""Errors of the command line that a user can mend. Imports nothing of the package."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn a ValueError (bad configuration, data or checkpoint) into a message and exit code 2.

    With the environment variable MHF_DEBUG set, the traceback is shown.
    """
    try:
        yield
    except ValueError as error:
        print(f"mhf: error: {error}", file=sys.stderr)
        if os.environ.get("MHF_DEBUG"):
            raise
        sys.exit(2)
