"""The margins that a figure compares: from the words of a config, with labels, and as a function of the angle alone.

A margin may look at more than the cosine. The figures show it at typical values, which `TYPICAL` says in words.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
import torch
from torch import Tensor

from partial_fc.head.margin import Margin, Sample
from partial_fc.head.margins import build_margin

LENGTHS = (30.0, 10.0)  # mean and deviation of |x| in the batches that typical statistics come of
LATE = 10**9  # a step at which what is annealed has come to rest
TYPICAL = (
    f"|x| = {LENGTHS[0]:g} with deviation {LENGTHS[1]:g}, |w| = 1, annealing at its end, running statistics settled, "
    "random margins at their mean"
)


@dataclass(frozen=True)
class Named:
    """A margin and what the figures call it."""

    label: str
    margin: Margin


def parse_margins(text: str) -> list[Named]:
    """ "cosface:margin=0.35,scale=30;arcface;softmax" to margins, by the names and parameters of a config.

    Raises ValueError, naming what there is, for an unknown name, parameter or value.
    """
    built = []
    for part in filter(None, map(str.strip, text.split(";"))):
        name, _, rest = part.partition(":")
        given = {}
        for setting in filter(None, map(str.strip, rest.split(","))):
            parameter, equals, value = setting.partition("=")
            if not equals:
                raise ValueError(f"--margins: got {setting!r} in {part!r}; wanted parameter=value, as margin=0.35")
            given[parameter.strip()] = _value(value.strip())
        name = name.strip() if "." in name else name.strip().lower()
        built.append((build_margin(name, given, trust_code=True), given))  # whoever starts the program names it
    if not built:
        raise ValueError("--margins: got no margin; give one or more, as cosface:margin=0.35;arcface;softmax")
    return _named(built)


def _value(text: str) -> str | bool | None:
    return {"true": True, "false": False, "none": None, "null": None}.get(text.lower(), text)


def _named(built: Sequence[tuple[Margin, dict]]) -> list[Named]:
    """Labels: the class and its margin, then what was given; the scale only where labels would else be equal."""
    short = [_label(margin, [name for name in given if name != "scale"]) for margin, given in built]
    twice = {label for label, count in Counter(short).items() if count > 1}
    return [
        Named(_label(margin, [*given, "scale"]) if label in twice else label, margin)
        for label, (margin, given) in zip(short, built, strict=True)
    ]


def _label(margin: Margin, parameters: Sequence[str]) -> str:
    has = [field.name for field in fields(margin)]
    shown = dict.fromkeys([*(["margin"] if "margin" in has else []), *(name for name in parameters if name in has)])
    short = {"margin": "m", "scale": "s", "lambda_min": "λmin", "lambda_max": "λmax"}
    parts = [f"{short.get(name, name)} = {_number(getattr(margin, name))}" for name in shown]
    return " ".join([type(margin).__name__, ", ".join(parts)]).strip()


def _number(value: object) -> str:
    if value is None:
        return "|x|"
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value).lower()


def psi(margin: Margin, angle: np.ndarray, *, length: float = LENGTHS[0], normal: float = 0.0) -> np.ndarray:
    """What of the target's logit takes the place of cos(theta): angles (n,) in rad to (n,), float64.

    That is the target's logit by r n, with a margin of the logit itself divided by them. length: |x|. normal: what
    a random margin draws, in deviations.
    """
    cosine = torch.from_numpy(np.cos(angle))
    sample = sample_at(cosine, torch.full_like(cosine, length), typical_statistics(margin), LATE, normal)
    with torch.no_grad():
        value = margin.target_of(sample).numpy()
    return value - margin.shift() / (length if margin.scale is None else margin.scale)


def band(margin: Margin, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest psi (n,) for |x| within two deviations and draws within one: equal where neither counts."""
    mean, deviation = LENGTHS
    around = [psi(margin, angle, length=mean + k * deviation) for k in (-2, 0, 2)]
    around += [psi(margin, angle, normal=k) for k in (-1, 1)]
    if margin.scale is None and margin.shift():  # a margin of the logit shrinks beside |x|: no property of psi
        around = [psi(margin, angle)]
    return np.min(around, axis=0), np.max(around, axis=0)


def sample_at(cosine: Tensor, length: Tensor, statistics: dict[str, Tensor], step: int, normal: float) -> Sample:
    """What a margin sees of samples (n,) float64, all of them real, at this step."""
    return Sample(
        cosine=cosine,
        length=length,
        real=torch.ones_like(cosine, dtype=torch.bool),
        step=step,
        statistics=statistics,
        normal=lambda: torch.full_like(cosine, normal),
    )


@cache
def typical_statistics(margin: Margin) -> dict[str, Tensor]:
    """The margin's running statistics after batches of |x| as `LENGTHS` says and cosines from 0.5 to 0.9."""
    statistics = {name: torch.tensor(value, dtype=torch.float64) for name, value in margin.first_statistics().items()}
    if not statistics:
        return {}
    share = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
    lengths = LENGTHS[0] + LENGTHS[1] * math.sqrt(2) * torch.erfinv(2 * share - 1)
    cosine = 0.5 + 0.4 * share
    for _ in range(2000):  # at a weight of 0.01 a batch what it started from is gone
        seen = margin.observe(sample_at(cosine, lengths.clamp_min(1.0), statistics, LATE, 0.0))
        statistics = statistics | seen
    return statistics
