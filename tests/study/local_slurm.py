"""A Slurm cluster of one node, on this machine, for as long as one needs it.

    python tests/study/local_slurm.py sinfo                  a command that sees the cluster
    python tests/study/local_slurm.py python -m pytest ...   or any other

munged, slurmctld and slurmd run as the user that calls, with their configuration, keys, spool and logs in a temporary
folder, and listen on ports of their own; a Slurm that the machine has otherwise is not touched. There is no slurmdbd,
so `sacct` knows nothing, as on many small clusters. Debian: apt-get install slurm-wlm munge.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

__all__ = ["PROGRAMS", "local_slurm", "missing"]

#: What has to be installed.
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")

#: The daemons lie where an ordinary user's PATH does not lead.
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])

# cgroups are left alone: few containers have any to give. Memory is watched by slurmd itself, once a second.
# Two partitions over the same node: a job in `urgent` makes Slurm requeue one in `normal`.
_CONFIGURATION = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmdPort={slurmd}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill,NoShared
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
MpiDefault=none
ReturnToService=2
KillWait=5
OverTimeLimit=0
DefMemPerCPU=1000
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=normal Nodes={host} Default=YES State=UP MaxTime=60 DefaultTime=30 PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes={host} State=UP MaxTime=60 DefaultTime=30 PriorityTier=2 PreemptMode=OFF
"""


def missing() -> list[str]:
    """The programs of Slurm that this machine has not."""
    return [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]


@contextlib.contextmanager
def local_slurm(cpus: int = 2, memory: int = 4000) -> Iterator[dict[str, str]]:
    """Start the cluster and yield the variables by which programs find it; at the end its jobs and daemons are gone.

    `cpus` are those that jobs may ask for, also more than there are; `memory` is theirs in MB.
    """
    folder = Path(tempfile.mkdtemp(prefix="local-slurm-"))  # short: the path of a socket has 107 characters at most
    folder.chmod(0o711)  # munged insists that everyone could reach its socket
    variables = {"SLURM_CONF": str(folder / "slurm.conf")}
    environment = {**os.environ, **variables, "PATH": _PATH}
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        _configure(folder, cpus, memory)
        daemons.append(_start(folder, environment, "munged", "--foreground", f"--socket={folder}/munge.socket",
                              f"--key-file={folder}/munge.key", f"--pid-file={folder}/munged.pid",
                              f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"))
        _until((folder / "munge.socket").exists, "munged", daemons, folder)
        daemons.append(_start(folder, environment, "slurmctld", "-D", "-c"))
        daemons.append(_start(folder, environment, "slurmd", "-D", "-c"))
        _until(lambda: _ask(environment, "sinfo", "-h", "-o", "%T") == "idle", "the node", daemons, folder)
        yield variables
    finally:
        _stop(environment, daemons)
        shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path, cpus: int, memory: int) -> None:
    for name in ("state", "spool"):
        (folder / name).mkdir()
    ctld, slurmd = _free_ports(2)
    (folder / "slurm.conf").write_text(_CONFIGURATION.format(
        host=socket.gethostname().partition(".")[0], ctld=ctld, slurmd=slurmd, folder=folder, cpus=cpus, memory=memory,
        user=_user()), encoding="utf-8")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _start(folder: Path, environment: dict[str, str], *command: str) -> subprocess.Popen[bytes]:
    with (folder / f"{command[0]}.out").open("wb") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, cwd=folder,
                                start_new_session=True)


def _until(condition: Callable[[], bool], what: str, daemons: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    end = time.monotonic() + 60
    while not condition():
        if time.monotonic() > end or any(daemon.poll() is not None for daemon in daemons):
            words = "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}"
                              for path in sorted([*folder.glob("*.out"), *folder.glob("*.log")]))
            raise RuntimeError(f"{what} did not start\n{words}")
        time.sleep(0.1)


def _ask(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip()


def _stop(environment: dict[str, str], daemons: Sequence[subprocess.Popen[bytes]]) -> None:
    """End all jobs, and then the daemons, the last first."""
    if len(daemons) == 3:
        _ask(environment, "scancel", "--full", "--signal=KILL", f"--user={_user()}")
        _ask(environment, "scancel", f"--user={_user()}")
        end = time.monotonic() + 20
        while _ask(environment, "squeue", "-h") and time.monotonic() < end:
            time.sleep(0.2)
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


if __name__ == "__main__":
    if absent := missing():
        sys.exit(f"not installed: {', '.join(absent)} (Debian: apt-get install slurm-wlm munge)")
    with local_slurm() as found:
        sys.exit(subprocess.run(sys.argv[1:] or ["sinfo"], env={**os.environ, **found}, check=False).returncode)
