"""What the figures read of a run folder: its checkpoints' backbones and class centers, and some of its images."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from partial_fc import backbone, checkpoint, storage
from partial_fc.checkpoint import Checkpoint
from partial_fc.config import Config
from partial_fc.data.reader import image_size, images_in_order, normalize
from partial_fc.data.sets import open_training_set
from partial_fc.data.shards import Index, load_index
from partial_fc.figures.cosines import ROWS, Counts, count_cosines, thinned
from partial_fc.seeds import seed_for
from partial_fc.storage import Place

BATCH = 256


def complete_checkpoints(run: Place) -> list[Checkpoint]:
    """All complete checkpoints of a run folder or URL, by step. Raises ValueError where there is none."""
    found = list(checkpoint.complete_checkpoints(run))
    if not found:
        raise ValueError(f"{run} holds no complete checkpoint; give the folder of a run that has saved one")
    return found[::-1]


def config_of(found: Checkpoint) -> Config:
    return found.config()


def load_net(found: Checkpoint) -> nn.Module:
    """A checkpoint's backbone, in evaluation mode."""
    config, size = config_of(found), found.image_size()
    net = backbone.build_seeded(config.backbone.name, config.backbone.embedding_dim, size, config.run.seed)
    checkpoint.load_backbone(net, found)
    return net.eval()


def load_centers(found: Checkpoint) -> tuple[Tensor, int]:
    """A checkpoint's class centers (k C, D), caught up, and k, its sub-centers a class."""
    centers = torch.cat(list(checkpoint.read_centers(found, found.manifest["num_classes"])))
    return (centers, 1) if centers.ndim == 2 else (centers.flatten(0, 1), centers.shape[1])


def run_cosines(run: Place, *, images: int = 1000, seed: int = 0) -> dict[int, Counts]:
    """Counts of cosines by step, of training images of a run with its class centers, for up to ROWS checkpoints.

    checkpoint.keep says how many of them a run leaves. Raises ValueError without checkpoints or training data.
    """
    found = complete_checkpoints(run)
    index = open_training_set(config_of(found[-1]).data)
    if index.classes() != found[-1].classes() or index.num_classes < 2:
        raise ValueError(f"{run} was trained on other classes than {index.path} has now, or on one: give its own data")
    samples = choose_samples(index, images, seed)
    labels = torch.from_numpy(index.label[samples])
    steps = thinned([one.step for one in found], ROWS)
    counts = {}
    shown = f"checkpoints of {storage.last_name(run)}"
    for one in tqdm([one for one in found if one.step in steps], desc=shown, mininterval=1, leave=False):
        embed = embedder(one)
        batches = [batch.images.numpy().transpose(0, 2, 3, 1) for batch in images_in_order(index, samples, BATCH, 0)]
        embeddings = torch.from_numpy(np.concatenate([embed(batch) for batch in batches]))
        counts[one.step] = count_cosines(embeddings, labels, *load_centers(one))
    return counts


def run_images(found: Checkpoint, count: int, seed: int = 0) -> np.ndarray:
    """Some images (n, H, W, 3) uint8 of a run's first evaluation set, or of its training data where it has none."""
    config = config_of(found)
    sets = list(config.evaluate.sets.values())
    index = load_index(sets[0].data) if sets else open_training_set(config.data)
    if image_size(index) != found.image_size():
        raise ValueError(f"{index.path} has images of {image_size(index)}, {found.path} was trained on other ones")
    batches = images_in_order(index, choose_samples(index, count, seed), BATCH, 0)
    return np.concatenate([batch.images.numpy().transpose(0, 2, 3, 1) for batch in batches])


def choose_samples(index: Index, count: int, seed: int) -> np.ndarray:
    """Ids (n,) of at most `count` samples, a function of the seed, ascending."""
    generator = np.random.Generator(np.random.Philox(seed_for("figures", seed)))
    return np.sort(generator.choice(index.num_samples, min(count, index.num_samples), replace=False))


def embedder(found: Checkpoint) -> Callable[[np.ndarray], np.ndarray]:
    """A checkpoint's backbone as a function: images (n, H, W, 3) uint8 to embeddings (n, D), not normalized."""
    net, config = load_net(found), config_of(found)

    @torch.no_grad()
    def embed(images: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).split(BATCH)
        return torch.cat([net(normalize(part, config.data.mean, config.data.std)) for part in parts]).float().numpy()

    return embed
