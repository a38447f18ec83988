"""Products of the head: oneDNN's and torch's agree; low precision is no worse than the naive low precision."""

import pytest
import torch
from torch import nn

from partial_fc import CosFace, PartialFC
from partial_fc.head.matmul import matmul_nt
from tests.dense import error


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (3, 5, 7), (64, 129, 33), (256, 2048, 128), (5, 0, 3), (0, 4, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product(m, n, k, transposed, dtype):
    a = torch.randn(k, m, dtype=dtype).T if transposed[0] else torch.randn(m, k, dtype=dtype)
    b = torch.randn(k, n, dtype=dtype).T if transposed[1] else torch.randn(n, k, dtype=dtype)
    got, wanted = matmul_nt(a, b), a.double() @ b.double().T
    assert got.shape == (m, n) and got.dtype == dtype
    if got.numel():
        assert (got - wanted).abs().max() < {torch.float32: 1e-6, torch.float64: 1e-14}[dtype] * 8 * k**0.5


def test_bf16_rounds_operands_and_nothing_else():
    a, b = torch.randn(20, 300), torch.randn(30, 300)
    wanted = a.bfloat16().double() @ b.bfloat16().double().T
    assert (matmul_nt(a, b, "bfloat16") - wanted).abs().max() < 1e-4
    assert (matmul_nt(a, b) - wanted).abs().max() > 1e-2


def low_precision(precision: str, device: str, compile: bool = False) -> None:
    """Loss and both gradients against float64: errors of the head's at most the naive computation's."""
    scale, margin, num_classes, dim, batch = 32.0, 0.35, 2000, 128, 64
    ours, naive = [], []
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(batch, dim, device=device)
        labels = torch.randint(num_classes, (batch,), device=device)
        options = dict(momentum=0.0, weight_decay=0.0, seed=seed, device=device)
        options |= dict(matmul_precision=precision, compile=compile, chunk=900)
        head = PartialFC(num_classes, dim, CosFace(scale=scale, margin=margin), **options)
        weight = head.full_weight().clone()

        def dense(dtype, autocast, x=x, weight=weight, labels=labels):
            x, w = (tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, weight))
            with autocast:
                cosine = nn.functional.normalize(x) @ nn.functional.normalize(w).T
            logits = scale * (cosine.to(dtype) - margin * nn.functional.one_hot(labels, num_classes))
            loss = nn.functional.cross_entropy(logits, labels)
            loss.backward()
            return loss.detach(), x.grad, w.grad

        exact = dense(torch.float64, torch.autocast(device, enabled=False))
        if precision == "tf32":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        low = dense(torch.float32, torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"))
        if precision == "tf32":
            torch.backends.cuda.matmul.fp32_precision = "none"
        embeddings = x.clone().requires_grad_()
        loss = head(embeddings, labels)
        loss.backward()
        head.step(2.0**20)
        moved = (weight.double() - head.full_weight().double()) / 2.0**20
        for errors, results in ((ours, (loss.detach(), embeddings.grad, moved)), (naive, low)):
            errors.append([error(got.double(), wanted) for got, wanted in zip(results, exact, strict=True)])
    ours, naive = torch.tensor(ours).mean(dim=0), torch.tensor(naive).mean(dim=0)
    assert (ours <= naive).all(), (ours, naive)
    assert ours[1] > 1e-5  # it is low precision


def test_bf16_is_no_worse_than_naive_bf16():
    low_precision("bfloat16", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("precision", ["bfloat16", "tf32"])
def test_low_precision_on_cuda_is_no_worse_than_naive(precision, compile):
    low_precision(precision, "cuda", compile)


def test_errors_name_what_to_do():
    for arguments, message in [
        (dict(matmul_precision="fp16"), "matmul_precision is 'fp16'; give 'float32', 'tf32' or 'bfloat16'"),
        (dict(matmul_precision="bfloat16", dtype=torch.float64), "is for a float32 head; this one is torch.float64"),
        (dict(matmul_precision="tf32"), "is something that CUDA devices do; this head is on cpu: give 'float32'"),
    ]:
        with pytest.raises(ValueError, match=message):
            PartialFC(4, 4, **arguments)
