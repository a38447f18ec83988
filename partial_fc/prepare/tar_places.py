"""Where shards lie: what a pattern, a folder or a list names."""

import glob
from pathlib import Path
from urllib.parse import unquote, urlsplit

from braceexpand import braceexpand

from partial_fc import storage
from partial_fc.data.description import SCHEMES
from partial_fc.documents import MIB, parse_json, read_bytes
from partial_fc.files import one_line, shortened
from partial_fc.storage import Place

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.zst")
_LIST_BYTES = 64 * MIB


def shard_places(source: str) -> list[Place]:
    """The paths and URLs that `source` names, as `prepare.tars.prepare_index` says, each once, in that order."""
    places: list[Place] = []
    for pattern in source.split("::"):
        for name in braceexpand(pattern):
            found = _behind_url(name) if "://" in name else _of_path(name)
            if not found:
                raise FileNotFoundError(f"{one_line(name)} names no shard: give .tar files, or a folder of them")
            places += found
    strange = [place for place in places if isinstance(place, str) and place.partition("://")[0] not in SCHEMES]
    if strange:
        raise ValueError(f"got the shard {one_line(strange[0])}, wanted a path, or a URL of {', '.join(SCHEMES)}")
    files = [place for place in places if isinstance(place, Path)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} is no file, as {len(missing)} of {len(places)} shards that {source} names"
        )
    return list({place.resolve() if isinstance(place, Path) else place: place for place in places}.values())


def _of_path(name: str) -> list[Place]:
    path = Path(name)
    if path.is_dir():
        return [file for file in sorted(path.iterdir()) if file.name.lower().endswith(ENDINGS)]
    if path.suffix == ".json":
        urls = _of_a_list(read_bytes(path, _LIST_BYTES), path)
        return [url if "://" in url else path.parent / url for url in urls]
    if any(sign in name for sign in "*?["):
        return [Path(one) for one in sorted(glob.glob(name, recursive=True))]
    return [path]


def _behind_url(url: str) -> list[Place]:
    scheme, path = url.partition("://")[0], urlsplit(url).path
    if path.endswith(".json"):
        data = storage.read(url, _LIST_BYTES)
        where = url.rpartition("/")[0]
        return [storage.pinned(one if "://" in one else f"{where}/{one}") for one in _of_a_list(data, url)]
    if scheme in ("http", "https"):
        return [url]
    if path.lower().endswith(ENDINGS) and not any(sign in url for sign in "*?["):
        return [storage.pinned(url)]
    parts = url.rstrip("/").split("/")
    first = next((i for i, part in enumerate(parts) if any(sign in part for sign in "*?[")), len(parts))
    found = storage.glob("/".join(parts[:first]), "/".join(parts[first:]) or "*")
    return [storage.pinned(str(one)) for one in found if str(one).lower().endswith(ENDINGS)]


def _of_a_list(data: bytes, name: object) -> list[str]:
    """The shards of a list of wids: {"shardlist": [{"url": …}, …]}."""
    values = parse_json(data, name)
    rows = values.get("shardlist") if isinstance(values, dict) else None
    urls = [row.get("url") if isinstance(row, dict) else None for row in rows] if isinstance(rows, list) else []
    if not urls or not all(isinstance(url, str) for url in urls):
        raise ValueError(
            f'{name}: got {shortened(rows)}, wanted a list of shards of wids: {{"shardlist": [{{"url": …}}]}}'
        )
    return [str(url) for url in urls]


def names_shards(source: str) -> bool:
    """Whether it is for `shard_places`, and no text."""
    path = Path(source)
    if path.is_file():
        return path.name.lower().endswith((*ENDINGS, ".json"))
    return "://" in source or path.is_dir() or path.name.lower().endswith(ENDINGS) or bool(set(source) & set("*{["))


def base_name(place: Place) -> str:
    """The shard's own name, of a URL without its query."""
    return place.name if isinstance(place, Path) else unquote(urlsplit(place).path.rpartition("/")[2])
