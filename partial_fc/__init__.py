"""Margin-softmax training with more classes than one device can hold."""

from partial_fc.head.margins import ArcFace, CosFace, Margin, NormSoftmax, Softmax
from partial_fc.head.partial_fc import PartialFC
from partial_fc.head.sampling import HardNegatives

__version__ = "0.1.0"

__all__ = ["ArcFace", "CosFace", "HardNegatives", "Margin", "NormSoftmax", "PartialFC", "Softmax"]
