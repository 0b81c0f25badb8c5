"""Lines to standard output that no training ends for: the reader may have gone, and a disk may be full."""

import os
import sys


def say(*words: str, sep: str = " ") -> None:
    """Print a line at once, if that can be done."""
    try:
        print(*words, sep=sep, flush=True)
    except OSError as error:
        leave_closed_pipe(error, sys.stdout.fileno())


def leave_closed_pipe(error: OSError, file: int) -> None:
    """Send to nowhere what would go to a pipe that nobody reads (``mhf fit | tee`` after Ctrl-C, which ends both).

    What Python still holds for it at its end would turn the exit code into 120.
    """
    if isinstance(error, BrokenPipeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file)
        os.close(nowhere)


def flush() -> None:
    """Flush both streams, if that can be done; for the end of the process."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            leave_closed_pipe(error, stream.fileno())
