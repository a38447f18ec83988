"""MobileFaceNet (arXiv 1804.07573, Table 1): a million parameters."""

import torch
from torch import nn

from partial_fc.backbone.net import STRIDE, EmbeddingNet

STEM = 64
# expansion t, width c, units n, stride s of the first
BOTTLENECKS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
LAST = 512


def conv(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution without bias, batch norm."""
    padding = kernel // 2
    return [nn.Conv2d(before, after, kernel, stride, padding, groups=groups, bias=False), nn.BatchNorm2d(after)]


class Bottleneck(nn.Module):
    """MobileNetV2's inverted residual (arXiv 1801.04381) with PReLU: 1x1 to `expanded` channels, 3x3 depthwise, 1x1.

    (b, before, h, w) -> (b, after, h / stride, w / stride); the input is added where the shapes are equal.
    """

    def __init__(self, before: int, expanded: int, after: int, stride: int):
        super().__init__()
        self.layers = nn.Sequential(
            *conv(before, expanded, 1),
            nn.PReLU(expanded),
            *conv(expanded, expanded, 3, stride, groups=expanded),
            nn.PReLU(expanded),
            *conv(expanded, after, 1),
        )
        self.adds = stride == 1 and before == after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


def mobilefacenet(embedding_dim: int, image_size: tuple[int, int]) -> EmbeddingNet:
    """Bottlenecks with PReLU, then a depthwise convolution as large as the last map in the place of average pooling.

    The paper has 112 x 112 images and 128 dimensions; InsightFace's "mbf" is twice as wide. Batch norm sees a rank's
    own images. The paper gives no initialization. Convolutions are normal with variance 2 / fan_out, as InsightFace's;
    the last linear layer is PyTorch's, where InsightFace's is normal with variance 2 / fan_out and has no bias.
    """
    layers = [*conv(3, STEM, 3, stride=2), nn.PReLU(STEM), *conv(STEM, STEM, 3, groups=STEM), nn.PReLU(STEM)]
    before = STEM
    for expansion, width, units, stride in BOTTLENECKS:
        for unit in range(units):
            layers.append(Bottleneck(before, expansion * before, width, stride if unit == 0 else 1))
            before = width
    layers += [*conv(before, LAST, 1), nn.PReLU(LAST)]
    last_map = (image_size[0] // STRIDE, image_size[1] // STRIDE)
    layers += [nn.Conv2d(LAST, LAST, last_map, groups=LAST, bias=False), nn.BatchNorm2d(LAST)]
    net = EmbeddingNet(nn.Sequential(*layers), LAST, embedding_dim, image_size, batch_norm=True, last_map=(1, 1))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net
