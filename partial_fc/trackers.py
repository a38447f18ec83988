"""Where a run's numbers go beside metrics.jsonl: wandb, TensorBoard. On rank 0 only."""

import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from partial_fc.config import Config
from partial_fc.documents import parse_json
from partial_fc.environment import pip_install
from partial_fc.files import one_line, write_atomically

FINISH_SECONDS = 300.0  # in which a tracker has to end: it may upload until then
OLD_NAMES = {"dryrun": "offline", "run": "online"}  # what WANDB_MODE may say, too


def wandb_mode(config: Config) -> str:
    """The mode of the config; unset: the environment's WANDB_MODE, else online where a key is set, else offline."""
    if config.track.wandb is not None:
        return config.track.wandb
    if os.environ.get("WANDB_MODE"):
        return OLD_NAMES.get(os.environ["WANDB_MODE"], os.environ["WANDB_MODE"])
    # without a key an online init fails: choose before it is tried
    return "online" if os.environ.get("WANDB_API_KEY") or _key_is_kept() else "offline"


def _key_is_kept() -> bool:
    """Whether wandb's own reader finds a key for its host (WANDB_BASE_URL, its settings) in netrc; no if it fails."""
    try:
        import wandb

        try:
            from wandb.sdk import wandb_setup
            from wandb.sdk.lib import wbauth
        except ImportError:  # of earlier versions
            return bool(wandb.api.api_key)
        return bool(wbauth.read_netrc_auth(host=wandb_setup.singleton().settings.base_url))
    except Exception as error:
        print(f"wandb: looking for a key: {_one_line(error)}")
        return False


def start_wandb(config: Config, run: Path) -> Any | None:
    """One wandb.Run per run folder, with the rows that metrics.jsonl has: see `_replay`.

    Offline where online does not work; None where it is disabled, or does not work at all, which is said: what a
    tracker lacks is no reason to end a run.
    """
    mode = wandb_mode(config)
    if mode == "disabled":
        print("wandb: disabled")
        return None
    try:
        import wandb  # as slow as matplotlib, and neither --help nor a run without it should wait for it

        options = dict(
            project=config.track.project,
            name=run.name,
            id=_wandb_id(run),
            resume="allow",
            dir=run,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True, init_timeout=30, **_limit_of_the_end(wandb)),
        )
        try:
            started = wandb.init(mode=mode, **options)
        except Exception as error:
            if mode != "online":
                raise
            print(f"wandb: online did not work ({_one_line(error)}), so offline")
            mode = "offline"
            wandb.teardown()  # its service still holds the id
            started = wandb.init(mode=mode, **options)
        _replay(started, run, mode)
    except Exception as error:
        print(f"wandb: {_one_line(error)}, so without it")
        return None
    print(f"wandb: {mode}" + (f"; upload it with: wandb sync {run}/wandb/offline-run-*" if mode == "offline" else ""))
    return started


def _limit_of_the_end(wandb: Any) -> dict[str, Any]:
    """wandb's own limit, after which it says which files are left; earlier versions have none."""
    limit = {"finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
    return limit if limit.keys() <= wandb.Settings.model_fields.keys() else {}


def finish(name: str, work: Callable[[], object]) -> None:
    """Calls `work`, which ends a tracker, and leaves it where it takes too long, which is said: the run has finished.

    What `work` raises is raised, but for its own TimeoutError.
    """
    failed: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(1.1 * FINISH_SECONDS)
    if thread.is_alive() or isinstance(next(iter(failed), None), TimeoutError):
        print(f"{name}: it has not ended within {FINISH_SECONDS:.0f} s, and is left unfinished", flush=True)
        if name == "wandb" and thread.is_alive():
            _leave_wandb()
    elif failed:
        raise failed[0]


def _leave_wandb() -> None:
    """Ends its service, which does not answer: wandb would wait for it again as the interpreter ends."""
    with suppress(Exception):  # names of its own, which other versions may not have
        from wandb.sdk import wandb_setup

        connection = wandb_setup.singleton()._connection
        connection._cleanup()
        connection._proc._process.kill()


def _replay(started: Any, run: Path, mode: str) -> None:
    """Logs the rows of metrics.jsonl that the tracker lacks; offline all of them, in place of what is there.

    A killed process leaves out rows that were on their way, and has logged rows past the checkpoint, which the resumed
    run logs again. Online the server says what it has: the run goes on there, and takes no step twice. Offline
    nobody can say, so this attempt's folder gets all rows, and those of earlier ones are deleted.
    """
    file = run / "metrics.jsonl"
    for line in file.read_bytes().splitlines() if file.exists() else []:
        row = parse_json(line, file)
        if row["step"] >= started.step:
            started.log(row, step=row["step"])
    if mode == "offline":
        ours = Path(started.dir).resolve().parent
        for folder in (run / "wandb").glob(f"offline-run-*-{started.id}"):
            if folder.resolve() != ours:
                shutil.rmtree(folder)


def _wandb_id(run: Path) -> str:
    """One wandb run a run folder: a restarted job goes on under the same id."""
    path = run / "wandb_id"
    kept = path.read_text().strip() if path.exists() else ""
    if re.fullmatch(r"[\w-]+", kept):
        return kept
    # none, or what a full disk or a power loss left of it
    kept = secrets.token_hex(4)
    write_atomically(path, kept + "\n")
    return kept


def _one_line(error: Exception) -> str:
    return one_line(" ".join(f"{type(error).__name__}: {error}".split()))


def start_tensorboard(config: Config, run: Path, start_step: int) -> Any | None:
    """torch's SummaryWriter on <run>/tensorboard, which shows nothing past `start_step` of what was there before.

    None where the config does not want it, or where it cannot be written, which is said. Raises ValueError without the
    package.
    """
    writer = check_tensorboard(config)
    try:
        return None if writer is None else writer(str(run / "tensorboard"), purge_step=start_step + 1, flush_secs=10)
    except Exception as error:
        print(f"tensorboard: {_one_line(error)}, so without it")
        return None


def check_tensorboard(config: Config) -> type | None:
    """torch's SummaryWriter; None where the config does not want it. Raises ValueError without the package."""
    if not config.track.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            f"track.tensorboard needs tensorboard: {pip_install('tensorboard')}, or give track.tensorboard=false"
        ) from None
    return SummaryWriter
