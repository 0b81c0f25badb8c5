"""A job of slurm/pretrain.sbatch on a test cluster: submitted, watched, and read afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from cluster import Cluster
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mhf_lightning.data.manifest import Manifest
from mhf_lightning.data.sampler import GlobalOrderSampler

ROOT = Path(__file__).parents[2]
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
FULL = os.environ.get("MHF_FAULTS") == "full"
STEPS = 40
MICRO_BATCH = 2
CURVES = ("train/loss", "train/grad_norm", "val/loss")


@dataclass
class Job:
    """Steps of 2 x ranks samples; ``folder`` holds the run folder, the output of sbatch, and the probe's files."""

    cluster: Cluster
    folder: Path
    corpus: str
    nodes: int = 2
    tasks: int = 1
    pace: float = 0.0  # seconds that every rank sleeps in a step
    sbatch: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    name: str = "run"
    steps: int = STEPS
    id: str = ""

    @property
    def run_dir(self) -> Path:
        return self.folder / self.name

    def submit(self) -> Job:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.set_pace(self.pace)
        config = self.folder / "config.yaml"
        config.write_text(yaml.safe_dump(self.config()))
        output = str(self.folder).replace("%", "%%") + "/slurm-%j.out"
        command = ["sbatch", "--parsable", f"--nodes={self.nodes}", f"--ntasks-per-node={self.tasks}"]
        command += [f"--output={output}", *self.sbatch, "slurm/pretrain.sbatch", "--config", str(config)]
        command += ["--allow-import", "probe", "--run_dir", str(self.run_dir), *self.options]
        self.id = self.cluster.slurm(*command, environment=self.all_environment(), cwd=ROOT).strip()
        return self

    def all_environment(self) -> dict[str, str]:
        return {
            "PATH": f"{ROOT / '.venv/bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).parent),
            "SLURM_CONF": self.cluster.environment["SLURM_CONF"],
            "MHF_HANG_SECONDS": "120",
            **self.environment,
        }

    def config(self) -> dict:
        return {
            "seed_everything": 7,
            "trainer": {
                "accelerator": "cpu",
                "max_steps": self.steps,
                "val_check_interval": 15,
                "limit_val_batches": 2,
                "num_sanity_val_steps": 1,
                "log_every_n_steps": 1,
                "enable_progress_bar": False,
                "callbacks": [{"class_path": "probe.Probe", "init_args": {"folder": str(self.folder)}}],
            },
            "data": {"path": self.corpus, "micro_batch_size": MICRO_BATCH},
            "model": {
                "decoder": {
                    "vocab_size": 300,
                    "d_model": 32,
                    "num_layers": 2,
                    "num_attention_heads": 2,
                    "dropout": 0.1,
                    "ffn": {"name": "flash_mhf", "num_heads": 2, "num_subnetworks": 2, "d_e": 32},
                },
                "schedule": {"warmup_steps": 3},
            },
            "checkpoint": {"every_n_steps": 10},
        }

    def set_pace(self, seconds: float, rank: int | None = None) -> None:
        """From the next step on."""
        path = self.folder / ("pace" if rank is None else f"pace-{rank}")
        new = self.folder / f"{path.name}.new"
        new.write_text(str(seconds))
        new.replace(path)

    # While it runs

    def show(self, key: str) -> str:
        return self.cluster.job(self.id)[key]

    def wait_until(self, condition, what: str, seconds: float = 240.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what} after {seconds} s: {self.show('JobState')}\n{self.tell()}"
            time.sleep(0.1)

    def wait_for(self, condition, what: str, seconds: float = 240.0) -> None:
        """The same, while the job goes on."""

        def reached() -> bool:
            if condition():
                return True
            state = self.show("JobState")
            assert state not in FINAL, f"{state} before {what}\n{self.tell()}"
            return False

        self.wait_until(reached, what, seconds)

    def wait_for_step(self, step: int, restart: int = 0) -> None:
        def reached() -> bool:
            return any(e["attempt"] == [int(self.id), restart] and e.get("step", 0) >= step for e in self.events(0))

        self.wait_for(reached, f"step {step} of start {restart}")

    def wait_for_checkpoint(self, step: int) -> None:
        self.wait_for((self.run_dir / f"checkpoints/step-{step}").exists, f"checkpoint of step {step}")

    def ends_in(self, seconds: int) -> None:
        """Let the time limit be as near as that."""
        self.cluster.slurm("scontrol", "update", f"JobId={self.id}", f"EndTime=now+{seconds}")

    def restarted(self, restarts: int = 1) -> None:
        """Wait until a requeued job starts; at full speed from then on."""
        self.wait_for(lambda: f"start {restarts + 1}:" in self.messages(), f"start {restarts + 1}")
        self.set_pace(0.0)

    def end(self) -> str:
        """The final state."""
        self.wait_until(lambda: self.show("JobState") in FINAL, "end")
        return self.show("JobState")

    def wait_for_end_of_script(self) -> None:
        """SLURM calls a cancelled job by that name while its processes are still saving."""

        def gone() -> bool:
            return not self.cluster.slurm("squeue", "-h", "-j", self.id, check=False).strip()

        self.wait_until(gone, "end of the script")

    def completes(self, restarts: int) -> None:
        assert self.end() == "COMPLETED", self.tell()
        assert int(self.show("Restarts")) == restarts, self.tell()

    def ranks(self) -> list[int]:
        """Process ids on this machine, in the order of ranks."""
        found = {}
        for node in self.cluster.nodes:
            if node in self.cluster.daemons:
                for pid in self.cluster.processes(node, f"--run_dir {self.run_dir}"):
                    if Path(f"/proc/{pid}/exe").readlink().name.startswith("python"):
                        environment = Path(f"/proc/{pid}/environ").read_bytes().decode()
                        found.setdefault(int(environment.partition("\0SLURM_PROCID=")[2].partition("\0")[0]), pid)
        return [found[rank] for rank in sorted(found)]

    def signal(self, rank: int, number: signal.Signals) -> float:
        """Send a signal to one rank; the time."""
        os.kill(self.ranks()[rank], number)
        return time.time()

    # What it left behind

    def events(self, rank: int) -> list[dict]:
        path = self.folder / f"samples-{rank}"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def messages(self) -> str:
        """What the batch script said, over all starts."""
        path = self.folder / f"slurm-{self.id}.out"
        return path.read_text() if path.exists() else ""

    def logs(self) -> str:
        return "".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.run_dir.glob("logs/*")))

    def tell(self) -> str:
        return f"{self.messages()}\n{self.logs()[-6000:]}"

    def samples(self, ranks: int | None = None) -> list[list[int]]:
        """The blocks of each step of the run as it counts; no start leaves a hole."""
        steps: dict[int, list[int]] = {}
        logs = [self.events(rank) for rank in range(ranks or self.nodes * self.tasks)]
        for attempt in sorted({tuple(event["attempt"]) for event in logs[0]}):
            mine = [event for events in logs for event in events if tuple(event["attempt"]) == attempt]
            starts = {event["start"] for event in mine if "start" in event}
            if len(starts) == 1:
                (start,) = starts
                assert all(step in steps for step in range(1, start + 1)), f"attempt {attempt} leaves a hole"
                steps = {step: blocks for step, blocks in steps.items() if step <= start}
            for event in mine:
                if "step" in event:
                    steps.setdefault(event["step"], []).extend(event["samples"])
        return [sorted(steps[step]) for step in sorted(steps)]

    def expected_samples(self) -> list[list[int]]:
        """The same by the definition of the order."""
        batch = self.nodes * self.tasks * MICRO_BATCH
        order = GlobalOrderSampler(
            Manifest.load(self.corpus).splits["train"].blocks, self.steps * batch, 1234, micro_batch_size=1
        )
        return [sorted(map(order.block_of, range(step * batch, (step + 1) * batch))) for step in range(self.steps)]

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """TensorBoard's points of losses and gradient norm.

        A start from the checkpoint of a step after which validation is due validates again: equal points count once.
        """
        assert [path.name for path in self.run_dir.glob("*version*")] == []
        events = EventAccumulator(str(self.run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
        points = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in CURVES}
        return {**points, "val/loss": sorted(set(points["val/loss"]))}

    def starts(self) -> list[int]:
        """The step from which each start went on that began to train."""
        return [event["start"] for event in self.events(0) if "start" in event]

    def report_save(self, what: str, sent: float) -> int:
        """Wait for the save that a signal led to, print the seconds to its checkpoint, and return its step."""
        saved = r"asked to stop: step (\d+) is saved"
        self.wait_until(lambda: re.search(saved, self.logs()), "save")
        (step,) = map(int, re.findall(saved, self.logs()))
        manifest = self.run_dir / f"checkpoints/step-{step}/manifest.json"
        print(f"{what}: {manifest.stat().st_mtime - sent:.1f} s from the signal to the checkpoint of step {step}")
        return step
