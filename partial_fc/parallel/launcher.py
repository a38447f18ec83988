"""Which rank this process is: what srun and mpirun say, in torch's variables; and how a rank ends with an error.

Imports no torch: it is asked before that is loaded.
"""

import json
import os
import re
import sys
import time
import zlib
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from typing import NoReturn

from partial_fc.files import printable

TORCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun, deepspeed and accelerate set
# rank, number of ranks, and the same on this machine
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # Intel MPI, MPICH
)
# sbatch and salloc set SLURM_PROCID and SLURM_NTASKS too, for a shell that is one process; this one only srun sets
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
PATIENCE = 2.0  # seconds in which torchrun ends the other ranks of a node when one has failed: it looks every 0.1 s


def join(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Whether this process is one of a job's ranks. Then `environ` holds torch's variables, and they are sound.

    torch's own win, then mpirun's, then srun's: a program that one of them starts inherits those of the others.
    Raises ValueError for variables that contradict each other or are not complete.
    """
    if not environ.get("RANK"):
        found = _mpirun(environ) or _srun(environ) or {}
        started = _number(found, "WORLD_SIZE") if found else 1
        if environ.get("WORLD_SIZE") and _number(environ, "WORLD_SIZE") != started:
            by = f"{found['by']} started {started} ranks" if found else "RANK is not set, so this is one process alone"
            raise ValueError(
                f"WORLD_SIZE is {environ['WORLD_SIZE']}, but {by}: unset WORLD_SIZE, and start several ranks with "
                "torchrun --nproc_per_node=8 launch/train.py ..."
            )
        if started == 1:
            return False
        environ.update({name: value for name, value in found.items() if name != "by"})
    missing = [name for name in TORCH if not environ.get(name)]
    if missing:
        raise ValueError(
            f"RANK is set, {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not: start ranks with "
            "torchrun, which sets all of them, or unset RANK to run in one process"
        )
    rank, ranks, port = (_number(environ, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if not 0 <= rank < ranks:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE is {ranks}: wanted ranks from 0 to WORLD_SIZE - 1")
    if not (ranks > 1) <= port < 2**16:  # a rank that is alone may take any that is free
        raise ValueError(f"MASTER_PORT is {port}: wanted a port from 1 to {2**16 - 1}")
    if environ.get("LOCAL_RANK") and _number(environ, "LOCAL_RANK") < 0:
        raise ValueError(f"LOCAL_RANK is {environ['LOCAL_RANK']}: wanted 0 or more")
    return True


def _mpirun(environ: Mapping[str, str]) -> dict[str, str] | None:
    """torch's variables by those of Open MPI, Intel MPI or MPICH; None without them."""
    for names in MPI:
        if not all(environ.get(name) for name in names):
            continue
        rank, ranks, local_rank, local_ranks = (_number(environ, name) for name in names)
        address = environ.get("MASTER_ADDR") or ("127.0.0.1" if local_ranks == ranks else "")
        if not address:
            raise ValueError(
                f"mpirun started {ranks} ranks, {local_ranks} of them on this machine, and does not say where rank 0 "
                "is: give the address of the first machine, as mpirun -x MASTER_ADDR=HOST ..."
            )
        job = environ.get("PMIX_NAMESPACE")  # Open MPI's
        return _variables("mpirun", rank, ranks, local_rank, address, environ.get("MASTER_PORT") or _port(job))
    return None


def _srun(environ: Mapping[str, str]) -> dict[str, str] | None:
    """torch's variables by those of a step of Slurm; None outside of one."""
    if not all(environ.get(name) for name in SRUN):
        return None
    rank, ranks, local_rank = (_number(environ, name) for name in SRUN)
    here = environ.get("SLURM_STEP_NUM_NODES") == "1"
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if here else first_host(environ["SLURM_STEP_NODELIST"]))
    step = f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    return _variables("srun", rank, ranks, local_rank, address, environ.get("MASTER_PORT") or _port(step))


def _variables(by: str, rank: int, ranks: int, local_rank: int, address: str, port: str) -> dict[str, str]:
    values = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": local_rank, "MASTER_ADDR": address, "MASTER_PORT": port}
    return {"by": by} | {name: str(value) for name, value in values.items()}


def first_host(nodes: str) -> str:
    """The first name of Slurm's list of nodes: gpu01 of gpu[01-04,07],cpu2. srun puts rank 0 there."""
    first = re.match(r"(?:[^,\[]|\[[^]]*\])*", nodes).group()
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", first)


def _port(job: str | None) -> str:
    """The same port on all ranks of a job, most likely another one for another job. Below the kernel's own, 32768."""
    return "29500" if job is None else str(20000 + zlib.crc32(job.encode()) % 10000)


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ValueError(f"{name} is {environ[name]!r}: wanted a number") from None


def alone(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` for a process that is no rank of this job."""
    names = {*TORCH, "LOCAL_RANK", *SRUN, *(name for names in MPI for name in names)}
    return {name: value for name, value in environ.items() if name not in names}


def one_device_each(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether srun --gpus-per-task=1 has hidden the other ranks' devices: this rank's is then number 0."""
    by_srun = all(environ.get(name) for name in SRUN) and "TORCHELASTIC_RUN_ID" not in environ
    return by_srun and bool(re.fullmatch(r"[^,]+", environ.get("CUDA_VISIBLE_DEVICES", "")))


def take_local_rank(given: int | None, environ: MutableMapping[str, str] = os.environ) -> None:
    """What the deepspeed launcher gives as --local_rank. Raises ValueError where LOCAL_RANK, which counts, differs."""
    if given is not None and environ.setdefault("LOCAL_RANK", str(given)) != str(given):
        raise ValueError(f"--local_rank={given} and LOCAL_RANK is {environ['LOCAL_RANK']}: leave out --local_rank")


def end(message: str) -> NoReturn:
    """Ends this process with `message` and exit code 1, where ranks cannot ask each other: each finds it by itself.

    The first rank of a node says it at once. The others say it where their launcher has not ended them by then.
    """
    if any(os.environ.get(name, "0") != "0" for name in ("LOCAL_RANK", SRUN[2], *(names[2] for names in MPI))):
        time.sleep(PATIENCE)
    text = printable(f"error: {message}")
    record(text)
    sys.exit(text)


def record(text: str) -> None:
    """Puts `text` where torchrun looks for what its summary says of this rank.

    torch's `record` does so for exceptions that nobody caught, with their traceback. Where the disk is full nothing is
    there: torchrun would end with an error of its own at half a file.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    try:
        with open(file, "w") as out:
            json.dump({"message": {"message": text, "extraInfo": extra}}, out)
    except OSError:
        os.environ.pop("TORCHELASTIC_ERROR_FILE", None)  # torch's `record` would fail there, too, and hide the cause
        with suppress(OSError):
            if os.path.isfile(file):
                os.unlink(file)
