"""Any model of timm as a backbone: backbone.name is timm/<model>."""

import torch

from partial_fc.backbone.net import EmbeddingNet
from partial_fc.environment import pip_install

PREFIX = "timm/"


def timm_model(name: str, embedding_dim: int, image_size: tuple[int, int]) -> EmbeddingNet:
    """timm's model `name`, untrained, without its classifier: its pooled features, a linear layer and batch norm.

    Models of a fixed image size, as ViTs are, are built for `image_size`. Initial values are timm's, drawn from torch's
    default generator, the linear layer's PyTorch's default.

    Raises ValueError where timm is not installed, does not know the name, or its model does not take such images, and
    for a tag of pretrained weights behind the name: they are not loaded.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"backbone.name {PREFIX}{name} needs timm, which cannot be imported ({error}): {pip_install('timm')}"
        ) from None
    if not timm.is_model(name):
        raise ValueError(
            f"backbone.name is {PREFIX}{name}; timm {timm.__version__} has no model {name!r}: see timm.list_models()"
        )
    model_name, dot, tag = name.partition(".")
    if dot:  # timm takes it, and without pretrained=True ignores it
        raise ValueError(
            f"backbone.name is {PREFIX}{name}: {tag!r} names pretrained weights, and backbones begin untrained; give "
            f"{PREFIX}{model_name}"
        )
    settings = timm.get_pretrained_cfg(name)
    sized = {"img_size": image_size} if settings is not None and settings.fixed_input_size else {}
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, **sized)
        channels = _features(model.eval(), image_size)
    except Exception as error:  # each family has its own: an IndexError of mvitv2_tiny at 112 x 112
        raise ValueError(
            f"backbone.name {PREFIX}{name} does not take images of {image_size[0]} x {image_size[1]} pixels "
            f"({type(error).__name__}: {error}): take another model, or prepare the data at another size"
        ) from error
    return _TimmNet(model.train(), channels, embedding_dim, image_size, batch_norm=True, last_map=(1, 1))


class _TimmNet(EmbeddingNet):
    def sync_batchnorm(self) -> None:
        """As the base's, with timm's own conversion: torch's drops the activation inside of a BatchNormAct2d."""
        from timm.layers import convert_sync_batchnorm

        self.features = convert_sync_batchnorm(self.features)
        self.norm = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.norm)


def _features(model: torch.nn.Module, image_size: tuple[int, int]) -> int:
    """The width of its output, by a forward: what timm's models say of it differs between families."""
    with torch.no_grad():
        shape = model(torch.zeros(1, 3, *image_size)).shape
    if len(shape) != 2:
        raise ValueError(f"its output is {tuple(shape)}, wanted (1, features)")
    return shape[1]
