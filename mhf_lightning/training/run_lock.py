"""One training at a time into a run folder: rank 0 holds a lock on the file ``lock`` there until its process ends."""

import errno
import fcntl
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TextIO

LOCK = "lock"
_ROOM = 1 << 16  # bytes that a start writes at least: its configuration, an event file, lines of the history
_held: dict[Path, TextIO] = {}  # of this process, which may train into a folder again


def make_writable(run_dir: Path) -> None:
    """Make the run folder where there is none, and try whether it takes a file, which a full disk does not.

    Raises:
        ValueError: It is of no use.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=run_dir) as file:
            file.write(bytes(_ROOM))
    except OSError as error:
        raise _unusable(run_dir, error) from error


def lock_run_folder(run_dir: Path) -> None:
    """Lock the run folder for the life of this process; the file says by whom, and stays.

    The kernel takes the lock back however the process ends. A rank of slurm/pretrain.sbatch goes on where an earlier
    start of its own job seems to hold it: that is ending, or its node is dead and the file server does not know yet.

    Raises:
        ValueError: Another process trains into it, or it is of no use.
    """
    make_writable(run_dir)
    path = (run_dir / LOCK).resolve()
    if path in _held and path.exists() and os.path.samestat(path.stat(), os.fstat(_held[path].fileno())):
        return
    try:
        file = (run_dir / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise _unusable(run_dir / LOCK, error) from error
    job = f" of job {os.environ.get('SLURM_JOB_ID')}" if "MHF_START_DIR" in os.environ else ""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        if not (job and holder.endswith(job)):
            raise ValueError(
                f"{holder} is training into {run_dir}; wait for it, end it, or choose another --run_dir"
            ) from None
        print(f"mhf: warning: {holder} still holds {run_dir / LOCK}; going on without", file=sys.stderr)
        return
    except OSError as error:
        file.close()
        print(
            f"mhf: warning: cannot lock {run_dir / LOCK} ({error.strerror}); nothing keeps a second run out of it",
            file=sys.stderr,
        )
        return
    with suppress(OSError):  # a full disk: the lock holds without the text
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"pid {os.getpid()} on host {socket.gethostname()}{job}\n".encode())
    _held[path] = file
    # A forked worker, which may live a little longer, would hold it too.
    os.register_at_fork(after_in_child=lambda: _forget(path, file))


def _forget(path: Path, file: TextIO) -> None:
    file.close()
    if _held.get(path) is file:
        del _held[path]


def _unusable(path: Path, error: OSError) -> ValueError:
    way_out = "make room there, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return ValueError(f"cannot write to {path}: {error.strerror}; {way_out}choose another --run_dir")
