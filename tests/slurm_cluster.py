"""A Slurm cluster of two nodes on this machine: real slurmctld and slurmd, configuration and folders of their own."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

# Without authentication, so for nobody outside: its daemons listen on 127.0.0.1 alone.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
MinJobAge=600
FirstJobId={job}
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=4
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{preempt}
PartitionName=main Nodes=n[1-2] Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n[1-2] PriorityTier=9
"""


def missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    for program in ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if os.geteuid() != 0:
        return "starting slurmd takes root"
    return None


class Cluster:
    """Started by the constructor; `close` ends the jobs and the daemons."""

    def __init__(self, folder: Path, preempt: str = ""):
        (folder / "state").mkdir(parents=True)
        first = _free_ports(3)
        host = socket.gethostname().split(".")[0]
        file = folder / "slurm.conf"
        settings = {"host": host, "folder": folder, "ports": range(first, first + 3), "preempt": preempt}
        file.write_text(CONFIGURATION.format(**settings, job=os.getpid() % 9000 + 1).lstrip())
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment |= {"SLURM_CONF": str(file), "OMP_NUM_THREADS": "1"}
        self.daemons: list[subprocess.Popen] = []
        try:
            for command in (["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]):
                out = open(folder / f"{'_'.join(command)}.out", "w")  # noqa: SIM115 - the daemon's own
                self.daemons.append(
                    subprocess.Popen(
                        command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
                    )
                )
                out.close()
            self.wait_for(
                lambda: self._call("scontrol", "show", "nodes").count("State=IDLE ") == 2, 30, "nodes to be idle"
            )
        except BaseException:
            self.close()
            raise

    def _call(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60).stdout

    def run(self, *command: str, cwd: Path, **environment: str) -> str:
        """Output of a command that must succeed, in the cluster's environment."""
        done = subprocess.run(
            command, env=self.environment | environment, cwd=cwd, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def field(self, job: str, name: str) -> str:
        """What scontrol says of a job, JobState for example."""
        for word in self._call("scontrol", "show", "job", job).split():
            if word.startswith(f"{name}="):
                return word.partition("=")[2]
        return ""

    def wait_for(self, happened, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            dead = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
            assert not dead, f"{dead} ended: {self.logs()}"
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}: {self.logs()}"
            time.sleep(0.3)

    def wait_for_state(self, job: str, state: str, seconds: float) -> None:
        self.wait_for(lambda: self.field(job, "JobState") == state, seconds, f"job {job} to be {state}")

    def logs(self) -> str:
        logs = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(logs))

    def close(self) -> None:
        if self.daemons:
            self._call("scancel", "--user=root", "--full", "--signal=KILL")
            self._call("scancel", "--user=root")
            deadline = time.monotonic() + 20
            while self._call("squeue", "--noheader").strip() and time.monotonic() < deadline:
                time.sleep(0.3)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _free_ports(count: int) -> int:
    """The first of `count` consecutive ports that nobody listens on."""
    for first in range(10000 + os.getpid() % 900 * 10, 20000, count):  # train.sbatch uses those above
        sockets = [socket.socket() for _ in range(count)]
        try:
            for number, each in enumerate(sockets):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                each.bind(("127.0.0.1", first + number))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise OSError(f"no {count} free ports in a row")
