"""IResNet: the residual networks of ArcFace (arXiv 1801.07698) as InsightFace trains them.

Parameter names are ours. InsightFace's PyTorch checkpoints (arcface_torch) hold the same tensors, with the
same shapes and in the same order of `state_dict()`, under other names (left theirs, right ours):

    conv1, bn1, prelu                   features.conv, features.norm, features.act
    layer1.0.bn1, .conv1, .bn2          features.stage1.0.norm1, .conv1, .norm2
    layer1.0.prelu, .conv2, .bn3        features.stage1.0.act, .conv2, .norm3
    layer1.0.downsample.0, .1           features.stage1.0.shortcut.0, .1
    bn2                                 features.last_norm
    fc, features                        linear, norm
"""

from collections import OrderedDict

import torch
from torch import nn

from partial_fc.backbone.net import EmbeddingNet

BLOCKS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}
WIDTHS = (64, 128, 256, 512)


class Block(nn.Module):
    """The improved residual unit: BN, conv, BN, PReLU, conv with the stride, BN; nothing after the sum.

    (b, in_channels, h, w) -> (b, out_channels, h / stride, w / stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.act = nn.PReLU(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm2(self.conv1(self.norm1(x))))
        return self.norm3(self.conv2(y)) + self.shortcut(x)


def iresnet(name: str, embedding_dim: int, image_size: tuple[int, int]) -> EmbeddingNet:
    """The IResNet called `name`; InsightFace's default, without dropout before the linear layer.

    Batch norm sees a rank's own images: a run depends on the number of ranks, and a training batch needs two
    images or more.

    Initialization is InsightFace's: convolutions normal with standard deviation 0.1, the rest PyTorch's
    defaults (batch norm 1 and 0, PReLU 0.25). In eval mode an untrained net does not divide by its batch
    statistics and grows with depth: iresnet100 and iresnet200 overflow to NaN.
    """
    layers = OrderedDict(
        conv=nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(WIDTHS[0]),
        act=nn.PReLU(WIDTHS[0]),
    )
    before = WIDTHS[0]
    for stage, (width, blocks) in enumerate(zip(WIDTHS, BLOCKS[name], strict=True), start=1):
        first = Block(before, width, stride=2)
        layers[f"stage{stage}"] = nn.Sequential(first, *(Block(width, width, 1) for _ in range(blocks - 1)))
        before = width
    layers["last_norm"] = nn.BatchNorm2d(before)
    net = EmbeddingNet(nn.Sequential(layers), before, embedding_dim, image_size, batch_norm=True)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.1)
    return net
