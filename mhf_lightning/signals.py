"""Signals that ask a run to save and leave. Imports output.py alone: cli.py calls it before anything slow is imported.

The stop signals are blocked and looked for between two steps, where a handler could interrupt anything. Blocked, one
that comes during import, compilation, validation or a save stays pending until then; Lightning's own handlers, which
save inside of the handler, never run; and compilers and loader workers, which SLURM signals along with the rank and
which inherit the mask, are not killed by it.

SIGINT, a user's Ctrl-C, is not blocked, because the second one must end the process wherever it is: :class:`Interrupt`
takes the first one alone, and only while there are steps to lose.
"""

import os
import signal
import threading
from types import FrameType

from mhf_lightning.output import leave_closed_pipe

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


def ignore_interrupts(*_: object) -> None:
    """Leave SIGINT, which a terminal sends to the whole group, to the parent, which ends this process in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Interrupt:
    """The first SIGINT while it is caught: remembered, and answered with a line on stderr. The next is as ever.

    Where SIGINT is ignored (``nohup``, a shell's background, slurm/rank.sh) or is somebody else's, it stays so.
    """

    def __init__(self) -> None:
        self.requested = False
        self._answer = b""
        self._catching = False

    def catch(self, answer: str = "") -> None:
        """Take the first SIGINT from now on; for the main thread, others change nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._answer = answer.encode()
            self._catching = True
            signal.signal(signal.SIGINT, self._handle)

    def release(self) -> None:
        """Let it raise ``KeyboardInterrupt`` again."""
        if self._catching:
            self._catching = False
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.release()
        if self._answer:
            try:
                os.write(2, self._answer)  # print may be what it interrupts
            except OSError as error:
                leave_closed_pipe(error, 2)
