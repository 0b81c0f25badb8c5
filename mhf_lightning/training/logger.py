"""The TensorBoard files of a run, and where a resume takes curves back. Knows Lightning and TensorBoard."""

from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog


class RunTensorBoard(TensorBoardLogger):
    """Lightning's, but that a resume takes back the curves past its step when training begins.

    A `purge_step` is written with the file, which Lightning opens before it restores a checkpoint: a start that is
    refused after that would have taken back what stays.
    """

    def __init__(self, run_dir: Path, resumed_step: int | None) -> None:
        """Set up the logger.

        Args:
            run_dir: Folder of the run.
            resumed_step: Step to continue from; None where there are no curves.
        """
        # The queue takes what a logging step writes; a full one would make the training wait for the disk.
        super().__init__(str(run_dir), name="", version="tensorboard", max_queue=1000)
        self.resumed_step = resumed_step

    @rank_zero_only
    def take_back(self) -> None:
        """Say that training begins at the resumed step: the first thing that is written."""
        if self.resumed_step is not None:
            begun = Event(step=self.resumed_step, session_log=SessionLog(status=SessionLog.START))
            self.experiment._get_file_writer().add_event(begun)
