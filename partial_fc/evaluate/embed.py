"""Embeddings of a data set's samples, computed by all ranks together."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from partial_fc.data.reader import images_in_order, normalize
from partial_fc.data.shards import Index
from partial_fc.parallel.distributed import all_gather, part, rank, together, world_size
from partial_fc.progress import DIVERGED


@torch.no_grad()
def embed(
    backbone: nn.Module,
    index: Index,
    samples: np.ndarray | None = None,
    *,
    batch_size: int,
    device: torch.device,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    flip: bool = False,
    workers: int = 0,
) -> Tensor:
    """Normalized embeddings (n, D) float32 of `samples` (n,) (None: all of the index), in their order.

    In, equal on all ranks: everything but `device`. Out, equal on all ranks: the embeddings, on `device`. The
    batches are the same whatever the number of ranks, which take whole ones; so are the results. `flip` adds
    the embedding of the mirrored image before normalizing. The backbone is in evaluation mode meanwhile and
    put back after.

    Raises an error on all ranks if a sample cannot be read or decoded, naming its key, or an embedding is not
    finite.
    """
    samples = np.arange(index.num_samples) if samples is None else np.asarray(samples)
    if not len(samples):
        raise ValueError(f"got no samples of {index.path} to embed, wanted at least one")
    num_batches = -(-len(samples) // batch_size)
    parts = [part(num_batches, r, world_size()) for r in range(world_size())]
    mine = samples[parts[rank()].start * batch_size : parts[rank()].stop * batch_size]

    training = {module: module.training for module in backbone.modules()}
    backbone.eval()
    embeddings = torch.empty(0, device=device)
    try:
        with together(f"embedding {index.path}"):
            rows = []
            batches = images_in_order(index, mine, batch_size, workers) if len(mine) else []
            bar = tqdm(
                total=len(mine),
                desc=f"embedding {index.path.name}, this rank's part",
                unit=" images",
                mininterval=1,
                delay=2,
                disable=rank() > 0,
            )
            with bar:
                for batch in batches:
                    images = normalize(batch.images.to(device), mean, std)
                    embedding = backbone(images).float()
                    if flip:
                        embedding = embedding + backbone(images.flip(-1)).float()
                    rows.append(nn.functional.normalize(embedding))
                    bar.update(len(images))
            if rows:
                embeddings = torch.cat(rows)
                finite = embeddings.isfinite().all(dim=1)
                if not finite.all():
                    sample = mine[int(finite.long().argmin())]
                    raise ValueError(f"the embedding of sample {index.described(sample)} is not finite: {DIVERGED}")
    finally:
        for module, mode in training.items():
            module.training = mode
    return _gather_rows(embeddings, [_rows(p, batch_size, len(samples)) for p in parts])


def _rows(batches: range, batch_size: int, num_samples: int) -> int:
    return min(batches.stop * batch_size, num_samples) - min(batches.start * batch_size, num_samples)


def _gather_rows(ours: Tensor, rows: list[int]) -> Tensor:
    """In: this rank's (rows[rank], D). Out: (sum(rows), D), the ranks' rows in their order."""
    # Collectives want equal shapes, and a rank without rows does not know D.
    width = int(all_gather(torch.tensor([ours.shape[-1]], device=ours.device)).max().item())
    padded = ours.new_zeros(max(rows), width)
    if len(ours):
        padded[: len(ours)] = ours
    gathered = all_gather(padded)
    return torch.cat([gathered[r, :count] for r, count in enumerate(rows)])
