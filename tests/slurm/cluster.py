"""A real Slurm of several nodes on this machine, started and stopped by tests.

In: a folder. Out: :class:`Cluster`, whose environment makes sbatch, squeue and scontrol talk to it. Needs root and Debian's
slurm-wlm and munge. Nodes are slurmd processes with ports of their own; they count CPUs, memory and GPUs without enforcing them.

Partitions: ``main``, the default; ``urgent``, on the same nodes, whose jobs preempt those of ``main``; ``full``, of nodes that exist for
``sbatch --test-only`` alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

PATIENCE = 3.0  # times the seconds that waits take on an idle machine: deadlines end a test, they time nothing
_FULL = 24  # nodes of the partition that exists on paper
_NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")


def missing() -> str:
    """Why there can be no Slurm here; '' if there can."""
    if os.geteuid():
        return "Slurm's daemons need root"
    absent = [name for name in _NEEDED if not shutil.which(name, path=_path())]
    return f"{', '.join(absent)} not found; apt-get install slurm-wlm munge" if absent else ""


class Cluster:
    """Args:
        folder: for configuration, state and logs; short, since it holds the names of sockets.
        nodes: slurmd processes.
        cpus: of each, as declared.
        gpus: of each, as declared; device files that are no GPUs.
    """

    def __init__(self, folder: Path, nodes: int = 4, cpus: int = 4, gpus: int = 8) -> None:
        self.folder, self._nodes, self._cpus, self._gpus = folder, [f"n{i}" for i in range(nodes)], cpus, gpus
        self._processes: list[subprocess.Popen] = []
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        for name in [name for name in self.environment if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]:
            del self.environment[name]

    def start(self) -> None:
        for name in ("state", "spool", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._start_munge()
        for i in range(self._gpus):
            os.mknod(self.folder / f"gpu{i}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (self.folder / "slurm.conf").write_text(self._configuration(), encoding="utf-8")
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu Type=h100 File={self.folder}/gpu[0-{self._gpus - 1}]\n", encoding="utf-8")
        self._run("slurmctld", "-D", "-c", "-f", self.folder / "slurm.conf")
        for name in self._nodes:
            self._run("slurmd", "-D", "-c", "-N", name, "-f", self.folder / "slurm.conf")
        self._until(lambda: self.command("sinfo", "-h", "-p", "main", "-o", "%T", check=False).split() == ["idle"], "nodes did not become idle")

    def command(self, *arguments: str | Path, check: bool = True, **environment: str) -> str:
        """Output of a Slurm command."""
        done = subprocess.run(list(map(str, arguments)), env={**self.environment, **environment}, cwd=self.folder, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise AssertionError(f"{arguments} returned {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def states(self, job: str) -> list[str]:
        """States of a job, or of the tasks of an array, as far as the controller remembers them."""
        shown = self.command("scontrol", "show", "job", job, check=False)
        return [line.split("JobState=")[1].split()[0] for line in shown.splitlines() if "JobState=" in line]

    def wait(self, job: str, seconds: float, *states: str) -> None:
        """Wait until all tasks of a job are in one of ``states`` (default: COMPLETED)."""
        wanted = set(states or ("COMPLETED",))
        self._until(lambda: (found := self.states(job)) and set(found) <= wanted, f"job {job} did not become {' or '.join(wanted)}", seconds,
                    lambda: set(self.states(job)) & ({"FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"} - wanted))

    def stop(self) -> None:
        with contextlib.suppress(Exception):
            self.command("scancel", "--user", "root", check=False)
            self._until(lambda: not self.command("squeue", "-h", check=False).strip(), "", 10)
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in _carrying(f"SLURM_CONF={self.folder / 'slurm.conf'}"):  # stepds
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted((self.folder / "log").iterdir()))

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        os.chmod(self.folder, 0o755)
        (self.folder / "munge").mkdir(mode=0o755, exist_ok=True)
        self._socket = self.folder / "munge" / "s"
        self._run("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self._socket}", f"--pid-file={self.folder / 'munge' / 'pid'}",
                  f"--log-file={self.folder / 'log' / 'munged'}", f"--seed-file={self.folder / 'munge' / 'seed'}")
        self._until(self._socket.exists, "munged did not start")

    def _configuration(self) -> str:
        ports = _free_ports(1 + len(self._nodes))
        host = socket.gethostname().split(".")[0]
        lines = [
            "ClusterName=test", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={ports[0]}", "SlurmUser=root", "SlurmdUser=root", "AuthType=auth/munge",
            "CredType=cred/munge", f"AuthInfo=socket={self._socket},cred_expire=10",  # a requeued job waits for that long
            f"StateSaveLocation={self.folder / 'state'}", f"SlurmdSpoolDir={self.folder / 'spool'}/%n", f"SlurmctldPidFile={self.folder / 'ctld.pid'}",
            f"SlurmdPidFile={self.folder}/%n.pid", f"SlurmctldLogFile={self.folder / 'log' / 'slurmctld'}", f"SlurmdLogFile={self.folder / 'log'}/%n",
            "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none", "SwitchType=switch/none", "MpiDefault=none", "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core", "SlurmdParameters=config_overrides",
            "SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1", "ReturnToService=2",
            "KillWait=5", "MinJobAge=3600", "InactiveLimit=0", "GresTypes=gpu", "PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE",
            "SuspendProgram=/bin/true", "ResumeProgram=/bin/true", "SuspendTime=INFINITE", "ResumeTimeout=60", "PrivateData=cloud",
        ]
        size = f"CPUs={self._cpus} RealMemory=64000 Gres=gpu:h100:{self._gpus}"
        lines += [f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {size} State=UNKNOWN"
                  for name, port in zip(self._nodes, ports[1:])]
        lines.append(f"NodeName=c[0-{_FULL - 1}] CPUs=96 RealMemory=1000000 Gres=gpu:h100:8 State=CLOUD")
        nodes = ",".join(self._nodes)
        lines += [f"PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60",
                  f"PartitionName=urgent Nodes={nodes} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF",
                  f"PartitionName=full Nodes=c[0-{_FULL - 1}] MaxTime=INFINITE State=UP"]
        return "\n".join([*lines, ""])

    def _run(self, *command: str | Path) -> None:
        with open(self.folder / "log" / f"{Path(str(command[0])).name}.out", "ab") as log:
            self._processes.append(subprocess.Popen(list(map(str, command)), env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                                    start_new_session=True))

    def _until(self, condition, problem: str, seconds: float = 30.0, hopeless=lambda: False) -> None:
        deadline = time.monotonic() + PATIENCE * seconds
        while not condition():
            if time.monotonic() > deadline or hopeless():
                raise AssertionError(f"{problem}\n{self.logs()}")
            time.sleep(0.2)


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _carrying(mark: str) -> list[int]:
    """Processes with a variable of the environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes().split(b"\0") and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found
