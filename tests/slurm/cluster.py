"""A real SLURM cluster on this machine: munged, slurmctld and one slurmd per node, without systemd."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
# daemons lie in /usr/sbin, which is not on everybody's PATH
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# A requeued job becomes eligible when its old credential has expired: after 5 s, the least that slurmd accepts.
# SlurmdTimeout is short so that a killed slurmd is noticed within a test.
_CONFIGURATION = """\
ClusterName=comol
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/node.%n.pid
ProctrackType={proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=10
ReturnToService=2
MpiDefault=none
MailProg=/bin/true
GresTypes=gpu
FirstJobId={first_job}
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


class Cluster:
    """Nodes 127.0.0.11, 127.0.0.12, ... of 4 CPUs and 4 GPUs each, none of them real.

    Partition ``high`` preempts ``low`` by requeueing, after 30 s of grace. Another cluster on this machine has other
    ports, another folder and other job numbers.

    Args:
        nodes: how many.
        proctrack: ``proctrack/cgroup``, which signals only the tasks themselves as production clusters do, or
            ``proctrack/linuxproc``, which signals their children too.

    Raises:
        RuntimeError: the cluster does not come up, or does not run a job; nothing is left running.
    """

    def __init__(self, nodes: int, proctrack: str):
        self.folder = Path(tempfile.mkdtemp(prefix="comol-slurm-", dir="/tmp"))
        self.folder.chmod(0o755)  # munged refuses a socket that others cannot reach
        self.proctrack = proctrack
        self.nodes = [f"127.0.0.{11 + node}" for node in range(nodes)]
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), SEARCH_PATH]),
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }
        self._daemons: dict[str, subprocess.Popen] = {}
        try:
            self._configure()
            self._start()
            self.command("srun", "--nodes", str(nodes), "--immediate=20", "true")
        except Exception as error:
            logs = self.logs()
            self.stop()
            raise RuntimeError(f"no SLURM cluster with {proctrack}: {error}\n{logs}") from error

    def command(self, *words: str, cwd: Path | None = None, timeout: float = 60, **extra: str) -> str:
        """Run a command against this cluster with ``extra`` environment variables; its standard output."""
        done = subprocess.run(
            words, env=self.environment | extra, cwd=cwd, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def submit(self, *words: str, cwd: Path, **extra: str) -> str:
        """sbatch; the job's number."""
        return self.command("sbatch", "--parsable", *words, cwd=cwd, **extra)

    def job(self, job: str) -> dict[str, str]:
        """What scontrol says about a job, as "JobState" -> "RUNNING"."""
        return dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", "--oneliner", job)))

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"not within {seconds} s: {what}\n{self.logs()}")
            time.sleep(0.05)

    def wait_for_end(self, job: str, seconds: float) -> dict[str, str]:
        """Wait until a job has ended for good, and no node is busy with it; what scontrol says then."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")
        self.wait_until(lambda: self.job(job)["JobState"] in ended, f"the end of job {job}", seconds)
        return self.job(job)

    def ranks(self, job: str) -> dict[int, list[int]]:
        """SLURM_PROCID -> the processes of this rank of a job's training, and those that it forked."""
        found: dict[int, list[int]] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words, variables = ((folder / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            except OSError:
                continue  # ended meanwhile
            values = dict(variable.decode().split("=", 1) for variable in variables if b"=" in variable)
            is_ours = values.get("SLURM_CONF") == self.environment["SLURM_CONF"] and values.get("SLURM_JOB_ID") == job
            if is_ours and "SLURM_PROCID" in values and b"launch/train.py" in words and b"srun" not in words:
                found.setdefault(int(values["SLURM_PROCID"]), []).append(int(folder.name))
        return found

    def kill_node(self, node: str) -> None:
        """SIGKILL for a node's slurmd. What runs on the node goes on; after SlurmdTimeout the node counts as down."""
        daemon = self._daemons[f"slurmd.{node}"]
        daemon.kill()
        daemon.wait()

    def restart_node(self, node: str) -> None:
        """Start a node's slurmd, unless it runs, and wait until the node takes jobs."""
        if self._daemons[f"slurmd.{node}"].poll() is not None:
            self._start_node(node)

        def serves() -> bool:
            state = self.command("sinfo", "--noheader", "--partition=low", f"--nodes={node}", "--format=%T")
            return not state.startswith("down") and not state.endswith("*")  # the star: it does not answer

        self.wait_until(serves, f"node {node} in service", 60)

    def logs(self) -> str:
        """The last lines of every daemon."""
        files = sorted((self.folder / "log").glob("*"))
        return "\n".join(f"--- {file.name}\n{file.read_text()[-1500:]}" for file in files)

    def stop(self) -> None:
        """Cancel what runs, end every daemon, delete the folder."""
        try:
            self._cancel_all()
        finally:
            for daemon in reversed(self._daemons.values()):
                daemon.terminate()
            for daemon in self._daemons.values():
                try:
                    daemon.wait(timeout=15)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            self._kill_orphans()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _kill_orphans(self) -> None:
        """A job that could not be cancelled outlives slurmd: its processes are known by this cluster's SLURM_CONF."""
        mark = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        for environment in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in environment.read_bytes().split(b"\0"):
                    os.kill(int(environment.parent.name), signal.SIGKILL)
            except OSError:
                continue  # ended meanwhile

    def _cancel_all(self) -> None:
        if self._state() is None:
            return  # no controller that could cancel
        for job in self.command("squeue", "--noheader", "--format=%A").split():
            subprocess.run(["scancel", job], env=self.environment, timeout=20, check=False)
        self.wait_until(lambda: not self.command("squeue", "--noheader"), "the end of all jobs", 40)

    def _configure(self) -> None:
        for name in ("munge", "controller", "log", *(f"spool.{node}" for node in self.nodes)):
            (self.folder / name).mkdir(mode=0o755)
        controller_port, *ports = free_ports(1 + len(self.nodes))
        lines = [
            f"NodeName={node} NodeHostname={node} NodeAddr={node} Port={port} CPUs=4 RealMemory=1000 Gres=gpu:4"
            for node, port in zip(self.nodes, ports, strict=True)
        ]
        # a run's rendezvous port follows from its job number: two clusters must not both start at 1
        text = _CONFIGURATION.format(
            controller_port=controller_port, folder=self.folder, proctrack=self.proctrack,
            first_job=1 + controller_port * 10, nodes="\n".join(lines),
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/tty[0-3]\n")

    def _start(self) -> None:
        munge, configuration = self.folder / "munge", str(self.folder / "slurm.conf")
        self.command("mungekey", "--create", f"--keyfile={munge}/key")
        self._launch(
            "munged", "munged", "-F", f"--key-file={munge}/key", f"--socket={munge}/socket",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        self.wait_until((munge / "socket").exists, "munged's socket", 20)
        self._launch("slurmctld", "slurmctld", "-D", "-c", "-f", configuration)
        for node in self.nodes:
            self._start_node(node)
        self.wait_until(lambda: self._state() == f"idle {len(self.nodes)}", "all nodes idle", 30)

    def _start_node(self, node: str) -> None:
        self._launch(f"slurmd.{node}", "slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"])

    def _launch(self, name: str, program: str, *words: str) -> None:
        command = [shutil.which(program, path=SEARCH_PATH), *words]
        with (self.folder / "log" / name).open("a") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _state(self) -> str | None:
        """Such as "idle 2"; None without an answer."""
        asked = subprocess.run(
            ["sinfo", "--noheader", "--partition=low", "--format=%T %D"],
            env=self.environment, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        return asked.stdout.strip() if asked.returncode == 0 else None
