"""``mhf fit | validate | test | predict``: LightningCLI with OmegaConf, one run folder, and our callbacks.

The parser mode is ``omegaconf+``: interpolations are resolved once, after all files and flags are merged. The mode
``omegaconf`` resolves each file alone and leaves ``${...}`` silently stale when a later file or flag changes its
target.
"""

import json
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer import Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mhf_lightning.callbacks import MonitorConfig
from mhf_lightning.callbacks.checkpoint import CheckpointConfig, StepCheckpoint
from mhf_lightning.callbacks.garbage import FrozenGarbage
from mhf_lightning.callbacks.heartbeat import Heartbeat
from mhf_lightning.callbacks.history import History
from mhf_lightning.callbacks.layout import Layout
from mhf_lightning.callbacks.memory import PeakMemory
from mhf_lightning.callbacks.model_health import ModelHealth
from mhf_lightning.callbacks.preemption import Preemption
from mhf_lightning.callbacks.progress import progress_bar
from mhf_lightning.callbacks.router_health import RouterHealth
from mhf_lightning.callbacks.run_folder import ResolvedConfig
from mhf_lightning.callbacks.run_text import RunText
from mhf_lightning.callbacks.summary import RunSummary
from mhf_lightning.callbacks.throughput import Throughput
from mhf_lightning.checkpoint.files import CheckpointError
from mhf_lightning.checkpoint.folder import Manifest, find_newest_valid, newest
from mhf_lightning.checkpoint.strategy import MHFSingleDevice
from mhf_lightning.data.cli import add_data_commands
from mhf_lightning.data.datamodule import TokenDataModule
from mhf_lightning.errors import readable_errors
from mhf_lightning.parsing import SuggestingParser, environment_references, put_references, take_allowed_imports
from mhf_lightning.redaction import redact_tree
from mhf_lightning.signals import restore_stop_signals
from mhf_lightning.training.logger import RunTensorBoard
from mhf_lightning.training.module import PretrainModule
from mhf_lightning.training.ranks import data_parallel_ranks, is_first_of_replica, is_first_process
from mhf_lightning.training.run_lock import lock_run_folder, make_writable

PARSER_MODE = "omegaconf+"
FOLDERS = ("run_dir", "ckpt_path", "data.path", "model.init_from")

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_steps": 1000,
    "max_epochs": -1,  # a run is max_steps steps; the sampler deals out as many passes as that takes
    "check_val_every_n_epoch": None,
    "val_check_interval": 500,
    "num_sanity_val_steps": -1,  # the whole validation split before training: the "before" of the summary
    "log_every_n_steps": 10,
    "use_distributed_sampler": False,  # the datamodule deals samples to ranks itself
    "enable_model_summary": False,
}


class TrainingParser(SuggestingParser, LightningArgumentParser):
    """LightningCLI's parser with suggestions."""


class MHFCLI(LightningCLI):
    """The training commands; the run folder holds config, checkpoints, event files and predictions."""

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Add the training commands, and ``data`` for the completion script (main() runs it by itself)."""
        super()._add_subcommands(parser, **kwargs)
        data_parser = SuggestingParser(prog="mhf data")
        assert parser._subcommands_action is not None
        parser._subcommands_action.add_subcommand("data", data_parser, help="prepare, inspect, verify corpora")
        add_data_commands(data_parser.add_subcommands(dest="command"))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that belong to neither trainer, model nor data."""
        parser.add_argument(
            "--run_dir", type=str, default="runs/run", help="Folder of the run: config, checkpoints, curves."
        )
        parser.add_class_arguments(CheckpointConfig, "checkpoint", help="When to save.")
        parser.add_class_arguments(MonitorConfig, "monitor", help="What to measure.")
        parser.add_argument(
            "--sample_prompt", type=str | None, default=None, help="Text to continue in the final summary."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and remember what comes from environment variables."""
        with environment_references() as self._references:
            super().parse_arguments(parser, args)

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self._get(self.config, "run_dir"))

    def before_instantiate_classes(self) -> None:
        """Lock the run folder; look for the checkpoint that is asked for, and for a run not to be overwritten."""
        options = self.config[str(self.subcommand)]
        for key in FOLDERS:
            if isinstance(options.get(key), str):
                options[key] = os.path.expanduser(options[key])
        _check_trainer(options["trainer"])
        _check_hardware(options["trainer"])
        if self.subcommand == "fit" and is_first_process():
            (make_writable if options["trainer"].get("fast_dev_run") else lock_run_folder)(self.run_dir)
        checkpoints = self.run_dir / "checkpoints"
        path = options.get("ckpt_path")
        if path == "auto":
            options["ckpt_path"] = find_checkpoint(checkpoints)
            if self.subcommand == "fit":
                options["ckpt_path"] = options["ckpt_path"] or self._origin()
                return  # a run that was cut off before its first checkpoint starts again as it did
        elif path == "last":
            options["ckpt_path"] = str(_newest(checkpoints))
        elif path and not Path(path).is_dir():
            raise ValueError(f"--ckpt_path {path} is no checkpoint folder; give one (.../step-N), 'last', or 'auto'")
        path = options.get("ckpt_path")
        if self.subcommand == "fit" and not (path and Path(path).resolve().parent == checkpoints.resolve()):
            self._refuse_existing_run()
        if self.subcommand != "fit" and not path:
            raise ValueError(
                f"mhf {self.subcommand} needs a trained model: give --ckpt_path last, or a checkpoint folder"
            )

    def instantiate_classes(self) -> None:
        """Build the classes; weights that a checkpoint will replace are not read."""
        options = self.config[str(self.subcommand)]
        if options.get("ckpt_path"):
            options["model"]["init_from"] = None
            steps, resumed = int(options["trainer"].get("fast_dev_run") or 0), self._resumed_step()
            if steps and resumed is not None and resumed >= steps:
                raise ValueError(
                    f"--trainer.fast_dev_run is a trial that ends at step {steps}, and {options['ckpt_path']} is at "
                    f"step {resumed}; leave out --ckpt_path and give another --run_dir"
                )
        try:
            super().instantiate_classes()
        except MisconfigurationException as error:
            raise _as_option_error(error) from error

    def _origin(self) -> str | None:
        """Return the checkpoint of another run that this one started from, if it did.

        Raises:
            ValueError: It is gone.
        """
        config = self.run_dir / "config.yaml"
        begun = yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else None
        path = begun.get("ckpt_path") if isinstance(begun, dict) else None
        if path and not Path(path).is_dir():
            raise ValueError(
                f"{self.run_dir} has no checkpoint yet, and {path}, from which it started, is gone; choose another "
                "--run_dir"
            )
        return path

    @rank_zero_only
    def _refuse_existing_run(self) -> None:
        if (self.run_dir / "config.yaml").exists():
            raise ValueError(
                f"{self.run_dir} already holds a run; continue it with --ckpt_path auto, or choose another --run_dir"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the run folder's logger and our callbacks."""
        monitor = self._get(self.config_init, "monitor")
        # Throughput comes first: the time of the others counts as logging.
        callbacks: list[Any] = [Throughput(monitor.peak_tflops), PeakMemory(self.run_dir), ModelHealth()]
        callbacks += [RouterHealth(monitor.router_every_n_steps), Layout()]
        config = dict(self._get(self.config_init, "trainer"))
        if config.get("enable_progress_bar") is not False:
            callbacks.append(progress_bar())
        if self.subcommand == "fit":
            is_trial = bool(config.get("fast_dev_run"))  # of a few steps; it leaves the run folder as it is
            callbacks += [FrozenGarbage(), RunSummary(self.run_dir, self._get(self.config_init, "sample_prompt"))]
            if not is_trial:
                text = self._text_of_config()
                callbacks += [ResolvedConfig(self.run_dir, text), RunText(text), History(self.run_dir)]
            if config.get("enable_checkpointing") is not False and not is_trial:
                checkpoint = StepCheckpoint(self.run_dir / "checkpoints", self._get(self.config_init, "checkpoint"))
                callbacks += [checkpoint, Preemption(checkpoint)]
            else:
                restore_stop_signals()  # there would be nothing to come back to
            if "MHF_HEARTBEAT_DIR" in os.environ:
                callbacks.append(Heartbeat(Path(os.environ["MHF_HEARTBEAT_DIR"]), self._resumed_step() or 0))
        if config.get("precision") is None:
            on_gpu = torch.cuda.is_available() and config.get("accelerator") != "cpu"
            config["precision"] = "bf16-mixed" if on_gpu else "32-true"
        config["strategy"] = choose_strategy(config)
        if SLURMEnvironment.detect() and not config.get("plugins"):
            config["plugins"] = [SLURMEnvironment(auto_requeue=False)]  # callbacks/preemption.py does that
        config["default_root_dir"] = config.get("default_root_dir") or str(self.run_dir)
        if config.get("logger") is None and self.subcommand == "fit":
            logger = config["logger"] = RunTensorBoard(self.run_dir, self._resumed_step())
            if not config.get("fast_dev_run"):  # Lightning takes another logger for a trial, which writes nothing
                callbacks.insert(0, LambdaCallback(on_train_start=lambda *_: logger.take_back()))
        elif config.get("logger") is None:
            config["logger"] = False
        return self._instantiate_trainer({**config, **kwargs}, callbacks)

    def _text_of_config(self) -> str:
        """Return the resolved configuration as YAML without secrets.

        What comes from environment variables stands as the reference to them, which works for a resume from it too.
        """
        options = cast(Any, self.config)[str(self.subcommand)]
        resolved = self._parser(self.subcommand).dump(options, skip_none=False, skip_link_targets=False)
        written = put_references(yaml.safe_load(resolved), self._references.get(str(self.subcommand), {}))
        written, keys = redact_tree(written)
        if keys:
            rank_zero_warn(
                f"{', '.join(keys)}: not written to {self.run_dir}, since it looks like a secret; give it as "
                "${oc.env:NAME}, so that a resume from config.yaml finds it",
                category=UserWarning,
            )
        return yaml.safe_dump(written, sort_keys=False, allow_unicode=True)

    def _resumed_step(self) -> int | None:
        """Return the step to continue from: curves that a cut-off run drew past it are purged."""
        path = self._get(self.config, "ckpt_path")
        if path:
            return Manifest.load(Path(path)).step
        return 0 if (self.run_dir / "config.yaml").exists() else None  # cut off before its first checkpoint

    def fit(self, **kwargs: Any) -> None:
        """Train; once that has begun, an error is no longer one of the options, and ends with code 1.

        So slurm/pretrain.sbatch tries again after a ValueError too, such as the CheckpointError of a failed save.
        """
        trainer, begun = cast(Any, self.trainer), []
        trainer.callbacks.append(LambdaCallback(on_train_start=lambda *_: begun.append(True)))
        try:
            trainer.fit(**kwargs)
        except MisconfigurationException as error:
            if begun:
                raise
            raise _as_option_error(error) from error
        except ValueError:
            if not begun:
                raise
            traceback.print_exc()
            sys.exit(1)

    def predict(self, **kwargs: Any) -> None:
        """Write one line per validation block: its index, summed loss in nats, and number of target tokens.

        Each data-parallel rank writes a file of its own.
        """
        make_writable(self.run_dir)
        for path in self.run_dir.glob("predictions*.jsonl"):
            raise ValueError(f"{path} exists; move it away, or choose another --run_dir and give --ckpt_path a folder")
        batches: list[Any] = self.trainer.predict(**{**kwargs, "return_predictions": True}) or []
        if not is_first_of_replica(self.trainer):
            return
        rank, ranks = data_parallel_ranks(self.trainer)
        path = self.run_dir / ("predictions.jsonl" if ranks == 1 else f"predictions-rank{rank}.jsonl")
        with path.open("w", encoding="utf-8") as file:
            for batch in batches:
                for row in zip(*(batch[key].tolist() for key in ("sample_index", "nll", "num_tokens")), strict=True):
                    if row[0] >= 0:  # not padding
                        file.write(
                            json.dumps(dict(zip(("sample_index", "nll", "num_tokens"), row, strict=True))) + "\n"
                        )
        print(f"wrote {path}")


def _as_option_error(error: MisconfigurationException) -> ValueError:
    return ValueError(" ".join(str(error).split()))


def find_checkpoint(folder: Path) -> str | None:
    """What ``--ckpt_path auto`` means: the newest valid checkpoint, or None where there never was one.

    Rank 0 compares hashes, and its choice is taken by all when the strategy loads; the others only look.

    Raises:
        CheckpointError: There are checkpoints, and none is valid.
    """
    path, skipped = find_newest_valid(folder, verify_files=cast(Any, rank_zero_only).rank == 0)
    for message in skipped:
        print(f"mhf: warning: skipped a checkpoint: {message}", file=sys.stderr)
    return None if path is None else str(path)


def _newest(folder: Path) -> Path:
    try:
        return newest(folder)
    except CheckpointError as error:
        raise ValueError(
            f"--ckpt_path last: {error}; 'auto' takes the newest valid one, or starts a new run"
        ) from error


def choose_strategy(config: dict[str, Any]) -> Any:
    """Replace the names ``auto`` and ``ddp`` by strategies whose checkpoints survive a kill.

    Raises:
        ValueError: Another name.
    """
    strategy = config.get("strategy") or "auto"
    if not isinstance(strategy, str):
        return strategy
    on_gpu = torch.cuda.is_available() and config.get("accelerator") in (None, "auto", "gpu", "cuda")
    devices = config.get("devices") or "auto"
    if on_gpu:
        devices = CUDAAccelerator.auto_device_count() if devices == "auto" else devices
        indices: list[int] = CUDAAccelerator.parse_devices(devices) or []
    else:
        indices = list(range(1 if devices == "auto" else CPUAccelerator.parse_devices(devices)))
    if strategy == "ddp" or (strategy == "auto" and (len(indices) > 1 or int(config.get("num_nodes") or 1) > 1)):
        from mhf_lightning.training.strategies import MHFDDP

        return MHFDDP()
    if strategy == "auto":
        return MHFSingleDevice(torch.device("cuda", indices[0]) if on_gpu else torch.device("cpu"))
    raise ValueError(
        f"trainer.strategy is {strategy!r}; use auto, ddp, or a class of mhf_lightning.training.strategies "
        "(configs/trainer has one file for each)"
    )


def _check_trainer(options: Any) -> None:
    """Refuse options of the Trainer under which samples would be lost, read twice, or counted wrongly.

    Raises:
        ValueError: There is one.
    """
    if options.get("use_distributed_sampler"):
        raise ValueError("trainer.use_distributed_sampler is true; leave it out, the data are dealt to ranks anyhow")
    limit = options.get("limit_train_batches")  # 1 is one batch, 1.0 all
    if (limit is not None and (isinstance(limit, int) or limit != 1.0)) or options.get("overfit_batches"):
        raise ValueError(
            "trainer.limit_train_batches and overfit_batches end a pass early, and the next one would read the same "
            "blocks again; leave them out, and set trainer.max_steps"
        )
    for key in ("accumulate_grad_batches", "val_check_interval"):
        value = options.get(key)
        if isinstance(value, int | float) and value <= 0:
            raise ValueError(f"trainer.{key} is {value}; it must be positive")


def _check_hardware(options: Any) -> None:
    """Refuse accelerators, devices and precisions that are not there, or that the model has not been made for.

    Raises:
        ValueError: There is one.
    """
    accelerator, devices, precision = (options.get(key) for key in ("accelerator", "devices", "precision"))
    if accelerator not in (None, "auto", "cpu", "gpu", "cuda"):
        raise ValueError(f"trainer.accelerator is {accelerator!r}; use auto, cpu or gpu")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"trainer.accelerator is {accelerator!r}, and torch finds no GPU here; "
            "on a CPU: --trainer.accelerator cpu --trainer.precision 32-true"
        )
    on_gpu = torch.cuda.is_available() and accelerator != "cpu"
    is_number = str(devices).strip().isdigit() and int(devices) > 0
    if not (is_number or devices in (None, "auto")) and (not on_gpu or devices in (0, "0")):
        kinds = "GPUs" if on_gpu else "processes on the CPU"
        raise ValueError(f"trainer.devices is {devices!r}; give the number of {kinds}, at least 1, or auto")
    if str(precision).startswith("16"):
        raise ValueError("trainer.precision is float16, which needs loss scaling; use bf16-mixed or 32-true")
    if precision is not None and not str(precision).startswith(("32", "bf16")):
        raise ValueError(f"trainer.precision is {precision!r}; use 32-true, bf16-mixed or bf16-true")


def _quieten() -> None:
    """Silence what Lightning says of a generic setup and what is wrong or of no use in this one."""
    for message in (
        r"You're resuming from a checkpoint that ended before the epoch ended",  # the sampler is exact: tests/training
        r".*does not have many workers which may be a bottleneck",  # blocks are memory-mapped
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # inside Lightning
        r"Checkpoint directory .* exists and is not empty",  # a resumed run
        r"LightningCLI's args parameter is intended",  # those of the command line without --allow-import
        r"The `srun` command is available on your system but is not used",  # a short run on a login node
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.msg)


def run(args: list[str]) -> None:
    """Run one training command with its arguments."""
    set_parsing_settings(add_print_completion_argument=True)
    _quieten()
    parsers: dict[str, Any] = {
        name: {"parser_mode": PARSER_MODE, "usage": f"mhf {name} [--config FILE ...] [options]"}
        for name in MHFCLI.subcommands()
    }
    with readable_errors():
        MHFCLI(
            PretrainModule,
            TokenDataModule,
            args=take_allowed_imports(args),
            seed_everything_default=1234,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=TrainingParser,
            parser_kwargs={"parser_mode": PARSER_MODE, "prog": "mhf", **parsers},
        )
