"""Margin-softmax training with more classes than one device can hold.

A name's module is imported when the name is first used. So `import partial_fc` takes no time, and a rank can call
`partial_fc.parallel.process` before torch is imported, which takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for mypy and editors
    from partial_fc.export.model import load_backbone, load_image
    from partial_fc.head.embedding_losses import CenterLoss, ContrastiveLoss, EmbeddingLoss, TripletLoss
    from partial_fc.head.margin import Margin, WarmUp
    from partial_fc.head.margins import (
        AdaFace,
        ArcFace,
        CombinedMargin,
        CosFace,
        CurricularFace,
        ElasticArcFace,
        ElasticCosFace,
        L2Softmax,
        LSoftmax,
        MagFace,
        NormSoftmax,
        SoftMarginSoftmax,
        Softmax,
        SphereFace,
        SubCenterArcFace,
    )
    from partial_fc.head.partial_fc import PartialFC
    from partial_fc.head.sampling import HardNegatives

__version__ = "0.1.0"

__all__ = [
    "AdaFace",
    "ArcFace",
    "CenterLoss",
    "CombinedMargin",
    "ContrastiveLoss",
    "CosFace",
    "CurricularFace",
    "ElasticArcFace",
    "ElasticCosFace",
    "EmbeddingLoss",
    "HardNegatives",
    "L2Softmax",
    "LSoftmax",
    "MagFace",
    "Margin",
    "NormSoftmax",
    "PartialFC",
    "SoftMarginSoftmax",
    "Softmax",
    "SphereFace",
    "SubCenterArcFace",
    "TripletLoss",
    "WarmUp",
    "load_backbone",
    "load_image",
]

_MODULES = {
    "export.model": ("load_backbone", "load_image"),
    "head.embedding_losses": ("CenterLoss", "ContrastiveLoss", "EmbeddingLoss", "TripletLoss"),
    "head.margin": ("Margin", "WarmUp"),
    "head.partial_fc": ("PartialFC",),
    "head.sampling": ("HardNegatives",),
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = next((module for module, names in _MODULES.items() if name in names), "head.margins")
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
