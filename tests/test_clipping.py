"""Clipping by one norm over backbone and class centers: equal to torch's clip_grad_norm_ on a dense float64 process."""

from dataclasses import replace

import pytest
import torch

from tests.dense import Case, assert_equals_dense, make_head
from tests.pairwise import pairwise

CASES = {
    "cosface": Case("cosface"),
    "bias": Case("softmax"),
    "adamw": Case("arcface", optimizer="adamw", hyper=dict(weight_decay=5e-3)),
    "micro-batches": Case("cosface", forwards=3),
    "loss scale": Case("cosface", loss_scale=1024.0),
    "cached": Case("cosface", head=dict(cache_bytes=600, cache_dtype=torch.float64)),
    "learned scale": Case("learned-scale"),
    "ranks without classes": Case("cosface", num_classes=3),
}


@pytest.mark.slow
@pairwise("dense", kind=CASES, rate=[1.0, 0.4], sizes=[(6,), (3, 4), (4, 1, 2), (2, 2, 1, 3)])
def test_joint_clipping_equals_dense(kind, rate, sizes):
    assert_equals_dense(replace(CASES[kind], sample_rate=rate, sizes=sizes, clip=0.05))


@pytest.mark.slow
def test_a_norm_below_the_largest_changes_nothing():
    assert_equals_dense(Case("cosface", sizes=(3, 4), clip=1e6))


def test_gradient_norm_leaves_the_step_alone():
    """The pass over the rows reads: the update after it is the same bit for bit, with a cache in bfloat16 too."""
    results = []
    for ask in (False, True):
        head = make_head(Case("softmax", sample_rate=0.5, dtype=torch.float32, head=dict(cache_bytes=10_000)))
        for step in range(3):
            x, labels = Case("softmax").data(step, 0)
            head(x[:, :5].float().requires_grad_(), labels).backward()
            norms = [head.gradient_norm().item() for _ in range(2)] if ask else [1.0, 1.0]
            assert norms[0] == norms[1] > 0
            head.step(0.1)
        results.append(head.full_weight())
    assert torch.equal(*results)


def test_a_norm_wants_a_backward():
    head = make_head(Case("cosface"))
    with pytest.raises(RuntimeError, match="gradient_norm without a training forward"):
        head.gradient_norm()
