"""A real Slurm cluster of virtual nodes on one machine: own controller, own daemons, own network.

The cluster is one process tree in namespaces of its own (processes, network, mounts, host name), and each
node is such a tree within it: with its own address, loopback, /dev/shm and host name, so that a rendezvous
on `localhost` fails as it does on a cluster. Killing a node's first process is a loss of power; killing
the cluster's first process leaves nothing behind. That process reads a pipe from this one, so that the
cluster ends with the tests, however they end.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
NUM_NODES = 3
CPUS, MEMORY_MIB, GPUS = 8, 16000, 2
"""What each node claims to have. Slurm does not look for it."""

_CONTROLLER = """
mount --bind "$1/hosts" /etc/hosts
hostname controller
ip link set lo up
ip link add bridge type bridge
ip address add 10.0.0.100/24 dev bridge
ip link set bridge up
{
    munged --foreground --force --key-file="$1/munge/key" --socket="$1/munge/socket" \
        --pid-file="$1/munge/pid" --log-file="$1/munge/log" --seed-file="$1/munge/seed" >/dev/null 2>&1 &
    until munge -n -S "$1/munge/socket" >/dev/null 2>&1; do sleep 0.05; done
    exec slurmctld -D -c >"$1/log/slurmctld.out" 2>&1
} &
cat >/dev/null # until the tests end
"""

_NODE = """
hostname "$2"
mount --bind "$1/hosts" /etc/hosts
mount -t tmpfs -o mode=1777 none /dev/shm
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip address add "10.0.0.$3/24" dev eth0
ip link set eth0 up
slurmd -D -N "$2" >>"$1/log/$2.out" 2>&1 &
wait
sleep infinity
"""

_CONFIG = """
ClusterName=virtual
SlurmctldHost=controller(10.0.0.100)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,bf_resolution=1
ReturnToService=2
SlurmdTimeout=5
MessageTimeout=5
InactiveLimit=0
KillWait=20
WaitTime=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
GresTypes=gpu
NodeName=node[1-{nodes}] NodeAddr=10.0.0.[1-{nodes}] CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
"""


def why_not() -> str | None:
    """Why the cluster cannot run here, None if it can."""
    if os.geteuid() != 0:
        return "a virtual Slurm cluster needs root"
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        return f"{', '.join(missing)} not installed: run tests/slurm/install.sh"
    probe = subprocess.run(
        ["unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "true"], capture_output=True
    )
    return None if probe.returncode == 0 else "namespaces are not allowed here"


def wait_until(condition: Callable[[], object], what: str, timeout_s: float) -> None:
    """Poll until a condition holds.

    Raises:
        AssertionError: it does not hold in time.
    """
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}"
        time.sleep(0.2)


class VirtualCluster:
    """A running cluster, until `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._nodes: dict[str, int] = {}
        for name in ("state", "spool", "log", "munge", "devices"):
            (folder / name).mkdir(parents=True)
        self._log = (folder / "log/first_processes.out").open("w")
        self._write_config()
        self._first = self._start(_CONTROLLER, str(folder))
        self._first_pid = _first_child(self._first.pid)
        wait_until((folder / "munge/socket").exists, "munged listens", timeout_s=60)
        for number in range(1, NUM_NODES + 1):
            self.boot(f"node{number}")
        self.wait_for_idle()

    def boot(self, node: str) -> None:
        """Give a node power."""
        number = node.removeprefix("node")
        enter = ["nsenter", "--target", str(self._first_pid), "--all"]
        process = self._start(_NODE, str(self.folder), node, number, enter=enter)
        pid = _first_child(_first_child(process.pid))  # nsenter, unshare, the node's first process
        self._nodes[node] = pid
        link = ["ip", "link", "add", f"to_{node}", "type", "veth", "peer", "name", "eth0", "netns", str(pid)]
        self._in_network("ip", "link", "delete", f"to_{node}", check=False)  # if it lost power a moment ago
        self._in_network(*link)
        self._in_network("ip", "link", "set", f"to_{node}", "master", "bridge", "up")

    def wait_for_idle(self) -> None:
        """Wait until every node is up and free."""
        wait_until(lambda: len(self._idle_nodes()) == NUM_NODES, "all nodes are idle", timeout_s=120)

    def cut_power(self, node: str) -> None:
        """End all processes of a node at once."""
        os.kill(self._nodes.pop(node), signal.SIGKILL)

    def cut_network(self, node: str) -> None:
        """Unplug a node; what runs on it goes on."""
        self._in_network("ip", "link", "set", f"to_{node}", "down")

    def mend_network(self, node: str) -> None:
        """Plug a node in again."""
        self._in_network("ip", "link", "set", f"to_{node}", "up")

    def command(self, *words: str, check: bool = True, environment: Mapping[str, str] | None = None) -> str:
        """Standard output of a command on the controller."""
        return self._run(self._first_pid, words, check, environment)

    def on_node(self, node: str, *words: str) -> str:
        """Standard output of a command on a node."""
        return self._run(self._nodes[node], words, check=True)

    def submit(self, *words: str, environment: Mapping[str, str] | None = None) -> str:
        """The id of a job submitted with these words after `sbatch`."""
        return self.command("sbatch", "--parsable", *words, environment=environment).strip()

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", job)))

    def wait_for(self, job: str, states: Sequence[str], timeout_s: float) -> dict[str, str]:
        """Wait until a job is in one of these states; answer what Slurm says of it."""
        facts: dict[str, str] = {}

        def reached() -> bool:
            facts.update(self.facts(job))
            return facts["JobState"] in states

        wait_until(reached, f"job {job} is {' or '.join(states)}", timeout_s)
        return facts

    def clear(self) -> None:
        """Cancel all jobs and wait until every node is up and free."""
        self.command("scancel", "--user=root", check=False)
        self.command("scancel", "--full", "--signal=KILL", "--user=root", check=False)
        wait_until(lambda: not self.command("squeue", "--noheader"), "no job is left", timeout_s=120)
        self.wait_for_idle()

    def close(self) -> None:
        """End everything."""
        os.kill(self._first_pid, signal.SIGKILL)
        self._first.wait(timeout=30)
        self._log.close()

    def _run(
        self, pid: int, words: Sequence[str], check: bool, environment: Mapping[str, str] | None = None
    ) -> str:
        found = subprocess.run(
            ["nsenter", "--target", str(pid), "--all", f"--wd={Path.cwd()}", *words],
            capture_output=True,
            text=True,
            timeout=60,
            env=self._environment | dict(environment or {}),
        )
        assert not check or found.returncode == 0, f"{' '.join(words)}: {found.stderr}"
        return found.stdout

    def _write_config(self) -> None:
        folder = self.folder
        (folder / "munge/key").write_bytes(os.urandom(1024))
        (folder / "munge/key").chmod(0o400)
        addresses = [f"10.0.0.{number} node{number}" for number in range(1, NUM_NODES + 1)]
        hosts = ["127.0.0.1 localhost", "10.0.0.100 controller", *addresses]
        (folder / "hosts").write_text("\n".join(hosts) + "\n")
        (folder / "slurm.conf").write_text(
            _CONFIG.format(folder=folder, nodes=NUM_NODES, cpus=CPUS, memory=MEMORY_MIB, gpus=GPUS)
        )
        for number in range(GPUS):  # a second /dev/null each
            os.mknod(folder / f"devices/gpu{number}", 0o20666, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/devices/gpu[0-{GPUS - 1}]\n")
        self._environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH", "METALM"))
        } | {"SLURM_CONF": str(folder / "slurm.conf")}

    def _start(self, script: str, *arguments: str, enter: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        own = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc"]
        return subprocess.Popen(
            [*enter, *own, "bash", "-c", script, "bash", *arguments],
            stdin=subprocess.PIPE,
            stderr=self._log,
            env=self._environment,
            start_new_session=True,
        )

    def _in_network(self, *words: str, check: bool = True) -> None:
        enter = ["nsenter", "--target", str(self._first_pid), "--net"]
        subprocess.run([*enter, *words], check=check, stderr=self._log)

    def _idle_nodes(self) -> list[str]:
        listed = self.command(
            "sinfo", "--noheader", "--Node", "-p", "main", "-t", "idle", "-o", "%N", check=False
        )
        return listed.split()


def _first_child(pid: int) -> int:
    """The child of a process that starts one program, once it is there."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    wait_until(lambda: children.read_text().split(), f"process {pid} has a child", timeout_s=60)
    return int(children.read_text().split()[0])
