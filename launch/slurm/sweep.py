"""Submits one Slurm job a point of a grid, as one array; each saves and resumes when it is preempted or its time is up.

    python launch/slurm/sweep.py CONFIG.yaml optim.lr=0.1,0.05 head.margin.margin=0.3,0.35,0.4 [section.key=value ...]

Values are separated by commas, except inside brackets. A point's run folder is RUN.DIR/KEY=VALUE,KEY=VALUE.
"""

import argparse
import contextlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time

from partial_fc.build import build_losses
from partial_fc.config_file import load_config, without_dashes

GRACE = 180  # seconds from Slurm's signal to the end of a job: what a checkpoint may take


class Training:
    """What runs in a job: torchrun on one node. submitit pickles it and calls it in the job."""

    def __init__(self, command: list[str]):
        self.command = command
        self.torchrun = 0  # its process id

    def __call__(self) -> None:
        # the signal that Slurm has for submitit comes to all processes of the job, and would end torchrun
        ignore = ["bash", "-c", 'trap "" USR1 USR2; exec "$@"', "_"]
        with subprocess.Popen([*ignore, *self.command]) as process:
            self.torchrun = process.pid
            while (code := process.poll()) is None:  # not wait(): the handler of the signal runs in the midst of it
                time.sleep(0.5)
        if code != 0:
            raise RuntimeError(f"exit code {code} of {shlex.join(self.command)}: the log says why")

    def checkpoint(self):
        """Called by submitit on Slurm's signal: the run saves and stops; what is returned is put into the queue."""
        import submitit

        if self.torchrun:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has just ended
                os.kill(self.torchrun, signal.SIGTERM)  # torchrun hands it on and waits
                os.waitid(os.P_PID, self.torchrun, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Training(self.command))


def points(config: str, overrides: list[str]) -> list[tuple[str, list[str]]]:
    """Run folder and overrides of each point of the grid. Raises ValueError where one of them is no valid config."""
    axes, fixed = [], []
    for override in overrides:
        key, _, text = override.partition("=")
        values = split(text)
        if "" in values or (key == "run.dir" and len(values) > 1):
            raise ValueError(f"{override}: wanted {key}=value[,value...], and one run.dir, which every point extends")
        if len(values) > 1:
            axes.append([f"{key}={value}" for value in values])
        else:
            fixed.append(override)
    first = load_config(config, [*fixed, *(axis[0] for axis in axes)])
    base, store = first.run.dir, first.checkpoint.dir
    found = []
    for choice in itertools.product(*axes):
        name = re.sub(r"[^\w.,=+-]+", "_", ",".join(choice))
        run = f"{base}/{name}" if choice else base
        own = [f"run.dir={run}", *([f"checkpoint.dir={store}/{name}"] if store and choice else [])]
        found.append((run, [*fixed, *choice, *own]))
        build_losses(load_config(config, found[-1][1]))
    if len({run for run, _ in found}) < len(found):
        raise ValueError(f"two points of the grid have the same run folder: {sorted(run for run, _ in found)}")
    return found


def split(text: str) -> list[str]:
    """`a,[b,c],d` into a, [b,c] and d."""
    values, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            values.append("")
        else:
            values[-1] += letter
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value[,value...]")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of a point, on one node; 0: CPUs (default: 1)")
    parser.add_argument("--processes", type=int, help="processes of a point (default: one a GPU, one without)")
    parser.add_argument("--cpus", type=int, default=8, help="CPU cores of a process (default: 8)")
    parser.add_argument("--minutes", type=int, default=24 * 60, help="time limit of a job (default: a day)")
    parser.add_argument("--at-once", type=int, default=256, help="jobs that may run at the same time (default: 256)")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION[=VALUE]", help="partition=NAME; may be repeated"
    )
    parser.add_argument("--dry", action="store_true", help="print the commands of the points, submit nothing")
    arguments = parser.parse_intermixed_args(without_dashes(sys.argv[1:]))
    if not os.path.isfile("launch/train.py"):
        sys.exit(f"error: {os.getcwd()} has no launch/train.py: submit from the repository's folder")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a loss of one's own prints when it is imported
            grid = points(arguments.config, arguments.overrides)
    except ValueError as error:
        sys.exit(f"error: {error}")
    processes = arguments.processes or max(arguments.gpus, 1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    torchrun.append(f"--shutdown-timeout={GRACE - 30}")
    commands = [[*torchrun, "launch/train.py", arguments.config, *overrides] for _, overrides in grid]
    if arguments.dry:
        for command in commands:
            print(shlex.join(command))
        return

    import submitit

    options = {key: value or True for key, _, value in (option.partition("=") for option in arguments.sbatch)}
    base = os.path.dirname(grid[0][0]) if len(grid) > 1 else grid[0][0]
    executor = submitit.AutoExecutor(folder=f"{base}/slurm", cluster="slurm", slurm_max_num_timeout=1000)
    executor.update_parameters(
        name="partial_fc",
        timeout_min=arguments.minutes,
        tasks_per_node=1,
        cpus_per_task=arguments.cpus * processes,
        slurm_signal_delay_s=GRACE,
        slurm_array_parallelism=arguments.at_once,
        slurm_additional_parameters=options,
        **({"gpus_per_node": arguments.gpus} if arguments.gpus else {}),
    )
    with executor.batch():
        jobs = [executor.submit(Training(command)) for command in commands]
    for job, (run, _) in zip(jobs, grid, strict=True):
        print(f"{job.job_id}  {run}  log: {job.paths.stdout}")


if __name__ == "__main__":
    main()
