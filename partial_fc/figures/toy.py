"""Small networks trained on Fashion-MNIST with the real head, for the pictures of features: seconds on a core.

Shapes: n images, D embedding size, C classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from partial_fc.figures import EPOCHS
from partial_fc.figures.cosines import Counts, count_cosines
from partial_fc.figures.margins import Named
from partial_fc.head.margin import Margin
from partial_fc.head.partial_fc import PartialFC
from partial_fc.seeds import seed_for

BATCH = 128
IMAGES = 24_000
LR = 0.1
MOMENTS = (0.0, 0.02, 0.06, 0.2, 0.5, 1.0)  # parts of the training at which cosines are counted
WATCHED = 2000  # images whose cosines are


@dataclass(frozen=True)
class Images:
    """Images of `names` classes: (n, 1, 28, 28) float32 around 0 and labels (n,) int64, to train on and to look at."""

    names: tuple[str, ...]
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Toy:
    """A trained network: embeddings (n, D) of the test images, centers (C, D), and cosines on the way, by step."""

    margin: Margin
    net: nn.Module
    embeddings: np.ndarray
    centers: np.ndarray
    cosines: dict[int, Counts]


def choose(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    names: Sequence[str],
    leave_out: Sequence[str] = (),
) -> Images:
    """The images (n, 28, 28) uint8 with labels (n,) of all classes but `leave_out`, which are numbered anew."""
    kept = [number for number, name in enumerate(names) if name not in leave_out]
    renumbered = np.full(len(names), -1)
    renumbered[kept] = range(len(kept))
    parts = []
    for images, labels in (train, test):
        chosen = np.flatnonzero(renumbered[labels] >= 0)[:IMAGES]
        parts += [as_input(images[chosen]), torch.from_numpy(renumbered[labels[chosen]])]
    return Images(tuple(names[number] for number in kept), *parts)


def as_input(images: np.ndarray) -> Tensor:
    """(n, 28, 28) uint8 to (n, 1, 28, 28) float32, by the mean and deviation of Fashion-MNIST's pixels."""
    return (torch.from_numpy(images.astype(np.float32)) - 73).div(90).unsqueeze(1)


def toy_net(embedding_dim: int, seed: int) -> nn.Module:
    """Three strided convolutions and two linear layers: (b, 1, 28, 28) to (b, D). Its start is a function of seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for("toy", seed))
        layers: list[nn.Module] = []
        before = 1
        for width in (16, 32, 64):
            conv = nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.PReLU(width)]
            before = width
        layers += [nn.Flatten(), nn.Linear(64 * 16, 64), nn.BatchNorm1d(64), nn.PReLU(64), nn.Linear(64, embedding_dim)]
        return nn.Sequential(*layers)


def train_toy(images: Images, named: Named, embedding_dim: int, *, seed: int = 0, epochs: int = EPOCHS) -> Toy:
    """Trains a network from scratch with this margin: SGD with momentum, a warm-up and a cosine schedule.

    The same seed gives the same bits on the same machine. Raises ValueError where the loss is not finite.
    """
    if named.margin.sub_centers > 1:
        raise ValueError(f"{named.label}: the pictures of small networks show one center a class; leave it out of them")
    net = toy_net(embedding_dim, seed)
    head = PartialFC(len(images.names), embedding_dim, margin=named.margin, seed=seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(seed_for("toy order", seed))
    batch = min(BATCH, len(images.train))
    per_epoch = len(images.train) // batch
    steps = epochs * per_epoch
    moments = {round(share * steps) for share in MOMENTS}
    watched, watched_labels = images.train[:WATCHED], images.train_labels[:WATCHED]
    cosines: dict[int, Counts] = {}

    def count(step: int) -> None:
        cosines[step] = count_cosines(embed_toy(net, watched), watched_labels, head.full_weight())

    count(0)
    order = torch.empty(0)
    for step in tqdm(
        range(steps), desc=f"training {named.label} in {embedding_dim}-D", unit=" steps", mininterval=1, leave=False
    ):
        if step % per_epoch == 0:
            order = torch.randperm(len(images.train), generator=generator)
        chosen = order[step % per_epoch * batch :][:batch]
        lr = LR * min(1.0, (step + 1) / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = head(net(images.train[chosen]), images.train_labels[chosen])
        if not loss.isfinite():
            raise ValueError(f"{named.label}: the loss is {loss.item()} at step {step}; give a smaller scale or margin")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        head.step(lr)
        optimizer.step()
        if step + 1 in moments:
            count(step + 1)
    embeddings = embed_toy(net, images.test)
    return Toy(named.margin, net, embeddings.numpy(), head.full_weight().numpy(), cosines)


@torch.no_grad()
def embed_toy(net: nn.Module, images: Tensor) -> Tensor:
    """Embeddings (n, D), not normalized; the network is in evaluation mode meanwhile."""
    training = net.training
    net.eval()
    embeddings = torch.cat([net(part) for part in images.split(1000)])
    net.train(training)
    return embeddings
