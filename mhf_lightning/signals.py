"""Signals that ask a run to save and leave. Standard library only: cli.py calls it before anything slow is imported.

The signals are blocked and looked for between two steps, where a handler could interrupt anything. Blocked, one that
comes during import, compilation, validation or a save stays pending until then; Lightning's own handlers, which save
inside of the handler, never run; and compilers and loader workers, which SLURM signals along with the rank and which
inherit the mask, are not killed by it.
"""

import signal

STOP_SIGNALS = frozenset((signal.SIGUSR1, signal.SIGTERM))


def block_stop_signals() -> None:
    """Let the stop signals wait from now on; for the main thread, before there are others."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def restore_stop_signals() -> None:
    """Let them end the process, as they usually do: one that is pending does so now."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # slurm/rank.sh lets them be ignored until here
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def stop_requested() -> bool:
    """Whether this process was asked to stop since :func:`block_stop_signals`."""
    return bool(STOP_SIGNALS & signal.sigpending())
