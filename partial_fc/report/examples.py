"""Example pairs of a result, with the images inlined as data URIs."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partial_fc.data.shards import Index, load_index

GROUPS = {
    "right": "Decided rightly (drawn at random)",
    "wrong": "Decided wrongly (furthest from the threshold)",
    "hardest": "Hardest of the pairs (most alike impostors, least alike genuine)",
}
_SIGNATURES = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"RIFF": "image/webp",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
}


def example_groups(result: Mapping[str, Any]) -> tuple[list[dict], str]:
    """(groups, note): each group a title and its pairs, ready for the template; a note instead where there are none."""
    if not any(result["examples"].values()):
        return [], "The evaluation recorded no example pairs."
    try:
        index = load_index(Path(result["data"]))
        names = index.classes()
        groups = [
            {
                "title": title,
                "pairs": [_pair(index, names, pair) for pair in result["examples"][group]],
            }
            for group, title in GROUPS.items()
        ]
    except (OSError, ValueError) as error:
        return [], f"The example pairs are left out, since the data set cannot be read any more: {error}"
    return groups, ""


def _pair(index: Index, names: list[str], pair: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "images": [_data_uri(index, pair[side]) for side in ("a", "b")],
        "names": list(dict.fromkeys(names[index.label[pair[side]]] for side in ("a", "b"))),
        "score": pair["score"],
        "same": pair["same"],
    }


def _data_uri(index: Index, sample: int) -> str:
    if not 0 <= sample < index.num_samples:
        raise ValueError(f"{index.path} has {index.num_samples} samples, the evaluation names number {sample}")
    data = index.read(sample)
    media = next((name for start, name in _SIGNATURES.items() if data.startswith(start)), None)
    if media is None:
        raise ValueError(f"sample {index.key(sample)} of {index.path} is no image that a page can show")
    return f"data:{media};base64,{base64.b64encode(data).decode('ascii')}"
