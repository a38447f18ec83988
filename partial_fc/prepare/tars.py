"""A data set from WebDataset shards that someone else wrote, where they lie: an index is written, no shard is.

A shard may be a file or lie behind a URL, and may be compressed: its index is of the plain tar.

Members are grouped as webdataset groups them: successive members of one key make a sample; a key ends at the first dot
of the base name. The image is the member that ends in one of EXTENSIONS, in any case. The label is in .cls, in a field
of .json, or in .txt; where no sample has one, it is the folder of the key. Integers are class indices as they are, and
classes without a sample stay empty; other labels are class names, sorted by code point.

Every shard is read once, several at a time; one behind a URL is fetched for that and not kept. What a killed run has
read is not read again. What is left out is counted and named in left_out.jsonl:
    no_label, no_image     the sample has none
    bad_label              empty, of several lines, no text in UTF-8, a number of more than 18 digits, or no field of
                           that name
    too_large              an image of more than 256 MiB, or a label of more than 1 MiB
    several_images         the sample has more than one
    duplicate_key          the sample has a member twice; webdataset ends with an error there
    undecodable            OpenCV cannot decode it
    other_size             not of the size that most images have
    no_key                 the member's name has no dot, so that it belongs to no sample
    link, sparse           a link, which webdataset skips, or a sparse file, which is not stored as it is
"""

import hashlib
import json
import os
import shutil
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from partial_fc import storage
from partial_fc.data.pixels import decode
from partial_fc.data.remote import compression_of
from partial_fc.data.shards import LEFT_OUT, Index, load_index, require_new, write_index
from partial_fc.documents import MIB
from partial_fc.files import plain_name, printable
from partial_fc.prepare.images import MOST_IMAGE_BYTES, LeftOut, as_utf8
from partial_fc.prepare.tar_members import Member, Members
from partial_fc.prepare.tar_places import ENDINGS, base_name, shard_places
from partial_fc.storage import Place

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
REASONS = (
    "no_label",
    "no_image",
    "bad_label",
    "too_large",
    "several_images",
    "duplicate_key",
    "undecodable",
    "other_size",
    "no_key",
    "link",
    "sparse",
)
MOST_LABEL_BYTES = MIB  # of a .cls, .json or .txt
MOST_DIGITS = 18  # of a class index
EMPTY_SHARE = 0.5  # of the classes: more without a sample are no class indices


class Options(NamedTuple):
    """What of a sample its label and its key are."""

    label: str | None  # cls, txt, folder, or a field of .json as person.id; None: the first that a sample has
    last_dot: bool  # a key ends at the last dot of the base name


@dataclass
class Scan:
    """What one shard has: of each sample where its image lies, its size in bytes, CRC32, (H, W), label and name."""

    bytes: int = 0
    sha256: str = ""
    unpacked_bytes: int | None = None  # of a compressed one
    offset: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    crc32: list[int] = field(default_factory=list)
    height: list[int] = field(default_factory=list)
    width: list[int] = field(default_factory=list)
    label: list[str | None] = field(default_factory=list)  # None: the folder of the key is one, if any is
    name: list[str] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)


def prepare_index(
    source: str,
    out: Path,
    *,
    label: str | None = None,
    last_dot: bool = False,
    close_gaps: bool = False,
    workers: int | None = None,
) -> Index:
    """Index the shards that `source` names in the new folder `out`, which gets links to those that are files.

    source: a shard, a folder of shards, a pattern with braces or wildcards, several of these joined by "::", or the
    .json list of shards of `wids`; each a path or a URL of s3, gs, hf, http or https. Compressed ones end in .tar.gz,
    .tgz or .tar.zst. label: cls, txt, folder, or a field of .json, as person.id; None takes the first of
    .cls, the field "label" of .json, and .txt. last_dot: a key ends at the last dot of the base name, so that
    s2.0.png has the key s2.0. close_gaps: integer labels are numbered anew, without empty classes. workers: shards
    read at a time; None: as many as cores.

    Raises FileNotFoundError for a shard that is not there, OSError for one that cannot be fetched, FileExistsError if
    `out` exists, and ValueError for a file that is no tar, if no sample is left, for labels of which most classes would
    be empty, and for images of which most are not of one size.
    """
    out = Path(out)
    require_new(out)
    places = shard_places(source)
    partial = out.with_name(out.name + ".partial")
    scans = _scan_all(places, partial, Options(label, last_dot), workers)
    size, labelled = _sizes_and_labels(scans, source)
    of_folder = label == "folder" or label is None and not labelled
    left_out = LeftOut(REASONS)
    shards: list[dict[str, Any]] = []
    shard, offset, length, own_label = array("i"), array("q"), array("i"), array("q")
    crc32, names, name_offset = array("I"), bytearray(), array("q", [0])
    label_of: dict[str, int] = {}  # in the order in which they come
    for number, (place, file) in enumerate(zip(places, scans, strict=True)):
        scan, called = _read(file), base_name(place)
        shards.append(_described(place, scan))
        for row in scan.left_out:
            left_out.add(row["name"], row["reason"], shard=called)
        for row, name in enumerate(scan.name):
            own = os.path.dirname(name).removeprefix("./") if of_folder else scan.label[row]
            if not own or (scan.height[row], scan.width[row]) != size:
                left_out.add(name, "other_size" if own else "no_label", shard=called)
                continue
            shard.append(number)
            offset.append(scan.offset[row])
            length.append(scan.size[row])
            own_label.append(label_of.setdefault(own, len(label_of)))
            crc32.append(scan.crc32[row])
            names += name.encode("utf-8")
            name_offset.append(len(names))
    if not label_of:
        raise ValueError(f"{source} has no sample to use; left out: {left_out.said() or 'nothing'}")
    numbers, classes = number_labels(list(label_of), close_gaps, source)
    empty = len(classes) - len(np.unique(numbers))
    for described, name in zip(shards, _names(places), strict=True):
        described["name"] = name
    write_index(
        partial,
        shards,
        {
            "shard": np.frombuffer(shard, np.int32),
            "offset": np.frombuffer(offset, np.int64),
            "size": np.frombuffer(length, np.int32),
            "label": numbers[np.frombuffer(own_label, np.int64)],
        },
        {
            "crc32": np.frombuffer(crc32, np.uint32),
            "name": np.frombuffer(names, np.uint8),
            "name_offset": np.frombuffer(name_offset, np.int64),
        },
        classes,
        {
            "kind": "index",
            "source": as_utf8(source),
            "image_size": list(size),
            "label": label,
            "last_dot": last_dot,
            "dropped": dict(left_out.counts),
            "empty_classes": empty,
        },
        left_out.rows,
    )
    shutil.rmtree(partial / "scans")
    _link(places, partial, shards)
    partial.rename(out)
    see = f"; all are named in {out / LEFT_OUT}" if left_out.rows else ""
    said = f"{len(shard):,} images of {len(classes) - empty:,} identities in {len(places):,} shards"
    print(printable(f"{out}: {said}; left out: {left_out.said() or 'nothing'}{see}"))
    if empty:
        print(f"warning: {empty:,} of {len(classes):,} classes have no image; --close-gaps numbers them anew")
    return load_index(out)


def number_labels(labels: list[str], close_gaps: bool, source: str) -> tuple[np.ndarray, list[str]]:
    """The class (n,) int64 of each of n different labels, and the names of all classes.

    Raises ValueError where the labels are integers and most classes would have no sample.
    """
    if not all(label.isascii() and label.isdigit() for label in labels):
        number = {label: i for i, label in enumerate(sorted(labels))}
        return np.array([number[label] for label in labels], np.int64), [as_utf8(label) for label in number]
    values = [int(label) for label in labels]  # 007 is 7
    used = sorted(set(values))
    if close_gaps:
        place = {value: i for i, value in enumerate(used)}
        return np.array([place[value] for value in values], np.int64), [str(value) for value in used]
    count = used[-1] + 1
    if count - len(used) > EMPTY_SHARE * count:
        raise ValueError(
            f"{source}: {count - len(used):,} of {count:,} classes would have no image: the labels are integers up to "
            f"{used[-1]:,}, {len(used):,} different ones. If they are not class indices, number them anew: --close-gaps"
        )
    return np.array(values, np.int64), [str(value) for value in range(count)]


def _sizes_and_labels(scans: list[Path], source: str) -> tuple[tuple[int, int], bool]:
    """(H, W) of most images, and whether any sample has a label of its own."""
    sizes: Counter[tuple[int, int]] = Counter()
    labelled = False
    for place in scans:
        scan = _read(place)
        sizes.update(zip(scan.height, scan.width, strict=True))
        labelled = labelled or any(label is not None for label in scan.label)
    (size, count), *others = sizes.most_common() or [((0, 0), 0)]
    if count * 2 < sizes.total():
        examples = ", ".join(f"{height} x {width}: {n}" for (height, width), n in [(size, count), *others[:2]])
        raise ValueError(
            f"{source} has images of {len(sizes)} sizes (height x width: how many; {examples}, …), wanted one that "
            "most have: shards are indexed as they are; unpack them and give `prepare folder` a --size"
        )
    return size, labelled


def _described(place: Place, scan: Scan) -> dict[str, Any]:
    """What index.json says of a shard, but for its name."""
    described: dict[str, Any] = {"name": "", "bytes": scan.bytes, "sha256": scan.sha256}
    if isinstance(place, str):
        described["url"] = place
    if scan.unpacked_bytes is not None:
        described |= {"compression": compression_of(base_name(place)), "unpacked_bytes": scan.unpacked_bytes}
    return described


def _names(places: list[Place]) -> list[str]:
    """Their own, where these differ and nothing else in the folder is called so; else a number."""
    own = [base_name(place) for place in places]
    with suppress(ValueError):
        if len(set(own)) == len(own) and all(plain_name(name, "", "").endswith(ENDINGS) for name in own):
            return own
    return [f"shard-{i:06d}.tar" for i in range(len(own))]


def _link(places: list[Place], folder: Path, shards: list[dict[str, Any]]) -> None:
    """Links to the shards that are files in `folder`."""
    for place, shard in zip(places, shards, strict=True):
        if isinstance(place, Path):
            link = folder / shard["name"]
            link.unlink(missing_ok=True)  # of a killed run
            link.symlink_to(place.resolve())


def _scan_all(places: list[Place], partial: Path, options: Options, workers: int | None) -> list[Path]:
    """Where the scans of all shards are. What a killed run has done, of the same shards and options, is taken."""
    kept = partial / "scans"
    kept.mkdir(parents=True, exist_ok=True)
    scans = {place: kept / f"{_digest(place, options)}.json" for place in places}
    left = [place for place in places if not scans[place].exists()]
    workers = min(workers or os.cpu_count() or 1, max(len(left), 1))
    with (
        tqdm(total=len(places), initial=len(places) - len(left), desc="indexing", unit=" shards", mininterval=1) as bar,
        ExitStack() as stack,
    ):
        jobs = [(place, scans[place], options) for place in left]
        if workers == 1:
            done: Iterable[None] = (_scan_into(*job) for job in jobs)
        else:
            pool = stack.enter_context(ProcessPoolExecutor(workers))
            stack.callback(pool.shutdown, cancel_futures=True)  # what is wrong is said at once
            done = (future.result() for future in as_completed([pool.submit(_scan_into, *job) for job in jobs]))
        try:
            for _ in done:
                bar.update()
        except BrokenProcessPool:
            raise OSError(
                "a process that reads shards was killed, as where memory runs out: lower --workers, now "
                f"{workers}. The same command goes on"
            ) from None
    return [scans[place] for place in places]


def _read(place: Path) -> Scan:
    return Scan(**json.loads(place.read_text(encoding="utf-8")))


def _digest(place: Place, options: Options) -> str:
    """Equal where a scan would be: the same path, length and time of change, or URL; the same options."""
    where: list = [place]
    if isinstance(place, Path):
        stat = place.stat()
        where = [os.fspath(place.resolve()), stat.st_size, stat.st_mtime_ns]
    return hashlib.sha256(json.dumps([*where, *options]).encode()).hexdigest()[:32]


def _scan_into(place: Place, to: Path, options: Options) -> None:
    temporary = to.with_suffix(".partial")
    with storage.local_copy(place, to.with_suffix(".fetched")) as file:
        scan = scan_shard(file, options, place)
    temporary.write_text(json.dumps(vars(scan)), encoding="utf-8")
    temporary.rename(to)


def scan_shard(file: Path, options: Options, place: Place) -> Scan:
    """Reads a shard once, from its beginning to its end. Raises ValueError, which names `place`, for no whole tar."""
    scan = Scan()
    members = Members(file, place, options.last_dot, scan.left_out)
    for key, sample in members.samples(_most_bytes):
        _add(scan, key, sample, options)
    scan.bytes, scan.sha256, scan.unpacked_bytes = members.bytes, members.sha256, members.unpacked_bytes
    return scan


def _most_bytes(extension: str) -> int | None:
    if extension in EXTENSIONS:
        return MOST_IMAGE_BYTES
    return MOST_LABEL_BYTES if extension in ("cls", "json", "txt") else None


def _add(scan: Scan, key: str, members: list[Member], options: Options) -> None:
    """Adds a sample, or why it is left out."""
    by_extension = {member.extension: member for member in members}
    images = [member for member in members if member.extension in EXTENSIONS]
    reason, label, data = "", None, b""
    if len(by_extension) < len(members):
        reason = "duplicate_key"
    elif len(images) != 1:
        reason = "several_images" if images else "no_image"
    elif images[0].data is None:
        reason = "too_large"
    else:
        data = images[0].data
        label, reason = _label(by_extension, options.label)
    pixels = None if reason else decode(data)
    if not reason and pixels is None:
        reason = "undecodable"
    if reason or pixels is None:
        scan.left_out.append({"name": key, "reason": reason})
        return
    scan.offset.append(images[0].offset)
    scan.size.append(len(data))
    scan.crc32.append(zlib.crc32(data))
    scan.height.append(pixels.shape[0])
    scan.width.append(pixels.shape[1])
    scan.label.append(label)
    scan.name.append(images[0].name)


def _label(members: dict[str, Member], wanted: str | None) -> tuple[str | None, str]:
    """The label, None where it may be the folder, and why there is none."""
    if wanted == "folder":
        return None, ""
    of_json = wanted not in (None, "cls", "txt")
    kinds = (
        [("json", wanted)]
        if of_json
        else [(wanted, None)]
        if wanted
        else [("cls", None), ("json", "label"), ("txt", None)]
    )
    for extension, path in kinds:
        if extension not in members:
            continue
        data = members[extension].data
        if data is None:
            return None, "too_large"
        text = _field(data, path.split(".")) if path else data.decode("utf-8", "replace").strip()
        if text is None and wanted is None:
            continue
        bad = not text or any(sign in text for sign in "\n\r�") or text.isdigit() and len(text) > MOST_DIGITS
        return (None, "bad_label") if bad else (text, "")
    return None, "" if wanted is None else "no_label"


def _field(data: bytes, path: list[str]) -> str | None:
    """A text or whole number in a JSON object."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None if value is None else ""
    with suppress(ValueError):  # an integer of thousands of digits, half a character
        text = str(value).strip()
        text.encode()
        return text
    return ""
