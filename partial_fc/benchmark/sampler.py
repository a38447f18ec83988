"""partial-fc benchmark sampler: how much of the full softmax's negative mass a sampler's rows hold, in a trained run.

Shapes: B samples of a batch, C classes, S samplers.
"""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from partial_fc import backbone, checkpoint
from partial_fc.config import Config
from partial_fc.data.groups import build_order
from partial_fc.data.reader import image_size, loader, normalize
from partial_fc.data.sets import open_training_set
from partial_fc.data.shards import Index
from partial_fc.files import one_line
from partial_fc.head.margins import build_margin
from partial_fc.head.partial_fc import PartialFC
from partial_fc.head.sampling import HardNegatives, Sampler, nearest_classes, random_negatives
from partial_fc.head.targets import unit
from partial_fc.optim import build_optimizer
from partial_fc.parallel import distributed
from partial_fc.parallel.engine import DDPEngine
from partial_fc.storage import Place


@torch.no_grad()
def benchmark_sampler(
    path: Place,
    device: torch.device,
    *,
    random: list[float],
    hard: list[tuple[int, float]],
    batches: int = 10,
    trust_code: bool = False,
) -> list[dict]:
    """Measures random negatives at each rate of `random` and hard ones at each (neighbours, rate) of `hard`.

    path: a run, of which the newest checkpoint is taken, or one checkpoint, folders or URLs; nothing is written there.
    The batches are those that the run would see next, their backbone in training mode, their random negatives
    the run's own; the table of nearest classes is made from the centers as they are. Prints a table and returns its
    lines: mean `rows` in use, their `fraction` of all classes, the mean over samples of the `mass` that they hold, and
    how often the `hardest` negative is in use. With z_ij = exp(s cos_ij),

        mass_i = sum of z_ij over the negatives j in use / sum of z_ij over all negatives j

    Dense, in float64: (B, C) numbers exist a few times, 0.2 GB each at B = 256 and C = 1e5. One process. trust_code:
    import a margin that the run names as module.Class. Raises ValueError for a run whose logits are not s cos, and for
    samplers out of range.
    """
    choices = [(0, rate) for rate in random] + hard
    names = [f"random {rate:g}" for rate in random] + [f"hard {neighbours}:{rate:g}" for neighbours, rate in hard]
    _check(random, hard, batches)
    found, config, index = _open(path)
    head, net = _load(found, config, index, device, trust_code)
    centers = unit(head.full_weight().double())[0]
    order = build_order(config.data, index, config.run.seed)
    rows, mass, hardest = torch.zeros(3, len(choices), dtype=torch.float64, device=device)
    samples = 0
    with tqdm(total=batches, desc="nearest classes", unit=" batches", leave=False) as bar:
        samplers = _samplers(head, [neighbours for neighbours, _ in choices])
        bar.set_description("batches")
        for batch in loader(
            index,
            order,
            rank=0,
            world_size=1,
            seed=config.run.seed,
            start_step=found.step,
            stop_step=found.step + batches,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
            flip=config.data.flip,
            affine=config.data.affine,
        ):
            embeddings = net(normalize(batch.images.to(device), config.data.mean, config.data.std))
            logits = head.scale * unit(embeddings.double())[0] @ centers.T
            logits.scatter_(1, batch.labels.to(device).unsqueeze(1), -torch.inf)
            share = logits.softmax(dim=1)  # (B, C) of the negatives' mass: the target has none
            used = torch.stack(
                [
                    rows_in_use(head, sampler, rate, batch.step, batch.labels)
                    for sampler, (_, rate) in zip(samplers, choices, strict=True)
                ]
            ).to(device)  # (S, C)
            rows += used.sum(dim=1)
            mass += (share @ used.double().T).sum(dim=0)
            hardest += used[:, logits.argmax(dim=1)].sum(dim=1)
            samples += len(logits)
            bar.update()
    lines = [
        {
            "sampler": name,
            "rows": rows[i].item() / batches,
            "fraction": rows[i].item() / batches / index.num_classes,
            "mass": mass[i].item() / samples,
            "hardest": hardest[i].item() / samples,
        }
        for i, name in enumerate(names)
    ]
    print(f"{one_line(found.path)}: {index.num_classes:,} classes, {batches} batches of {order.global_batch_size}")
    print("mass: share of the full softmax's negative mass in use; hardest: how often the hardest negative is in use")
    width = max(map(len, names))
    print(f"{'':{width}}     rows  of all   mass  hardest")
    for line in lines:
        print(
            f"{line['sampler']:{width}} {line['rows']:8,.0f}  {line['fraction']:6.3f}  {line['mass']:5.3f}"
            f"  {line['hardest']:7.3f}"
        )
    return lines


def rows_in_use(head: PartialFC, sampler: Sampler, rate: float, step: int, labels: Tensor) -> Tensor:
    """(C,) bool: what a step with these labels (B,) has in use."""
    head.sample_rate = rate
    used = torch.zeros(head.num_classes, dtype=torch.bool)
    used[sampler(head, step, labels)] = True
    used[labels] = True
    return used


def _samplers(head: PartialFC, neighbours: list[int]) -> list[Sampler]:
    """Samplers with so many neighbours, 0 for random negatives; one search of the centers serves all of them."""
    table = None
    if any(neighbours):
        table = nearest_classes(head.centers, head.classes, head.num_classes, max(neighbours))
    samplers: list[Sampler] = []
    for count in neighbours:
        sampler = HardNegatives(count) if count else random_negatives
        if count:
            sampler.tables(head)["neighbours"].copy_(table[:, :count])
        samplers.append(sampler)
    return samplers


def _check(random: list[float], hard: list[tuple[int, float]], batches: int) -> None:
    if distributed.world_size() > 1:
        raise ValueError(
            f"benchmark sampler on {distributed.world_size()} ranks; it is one process: leave out torchrun"
        )
    if batches < 1:
        raise ValueError(f"--batches is {batches}; give a positive number")
    for rate in (*random, *(rate for _, rate in hard)):
        if not 0 < rate <= 1:
            raise ValueError(f"--random and --hard: got the rate {rate:g}; give a probability in (0, 1]")
    for neighbours, rate in hard:
        if neighbours < 1:
            raise ValueError(f"--hard: got {neighbours}:{rate:g}; give 1 neighbour or more, or the rate to --random")


def _open(path: Place) -> tuple[checkpoint.Checkpoint, Config, Index]:
    found = checkpoint.find_checkpoint(path)
    config = found.config()
    index = open_training_set(config.data)
    if found.classes() != index.classes() or index.num_classes < 2:
        raise ValueError(
            f"{found.path} was written with {len(found.classes())} classes, {index.path} has {index.num_classes} that "
            "are not the same, or there is one alone: give a run of two classes or more whose data is still there"
        )
    return found, config, index


def _load(
    found: checkpoint.Checkpoint, config: Config, index: Index, device: torch.device, trust_code: bool
) -> tuple[PartialFC, nn.Module]:
    """A checkpoint's head and its backbone, in training mode."""
    name, parameters = config.head.margin.name, config.head.margin.parameters
    margin = build_margin(name, parameters, trust_code=trust_code).at(found.step)
    other = margin.scale is None or margin.has_bias or not margin.normalize_centers
    if other or margin.changes_negatives:
        raise ValueError(
            f"{found.path} was trained with {margin}; wanted negatives s cos, each of one center and none filtered: "
            "give a run with cosface, arcface or normsoftmax and a scale"
        )
    net = backbone.build_seeded(
        config.backbone.name, config.backbone.embedding_dim, image_size(index), config.run.seed
    ).to(device)
    head = PartialFC(
        index.num_classes,
        config.backbone.embedding_dim,
        margin,
        optimizer=config.head.optim.name or config.optim.name,
        seed=config.run.seed,
        sampler=random_negatives,  # a head that samples gives single rows, whatever the run's own sample rate
        device=device,
    )
    checkpoint.load(found, head=head, engine=DDPEngine(net, build_optimizer(net, config.optim), device))
    return head, net
