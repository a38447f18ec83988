"""Random numbers as pure functions of named integers, so that a run does not depend on the number of ranks."""

from hashlib import blake2b


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of `parts`: the same on every machine, rank and version.

    The first part names the purpose ("order", "centers", "negatives", "augment", "step", ...), which keeps
    the streams of one run seed independent of each other.
    """
    return int.from_bytes(keyed_bytes(8, *parts), "little") >> 1


def keyed_bytes(count: int, *parts: int | str) -> bytes:
    """`count` (at most 64) pseudo-random bytes, a pure function of `parts` (BLAKE2b of their text)."""
    return blake2b("/".join(map(str, parts)).encode(), digest_size=count).digest()
