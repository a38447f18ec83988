"""Margin-softmax training with more classes than one device can hold."""

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
