"""Which rank owns which classes."""


def class_range(num_classes: int, rank: int, world_size: int) -> range:
    """The classes of `rank`: [min(r q, C), min((r + 1) q, C)) with q = ceil(C / W). A rank may own none."""
    per_rank = -(-num_classes // world_size)
    return range(min(rank * per_rank, num_classes), min((rank + 1) * per_rank, num_classes))
