"""The frame that every backbone shares: convolutions, a flatten, a linear layer to the embedding.

Shapes: b images of a rank, 3 x H x W pixels, D = embedding_dim.
"""

from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

STRIDE = 16  # every backbone of ours halves its feature map four times


class Segment:
    """Layers in turn. No module: their parameters would have two names."""

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def segments(features: nn.Sequential) -> list[Segment]:
    """The layers of nested Sequentials, cut before everything that holds a convolution: a layer or a residual unit."""

    def flat(module: nn.Module) -> list[nn.Module]:
        return [leaf for child in module for leaf in flat(child)] if isinstance(module, nn.Sequential) else [module]

    found: list[Segment] = []
    for layer in flat(features):
        if not found or any(isinstance(part, nn.Conv2d) for part in layer.modules()):
            found.append(Segment([]))
        found[-1].layers.append(layer)
    return found


class EmbeddingNet(nn.Module):
    """Images (b, 3, H, W) -> embeddings (b, D), float32 or wider and not normalized.

    `features` maps the images to (b, channels, *last_map), (H / 16, W / 16) unless given. `batch_norm` adds the
    batch norm that ArcFace ends in; its weight stays 1, as in InsightFace: a scale per column would tilt the
    angles that the margin is measured in.

    Raises ValueError for images of another size than the net was built for: padding would let some through
    (100 pixels leave a 7 x 7 map, like 112) with meaningless embeddings.
    """

    def __init__(
        self,
        features: nn.Module,
        channels: int,
        embedding_dim: int,
        image_size: tuple[int, int],
        batch_norm: bool = False,
        last_map: tuple[int, int] | None = None,
    ):
        super().__init__()
        height, width = image_size
        self.image_size = (height, width)
        self.embedding_dim = embedding_dim
        self.features = features
        rows, columns = last_map or (height // STRIDE, width // STRIDE)
        self.linear = nn.Linear(channels * rows * columns, embedding_dim)
        self.norm = nn.BatchNorm1d(embedding_dim) if batch_norm else nn.Identity()
        if batch_norm:
            self.norm.weight.requires_grad = False
        self._segments: list[Segment] | None = None

    def checkpoint_activations(self) -> None:
        """From here on a training forward keeps the inputs of the blocks alone; backward computes the rest again.

        Recomputing a batch norm moves its running statistics once more: put them back after each backward.
        """
        if hasattr(self.features, "set_grad_checkpointing"):  # timm's own
            self.features.set_grad_checkpointing(True)
        else:
            self._segments = segments(self.features)

    def sync_batchnorm(self) -> None:
        """Batch norms see the batches of all ranks from here on; the parameters stay the same. For CUDA devices."""
        for name, child in self.named_children():
            setattr(self, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[1:] != (3, *self.image_size):
            raise ValueError(
                f"got images of shape {tuple(images.shape)}, wanted (b, 3, {self.image_size[0]}, "
                f"{self.image_size[1]}): resize the images or build the backbone with their size"
            )
        if self._segments is not None and torch.is_grad_enabled():
            features = images
            for segment in self._segments:
                features = checkpoint(segment, features, use_reentrant=False)
        else:
            features = self.features(images)
        features = features.flatten(1)
        # Under autocast the embedding would be rounded to bfloat16's 8 bits, and the margin acts on small
        # differences between cosines: the last layers run in the precision of their parameters.
        device = features.device.type
        available = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if available else nullcontext():
            embeddings = self.norm(self.linear(features.to(self.linear.weight.dtype)))
        return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
