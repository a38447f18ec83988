"""The kernels for CUDA devices against float64, on a device or by Triton's interpreter; then the head with them."""

import os
import subprocess
import sys

import pytest
import torch

from partial_fc import ArcFace, CosFace, MagFace, PartialFC
from partial_fc.head.matmul import rounded
from partial_fc.head.optimizers import SGD, Learned
from tests.conftest import REPOSITORY
from tests.dense import error

SIZES = [(300, 70, 96), (128, 256, 64), (5, 3, 7), (1, 1, 1), (0, 4, 8), (4, 0, 8)]  # c, B, D
# of a result over the largest: float32 sums, and results rounded to bfloat16
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 5e-3}


def check_exponentials(device: str, precision: str) -> None:
    from partial_fc.head import kernels

    for rows, samples, dim in SIZES:
        torch.manual_seed(0)
        weight, xs = torch.randn(rows, dim, device=device), 0.3 * torch.randn(samples, dim, device=device)
        inverse_norm, subtract = torch.rand(rows, device=device) + 0.5, torch.randn(samples, device=device)
        first = rows // 2
        column = torch.randint(-1, 2 * rows + 1, (samples,), device=device)
        operand = rounded(xs, precision)
        exact = rounded(weight, precision).double() @ operand.double().T * inverse_norm.double().unsqueeze(1)
        exact[torch.arange(first, first + rows, device=device).unsqueeze(1) == column] = -torch.inf
        for shift in (None, subtract):
            wanted = torch.exp2(exact if shift is None else exact - shift.double())
            out = torch.full((rows, samples), torch.nan, dtype=operand.dtype, device=device)
            at = (weight.to(operand.dtype), operand, inverse_norm, column, first)
            sums = kernels.exponentials(*at, out=out, subtract=shift, summed=True)
            alone = kernels.exponentials(*at, out=None, subtract=shift, summed=True)
            assert torch.equal(sums, alone)
            if wanted.numel():
                assert error(sums, wanted.sum(dim=0)) < TOLERANCE[torch.float32]
                assert error(out.double(), wanted * inverse_norm.double().unsqueeze(1)) < TOLERANCE[out.dtype]


def check_rows(device: str) -> None:
    """Catch-up, the targets' gradients, the update and the norms, of some rows of many."""
    from partial_fc.head import kernels

    for rows, samples, dim in [*SIZES[:3], (300, 8, 512), (9, 4, 2048)]:
        torch.manual_seed(0)
        weight, velocity = (torch.randn(rows + 40, dim, device=device) for _ in range(2))
        ids = torch.randperm(rows + 40, device=device)[:rows].sort().values
        missed = torch.randn(4, rows + 9, device=device)[:, 4 : 4 + rows]  # a chunk of more
        value, moved, norms = (
            torch.empty(rows, dim, device=device),
            torch.empty(rows, dim, device=device),
            missed[0] * 0,
        )
        kernels.take(Learned(weight, (velocity,)), ids, missed, value, moved, norms)
        a, b, c, d = missed.double().unsqueeze(2)
        w = a * weight[ids].double() + b * velocity[ids].double()
        v = c * weight[ids].double() + d * velocity[ids].double()
        assert error(value.double(), w) < 1e-6 and error(moved.double(), v) < 1e-6
        assert error(norms.double(), 1 / w.norm(dim=1)) < 1e-5

        gradient, by_center = torch.randn(rows, dim, device=device), torch.randn(samples, dim, device=device)
        first = 7
        column = torch.randint(-1, rows + 2 * first, (samples,), device=device)
        column[: samples // 2] = first + rows // 2  # many samples of one class
        wanted = torch.zeros(rows + 2 * first, dim, dtype=torch.float64, device=device)
        wanted[first : first + rows] = gradient.double()
        own = column >= 0
        wanted.index_add_(0, column[own], by_center.double()[own])
        kernels.add_targets(gradient, by_center, column.argsort(stable=True), column, first)
        assert error(gradient.double(), wanted[first : first + rows]) < 1e-6

        optimizer = SGD(momentum=0.9, weight_decay=5e-3)
        w, v, g, norms = value.double(), moved.double(), gradient.double(), 1 / value.norm(dim=1)
        v = 0.9 * v + g + (5e-3 - (g * w).sum(dim=1) * norms.double().square()).unsqueeze(1) * w
        kernels.sgd(optimizer, Learned(value, (moved,)), norms, gradient, 0.1)
        assert error(moved.double(), v) < 1e-5 and error(value.double(), w - 0.1 * v) < 1e-5
        again = torch.empty_like(norms)
        kernels.inverse_norms(value, again)
        assert torch.equal(again, norms), "a resumed head would round another way"
        assert error(norms.double(), 1 / value.double().norm(dim=1)) < 1e-5


def check_not_a_number(device: str) -> None:
    """A center or an embedding that is none makes a loss that is none: a step that is then skipped."""
    from partial_fc.head import kernels

    for payload in (0x7FFFFFFF, 0x7FC00000):  # the first is what a GPU's arithmetic gives
        nan = torch.tensor([payload], dtype=torch.int32, device=device).view(torch.float32)
        for broken in ("weight", "xs"):
            weight, xs = torch.randn(40, 32, device=device), torch.randn(6, 32, device=device)
            (weight if broken == "weight" else xs)[3, 5] = nan
            norms = torch.empty(40, device=device)
            kernels.inverse_norms(weight, norms)
            column = torch.full((6,), -1, device=device)
            sums = kernels.exponentials(weight, rounded(xs, "tf32"), norms, column, 0, out=None, summed=True)
            assert sums.isnan().all() if broken == "weight" else sums[3].isnan(), (payload, broken)


@pytest.mark.slow
def test_on_a_cpu_by_the_interpreter():
    pytest.importorskip("triton", reason="not run: no Triton here")
    # it has no products of bfloat16
    checks = "check_exponentials('cpu', 'tf32'); check_rows('cpu'); check_not_a_number('cpu')"
    command = [sys.executable, "-c", f"from tests.test_kernels import *; {checks}"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_exponentials(precision):
    check_exponentials("cuda", precision)


@pytest.mark.gpu
def test_rows():
    check_rows("cuda")


@pytest.mark.gpu
def test_not_a_number():
    check_not_a_number("cuda")


def train(compile: bool, margin, rate: float, **options) -> list[torch.Tensor]:
    """Losses and embedding gradients of five steps of two forwards each, and the centers."""
    options = dict(momentum=0.9, weight_decay=5e-3, device="cuda", chunk=600) | options
    head = PartialFC(5003, 96, margin, rate, compile=compile, **options)
    results = []
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(2, 40, 96, generator=generator).cuda()
        labels = torch.randint(50, (2, 40), generator=generator).cuda()  # each class many times
        head.begin_step(step, labels.flatten())
        for micro in range(2):
            embeddings = x[micro].requires_grad_()
            loss = head(embeddings, labels[micro])
            loss.backward()
            results += [loss.detach(), embeddings.grad]
        head.step(0.1)
    return [*results, head.full_weight()]


KINDS = {
    "bfloat16": (dict(matmul_precision="bfloat16"), 2e-2),
    "bfloat16, cached": (dict(matmul_precision="bfloat16", cache_bytes=1 << 20, cache_dtype=torch.bfloat16), 2e-2),
    "bfloat16, cached in float32": (dict(matmul_precision="bfloat16", cache_bytes=1 << 20), 2e-2),
    "tf32": (dict(matmul_precision="tf32"), 2e-3),
    "tf32, cached": (dict(matmul_precision="tf32", cache_bytes=1 << 20), 2e-3),
    "tf32, cached in bfloat16": (dict(matmul_precision="tf32", cache_bytes=1 << 20, cache_dtype=torch.bfloat16), 2e-2),
    "float32": ({}, 1e-4),
    # a small eps would make every difference between small gradients as large as an update
    "adamw": (dict(matmul_precision="tf32", optimizer="adamw", eps=1.0), 2e-3),
}
MARGINS = {
    "cosface": CosFace(scale=32),
    "arcface": ArcFace(scale=32),
    "magface": MagFace(),
    "cosface-unnormalized": CosFace(scale=None),
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [1.0, 0.2])
@pytest.mark.parametrize("margin", MARGINS)
def test_a_head_with_kernels_follows_one_without(margin, rate, kind):
    options, tolerance = KINDS[kind]
    for got, wanted in zip(
        *(train(compile, MARGINS[margin], rate, **options) for compile in (True, False)), strict=True
    ):
        assert error(got, wanted) < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("rate", [1.0, 0.2])
@pytest.mark.parametrize("precision", ["bfloat16", "tf32"])
def test_the_same_training_twice_is_the_same_bit_for_bit(precision, rate):
    once, twice = (train(True, CosFace(), rate, matmul_precision=precision) for _ in range(2))
    assert all(map(torch.equal, once, twice))
