"""PartialFC's forward: this rank's part of the softmax, joined with the others', and the embedding gradient.

Shapes: B gathered rows with padding, D embedding size. `head` is the PartialFC whose half this is.
"""

import math

import torch
from torch import Tensor

from partial_fc.head import draws, elementwise, embedding_losses, exchange, softmax
from partial_fc.head.attach import Forward
from partial_fc.head.centers import InUse
from partial_fc.head.elementwise import Negatives
from partial_fc.head.margin import Sample
from partial_fc.head.observed import Observed
from partial_fc.head.softmax import LARGEST, LARGEST_INVERSE, LOG2_E
from partial_fc.head.targets import Target, find_targets, regularized, target_gradients, unit
from partial_fc.parallel import distributed


def _columns(head, x: Tensor, labels: Tensor, used: InUse) -> Tensor:
    """The row of each target (B,) among the rows in use; -1 where it is not: another rank's, or padding.

    With sub-centers the nearest of the class.
    """
    local = (labels - head.classes.start) * head.sub_centers
    owned = (labels >= head.classes.start) & (labels < head.classes.stop)
    if used.count == 0:
        return torch.full_like(labels, -1)
    if used.ids is not None:
        row = torch.searchsorted(used.ids, local).clamp_max(used.count - 1)
        owned &= used.ids[row] == local  # begin_step may not have been given this label
        local = row
    if head.sub_centers > 1:
        rows = torch.where(owned, local, 0).unsqueeze(1) + torch.arange(head.sub_centers, device=head.device)
        weight, _ = head._centers.rows_at(used, rows.flatten())
        w_hat = unit(weight.double(), elementwise.SHORTEST)[0].view(*rows.shape, x.shape[1])
        local = local + torch.linalg.vecdot(w_hat, unit(x.double())[0].unsqueeze(1)).argmax(dim=1)
    return torch.where(owned, local, -1)


def _bounded(head) -> bool:
    """Whether 2^logit and its sum stay inside the dtype, and the cache's, without a maximum."""
    margin = head.margin
    if margin.scale is None or margin.learn_scale or margin.has_bias or not margin.normalize_centers:
        return False
    # |logit| <= s: that holds as long as s + ln C is small enough, and for 2^logit / |w| as long as s + ln(1e8) is
    room = max(math.log(head.num_classes), -math.log(elementwise.SHORTEST))
    largest = min(LARGEST[head.dtype], head._cache.largest)
    return margin.scale * margin.largest_negative + room <= largest


def forward(
    head, x: Tensor, labels: Tensor, used: InUse, training: bool
) -> tuple[Tensor, Tensor | None, Forward | None]:
    """Loss (), this rank's embedding gradient (padded_size, D) and what `step` needs."""
    margin, scale, bounded = head.margin, head.scale, _bounded(head)
    real = labels != exchange.PADDING
    count = real.sum().clamp_min(1)
    key = (head.seed, head.step_count, len(head._forwards))
    raw, shares, by_shares, dropped = x, None, None, None
    if head._terms:
        size = len(x) // distributed.world_size()
        own = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
        shares, by_shares = embedding_losses.evaluate(head._terms, x, labels, real, own, training)
    if training and head.dropout:
        dropped = draws.dropout(head.dropout, head.embedding_dim, x.dtype, *key, real)
        x = x * dropped
    column = _columns(head, x, labels, used)
    target = targets_of(head, x, used, column)
    length = target.x_length.squeeze(1)
    places = softmax.Places.of(column, head._way.chunk, head.sub_centers)

    def seen(cosine: Tensor) -> tuple[Sample, Tensor]:
        """What the margin looks at, and its f; a training batch goes into the running statistics first."""
        sample = Sample(cosine, length, real, key[1], head.statistics, lambda: draws.standard_normal(*key, real))
        if training:
            head.statistics = head.statistics | margin.observe(sample)
        sample = sample._replace(statistics=head.statistics)
        return sample, margin.target_of(sample)

    sample = psi = None
    if margin.reweights:  # negatives wait for the targets
        sample, psi = seen(distributed.all_reduce_sum(target.cosine.clone()))
    negatives = Negatives.of(
        margin, None if scale is None else scale * LOG2_E, None if psi is None else psi.to(x.dtype), head.statistics
    )
    x_hat, x_length = target.x_hat.to(head.dtype), target.x_length.to(head.dtype)
    xs = x if scale is None else x_hat * scale
    maximum, total, mean, cached = softmax.sum_negatives(
        xs * LOG2_E,
        lambda rows: head._centers.take(used, rows, head._buffers, moments=False),
        used.count,
        places,
        way=head._way,
        bounded=bounded,
        negatives=negatives,
        weighted=training,
        cache=head._cache.reserve(len(x), used.count, head._way.chunk) if training else None,
    )
    maximum = maximum / LOG2_E
    log_negatives, cosine, w_length, bias, shares = exchange.sum_over_ranks(maximum, total, target, shares, bounded)
    if sample is None:
        sample, psi = seen(cosine)
    x_factor = length if scale is None else scale
    w_factor = 1.0 if margin.normalize_centers else w_length
    logit = x_factor * w_factor * psi + bias - margin.shift()
    # log(1 + Z_neg / e^t) in this form keeps small losses: log Z - t has lost 8 % of a loss of 1e-5
    losses = torch.logaddexp(torch.zeros_like(logit), log_negatives - logit)
    log_z = torch.logaddexp(log_negatives, logit)
    p_minus_one = -torch.exp(log_negatives - log_z)
    zero = torch.zeros_like(losses)
    regularizer, by_length = regularized(margin, length)
    loss = torch.where(real, losses + regularizer, zero).sum() / count
    if shares is not None:
        head.embedding_loss = shares.sum()
        loss = loss + head.embedding_loss
    loss = loss.to(head.dtype)
    head.observed = Observed(cosine, w_length, length, real)
    if not training:
        return loss, None, None
    psi_prime, psi_by_length = margin.derivatives(sample)
    by_logit = torch.where(target.owned, p_minus_one, zero)
    by_psi = by_logit * x_factor * w_factor
    by_x_length = by_psi * psi_by_length + torch.where(target.owned, by_length, zero)
    if scale is None:
        by_x_length += by_logit * w_factor * psi
    by_w_length = None if margin.normalize_centers else by_logit * x_factor * psi
    by_target, by_center = target_gradients(target, by_psi * psi_prime, by_x_length, by_w_length)
    batch = None if head.feature_centers is None else (raw, labels, real)
    by_center, by_bias = by_center.to(head.dtype), by_logit.to(head.dtype)
    kept = Forward(xs, places, real, log_z, by_center, by_bias, negatives, batch, cached)
    gradient = mean * torch.exp((maximum - log_z).clamp_max(LARGEST_INVERSE[head.dtype])).to(head.dtype).unsqueeze(1)
    if scale is not None:  # the backward of s x / |x|
        along = (gradient * x_hat).sum(dim=1)
        if margin.learn_scale:  # that is sum_j p_j n_j cos_j
            own = by_logit * w_factor * psi
            kept.by_scale = distributed.all_reduce_sum(torch.where(real, along + own, zero).sum() / count)
        gradient -= along.unsqueeze(1) * x_hat
        gradient *= scale / x_length
    gradient += by_target.to(head.dtype)
    if dropped is not None:
        gradient *= dropped
    gradient = torch.where(real.unsqueeze(1), gradient / count, 0)
    if by_shares is not None:
        gradient += by_shares
    return loss, distributed.reduce_scatter_sum(gradient * distributed.world_size()), kept


def targets_of(head, x: Tensor, used: InUse, column: Tensor) -> Target:
    """In: the targets' rows (B,) among those in use, -1 for other ranks'."""
    owned = column >= 0
    if used.count == 0:
        return find_targets(x, torch.zeros_like(x), None, owned)
    return find_targets(x, *head._centers.rows_at(used, column.clamp_min(0)), owned)
