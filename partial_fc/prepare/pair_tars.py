"""Pairs from WebDataset shards, as verification sets lie on the Hugging Face hub: two images and a label a sample."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from partial_fc.prepare.images import MOST_IMAGE_BYTES
from partial_fc.prepare.tar_members import Member, Members
from partial_fc.prepare.tars import EXTENSIONS, MOST_LABEL_BYTES
from partial_fc.storage import Place, local_copy

_NAMED = ("img1", "img2")
_SAME = {"1": True, "0": False}
_FOLDERS = {"genuine": True, "impostor": False}


def read_pair_tars(places: Sequence[Place], copy: Path) -> tuple[list[bytes], list[bool]]:
    """The encoded images, two for each pair, and whether a pair is of one identity. All of it is in memory.

    places: of the shards; one behind a URL lies at `copy` while it is read. Raises ValueError, which names shard and
    sample, for one of other than two images and a label of 1 or 0, and FileNotFoundError and OSError as `download`.
    """
    images: list[bytes] = []
    same: list[bool] = []
    for place in tqdm(places, desc="reading", unit=" shards", mininterval=1):
        with local_copy(place, copy) as file:
            left_out: list[dict[str, str]] = []
            for key, members in Members(file, place, False, left_out).samples(_most_bytes):
                pair = [member for member in members if _is_image(member.extension)]
                if (
                    len(pair) != 2
                    or pair[0].extension == pair[1].extension
                    or any(member.data is None for member in pair)
                ):
                    found = ", ".join(member.name for member in members)
                    wanted = f"two images of at most {MOST_IMAGE_BYTES >> 20} MiB, as .img1 and .img2"
                    raise ValueError(f"{place}: the sample {key} has {found}: wanted {wanted}")
                images += [member.data or b"" for member in sorted(pair, key=lambda member: member.extension)]
                same.append(_label(place, key, members))
            if left_out:  # the result would be one over other pairs
                first = f"{left_out[0]['name']} ({left_out[0]['reason']})"
                raise ValueError(
                    f"{place}: {len(left_out)} members belong to no pair, the first is {first}: wanted files that are "
                    "called KEY.img1, KEY.img2, KEY.cls"
                )
    return images, same


def _most_bytes(extension: str) -> int | None:
    if _is_image(extension):
        return MOST_IMAGE_BYTES
    return MOST_LABEL_BYTES if extension == "cls" else None


def _is_image(extension: str) -> bool:
    """img1, img1.jpg, jpg, 0.jpg."""
    return extension.split(".")[0] in _NAMED or extension.split(".")[-1] in EXTENSIONS


def _label(place: Place, key: str, members: list[Member]) -> bool:
    """Of .cls, else of a folder of the key."""
    said = [(member.data or b"").decode("utf-8", "replace").strip() for member in members if member.extension == "cls"]
    if said:
        found = [_SAME[text] for text in said if text in _SAME]
    else:
        found = [_FOLDERS[folder] for folder in PurePosixPath(key).parts if folder in _FOLDERS]
    if len(found) != max(len(said), 1):
        got = f".cls {said}" if said else f"no .cls, and no folder {' or '.join(_FOLDERS)} in the key"
        raise ValueError(f"{place}: the sample {key} has {got}: wanted 1 for one identity or 0 in .cls")
    return found[0]
