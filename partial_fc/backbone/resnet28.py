"""ResNet-28: the 28-layer network that the authors of center loss published with their code (Wen et al., ECCV 2016)."""

from torch import nn

from partial_fc.backbone.net import EmbeddingNet
from partial_fc.backbone.spherenet import Residual, caffe_xavier

# widths of a stage's convolutions without padding, residual units; 5 + 2 * 11 convolutions and the linear layer
STAGES = (((32, 64), 1), ((128,), 2), ((256,), 5), ((512,), 3))
SMALLEST = 48  # pixels a side


def resnet28(embedding_dim: int, image_size: tuple[int, int]) -> EmbeddingNet:
    """Convolutions without padding, PReLU and max pooling, then residual units; no batch statistics.

    They train 112 x 96 images (H x W) to 512 dimensions. The last map is (H / 16 - 2, W / 16 - 2). Initialization
    follows their face_train_test.prototxt: Caffe's xavier, and a standard deviation of 0.01 in the residual units.

    Raises ValueError for images below 48 pixels a side.
    """
    height, width = image_size
    if min(image_size) < SMALLEST:
        raise ValueError(
            f"the images are {height} x {width} pixels, wanted at least {SMALLEST} a side for resnet28: prepare the "
            "data at another size, or take another backbone.name"
        )
    layers: list[nn.Module] = []
    before = 3
    for widths, units in STAGES:
        for after in widths:
            conv = nn.Conv2d(before, after, 3)
            caffe_xavier(conv)
            layers += [conv, nn.PReLU(after)]
            before = after
        layers += [nn.MaxPool2d(2), *(Residual(before) for _ in range(units))]
    last_map = (height // 16 - 2, width // 16 - 2)
    net = EmbeddingNet(nn.Sequential(*layers), before, embedding_dim, image_size, last_map=last_map)
    caffe_xavier(net.linear)
    return net
