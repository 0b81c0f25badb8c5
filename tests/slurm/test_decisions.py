"""What pretrain.sbatch decides, start by start, among programs that stand for SLURM; test_pretrain.py has a real."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[2] / "slurm"
PROGRAMS = {
    "srun": 'bash "$STAND_IN/ranks"',
    "scontrol": 'case $1 in show) echo node1 ;; *) echo "$*" ;; esac',
    "squeue": """
        if [[ -e $STAND_IN/away ]]; then
            rm "$STAND_IN/away"
            exit 1
        fi
        case $* in
        *%A) cat "$STAND_IN/queue" ;;
        *) echo "RUNNING None $SLURM_RESTART_COUNT node1" ;;
        esac""",
    "sleep": "exec /bin/sleep 0.1",
}


@dataclass
class Script:
    """pretrain.sbatch, a small checkout, and a run folder."""

    folder: Path

    def __post_init__(self) -> None:
        for name, body in PROGRAMS.items():
            path = self.folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/bin/bash\n{body}\n")
            path.chmod(0o755)
        for name in ("mhf_lightning", "kernels", "configs"):
            (self.folder / "checkout" / name).mkdir(parents=True)
        (self.folder / "checkout/mhf_lightning/cli.py").touch()
        shutil.copytree(SLURM, self.folder / "checkout/slurm")

    def start(
        self, ranks: str = "exit 0", job: str = "7", restart: int = 0, arguments: tuple = (), **environment: str
    ) -> tuple[int, str]:
        """Start a job, whose ranks do as told; its exit code, and what it printed."""
        (self.folder / "ranks").write_text(ranks)
        (self.folder / "queue").write_text(f"{job}\n{environment.pop('QUEUE', '')}\n")
        settings = {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "STAND_IN": str(self.folder),
            "SLURM_JOB_ID": job,
            "SLURM_RESTART_COUNT": str(restart),
            "SLURM_JOB_NODELIST": "node1",
            "SLURMD_NODENAME": "node1",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_CPUS_ON_NODE": "1",
            "SLURM_SUBMIT_DIR": str(self.folder / "checkout"),
        }
        arguments = arguments or ("--run_dir", str(self.folder / "run"))
        command = ["bash", str(SLURM / "pretrain.sbatch"), *arguments]
        done = subprocess.run(
            command, env={**settings, **environment}, cwd=self.folder, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def script(tmp_path) -> Script:
    return Script(tmp_path)


def crash(step: int) -> str:
    return f'echo "{step} 1 0.0" >"$MHF_HEARTBEAT_DIR/rank-0"; exit 1'


def test_the_same_step_counts_when_two_starts_one_after_the_other_fail_at_it(script):
    assert script.start(crash(12), restart=0)[0] == 0  # requeued
    assert script.start("exit 75", restart=1)[0] == 0  # went on, saved on request
    assert "requeued" in script.start(crash(12), restart=2)[1]
    code, printed = script.start(crash(12), restart=3)
    assert code == 1
    assert "crash 3: exit code 1, steps done: 12" in printed
    assert "the start before failed at the same step: giving up" in printed


def test_starts_that_fail_before_their_first_sign_of_life(script):
    assert script.start("exit 1", restart=0)[0] == 0
    assert "giving up" in script.start("exit 1", restart=1)[1]


def test_a_number_may_begin_with_zeros(script):
    for restart in range(8):
        code, printed = script.start(crash(restart), restart=restart, MHF_MAX_CRASHES="08", MHF_HANG_SECONDS="09")
        assert code == 0, printed
        assert "error" not in printed
    assert "more than 8 crashes" in script.start(crash(8), restart=8, MHF_MAX_CRASHES="08")[1]


def test_a_rank_of_an_earlier_start_does_not_make_this_one_a_crash(script, tmp_path):
    assert script.start('echo "$MHF_START_DIR" >"$STAND_IN/first"; exit 75')[0] == 0
    late = 'echo "137 1 node2" >"$(<"$STAND_IN/first")/exit" && echo written'
    code, printed = script.start(late, restart=1)
    assert (code, "done" in printed, "written" in printed) == (0, True, False)


def test_the_exit_code_of_the_first_rank_to_fail_is_told(script):
    printed = script.start('echo "137 1 node2" >"$MHF_START_DIR/exit"; exit 9')[1]
    assert "crash 1: exit code 137 of rank 1 on node2, steps done: none" in printed


def test_a_controller_that_does_not_answer_does_not_free_the_run_folder(script):
    assert script.start(job="7")[0] == 0
    (script.folder / "away").touch()
    code, printed = script.start(job="8", QUEUE="7")
    assert code == 2
    assert "job 7, still in the queue, uses" in printed
    (script.folder / "away").touch()
    assert script.start(job="8")[0] == 0


def test_of_two_jobs_that_begin_together_one_is_refused(script):
    """The second finds no owner yet, but the link of the first, which copies the code."""
    claim = script.folder / "run/slurm/claim"
    claim.parent.mkdir(parents=True)
    claim.symlink_to("7")
    code, printed = script.start(job="8", QUEUE="7")
    assert code == 2
    assert "job 7 begins in" in printed
    assert os.readlink(claim) == "7"
    assert script.start(job="8")[0] == 0  # the first has been killed in it
    assert not claim.is_symlink()


def test_a_start_that_was_killed_before_it_owned_the_folder_does_not_leave_old_code(script):
    assert script.start(job="7")[0] == 0
    assert script.start(job="8")[0] == 0
    (script.folder / "run/slurm/job").write_text("7\n")
    (script.folder / "checkout/mhf_lightning/cli.py").write_text("newest")
    code, printed = script.start(job="9")
    assert (code, "cannot move" in printed) == (0, False)
    assert (script.folder / "run/code/mhf_lightning/cli.py").read_text() == "newest"
    assert sorted(path.name for path in (script.folder / "run").glob("code*")) == ["code", "code-7", "code-7x"]


@pytest.mark.parametrize("option", [("--config", "mine.yaml"), ("--config=mine.yaml",)])
def test_a_run_dir_in_a_config_is_refused(script, option):
    (script.folder / "mine.yaml").write_text("trainer:\n  max_steps: 1\nrun_dir: runs/mine\n")
    code, printed = script.start(arguments=option)
    assert code == 2
    assert "the run_dir of mine.yaml is not read here: give it as --run_dir" in printed
    assert script.start(arguments=(*option, "--run_dir", "runs/mine"))[0] == 0


def test_code_that_cannot_be_read_whole_is_not_run(script):
    (script.folder / "checkout/kernels").rmdir()
    code, printed = script.start()
    assert code == 2
    assert "cannot copy the code" in printed
    assert list((script.folder / "run").glob("code*")) == []
