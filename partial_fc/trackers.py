"""Where a run's numbers go beside metrics.jsonl: wandb, TensorBoard. On rank 0 only."""

import os
import secrets
from pathlib import Path
from typing import Any

from partial_fc.config import Config
from partial_fc.environment import pip_install


def wandb_mode(config: Config) -> str:
    """The mode of the config; unset: the environment's WANDB_MODE, else online where a key is set, else offline."""
    if config.track.wandb is not None:
        return config.track.wandb
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    # without a key an online init fails: choose before it is tried
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (netrc.exists() and "wandb.ai" in netrc.read_text())
    return "online" if has_key else "offline"


def start_wandb(config: Config, run: Path) -> Any | None:
    """One wandb.Run per run folder; offline where online does not work; None where it is disabled."""
    mode = wandb_mode(config)
    if mode == "disabled":
        print("wandb: disabled")
        return None
    import wandb  # as slow as matplotlib, and neither --help nor a run without it should wait for it

    options = dict(
        project=config.track.project,
        name=run.name,
        id=_wandb_id(run),
        resume="allow",
        dir=run,
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(console="off", silent=True, init_timeout=30),
    )
    try:
        started = wandb.init(mode=mode, **options)
    except wandb.Error as error:
        if mode != "online":
            raise
        print(f"wandb: online did not work ({error}), so offline")
        mode = "offline"
        started = wandb.init(mode=mode, **options)
    print(f"wandb: {mode}" + (f"; upload it with: wandb sync {run}/wandb/offline-run-*" if mode == "offline" else ""))
    return started


def _wandb_id(run: Path) -> str:
    """One wandb run a run folder: a restarted job goes on under the same id."""
    path = run / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def start_tensorboard(config: Config, run: Path, start_step: int) -> Any | None:
    """torch's SummaryWriter on <run>/tensorboard, which shows nothing past `start_step` of what was there before.

    None where the config does not want it. Raises ValueError without the package.
    """
    writer = check_tensorboard(config)
    return None if writer is None else writer(str(run / "tensorboard"), purge_step=start_step + 1, flush_secs=10)


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
