"""Runs of the shipped pretrain.sbatch on a real SLURM, through everything that ends a job early.

`make test` runs a few; `make test-faults` (MHF_FAULTS=full) all of them.
"""

import shlex
import signal
import time
from dataclasses import replace

import pytest
from job import FULL, ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.serial]
full_only = pytest.mark.skipif(not FULL, reason="one of make test-faults")


def same(job, uninterrupted, resumed_from: int | None = None) -> None:
    """The run cannot be told from the one that nothing disturbed.

    Nor could one that was restarted from step 0, so what the last start went on from is asserted too: the step that was
    saved on request, or else, after a crash, the checkpoint of step 10 or a later one.
    """
    assert job.samples() == job.expected_samples()
    assert job.curves() == uninterrupted.curves()
    if resumed_from is None:
        assert job.starts()[-1] >= 10
    else:
        assert job.starts()[-1] == resumed_from


def undisturbed(job, uninterrupted) -> None:
    """The same of a run that was never restarted."""
    same(job, uninterrupted, resumed_from=0)
    assert job.starts() == [0]


def test_two_nodes_with_two_ranks_each(job, tmp_path):
    """With an environment that comes from MHF_SETUP alone, and a name that Lightning gives a meaning.

    A second job may not use the run folder meanwhile.
    """
    setup = tmp_path / "set up.sh"
    setup.write_text("\n".join(f"export {key}={shlex.quote(value)}" for key, value in job.all_environment().items()))
    job.tasks, job.sbatch, job.pace = 2, (f"--export=MHF_SETUP={setup}", "--job-name=bash"), 2.0
    job.submit()
    job.wait_for_step(1)
    second = replace(job).submit()
    assert second.end() == "FAILED"
    job.set_pace(0.0)
    assert second.show("ExitCode") == "2:0"
    assert f"job {job.id}, still in the queue, uses" in second.messages()
    job.completes(restarts=0)
    assert job.samples() == job.expected_samples()
    assert [step for step, _ in job.curves()["train/loss"]] == list(range(40))
    assert sorted(path.name for path in job.run_dir.glob("logs/*")) == ["node1.txt", "node2.txt"]
    assert (job.run_dir / "code/mhf_lightning/cli.py").exists()
    assert "commit " in (job.run_dir / "git.txt").read_text()


def test_time_limit(job, uninterrupted):
    job.sbatch, job.pace = ("--time=30", "--signal=B:USR1@30"), 1.0
    job.submit()
    job.wait_for_step(3)
    job.ends_in(35)
    notice = "asked to stop by SIGUSR1"
    job.wait_for(lambda: notice in job.messages(), "notice")
    saved = job.report_save("time limit", time.time())
    job.restarted()
    job.completes(restarts=1)
    same(job, uninterrupted, saved)


@full_only
def test_time_limit_without_notice(job, uninterrupted):
    job.sbatch, job.pace = ("--time=30", "--signal=B:CONT@1"), 1.0
    job.submit()
    job.wait_for_step(3)
    job.ends_in(1)
    saved = job.report_save("time limit without notice, seen by SLURM in up to 30 s", time.time())
    job.restarted()
    job.completes(restarts=1)
    same(job, uninterrupted, saved)


@full_only
def test_preflight_comes_first(job):
    job.environment = {"MHF_PREFLIGHT": "1"}
    job.submit().completes(restarts=0)
    assert "preflight" in job.messages()


@full_only
@pytest.mark.parametrize("notice", ["signal", "no signal"])
def test_preemption_by_a_higher_partition(job, uninterrupted, cluster, notice):
    if notice == "no signal":
        cluster.configure("SlurmctldParameters=preempt_send_user_signal", "#")
    try:
        job.pace = 0.5
        job.submit()
        job.wait_for_step(5)
        sent = time.time()
        cluster.slurm("sbatch", "-p", "high", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
        job.wait_for(lambda: job.show("Restarts") == "1", "requeue")
        saved = job.report_save(f"preemption, {notice}", sent)
        job.restarted()
        job.completes(restarts=1)
        same(job, uninterrupted, saved)
    finally:
        cluster.configure("#", "SlurmctldParameters=preempt_send_user_signal")


@full_only
def test_scontrol_requeue(job, uninterrupted, cluster):
    job.pace = 0.3
    job.submit()
    job.wait_for_step(14)
    (job.folder / "save").write_text("4")  # SLURM gives the ranks KillWait, 10 s here
    sent = time.time()
    cluster.slurm("scontrol", "requeue", job.id)
    saved = job.report_save("scontrol requeue, with 4 s more for the save", sent)
    job.restarted()
    (job.folder / "save").write_text("0")
    job.completes(restarts=1)
    same(job, uninterrupted, saved)


@pytest.mark.parametrize("trial", range(10 if FULL else 1))
def test_signal_to_one_rank_while_another_is_slow(job, uninterrupted, trial):
    job.pace = 0.05
    job.submit()
    job.wait_for_step(3 + trial)
    job.set_pace(1.0, rank=trial % 2)
    sent = job.signal(1 - trial % 2, signal.SIGUSR1)
    saved = job.report_save("USR1 to one rank, the other 20 times slower", sent)
    job.set_pace(0.0, rank=trial % 2)
    job.restarted()
    job.completes(restarts=1)
    same(job, uninterrupted, saved)


@full_only
@pytest.mark.parametrize("to", ["steps", "batch"])
def test_scancel_with_a_signal(job, uninterrupted, cluster, to):
    job.pace = 0.3
    job.submit()
    job.wait_for_step(14)
    sent = time.time()
    cluster.slurm("scancel", "--signal=USR1", *(["--batch"] if to == "batch" else []), job.id)
    saved = job.report_save(f"scancel --signal to the {to}", sent)
    job.restarted()
    job.completes(restarts=1)
    same(job, uninterrupted, saved)


def test_killed_rank(job, uninterrupted):
    job.pace = 0.2
    job.submit()
    job.wait_for_step(14)
    job.wait_for_checkpoint(10)
    killed = job.signal(1, signal.SIGKILL)
    job.wait_for(lambda: "crash 1" in job.messages(), "end of the job")
    print(f"SIGKILL of a rank: {time.time() - killed:.1f} s to the end of the job")
    assert time.time() - killed < 30
    assert "exit code 137 of rank 1 on node2" in job.messages()
    job.restarted()
    job.completes(restarts=1)
    same(job, uninterrupted)


@pytest.mark.parametrize("moment", ["a step", pytest.param("the start", marks=full_only)])
def test_stopped_rank(job, uninterrupted, moment):
    job.pace = 0.2
    job.environment = {"MHF_HANG_SECONDS": "20", "MHF_START_SECONDS": "180"}  # the latter also for the second start
    job.submit()
    if moment == "a step":
        job.wait_for_step(14)
        job.wait_for_checkpoint(10)
    else:
        job.wait_for((job.run_dir / "heartbeat/rank-1").exists, "first heartbeat")
    stopped = job.signal(1, signal.SIGSTOP)
    job.wait_for(lambda: "crash 1" in job.messages(), "end of the job", seconds=360)
    print(f"SIGSTOP of a rank in {moment}: {time.time() - stopped:.1f} s to the end of the job")
    assert "no progress of rank-" in job.messages()
    for rank in range(2):
        stacks = (job.run_dir / f"heartbeat/stacks-rank-{rank}.txt").read_text()
        assert "(most recent call first)" in stacks
        assert "in fit" in stacks or moment == "the start"
    job.restarted()
    job.completes(restarts=1)
    same(job, uninterrupted, resumed_from=0 if moment == "the start" else None)


@full_only
@pytest.mark.parametrize("node", ["node1", "node2"])
def test_power_off(job, uninterrupted, cluster, node):
    """Of the node of the batch script, and of another one."""
    job.pace = 0.2
    job.submit()
    job.wait_for_step(14)
    job.wait_for_checkpoint(10)
    cluster.power_off(node)
    off = time.time()
    try:
        job.restarted()
        print(f"power-off of {node}: {time.time() - off:.1f} s to the next start")
        assert node not in cluster.job(job.id)["NodeList"]
        job.completes(restarts=1)
        same(job, uninterrupted)
    finally:
        cluster.boot(node)
        cluster.wait_idle()


@full_only
def test_network_outage_of_ten_seconds(job, uninterrupted, cluster):
    job.pace = 0.2
    job.submit()
    job.wait_for_step(14)
    cluster.network("node2", "down")
    time.sleep(10)
    cluster.network("node2", "up")
    job.completes(restarts=0)
    undisturbed(job, uninterrupted)


@full_only
def test_cancelled_then_resumed_on_fewer_nodes(job, cluster):
    job.pace = 0.3
    job.submit()
    job.wait_for_step(14)
    sent = time.time()
    cluster.slurm("scancel", job.id)
    assert job.end() == "CANCELLED"
    job.wait_for_end_of_script()
    assert job.show("Restarts") == "0"
    saved = job.report_save("scancel", sent)
    job.pace, job.nodes = 0.0, 1
    job.options = ("--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "30")
    job.submit().completes(restarts=0)
    job.nodes = 2
    assert job.starts() == [0, saved]
    assert job.samples() == job.expected_samples()
    assert [step for step, _ in job.curves()["train/loss"]] == list(range(40))


@full_only
def test_a_step_that_fails_twice_ends_the_job(job):
    (job.folder / "fail").write_text("12")
    job.submit()
    assert job.end() == "FAILED"
    assert job.show("Restarts") == "1"
    assert job.show("ExitCode") == "1:0"
    assert "as the test asked for" in job.logs()
    assert "crash 2: exit code 1 of rank 1 on node2, steps done: 12" in job.messages()
    assert "failed at the same step: giving up" in job.messages()


@full_only
def test_crashes_are_counted(job):
    job.environment = {"MHF_MAX_CRASHES": "1"}
    job.pace = 0.2
    job.submit()
    job.wait_for_step(5)
    job.signal(1, signal.SIGKILL)
    job.wait_for_step(20, restart=1)
    job.signal(0, signal.SIGKILL)
    assert job.end() == "FAILED"
    assert job.show("Restarts") == "1"
    assert "more than 1 crashes" in job.messages()


@full_only
def test_a_job_that_may_not_be_requeued_saves(job, uninterrupted):
    job.sbatch, job.pace = ("--no-requeue",), 0.3
    job.submit()
    job.wait_for_step(14)
    saved = job.report_save("USR1 to one rank", job.signal(0, signal.SIGUSR1))
    assert job.end() == "FAILED"
    assert job.show("ExitCode") == "75:0"
    assert "the same sbatch command continues the run" in job.messages()
    first, job.pace = job, 0.0
    second = replace(first).submit()
    second.completes(restarts=0)
    same(second, uninterrupted, saved)


def test_what_cannot_be_mended_is_not_requeued(job):
    job.options = ("--trainer.max_stepz", "3")
    job.submit()
    assert job.end() == "FAILED"
    assert job.show("Restarts") == "0"
    assert job.show("ExitCode") == "2:0"
    assert "max_stepz" in job.logs()


@pytest.mark.parametrize("name", ["two\nlines", "a:b", "per%cent", "back\\slash", "${oc.env:HOME}"])
def test_refused_names_of_run_folders(job, name):
    job.name = name
    job.submit()
    assert job.end() == "FAILED"
    assert job.show("ExitCode") == "2:0"
    assert "--run_dir may not contain" in job.messages()
    assert [path.name for path in job.folder.iterdir() if path.is_dir()] == []


def test_refused_numbers(job):
    job.environment = {"MHF_MAX_CRASHES": "a[$(touch x)]"}
    job.submit()
    assert job.end() == "FAILED"
    assert "give a whole number" in job.messages()
    assert not (ROOT / "x").exists()


def test_harmless_names(job, cluster, uninterrupted, tmp_path):
    """Spaces, quotes, commands and fields of SLURM's own, in folder and job name."""
    bad = "a 'b' \"c\" $(touch x) `touch y`; touch z & * ? [!a] é #"
    job.name = bad
    (tmp_path / "a $(touch w) 'folder'").mkdir()
    job = replace(job, folder=tmp_path / "a $(touch w) 'folder'")
    job.sbatch = (f"--job-name={bad}\nJobState=CANCELLED Restarts=9 BatchHost=none", "--requeue")
    if FULL:
        job.pace = 0.2
    job.submit()
    saved = 0
    if FULL:
        job.wait_for_step(14)
        saved = job.report_save("USR1 to one rank", job.signal(0, signal.SIGUSR1))
        job.restarted()
    job.completes(restarts=1 if FULL else 0)
    same(job, uninterrupted, saved)
    assert not any((folder / name).exists() for folder in (ROOT, tmp_path, job.folder) for name in "wxyz")
