"""partial-fc figures: which figures there are, what each is drawn of, and the page that shows them."""

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from partial_fc.figures import (
    EPOCHS,
    NAMES,
    boundaries,
    checkpoints,
    cosines,
    features,
    gradient,
    psi,
    quality,
    verification,
)
from partial_fc.figures.margins import TYPICAL, Named, parse_margins
from partial_fc.figures.style import save, styled
from partial_fc.figures.toy import Images, Toy, as_input, choose, embed_toy, train_toy
from partial_fc.folders import make_folder
from partial_fc.head.margin import Margin
from partial_fc.prepare.fashion_mnist import CLASSES, fetch_fashion_mnist, load_fashion_mnist
from partial_fc.report.runs import load_run
from partial_fc.storage import Place, last_name

SPREAD = "the median angle between an embedding and its own class center"
ALIKE = ("coat", "shirt")  # left out in the plane: nearly pullovers and T-shirts, and eight directions are enough


class NothingToDraw(Exception):
    """What a figure needs was not given."""


@dataclass
class Sources:
    """What figures are drawn of. Networks are trained when the first figure asks for them, and once."""

    chosen: list[Named] | None
    runs: list[Place]
    folder: Path | None
    seed: int
    epochs: int
    trained: dict[tuple[Margin, int], Toy] = field(default_factory=dict)
    failure: Exception | None = None  # of Fashion-MNIST

    def margins(self, default: str) -> list[Named]:
        return self.chosen or parse_margins(default)

    @cached_property
    def fashion_mnist(self) -> tuple:
        if self.failure is not None:  # a fetch that fails may take minutes: once is enough
            raise self.failure
        try:
            folder = fetch_fashion_mnist() if self.folder is None else self.folder
            return load_fashion_mnist(folder, "train"), load_fashion_mnist(folder, "t10k")
        except (ValueError, OSError, RuntimeError) as error:
            self.failure = error
            raise

    @cached_property
    def ten_classes(self) -> Images:
        return choose(*self.fashion_mnist, CLASSES)

    @cached_property
    def eight_classes(self) -> Images:
        return choose(*self.fashion_mnist, CLASSES, leave_out=ALIKE)

    def toys(self, default: str, dim: int) -> list[tuple[str, Toy]]:
        images = self.eight_classes if dim == 2 else self.ten_classes
        for named in self.margins(default):
            if (named.margin, dim) not in self.trained:
                toy = train_toy(images, named, dim, seed=self.seed, epochs=self.epochs)
                self.trained[named.margin, dim] = toy
        return [(named.label, self.trained[named.margin, dim]) for named in self.margins(default)]


def draw_figures(
    out: Path,
    *,
    only: Sequence[str] | None = None,
    margins: str | None = None,
    runs: Sequence[Place] = (),
    fashion_mnist: Path | None = None,
    seed: int = 0,
    epochs: int = EPOCHS,
    format: str = "png",
) -> dict[str, Path]:
    """Draws the figures named in `only` (None: all of them) into `out`; index.html there shows them.

    margins: as `parse_margins` reads them; None: each figure's own. runs: run folders, for what is drawn of runs;
    without one gradients and cosines are drawn of small networks, and ROC and CMC are left out. fashion_mnist: the
    folder of its files; None: fetched. epochs: of the small networks. Returns the figures' files, by name.

    Raises ValueError for an unknown figure or margin, before anything is drawn; and, after all others are, for figures
    that could not be drawn, with the reason.
    """
    names = list(dict.fromkeys(NAMES if only is None else only))
    for name in names:
        if name not in NAMES:
            raise ValueError(f"--only: no figure is called {name!r}; there are {', '.join(NAMES)}")
    if epochs < 1:
        raise ValueError(f"--epochs is {epochs}; give a positive number")
    sources = Sources(None if margins is None else parse_margins(margins), list(runs), fashion_mnist, seed, epochs)
    make_folder(out, "folder for the figures")
    drawn: dict[str, tuple[Path, str]] = {}
    failed = []
    with styled():
        for name in tqdm(names, desc="figures", unit=" figures"):
            path = out / f"{name}.{format}"
            try:
                figure, sentence = FIGURES[name](sources)
            except NothingToDraw as error:
                tqdm.write(f"{name}: left out: {error}")
                failed += [f"{name}: {error}"] if only is not None else []
                continue
            except (ValueError, OSError, RuntimeError) as error:
                tqdm.write(f"{name}: not drawn: {error}")
                failed.append(f"{name}: {error}")
                continue
            save(figure, path)
            drawn[name] = path, sentence
            tqdm.write(f"{path}: {sentence}")
    (out / "index.html").write_text(_page(drawn), encoding="utf-8")
    if failed:
        raise ValueError(f"not drawn: {'; '.join(failed)}")
    return {name: path for name, (path, _) in drawn.items()}


def _psi(sources: Sources) -> tuple[Figure, str]:
    figure = psi.draw_psi(sources.margins(psi.DEFAULT))
    return figure, (
        f"The target's logit over the angle to the own class center (AM-Softmax, Fig. 2), at {TYPICAL}. Shaded: |x| "
        "two deviations less or more, random margins one."
    )


def _boundaries(sources: Sources) -> tuple[Figure, str]:
    margins = sources.margins(boundaries.DEFAULT)
    sentence = (
        "Angles to the centers of two classes: where the loss takes a sample for class 1, for class 2, and the margin "
        f"between (CosFace and ArcFace), at {TYPICAL}. What a margin does to negatives is not drawn."
    )
    if not all(one.margin.normalize_centers for one in margins):
        sentence += " Dashed: class 1's boundary with one center 1.25 times as long as the other."
    return boundaries.draw_boundaries(margins), sentence


def _circle(sources: Sources) -> tuple[Figure, str]:
    return boundaries.draw_circle(sources.margins(boundaries.CIRCLE_DEFAULT)), (
        "Two centers 90° apart, the part of the circle that each class may have, and the margin between (AM-Softmax, "
        "Figs. 1 and 3)."
    )


def _plane(sources: Sources) -> tuple[Figure, str]:
    toys, images = sources.toys(features.DEFAULT, 2), sources.eight_classes
    return features.draw_plane(toys, images.test_labels.numpy(), images.names), (
        "Test images of eight classes of Fashion-MNIST in two dimensions: features, and how many point where (square "
        f"roots), with the class centers as lines (CosFace). Below: {SPREAD}. Left out: {' and '.join(ALIKE)}."
        f"{_scales(toy.margin for _, toy in toys)}"
    )


def _sphere(sources: Sources) -> tuple[Figure, str]:
    toys, images = sources.toys(features.SPHERE_DEFAULT, 3), sources.ten_classes
    return features.draw_sphere(toys, images.test_labels.numpy(), images.names), (
        "Directions of Fashion-MNIST's test images in three dimensions, seen from both sides, with the class centers "
        f"circled (AM-Softmax, Fig. 5). Below: {SPREAD}. Spheres are turned to lie alike."
        f"{_scales(toy.margin for _, toy in toys)}"
    )


def _gradient(sources: Sources) -> tuple[Figure, str]:
    margins = sources.margins(gradient.DEFAULT)
    figure = gradient.draw_gradient(margins, seed=sources.seed)
    return figure, (
        "The gradient that an embedding receives, over its length, for a sample at two angles to its center among "
        f"{gradient.CLASSES:,} random centers in {gradient.DIM} dimensions: normalized, it falls as 1/|x| "
        f"(after AM-Softmax, Fig. 4).{_scales(one.margin for one in margins)}"
    )


def _quality(sources: Sources) -> tuple[Figure, str]:
    if sources.runs:
        found = [checkpoints.complete_checkpoints(run)[-1] for run in sources.runs]
        images = [checkpoints.run_images(one, quality.IMAGES, sources.seed) for one in found]
        measured = [
            (last_name(run), quality.lengths_by_quality(checkpoints.embedder(one), some))
            for run, one, some in zip(sources.runs, found, images, strict=True)
        ]
        examples, whose = images[0], "of the runs' evaluation images"
    else:
        toys, examples = sources.toys(quality.DEFAULT, cosines.DIM), sources.fashion_mnist[1][0][: quality.IMAGES]
        measured = [(label, quality.lengths_by_quality(_embed(toy), examples)) for label, toy in toys]
        whose = "of Fashion-MNIST's test images"
    return quality.draw_quality(measured, examples), (
        f"Length of the embeddings {whose} at less and less resolution: median and quartiles (after L2-softmax)."
    )


def _embed(toy: Toy) -> Callable[[np.ndarray], np.ndarray]:
    return lambda images: embed_toy(toy.net, as_input(images)).numpy()


def _roc(sources: Sources) -> tuple[Figure, str]:
    runs = [load_run(run) for run in sources.runs]
    if not any(map(verification.trained, runs)):
        raise NothingToDraw("it needs the folder of a run that was evaluated: --runs RUN")
    rows = verification.curves_of(runs)
    sentence = "Verification (ROC) and identification (CMC) from evaluation.json (AM-Softmax, Fig. 6)."
    missing = [run.name for run in runs if not verification.trained(run)]
    if missing:
        sentence += f" Not evaluated: {', '.join(missing)}."
    several = len(runs) - len(missing) > 1
    pairs = {title: {(one["num_genuine"], one["num_impostor"]) for _, one in curves} for title, curves in rows.items()}
    different = [title for title, found in pairs.items() if len(found) > 1]
    if several and different:
        sentence += f" The runs were evaluated on different data, so compare none of {', '.join(different)}."
    return verification.draw_verification(rows), sentence


def _cosines(sources: Sources) -> tuple[Figure, str]:
    if sources.runs:
        trainings = [(last_name(run), checkpoints.run_cosines(run, seed=sources.seed)) for run in sources.runs]
        whose = "checkpoints that the runs have left (checkpoint.keep says how many)."
    else:
        toys = sources.toys(cosines.DEFAULT, cosines.DIM)
        trainings = [(label, toy.cosines) for label, toy in toys]
        whose = f"small networks trained on Fashion-MNIST in {cosines.DIM} dimensions"
        whose += "." + _scales(toy.margin for _, toy in toys)
    return cosines.draw_cosines(trainings), f"Cosines of training images with class centers, over steps: {whose}"


def _scales(margins: Iterable[Margin]) -> str:
    """A sentence, or nothing where no margin has a scale."""
    scales = sorted({margin.scale for margin in margins if margin.scale is not None})
    return f" s = {', '.join(f'{scale:g}' for scale in scales)}." if scales else ""


FIGURES: dict[str, Callable[[Sources], tuple[Figure, str]]] = {
    "psi": _psi,
    "boundaries": _boundaries,
    "circle": _circle,
    "toy": _plane,
    "sphere": _sphere,
    "gradient": _gradient,
    "quality": _quality,
    "cosines": _cosines,
    "roc": _roc,
}


def _page(drawn: dict[str, tuple[Path, str]]) -> str:
    shown = "\n".join(
        f'<figure id="{name}"><img src="{html.escape(path.name)}" alt="{name}" width="800">\n'
        f"<figcaption>{html.escape(sentence)}</figcaption></figure>"
        for name, (path, sentence) in drawn.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Figures</title>\n'
        "<style>body { background: #fdfdfc; color: #1c1e21; font: 16px/1.5 system-ui, sans-serif; max-width: 800px;"
        " margin: 2rem auto; padding: 0 1rem } figure { margin: 0 0 3rem } img { max-width: 100%; height: auto }"
        " figcaption { color: #666b73 }</style></head>\n"
        f"<body>\n{shown}\n</body></html>\n"
    )
