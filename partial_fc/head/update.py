"""PartialFC's update: the class centers of this rank, chunk by chunk, from what the forwards of a step left.

`head` is the PartialFC whose half this is.
"""

import torch
from torch import Tensor

from partial_fc.head import softmax
from partial_fc.head.attach import Forward
from partial_fc.head.optimizers import Learned
from partial_fc.head.softmax import LOG2_E
from partial_fc.parallel import distributed


def update(head, lr: float, grad_scale: float | Tensor) -> None:
    """In place, of the rows in use, feature centers and a learned scale; see PartialFC.step."""
    used, centers = head._used, head._centers
    optimizer = centers.optimizer
    rates = optimizer.rates(lr, centers.updates + 1)
    passes = [_pass(head, kept, grad_scale) for kept in head._forwards]
    for number, selected in enumerate(head._way.chunks(used.count)):
        rows = centers.take(used, selected, head._buffers, moments=True)
        gradient, bias_gradient = softmax.row_gradients(rows, number, passes, head._way, head._buffers)
        if centers.kernels is None:
            softmax.update_rows(optimizer, rows, gradient, bias_gradient, rates, head._way)
        else:
            centers.kernels.sgd(optimizer, rows.weight, rows.inverse_norm, gradient, *rates)
        centers.put(used, selected, rows)
    if head.feature_centers is not None:
        batches = [kept.batch for kept in head._forwards]
        head.feature_centers.update(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    if head.margin.learn_scale:
        _update_scale(head, lr, grad_scale)
    centers.end_update(used, lr)


def gradient_norm(head, grad_scale: float | Tensor) -> Tensor:
    """See PartialFC.gradient_norm."""
    used = head._used
    passes = [_pass(head, kept, grad_scale) for kept in head._forwards]
    total = torch.zeros((), dtype=torch.float64, device=head.device)
    for number, selected in enumerate(head._way.chunks(used.count)):
        rows = head._centers.take(used, selected, head._buffers, moments=False)
        gradient, bias_gradient = softmax.row_gradients(rows, number, passes, head._way, head._buffers)
        if rows.inverse_norm is not None:  # what is along w has still to be taken out
            along = torch.linalg.vecdot(gradient, rows.weight.value) * rows.inverse_norm * rows.inverse_norm
            gradient.addcmul_(rows.weight.value, along.unsqueeze(1), value=-1)
        total += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        if bias_gradient is not None:
            total += torch.linalg.vector_norm(bias_gradient, dtype=torch.float64).square()
    total = distributed.all_reduce_sum(total)
    if head.margin.learn_scale:  # equal on all ranks
        total = total + _scale_gradient(head, grad_scale).square()
    return total.sqrt()


def _scale_gradient(head, grad_scale: float | Tensor) -> Tensor:
    return sum(kept.grad / grad_scale * kept.by_scale for kept in head._forwards)


def _update_scale(head, lr: float, grad_scale: float | Tensor) -> None:
    """The optimizer's step on the learned scale, which stays at least 1."""
    optimizer = head._scale_optimizer
    names = ["scale", *(f"scale_{moment}" for moment in optimizer.moments)]
    scale, *moments = (head.statistics[name].clone() for name in names)
    gradient = _scale_gradient(head, grad_scale)
    optimizer.update(Learned(scale, tuple(moments)), gradient, *optimizer.rates(lr, head._centers.updates + 1))
    head.statistics = head.statistics | dict(zip(names, (scale.clamp_min(1), *moments), strict=True))


def _pass(head, kept: Forward, grad_scale: float | Tensor) -> softmax.Pass:
    """What one forward contributes to the update: the mean over its real samples, times what reached its loss."""
    each = kept.grad / grad_scale / kept.real.sum().clamp_min(1)
    coefficient = torch.where(kept.real, each, 0).to(head.dtype)
    return softmax.Pass(
        kept.xs,
        coefficient,
        kept.log_z * LOG2_E,
        kept.places,
        kept.by_center * coefficient.unsqueeze(1),
        kept.by_bias * coefficient,
        kept.cached,
        kept.negatives,
    )
