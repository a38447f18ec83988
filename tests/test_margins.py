"""Every margin: its derivative, its formula written out, its shape over the angle."""

import math

import pytest
import torch

from partial_fc import ArcFace, CosFace, Margin, NormSoftmax, Softmax
from tests.dense import MARGINS, naive_target_logit

ANGLES = torch.linspace(0, math.pi, 2001, dtype=torch.float64)


@pytest.mark.parametrize("margin", MARGINS)
def test_gradcheck(margin):
    cosine = torch.cos(ANGLES[50:-50:25]).requires_grad_()
    assert torch.autograd.gradcheck(MARGINS[margin].target, (cosine,))


@pytest.mark.parametrize("margin", [*MARGINS.values(), ArcFace(margin=3.0), ArcFace(margin=0.0)])
def test_decreases_in_the_angle(margin):
    psi = margin.target(torch.cos(ANGLES))
    assert (psi.diff() < 0).all()


@pytest.mark.parametrize("margin", MARGINS)
def test_equals_the_formula_of_the_paper(margin):
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(2, 200, 3, generator=generator, dtype=torch.float64)  # in 3-D: angles all over [0, pi]
    bias = torch.randn(200, generator=generator, dtype=torch.float64)
    margin = MARGINS[margin]
    for i in range(200):
        cosine = torch.nn.functional.cosine_similarity(x[i], w[i], dim=0)
        r = x[i].norm() if margin.scale is None else margin.scale
        n = 1 if margin.normalize_centers else w[i].norm()
        logit = r * n * margin.target(cosine) + (bias[i] if margin.has_bias else 0)
        torch.testing.assert_close(logit, naive_target_logit(margin, x[i], w[i], bias[i]), rtol=1e-12, atol=1e-12)


def test_arcface_gradient_is_the_true_one():
    cosine = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(64 * ArcFace(margin=0.5).target(cosine), cosine)
    assert derivative.item() == pytest.approx(73.88, abs=5e-3)  # straight-through would be 64


def test_arcface_is_smooth_where_it_is_continued():
    edge = math.pi - 0.5
    cosine = torch.cos(torch.tensor([edge - 1e-7, edge + 1e-7], dtype=torch.float64)).requires_grad_()
    psi = ArcFace(margin=0.5).target(cosine)
    (slope,) = torch.autograd.grad(psi.sum(), cosine)
    assert abs(psi[0] - psi[1]) < 1e-6
    assert slope.abs().max() < 1e-5  # d psi / d theta = -sin(phi) is 0 at phi = pi


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arcface_is_finite_at_the_ends(dtype):
    cosine = torch.tensor([1.0, -1.0], dtype=dtype, requires_grad=True)
    psi = ArcFace().target(cosine)
    (slope,) = torch.autograd.grad(psi.sum(), cosine)
    assert psi.isfinite().all() and slope.isfinite().all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CosFace(scale=0), "scale is 0; give a positive number, or None"),
        (lambda: NormSoftmax(scale=math.nan), "scale is nan"),
        (lambda: CosFace(margin=-0.1), "margin is -0.1"),
        (lambda: ArcFace(margin=3.2), r"margin is 3.2 rad; give one in \[0, pi\)"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_softmax_normalizes_nothing():
    assert Softmax().scale is None and not Softmax().normalize_centers and Softmax().has_bias
    assert Margin().normalize_centers and not Margin().has_bias
