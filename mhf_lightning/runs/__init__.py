"""What became of runs, read from their folders alone. Standard library only: no torch, no Lightning.

- ``read.py``: :func:`read_run` of one folder, :func:`find_runs` below a folder; :func:`last_config` of one.
- ``cli.py``: ``mhf runs``.

``callbacks/history.py`` writes what is read here.
"""

from mhf_lightning.runs.read import HISTORY, Run, find_runs, last_config, read_history, read_run

__all__ = ["HISTORY", "Run", "find_runs", "last_config", "read_history", "read_run"]
