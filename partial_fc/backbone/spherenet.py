"""SphereFace-20: the 20-layer network of SphereFace (arXiv 1704.08063, Table 2)."""

import torch
from torch import nn

from partial_fc.backbone.net import EmbeddingNet

STAGES = ((64, 1), (128, 2), (256, 4), (512, 1))  # width, residual units; 4 + 2 * 8 convolutions


class Residual(nn.Module):
    """x + PReLU(conv(PReLU(conv(x)))), (b, width, h, w) -> the same shape, no norm.

    No bias: the authors' prototxt sets it to 0 with a learning rate of 0. Weights start at a standard
    deviation of 0.01, so that a unit is nearly the identity.
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.act1 = nn.PReLU(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.act2 = nn.PReLU(width)
        for conv in (self.conv1, self.conv2):
            nn.init.normal_(conv.weight, std=0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.act2(self.conv2(self.act1(self.conv1(x))))


def spherenet20(embedding_dim: int, image_size: tuple[int, int]) -> EmbeddingNet:
    """Four stages of a strided convolution, PReLU and residual units; no batch statistics.

    The paper trains 112 x 96 images (H x W) to 512 dimensions. Initialization follows the authors' prototxt
    (sphereface_model.prototxt): Caffe's xavier, uniform within sqrt(3 / fan_in), for the strided convolutions
    and the linear layer, their biases 0.
    """
    layers: list[nn.Module] = []
    before = 3
    for width, units in STAGES:
        strided = nn.Conv2d(before, width, 3, stride=2, padding=1)
        caffe_xavier(strided)
        layers += [strided, nn.PReLU(width), *(Residual(width) for _ in range(units))]
        before = width
    net = EmbeddingNet(nn.Sequential(*layers), before, embedding_dim, image_size)
    caffe_xavier(net.linear)
    return net


def caffe_xavier(layer: nn.Conv2d | nn.Linear) -> None:
    """Caffe's default: uniform within sqrt(3 / fan_in), the bias 0."""
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")  # gain 1: the bound is sqrt(3 / fan_in)
    nn.init.zeros_(layer.bias)
