"""Shapes, parameter counts, initialization and trainability of the backbones."""

import sys

import pytest
import torch
import torch.nn.functional as F

from partial_fc.backbone import BACKBONES, build, build_seeded
from partial_fc.backbone.iresnet import BLOCKS

TIMM = ("timm/vit_tiny_patch16_224", "timm/resnet10t")
NO_BATCH_STATISTICS = ("spherenet20", "resnet28", "smallnet")


def iresnet_count(blocks: tuple[int, ...], dim: int, height: int, width: int) -> int:
    """Parameters of an IResNet by hand; BN has 2 a channel, PReLU 1, convolutions no bias."""
    count = 3 * 64 * 9 + 2 * 64 + 64  # stem: conv, BN, PReLU
    before = 64
    for channels, repeats in zip((64, 128, 256, 512), blocks, strict=True):
        for entering in (before, *[channels] * (repeats - 1)):
            count += 2 * entering + 9 * entering * channels + 2 * channels + channels  # BN, conv, BN, PReLU
            count += 9 * channels * channels + 2 * channels  # conv, BN
        count += before * channels + 2 * channels  # shortcut of the first block: 1x1 conv, BN
        before = channels
    count += 2 * 512  # last BN
    return count + 512 * (height // 16) * (width // 16) * dim + dim + 2 * dim  # linear, BN


def spherenet20_count(dim: int, height: int, width: int) -> int:
    count, before = 0, 3
    for channels, units in ((64, 1), (128, 2), (256, 4), (512, 1)):
        count += 9 * before * channels + channels + channels  # strided conv, its bias, PReLU
        count += units * 2 * (9 * channels * channels + channels)  # residual units: twice conv and PReLU
        before = channels
    return count + 512 * (height // 16) * (width // 16) * dim + dim


def resnet28_count(dim: int, height: int, width: int) -> int:
    count, before = 0, 3
    for channels, units in ((32, 0), (64, 1), (128, 2), (256, 5), (512, 3)):
        count += 9 * before * channels + channels + channels  # conv, its bias, PReLU
        count += units * 2 * (9 * channels * channels + channels)  # residual units: twice conv and PReLU
        before = channels
    for _ in range(2):  # two convolutions of 3 and a pooling of 2, then one and one a stage
        height, width = height - 2, width - 2
    for more in (0, 2, 2, 2):
        height, width = (height - more) // 2, (width - more) // 2
    return count + 512 * height * width * dim + dim


def smallnet_count(dim: int, height: int, width: int) -> int:
    pairs = ((3, 32), (32, 64), (64, 128), (128, 128), (128, 256))
    count = sum(9 * i * o + 2 * o + o for i, o in pairs)  # conv, group norm, PReLU
    return count + 256 * (height // 16) * (width // 16) * dim + dim


def mobilefacenet_count(dim: int, height: int, width: int) -> int:
    """Table 1 of arXiv 1804.07573: t, c, n; BN has 2 a channel, PReLU 1, convolutions no bias."""
    count = 27 * 64 + 3 * 64 + 9 * 64 + 3 * 64  # conv and depthwise conv, each with BN and PReLU
    before = 64
    for expansion, channels, units in ((2, 64, 5), (4, 128, 1), (2, 128, 6), (4, 128, 1), (2, 128, 2)):
        for entering in (before, *[channels] * (units - 1)):
            inner = expansion * entering
            count += entering * inner + 3 * inner + 9 * inner + 3 * inner + inner * channels + 2 * channels
        before = channels
    count += before * 512 + 3 * 512  # 1x1 conv, BN, PReLU
    count += 512 * (height // 16) * (width // 16) + 2 * 512  # depthwise conv over the last map, BN
    return count + 512 * dim + dim + 2 * dim  # linear, BN


# Totals at 512 dimensions; 43.59M and 65.16M are the published sizes of iresnet50 and iresnet100.
TOTALS = {
    "iresnet18": ((112, 112), 24_025_600),
    "iresnet34": ((112, 112), 34_139_328),
    "iresnet50": ((112, 112), 43_590_848),
    "iresnet100": ((112, 112), 65_156_160),
    "iresnet200": ((112, 112), 118_833_920),
    "spherenet20": ((112, 96), 22_666_944),
    "resnet28": ((112, 96), 27_536_800),
    "smallnet": ((64, 64), 2_634_880),
    "mobilefacenet": ((112, 112), 1_201_024),
}


@pytest.mark.parametrize("name", TOTALS)
def test_parameter_count_is_the_hand_count_and_the_published_one(name):
    size, total = TOTALS[name]
    by_name = {
        "spherenet20": spherenet20_count,
        "resnet28": resnet28_count,
        "smallnet": smallnet_count,
        "mobilefacenet": mobilefacenet_count,
    }
    formula = by_name.get(name)
    by_hand = formula(512, *size) if formula else iresnet_count(BLOCKS[name], 512, *size)
    with torch.device("meta"):
        net = build(name, 512, size)
    assert sum(p.numel() for p in net.parameters()) == by_hand == total


def test_every_backbone_is_counted():
    assert set(TOTALS) == set(BACKBONES)


def images(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(count))


def test_mobilefacenet_is_as_large_as_published():
    """The paper says 0.99 million, at 128 dimensions: weights are 0.976, with BN and PReLU of all layers 1.003."""
    with torch.device("meta"):
        net = build("mobilefacenet", 128, (112, 112))
    assert sum(p.numel() for p in net.parameters()) == mobilefacenet_count(128, 112, 112) == 1_003_264
    assert sum(p.numel() for p in net.parameters() if p.ndim > 1) == 976_000
    shapes = []
    net = build("mobilefacenet", 128, (112, 112))
    for module in net.features:
        module.register_forward_hook(lambda module, _, out: shapes.append(tuple(out.shape[1:])))
    with torch.no_grad():
        net(images(2, 112, 112))
    table = [(64, 56, 56), (64, 28, 28), (128, 14, 14), (128, 7, 7), (512, 7, 7), (512, 1, 1)]
    assert list(dict.fromkeys(shapes)) == table


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm_models_by_name(name):
    """At 112 pixels, whatever timm's default is; the same for a seed, whatever torch drew before."""
    first = build_seeded(name, 16, (112, 112), seed=3)
    torch.rand(5)
    before = torch.random.get_rng_state()
    again, other = (build_seeded(name, 16, (112, 112), seed) for seed in (3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert not torch.equal(first.linear.weight, other.linear.weight)
    assert any(
        not torch.equal(a, b) for a, b in zip(first.features.parameters(), other.features.parameters(), strict=True)
    )
    embeddings = first(images(4, 112, 112))
    assert embeddings.shape == (4, 16) and first.training and first.features.training
    (embeddings * torch.randn(4, 16)).sum().backward()
    assert [k for k, p in first.named_parameters() if p.grad is None] == ["norm.weight"]
    assert torch.equal(first.eval()(images(1, 112, 112)), first(images(1, 112, 112)))
    with pytest.raises(ValueError, match=r"got images of shape \(2, 3, 96, 112\), wanted \(b, 3, 112, 112\)"):
        first(images(2, 96, 112))


def test_a_vit_sees_the_whole_image():
    net = build("timm/vit_tiny_patch16_224", 16, (112, 96))
    assert net.features.patch_embed.grid_size == (7, 6) and net.features.pos_embed.shape[1] == 7 * 6 + 1


def test_timm_errors_say_what_to_do(monkeypatch):
    with pytest.raises(ValueError, match="backbone.name is timm/vit_teeny; timm .* has no model 'vit_teeny'"):
        build("timm/vit_teeny", 8, (112, 112))
    with pytest.raises(ValueError, match="timm/vit_tiny_patch16_224 does not take images of 8 x 8 pixels"):
        build("timm/vit_tiny_patch16_224", 8, (8, 8))
    monkeypatch.setattr("timm.models.mvitv2.trunc_normal_tf_", lambda *_, **__: None)  # 3 s
    with pytest.raises(ValueError, match="timm/mvitv2_tiny does not take images of 112 x 112 pixels .IndexError"):
        build("timm/mvitv2_tiny", 8, (112, 112))
    for tag in ("c3_in1k", "none_such"):
        with pytest.raises(ValueError, match=f"'{tag}' names pretrained weights.*; give timm/resnet10t$"):
            build(f"timm/resnet10t.{tag}", 8, (112, 112))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm/resnet10t needs timm, .*: pip install 'timm>=1"):
        build("timm/resnet10t", 8, (112, 112))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in BACKBONES if name not in ("iresnet100", "iresnet200")]
)  # deeper alone
def test_every_parameter_receives_a_gradient(name):
    torch.manual_seed(0)
    size = (64, 48) if name == "resnet28" else (48, 32)
    net = build(name, 8, size)
    embeddings = net(images(4, *size))
    assert embeddings.shape == (4, 8) and embeddings.dtype == torch.float32
    (embeddings * torch.randn(4, 8)).sum().backward()
    fixed = [key for key, p in net.named_parameters() if not p.requires_grad]
    normed = name in BLOCKS or name == "mobilefacenet"
    assert fixed == (["norm.weight"] if normed else [])
    for key, p in net.named_parameters():
        if key in fixed:
            assert p.grad is None and (p == 1).all()
        else:
            assert p.grad is not None and p.grad.isfinite().all(), key
            # a batch norm takes out the mean, so the bias just before it has a gradient of 0
            assert p.grad.any() or (key == "linear.bias" and normed), key


@pytest.mark.slow
def test_iresnet200_embeds():
    net = build("iresnet200", 8, (32, 32))
    with torch.no_grad():
        embeddings = net(images(2))
    assert embeddings.shape == (2, 8) and embeddings.isfinite().all()


@pytest.mark.parametrize("name", ["iresnet18", *NO_BATCH_STATISTICS])
def test_the_seed_of_the_default_generator_fixes_the_parameters(name):
    def state(seed):
        torch.manual_seed(seed)
        return build(name, 8, (48, 48)).state_dict()

    first, again, other = state(1), state(1), state(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["linear.weight"], other["linear.weight"])


def test_iresnet_convolutions_start_with_standard_deviation_one_tenth():
    torch.manual_seed(0)
    net = build("iresnet18", 8, (32, 32))
    weights = torch.cat([m.weight.flatten() for m in net.modules() if isinstance(m, torch.nn.Conv2d)])
    # over 11 million draws the standard deviation is known to 0.0001
    assert abs(weights.std().item() - 0.1) < 1e-4 and abs(weights.mean().item()) < 2e-4


def test_spherenet_starts_as_published():
    torch.manual_seed(0)
    net = build("spherenet20", 512, (112, 96))
    residual = net.features[-1].conv1
    strided = net.features[-3]  # 512 filters over 256 channels
    assert residual.bias is None and abs(residual.weight.std().item() - 0.01) < 1e-4
    for layer, fan_in in ((strided, 9 * 256), (net.linear, 512 * 7 * 6)):
        bound = (3 / fan_in) ** 0.5
        assert 0.999 * bound < layer.weight.abs().max().item() <= bound * (1 + 1e-6)
        assert not layer.bias.any()


def test_resnet28_starts_as_published():
    torch.manual_seed(0)
    net = build("resnet28", 512, (112, 96))
    shapes = []
    for module in net.features:
        module.register_forward_hook(
            lambda module, _, out: shapes.append((type(module).__name__, tuple(out.shape[1:])))
        )
    with torch.no_grad():
        net(images(1, 112, 96))
    pools = [shape for name, shape in shapes if name == "MaxPool2d"]
    assert pools == [(64, 54, 46), (128, 26, 22), (256, 12, 10), (512, 5, 4)]  # as Caffe rounds them too
    assert [name for name, _ in shapes].count("Residual") == 11
    residual, conv = net.features[-1].conv2, net.features[-6]  # 512 filters over 256 channels
    assert residual.bias is None and abs(residual.weight.std().item() - 0.01) < 1e-4
    for layer, fan_in in ((conv, 9 * 256), (net.linear, 512 * 5 * 4)):
        bound = (3 / fan_in) ** 0.5
        assert 0.999 * bound < layer.weight.abs().max().item() <= bound * (1 + 1e-6)
        assert not layer.bias.any()


@pytest.mark.parametrize("name", NO_BATCH_STATISTICS)
def test_an_embedding_does_not_depend_on_the_rest_of_the_batch(name):
    torch.manual_seed(0)
    net = build(name, 8, (48, 48)).double()
    batch = images(5, 48, 48).double()
    together = net(batch)
    torch.testing.assert_close(together[3:4], net(batch[3:4]), rtol=1e-12, atol=1e-12)
    batch[0] += 100
    torch.testing.assert_close(together[3], net(batch)[3], rtol=1e-12, atol=1e-12)
    assert together.dtype == torch.float64  # never narrowed: partitioned is compared to dense in float64


@pytest.mark.parametrize("name", NO_BATCH_STATISTICS)
def test_an_empty_batch_gives_no_rows_and_zero_gradients(name):
    net = build(name, 8, (48, 48))
    embeddings = net(torch.zeros(0, 3, 48, 48))
    assert embeddings.shape == (0, 8)
    embeddings.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("name", ["iresnet18", *NO_BATCH_STATISTICS])
def test_embeddings_are_not_rounded_under_autocast(name):
    net = build(name, 8, (48, 48))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = net(images(4, 48, 48))
    assert embeddings.dtype == torch.float32
    assert not torch.equal(embeddings, embeddings.bfloat16().float())


@pytest.mark.slow
def test_smallnet_trains_at_a_high_rate_without_warmup():
    """20 smooth random patterns under noise and shifts; additive cosine margin 0.2 at scale 32."""
    torch.manual_seed(0)
    classes, chance = 20, 2.996 + 32 * 0.2  # at equal cosines: log(20) plus about the margin
    patterns = F.interpolate(torch.randn(classes, 3, 6, 6), (32, 32), mode="bilinear")
    net = build("smallnet", 32, (32, 32))
    centers = torch.nn.Parameter(torch.randn(classes, 32) * 0.1)
    optimizer = torch.optim.SGD([*net.parameters(), centers], lr=0.1, momentum=0.9)
    losses = []
    for _ in range(60):
        labels = torch.randint(classes, (32,))
        shift = torch.randint(-3, 4, (2,)).tolist()
        batch = patterns[labels].roll(shift, (2, 3)) + 0.3 * torch.randn(32, 3, 32, 32)
        cosines = F.normalize(net(batch)) @ F.normalize(centers).T
        loss = F.cross_entropy(32 * (cosines - 0.2 * F.one_hot(labels, classes)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.8 * chance
    assert sum(losses[-10:]) / 10 < 0.2 * chance


def test_errors_name_the_setting_and_what_is_wanted():
    with pytest.raises(ValueError, match="backbone.name is 'iresnet51'.*did you mean 'iresnet50'"):
        build("iresnet51", 8, (32, 32))
    with pytest.raises(ValueError, match="embedding_dim is 0, wanted at least 1"):
        build("smallnet", 0, (32, 32))
    with pytest.raises(ValueError, match="100 x 112 pixels, wanted .* multiples of 16.* example 96 x 112"):
        build("smallnet", 8, (100, 112))
    with pytest.raises(ValueError, match="0 x 32 pixels.* example 16 x 32"):
        build("smallnet", 8, (0, 32))
    with pytest.raises(ValueError, match="32 x 64 pixels, wanted at least 48 a side for resnet28"):
        build("resnet28", 8, (32, 64))
    # 30 pixels leave a 2 x 2 map as 32 do, so nothing else would notice
    with pytest.raises(ValueError, match=r"got images of shape \(2, 3, 30, 32\), wanted \(b, 3, 32, 32\)"):
        build("smallnet", 8, (32, 32))(images(2, 30, 32))


@pytest.mark.parametrize("name", ["timm/regnetx_002", "iresnet18"])
def test_synchronized_batch_norms_keep_what_is_inside_them(name):
    """timm's BatchNormAct2d holds an activation. In evaluation mode the converted net runs on a CPU."""
    net = build_seeded(name, 8, (112, 112), seed=1).eval()
    x = torch.randn(2, 3, 112, 112)
    with torch.inference_mode():
        before = net(x)
        net.sync_batchnorm()
        torch.testing.assert_close(net.eval()(x), before)
    norms = [module for module in net.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(module, torch.nn.SyncBatchNorm) for module in norms)
