"""The resolved configuration in the run folder, written once everything else has been checked."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from mhf_lightning.checkpoint.files import write_file


class ResolvedConfig(Callback):
    """Writes ``config.yaml`` when ``fit`` starts; each resumed start adds ``config-resume-N.yaml`` when it trains.

    The text is to hold no secrets: the report publishes it. The file marks the folder as taken, so a start that fails
    on its way here leaves the folder free. A resume may be refused until it trains, and then leaves no file.
    """

    def __init__(self, run_dir: Path, text: str) -> None:
        self.run_dir, self.text = run_dir, text
        self._is_written = False

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the first one.

        Raises:
            CheckpointError: The system refused; the message names the file.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "config.yaml"
        if not path.exists():
            self._write(path)

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that of a resumed start; nothing is overwritten.

        Raises:
            CheckpointError: As above.
        """
        if self._is_written:
            return
        resumed = 1
        while (path := self.run_dir / f"config-resume-{resumed}.yaml").exists():
            resumed += 1
        self._write(path)

    def _write(self, path: Path) -> None:
        """Write the file, which appears when it is whole."""
        new = path.with_name(path.name + ".tmp")
        new.unlink(missing_ok=True)
        try:
            write_file(new, [self.text.encode()])
            new.rename(path)
            self._is_written = True
        finally:
            new.unlink(missing_ok=True)
