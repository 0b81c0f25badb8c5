"""One cluster for all tests of this folder, the corpus, and the run that nothing disturbs."""

import os
import sysconfig
from pathlib import Path

import pytest
from cluster import Cluster, why_not
from job import Job

from mhf_lightning.data.prepare import prepare


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    reason = why_not()
    if reason:  # CI installs SLURM, so there it is an error
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("cluster") / "slurm", nodes=3)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def slurm_corpus(tmp_path_factory) -> str:
    """Blocks of 16 tokens, vocabulary 300."""
    folder = tmp_path_factory.mktemp("corpus") / "data"
    files = [str(path) for path in sorted((Path(sysconfig.get_path("stdlib")) / "json").glob("*.py"))]
    prepare(files, str(folder), context_length=16, vocab_size=300, validation_fraction=0.2, num_workers=1)
    return str(folder)


@pytest.fixture(scope="session")
def uninterrupted(cluster, slurm_corpus, tmp_path_factory) -> Job:
    """A run on two nodes, one rank each."""
    job = Job(cluster, tmp_path_factory.mktemp("uninterrupted"), slurm_corpus).submit()
    job.completes(restarts=0)
    return job


@pytest.fixture
def job(cluster, slurm_corpus, tmp_path) -> Job:
    """The same, not yet submitted."""
    job = Job(cluster, tmp_path, slurm_corpus)
    yield job
    if job.id:
        cluster.slurm("scancel", job.id, check=False)
