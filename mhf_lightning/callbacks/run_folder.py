"""The resolved configuration in the run folder, written once everything else has been checked."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only


class ResolvedConfig(Callback):
    """Writes ``config.yaml`` when ``fit`` starts; each resumed start adds ``config-resume-N.yaml``.

    The text is to hold no secrets: the report publishes it. The file marks the folder as taken, so a start that fails
    on its way here leaves the folder free.
    """

    def __init__(self, run_dir: Path, text: str) -> None:
        self.run_dir, self.text = run_dir, text

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file; nothing is overwritten."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path, resumed = self.run_dir / "config.yaml", 0
        while path.exists():
            resumed += 1
            path = self.run_dir / f"config-resume-{resumed}.yaml"
        path.write_text(self.text, encoding="utf-8")
