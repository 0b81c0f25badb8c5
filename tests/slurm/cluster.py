"""A SLURM cluster on this machine: slurmctld, munged, and nodes with an address, a hostname and processes of their own.

Each node is a network, UTS, PID and mount namespace with a slurmd; all share the file system, as cluster nodes do.
Needs root and the Debian packages slurm-wlm, munge and iproute2. Every process is a child whose end is waited for.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "ip", "nsenter", "unshare")

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}({net}.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MailProg=/bin/true
JobRequeue=1
KillWait=10
OverTimeLimit=0
SlurmdTimeout=20
MinJobAge=3600
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=1
PropagateResourceLimits=NONE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=node[1-{nodes}] NodeAddr={net}.[11-{last}] CPUs=8 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=40
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


def why_not() -> str | None:
    """What this machine lacks for a cluster, if anything."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"SLURM is not installed ({', '.join(missing)}): apt-get install slurm-wlm munge iproute2"
    if os.geteuid() != 0:
        return "a SLURM cluster in namespaces needs root"
    return None


def run(*command: str, check: bool = True, **kwargs) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, **kwargs)
    assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


class Cluster:
    """``nodes`` idle nodes, from :meth:`start` to :meth:`stop`."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder, self.nodes = folder, [f"node{i}" for i in range(1, nodes + 1)]
        self.tag = f"{os.getpid() % 10**5}"  # of network interfaces and namespaces, so that two clusters do not meet
        self.net = f"10.{os.getpid() % 250}.{os.getpid() // 250 % 250}"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Return when all nodes are idle."""
        host = socket.gethostname().partition(".")[0]
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        munge = self.folder / "munge"
        for path in (munge, self.folder / "state", *(self.folder / f"spool-{node}" for node in self.nodes)):
            path.mkdir(parents=True)
        for path in (self.folder, *self.folder.parents):
            path.chmod(path.stat().st_mode | 0o711)  # munge wants a path that everyone may pass
        munge.chmod(0o711)
        key = munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        hosts = ["127.0.0.1 localhost", f"{self.net}.1 {host}"]
        hosts += [f"{self.net}.{10 + i} {node}" for i, node in enumerate(self.nodes, 1)]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        (self.folder / "slurm.conf").write_text(
            SLURM_CONF.format(
                host=host, net=self.net, port=port, folder=self.folder, nodes=len(self.nodes), last=10 + len(self.nodes)
            )
        )
        run("ip", "link", "add", f"br{self.tag}", "type", "bridge")
        run("ip", "addr", "add", f"{self.net}.1/24", "dev", f"br{self.tag}")
        run("ip", "link", "set", f"br{self.tag}", "up")
        files = {"key": "key", "socket": "socket", "pid": "pid-file", "log": "log-file", "seed": "seed-file"}
        options = [f"--{option}={munge / name}" for name, option in files.items() if name != "key"]
        self._spawn("munged", ["munged", "-F", "--force", f"--key-file={key}", *options])
        self._wait((munge / "socket").exists, "munged")
        self._spawn("slurmctld", ["slurmctld", "-D", "-f", str(self.folder / "slurm.conf")])
        for node in self.nodes:
            self.boot(node)
        self._wait(lambda: self.idle() == len(self.nodes), "idle nodes")

    def stop(self) -> None:
        """End all that was started."""
        for node in self.nodes:
            self.power_off(node)
        for name in ("slurmctld", "munged"):
            daemon = self.daemons.pop(name, None)
            if daemon is not None:
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        run("ip", "link", "del", f"br{self.tag}", check=False)

    def boot(self, node: str) -> None:
        """Start a node."""
        space, link = f"{node}-{self.tag}", f"{node[-1]}v{self.tag}"
        run("ip", "netns", "add", space)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        run("ip", "link", "set", link, "master", f"br{self.tag}", "up")
        run("ip", "-n", space, "link", "set", "lo", "up")
        run("ip", "-n", space, "addr", "add", f"{self.net}.{10 + int(node[4:])}/24", "dev", "eth0")
        run("ip", "-n", space, "link", "set", "eth0", "up")
        init = (
            'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount -t tmpfs tmpfs /dev/shm; '
            'slurmd -f "$2/slurm.conf" -N "$1"; while :; do sleep 3600 & wait $!; done'
        )
        command = ["nsenter", f"--net=/run/netns/{space}", "unshare", "--uts", "--pid", "--fork", "--kill-child"]
        self._spawn(node, [*command, "--mount-proc", "bash", "-c", init, "node", node, str(self.folder)])

    def power_off(self, node: str) -> None:
        """End a node and all its processes without notice; from outside, it just does not answer any more."""
        daemon = self.daemons.pop(node, None)
        if daemon is None:
            return
        run("ip", "link", "set", f"{node[-1]}v{self.tag}", "down", check=False)
        daemon.kill()
        daemon.wait()
        run("ip", "netns", "del", f"{node}-{self.tag}", check=False)
        run("ip", "link", "del", f"{node[-1]}v{self.tag}", check=False)

    def network(self, node: str, state: str) -> None:
        """Pull a node's network cable (``down``), or put it back (``up``)."""
        run("ip", "link", "set", f"{node[-1]}v{self.tag}", state)

    def configure(self, old: str, new: str) -> None:
        """Replace a line of the configuration by another; ``#`` stands for no line."""
        path = self.folder / "slurm.conf"
        lines = path.read_text().splitlines()
        if old in lines:
            path.write_text("\n".join(new if line == old else line for line in lines) + "\n")
            self.slurm("scontrol", "reconfigure")

    def wait_idle(self) -> None:
        """Return when all nodes are."""
        self._wait(lambda: self.idle() == len(self.nodes), "idle nodes", 90.0)

    def idle(self) -> int:
        """Number of idle nodes."""
        return len(set(self.slurm("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split()))

    def slurm(self, *command: str, check: bool = True, **kwargs) -> str:
        """Run a SLURM command; return what it printed."""
        return run(*command, check=check, env={**self.environment, **kwargs.pop("environment", {})}, **kwargs)

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        return dict(re.findall(r"(\w+)=(\S*)", self.slurm("scontrol", "show", "job", job, "-o")))

    def processes(self, node: str, pattern: str) -> list[int]:
        """Ids, on this machine, of a node's processes whose command line contains the pattern."""
        init = run("pgrep", "-P", str(self.daemons[node].pid)).split()[0]
        space = os.readlink(f"/proc/{init}/ns/pid")
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if os.readlink(path / "ns/pid") == space and pattern in line:
                    found.append(int(path.name))
            except OSError:
                continue
        return sorted(found)

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def _wait(self, condition, what: str, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what} after {seconds} s; see {self.folder}"
            time.sleep(0.05)
