"""What the ranks tell each other in a forward pass: the batch, and the sums of the softmax.

Shapes: b this rank's rows, B = W * padded_size gathered rows, D embedding size.
"""

import torch
from torch import Tensor

from partial_fc.head.targets import Target
from partial_fc.parallel import distributed

# The label of a padding row on the wire; no caller can mean it, while -1 may be a caller's mistake.
PADDING = torch.iinfo(torch.int64).min


def agree_on_size(wrong: str | None, rows: int, padded_size: int | None, device: torch.device) -> int:
    """The number of rows that every rank pads to: `padded_size`, or the largest number of rows, found in one exchange.

    In: what is wrong with this rank's input, if anything, and its rows. Raises ValueError: without `padded_size` on all
    ranks, so that none waits for one that gave up.
    """
    if padded_size is not None:
        if wrong is None and rows > padded_size:
            wrong = f"this rank has {rows} rows, more than padded_size {padded_size}"
        if wrong is not None:
            raise ValueError(wrong)
        return padded_size
    sizes = distributed.all_gather(torch.tensor(rows if wrong is None else -1, device=device)).tolist()
    if wrong is not None:
        raise ValueError(wrong)
    if -1 in sizes:
        raise ValueError(f"the head was called wrongly on rank {sizes.index(-1)}; its own error says how")
    return max(sizes)


def gather_batch(
    embeddings: Tensor, labels: Tensor, padded_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """In: this rank's embeddings (b, D) and labels (b,), b at most `padded_size`. Out: all ranks', (B, D) and (B,).

    One collective: labels travel beside the embeddings as bit patterns (as float32 values they are exact only to 2^24).
    Rows past a rank's b are zero and labeled PADDING.
    """
    width = 8 // dtype.itemsize
    packed = torch.zeros(padded_size, embeddings.shape[1] + width, dtype=dtype, device=device)
    packed[: len(labels), :-width] = embeddings
    bits = torch.full((padded_size, 1), PADDING, device=device)
    bits[: len(labels), 0] = labels.clamp_min(PADDING + 1)  # a caller's mistake must not pass for padding
    packed[:, -width:] = bits.view(dtype)
    everything = distributed.all_gather(packed).flatten(0, 1)
    gathered = everything[:, -width:].contiguous().view(torch.int64).squeeze(1)
    return everything[:, :-width].contiguous(), gathered


def check_labels(gathered: Tensor, num_classes: int, planned: Tensor | None, padded_size: int) -> None:
    """Raises ValueError for a gathered label (B,) that is out of range, or not among those `planned` by begin_step.

    One host read, of what is equal on all ranks: so all of them raise.
    """
    outside = (gathered < 0) | (gathered >= num_classes)
    wrong = outside if planned is None else outside | ~torch.isin(gathered, planned)
    wrong = wrong & (gathered != PADDING)
    if not wrong.any():
        return
    position = int(wrong.nonzero()[0])
    where = f"label {int(gathered[position])} of rank {position // padded_size}, row {position % padded_size}"
    if outside[position]:
        raise ValueError(
            f"{where} is out of range: this head has {num_classes} classes, so labels run from 0 to "
            f"{num_classes - 1}; check the data's class count or raise num_classes"
        )
    raise ValueError(
        f"{where} is not among the labels that begin_step was given, so its class center may not be in use: give "
        "begin_step the labels of the whole global batch, of all its micro-batches"
    )


def sum_over_ranks(
    maximum: Tensor, total: Tensor, target: Target, shares: Tensor | None, bounded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Log of the negatives' sum over all ranks, target cosine, |w| and bias of the target's center, and the sums of the
    ranks' `shares` of embedding losses, each (B,) float64.

    In: this rank's `maximum` and `total` as `sum_negatives` gives them, and its targets. One collective. Bounded logits
    need a sum; others pairs of (maximum, sum), combined in rank order, so that all ranks round alike.
    """
    w_length = torch.where(target.owned, target.w_length.squeeze(1), 0)
    rows = [total, target.cosine, w_length, target.bias, *([] if shares is None else [shares])]
    if bounded:
        total, *rest = distributed.all_reduce_sum(torch.stack(rows))
        log_total = torch.log(total)
    else:
        parts = distributed.all_gather(torch.stack([maximum, *rows]))
        largest = parts[:, 0].amax(dim=0)
        total = (parts[:, 1] * torch.exp(parts[:, 0] - largest)).sum(dim=0)
        log_total, rest = torch.log(total) + largest, parts[:, 2:].sum(dim=0)
    cosine, w_length, bias, *shares = rest
    return log_total, cosine, w_length, bias, shares[0] if shares else None
