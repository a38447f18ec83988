"""AdamW for class centers: torch's on the rows in use; rows that sat out stay. SGD is in test_partial_fc."""

import pytest
import torch

from partial_fc import CosFace, PartialFC
from tests.dense import MARGINS, Case, assert_equals_dense
from tests.pairwise import pairwise

ADAMW = dict(optimizer="adamw", hyper=dict(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1))


@pytest.mark.slow
@pairwise("dense", margin=MARGINS, rate=[1.0, 0.1], sizes=[(6,), (3, 1, 2)])
def test_adamw_equals_dense(margin, rate, sizes):
    assert_equals_dense(Case(margin, sample_rate=rate, sizes=sizes, steps=5, **ADAMW))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(num_classes=2, sizes=(1, 2, 2, 3)),
        dict(labels="duplicates", sizes=(5, 0, 2)),
        dict(forwards=3, loss_scale=8.0, loss_factor=0.5, auxiliary=True),
        dict(chunk=1000, sizes=(2, 5)),
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()),
)
def test_adamw_equals_dense_in_awkward_cases(changes):
    assert_equals_dense(Case("biased", sample_rate=0.3, **ADAMW, **changes))


def test_adamw_leaves_rows_that_sat_out_and_counts_the_heads_updates():
    head = PartialFC(40, 4, CosFace(), 0.2, optimizer="adamw", dtype=torch.float64)
    labels = torch.tensor([3, 17])
    for step in range(6):
        before = head.full_weight().clone()
        head.begin_step(step, labels)
        head(torch.randn(2, 4, dtype=torch.float64), labels).backward()
        used = head._used.ids
        if step == 3:
            head.skip_step()
            assert torch.equal(head.full_weight(), before)
            continue
        head.step(0.1)
        idle = torch.ones(40, dtype=torch.bool)
        idle[used] = False
        assert idle.any() and torch.equal(head.full_weight()[idle], before[idle])
        assert (head.full_weight()[used] != before[used]).any(dim=1).all()
    assert head.centers.updates == 5
    assert set(head.centers.state()) == {"weight", "exp_avg", "exp_avg_sq"}


def test_errors_name_what_to_do():
    for arguments, message in [
        (dict(optimizer="adam"), "optimizer is 'adam'; give 'sgd' or 'adamw'"),
        (dict(optimizer="adamw", betas=(0.9, 1.0)), r"betas, eps and weight_decay are \(0.9, 1.0\), 1e-08 and 0.0005"),
        (dict(optimizer="adamw", weight_decay=-1.0), "give two numbers in"),
        (dict(momentum=3), "momentum and weight_decay are 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            PartialFC(4, 4, **arguments)
