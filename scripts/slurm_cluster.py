"""A two-node Slurm cluster on this machine, to try `duet submit` on: `python scripts/slurm_cluster.py up|down DIRECTORY`.

Real slurmctld and slurmd of Debian's packages slurm-wlm and munge, with all their files in DIRECTORY. Root is needed: munged
must run as the user munge with a key of its own, and slurmd starts jobs as whoever submitted them. Nodes are two daemons on
one host. There are two partitions, `low` and `high`; a job in `high` has one in `low` queued again. Use it with
`export SLURM_CONF=DIRECTORY/slurm.conf`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
START_S = 60
CONF = """\
ClusterName=duet
SlurmctldHost=localhost
SlurmctldPort={ports[slurmctld]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
MinJobAge=600
MaxArraySize=101
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[n1]} CPUs=2
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[n2]} CPUs=2
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 MaxTime=INFINITE
PartitionName=high Nodes=n1,n2 PriorityTier=10 MaxTime=INFINITE
"""


def missing() -> str:
    """What keeps the cluster from running here; empty if nothing does."""
    absent = [name for name in PROGRAMS if not _found(name)]
    if absent:
        return f"no {', '.join(absent)} here: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "munged and slurmd must be started by root"


def _found(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def up(directory: Path) -> Path:
    """Start the daemons and wait until both nodes take jobs; returns the path for SLURM_CONF."""
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)
    conf = directory / "slurm.conf"
    conf.write_text(CONF.format(directory=directory, ports=_free_ports("slurmctld", "n1", "n2")), encoding="utf-8")
    (directory / "state").mkdir(exist_ok=True)
    key = directory / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for path in (key, directory):
        shutil.chown(path, "munge", "munge")
    files = {"key": key, "pid": "munged.pid", "log": "munged.log", "seed": "munge.seed"}
    options = [f"--{what}-file={directory / name}" for what, name in files.items()]
    _start("munged", f"--socket={directory}/munge.socket", *options, user="munge")
    _start("slurmctld", "-f", str(conf), "-i")
    for node in ("n1", "n2"):
        _start("slurmd", "-f", str(conf), "-N", node)
    deadline = time.monotonic() + START_S
    while _idle_nodes(conf) < 2:
        if time.monotonic() > deadline:
            down(directory)
            raise RuntimeError(f"the nodes did not come up in {START_S} s: see the logs in {directory}")
        time.sleep(0.2)
    return conf


def _free_ports(*names: str) -> dict[str, int]:
    sockets = {name: socket.socket() for name in names}
    for one in sockets.values():
        one.bind(("127.0.0.1", 0))
    ports = {name: one.getsockname()[1] for name, one in sockets.items()}
    for one in sockets.values():
        one.close()
    return ports


def _start(program: str, *arguments: str, user: str | None = None) -> None:
    """A daemon, which goes to the background by itself once it runs."""
    subprocess.run(
        [_found(program) or program, *arguments], check=True, user=user, group=user, stdout=subprocess.DEVNULL
    )


def _idle_nodes(conf: Path) -> int:
    command = ["sinfo", "--noheader", "--partition=low", "--Node", "--format=%t"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "SLURM_CONF": str(conf)}
    )
    return done.stdout.split().count("idle")


def down(directory: Path) -> None:
    """Cancel what runs and end the daemons, by their pid files."""
    conf = directory / "slurm.conf"
    subprocess.run(
        ["scancel", "--user=root"], check=False, capture_output=True, env={**os.environ, "SLURM_CONF": str(conf)}
    )
    for name in ("slurmd-n1.pid", "slurmd-n2.pid", "slurmctld.pid", "munged.pid"):
        try:
            pid = int((directory / name).read_text())
            os.kill(pid, signal.SIGTERM)
            while Path(f"/proc/{pid}").exists():
                time.sleep(0.1)
        except (FileNotFoundError, ValueError, ProcessLookupError):
            continue


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in ("up", "down"):
        print(__doc__, file=sys.stderr)
        return 2
    directory = Path(sys.argv[2]).absolute()
    if fault := missing():
        print(
            f"error: no Slurm cluster can be started here: {fault}\nhint: run this as root on Debian", file=sys.stderr
        )
        return 2
    if sys.argv[1] == "down":
        down(directory)
    else:
        print(f"export SLURM_CONF={up(directory)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
