"""The loss of a forward whose gradient exists already, and what that forward leaves for the update."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from partial_fc.head.elementwise import Negatives
from partial_fc.head.softmax import Kept, Places


@dataclass
class Forward:
    """What one training forward leaves for `step`: small, (B, D) at most."""

    xs: Tensor  # (B, D) what multiplied the rows
    places: Places  # of the targets among the rows in use
    real: Tensor  # (B,) bool: not padding
    log_z: Tensor  # (B,) float64
    by_center: Tensor  # (B, D) each sample's derivative of its own loss by its center; zeros if another rank's
    by_bias: Tensor  # (B,) likewise, by the center's bias
    negatives: Negatives | None
    batch: tuple[Tensor, Tensor, Tensor] | None  # what feature centers move by: embeddings (B, D), labels, real (B,)
    cached: list[Kept] = field(default_factory=list)  # the first chunks
    by_scale: Tensor | None = None  # () float64: the derivative of the loss by a learned scale
    grad: Tensor | None = None  # () the gradient that reached the loss
    ready: torch.cuda.Event | None = None  # when it is there


class _AttachGradient(torch.autograd.Function):
    """Makes a loss whose backward hands the embeddings a gradient that exists already, and notes what reached it.

    In: embeddings (b, D), their gradient (b, D). Out: loss (). Backward sends gradient * (what reached the loss).
    """

    @staticmethod
    def forward(ctx, embeddings, anchor, loss, gradient, kept):
        ctx.save_for_backward(gradient)
        ctx.kept, ctx.dtype = kept, embeddings.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.kept.grad is not None:
            raise RuntimeError(
                "second backward of the same PartialFC forward: the centers' gradient would count it once; "
                "call head(...) again for another backward"
            )
        ctx.kept.grad = grad.detach().clone()
        if grad.is_cuda:
            ctx.kept.ready = torch.cuda.current_stream(grad.device).record_event()
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(ctx.dtype), None, None, None, None


def attach(embeddings: Tensor, loss: Tensor, gradient: Tensor, kept: Forward) -> Tensor:
    """The loss (); its backward gives the embeddings (b, D) the `gradient` (b, D), once."""
    # without an input that requires a gradient (a frozen backbone) backward would never reach the head
    anchor = torch.zeros((), requires_grad=True)
    return _AttachGradient.apply(embeddings, anchor, loss, gradient, kept)
