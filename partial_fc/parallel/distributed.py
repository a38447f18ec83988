"""The only module that speaks torch.distributed.

Every function works in one process without a process group, where the world size is 1: there is one code path.
In the docstrings, in is what each rank passes and out what each rank gets; W is the world size.
"""

import atexit
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

# Before there is a group: its functions have group=group.WORLD as a default argument. The first step of torch.optim
# would import it, and they would keep the group, and gloo's threads, past destroy_process_group. Such a thread, still
# at work while the interpreter ends, aborted 1 of 20 finished jobs on a loaded machine. Takes 4 ms.
import torch.distributed.nn.functional
from torch import Tensor

from partial_fc.files import printable
from partial_fc.parallel import launcher
from partial_fc.parallel.addresses import check_addresses
from partial_fc.parallel.process import end_with_torchrun
from partial_fc.parallel.watch import Watch, here

# torch 2.14 has new names for these two and warns of the old ones
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


_WATCHED = timedelta(days=1)  # a collective's timeout where a Watch ends what waits too long, but for a save


class RunError(RuntimeError):
    """An error whose message says what to change: it needs no traceback.

    `on_all_ranks`: every rank raises it alike, so one of them may say it.
    """

    def __init__(self, message: str, on_all_ranks: bool = True):
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


@contextmanager
def job(timeout_seconds: float = 600.0, watch_seconds: float | None = None) -> Iterator[torch.device]:
    """Joins the process group that the environment describes (see `launcher`), for the time of the body.

    Gives this rank's device: gloo runs on CPUs, NCCL on CUDA devices. Where the environment describes no group nothing
    is joined and the world size is 1. Ranks wait timeout_seconds for each other, at the start and in a collective; with
    watch_seconds as long as a `Watch` with this timeout lets them. A RunError in the body ends the process with its
    message, said by one rank, and exit code 1. Workers of torchrun die with it: a killed agent would else leave them
    training as orphans.
    """
    try:
        joins = launcher.join()
    except ValueError as error:
        launcher.end(str(error))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        index = 0 if launcher.one_device_each() else int(os.environ.get("LOCAL_RANK", 0))
        if index >= torch.cuda.device_count():
            launcher.end(
                f"LOCAL_RANK {index} on a machine of {torch.cuda.device_count()} CUDA devices: start one rank a device "
                "(--nproc_per_node)"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    watch = None
    if joins:
        end_with_torchrun()
        watch = _join_group(device, timeout_seconds, watch_seconds)
    try:
        yield device
        barrier()
    except RunError as error:
        launcher.record(f"error: {error}")
        if rank() == 0 or not error.on_all_ranks:
            print(printable(f"error: {error}"), file=sys.stderr, flush=True)
        if error.on_all_ranks:  # rank 0 may have had a tracker to close, and torchrun kills it when another is gone
            with suppress(RuntimeError):
                gather_objects(None)
        _end_without_farewell()
        sys.exit(1)
    except Exception as error:
        if world_size() > 1 and _is_of_a_collective(error):
            # Another rank is at fault. torchrun ends this one in that time, and blames whose record is the first, in
            # whole seconds.
            time.sleep(launcher.PATIENCE)
        if watch is not None and watch.found:  # a collective that failed since another rank has ended for it
            watch.end()
        _end_without_farewell()
        raise
    if watch is not None:
        watch.close()
    # every user of the group, DDP above all, is gone by now
    if dist.is_initialized():
        dist.destroy_process_group()


def _join_group(device: torch.device, timeout_seconds: float, watch_seconds: float | None) -> Watch | None:
    """Opens the process group, and starts the watch over it. Ends the process with a message where it cannot."""
    timeout = timedelta(seconds=timeout_seconds)
    watch = None
    try:
        store, rank_here, ranks = next(dist.rendezvous("env://", timeout=timeout))
        store = _of_this_attempt(store)
        check_addresses(store, rank_here, ranks)
        if watch_seconds is not None and ranks > 1:
            watch = Watch(dist.PrefixStore("watch", store.clone()), rank_here, ranks, watch_seconds)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank_here,
            world_size=ranks,
            timeout=timeout if watch is None else _WATCHED,
            device_id=device if device.type == "cuda" else None,
        )
        here.begin("the start", waits=False)
    except RuntimeError as error:  # of the store, the network, gloo or NCCL: some of torch's have a class of their own
        rank_here = os.environ["RANK"]
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).partition("\n")[0]
        if "EADDRINUSE" in reason:
            text = (
                f"rank {rank_here} cannot listen at {where}, where another program does: another job on this machine? "
                "Give another MASTER_PORT, to torchrun another --master-port, or --standalone on one machine"
            )
        elif isinstance(error, dist.DistError):
            text = (
                f"rank {rank_here} of {os.environ['WORLD_SIZE']} did not meet the others at {where} within "
                f"{timeout_seconds:.0f} s ({reason}): were all started, and is that port open between the machines?"
            )
        else:
            text = unreachable(rank_here, reason)
        launcher.record(f"error: {text}")
        print(f"error: {text}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # what is half joined may wait for others as it is taken down
    return watch


def unreachable(rank: int | str, error: object) -> str:
    """What to say where the network carries no collective of this rank."""
    reason = str(error).partition("\n")[0]
    return (
        f"rank {rank} on {socket.gethostname()} does not reach the others ({reason}): check the network between the "
        "machines, and that GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, where set, name an interface of this one"
    )


def _is_of_a_collective(error: Exception) -> bool:
    """Whether it came over the network: gloo's are plain RuntimeErrors that name its source."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _end_without_farewell() -> None:
    """Has this process end as soon as it has said why.

    To destroy an NCCL group waits for all ranks, and the others may wait for this one in a collective, until torchrun
    sees that it is gone.
    """

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    if dist.is_initialized():
        atexit.register(end)


def _of_this_attempt(store: dist.Store) -> dist.Store:
    """The store without what an earlier attempt of torchrun --max-restarts left in it.

    torchrun keeps one store for all attempts. The addresses of dead workers in it made gloo fail, or wait. The number
    of restarts tells attempts apart on one node; each node counts its own, so on several nodes torchrun has to be told
    to make a new store.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    if os.environ["GROUP_WORLD_SIZE"] == "1":
        return dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    if os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0" and os.environ["RANK"] == "0":
        print(
            "warning: restarts on several nodes need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of each "
            "torchrun",
            flush=True,
        )
    return store


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def backend() -> str:
    """What carries the collectives."""
    if not dist.is_initialized():
        return "no process group"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else ""
    return dist.get_backend_config().replace("nccl", f"nccl {nccl}") if nccl else dist.get_backend()


def joined() -> bool:
    """Whether there is a process group, be it of one process."""
    return dist.is_initialized()


def part(n: int, rank: int, world_size: int) -> range:
    """The part of `range(n)` that belongs to `rank`: cut at floor(r n / W), so that parts differ by at most one."""
    return range(rank * n // world_size, (rank + 1) * n // world_size)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_gather(tensor: Tensor) -> Tensor:
    """In: (*shape), equal on all ranks. Out: (W, *shape), rank r's tensor at [r]."""
    if not dist.is_initialized():
        return tensor.unsqueeze(0)
    tensor = tensor.contiguous()
    # gloo and NCCL concatenate along the first dimension, hence the leading 1
    out = tensor.new_empty((world_size(), *tensor.shape))
    _all_gather_single(out, tensor.unsqueeze(0))
    return out


def gather_rows(mine: Tensor, per_rank: int, count: int) -> Tensor:
    """In: this rank's rows (n, *shape), n = per_rank until the rows run out. Out: all `count`, rank after rank."""
    padded = mine.new_zeros(per_rank, *mine.shape[1:])
    padded[: len(mine)] = mine
    return all_gather(padded).flatten(0, 1)[:count]


def broadcast(tensor: Tensor) -> Tensor:
    """In: (*shape). Out: (*shape), rank 0's."""
    out = tensor.clone(memory_format=torch.contiguous_format)
    if dist.is_initialized():
        dist.broadcast(out, src=0)
    return out


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """In: (*shape). Out: the sum over ranks, equal bit for bit on all of them. `tensor` itself is overwritten."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """In: (*shape). Out: the maximum over ranks. `tensor` itself is overwritten."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def reduce_scatter_sum(tensor: Tensor) -> Tensor:
    """In: (W n, *shape). Out: (n, *shape), rows [r n, (r + 1) n) of the sum over ranks."""
    if not dist.is_initialized():
        return tensor
    tensor = tensor.contiguous()
    out = tensor.new_empty((tensor.shape[0] // world_size(), *tensor.shape[1:]))
    _reduce_scatter_single(out, tensor, op=dist.ReduceOp.SUM)
    return out


def gather_objects(value: object) -> list:
    """In: a small picklable value. Out: the list of all ranks' values. Between the ranks of one job only."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def message(error: Exception) -> str:
    """The text of an error for people."""
    # what we raise ourselves and what names a file reads as a sentence; else the type says more than the text
    own = isinstance(error, ValueError | RunError)
    named = isinstance(error, OSError) and (error.errno is None or error.filename is not None)
    return str(error) if own or named else f"{type(error).__name__}: {error}"


def first_of_node() -> bool:
    """Whether this is the rank that does what one rank of each node must do: LOCAL_RANK 0, or unset."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def local_world_size() -> int:
    """How many ranks this node has: LOCAL_WORLD_SIZE, or one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def together(what: str) -> Iterator[None]:
    """Runs its body so that it succeeds on all ranks or fails on all of them.

    The body must hold no collective of its own. An exception on any rank becomes a RunError on every rank that
    names the first rank that failed and why; so no rank waits in a later collective for one that is gone.
    """
    error: Exception | None = None
    here.begin(what, waits=False)
    try:
        yield
    except Exception as caught:
        error = caught
    here.begin(what, waits=True)
    messages = gather_objects(None if error is None else message(error))
    failed = [(r, text) for r, text in enumerate(messages) if text is not None]
    if failed:
        if len(messages) == 1 and isinstance(error, BrokenPipeError):  # of stdout the program's end speaks
            raise error
        failed_rank, text = failed[0]
        where = f" on rank {failed_rank}" if len(messages) > 1 else ""
        raise RunError(f"{what} failed{where}: {text}") from error
