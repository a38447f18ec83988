"""The schema of a data set's index.json.

Versions: 1 has no pairs, 2 has them, 3 also has a CRC32 and a source name of every sample, and a field for each shard's
URL and compression. Older ones are read as they are.
"""

import math
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field

from partial_fc.documents import MIB, parse_json, read_bytes
from partial_fc.files import MAX_PIXELS, plain_name, shortened
from partial_fc.schema import Document, fits

FORMAT = "partial_fc-index"
VERSION = 3
SCHEMES = ("http", "https", "s3", "gs", "hf")  # of a shard's URL
MOST_BYTES = 512 * MIB  # of index.json: 2 million shards
AGAIN = "copy the data set again, or prepare it again"


def _identifier(name: str) -> str:
    if not name.isidentifier():
        raise ValueError("an identifier, nothing outside its folder")
    return name


def _of_a_scheme(url: str) -> str:
    if not url.isprintable() or url.partition("://")[0] not in SCHEMES:
        raise ValueError(f"a URL that begins with one of {', '.join(SCHEMES)}")
    return url


def _of_an_image(size: list[int]) -> list[int]:
    if math.prod(size) > MAX_PIXELS:
        raise ValueError(f"at most {MAX_PIXELS:,} pixels")
    return size


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Side = Annotated[int, Field(ge=1, le=2**16)]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class Shard(Document):
    """One shard. With a `url` it lies there, and `name` is what a local copy is called."""

    name: str
    bytes: Count
    """Of the file as it lies there, compressed where it is."""
    sha256: Sha256
    samples: Count
    url: Annotated[str, AfterValidator(_of_a_scheme)] | None = None
    compression: Literal["gzip", "zstd"] | None = None
    unpacked_bytes: Count | None = None
    """Offsets of samples are in the unpacked tar, which has so many bytes; without compression unset."""

    @property
    def plain_bytes(self) -> int:
        """Of the unpacked tar."""
        return self.bytes if self.unpacked_bytes is None else self.unpacked_bytes

    @property
    def copied(self) -> bool:
        """Whether it is read from a plain copy in the cache."""
        return self.url is not None or self.compression is not None


class Prepared(Document):
    """How the data set was made. What is not read here is kept as it is."""

    model_config = ConfigDict(extra="allow")

    image_size: Annotated[list[Side], Field(min_length=2, max_length=2), AfterValidator(_of_an_image)] | None = None
    """[height, width] of all images, in pixels."""


class Description(Document):
    """What index.json says; the arrays' checksums are of the files in index/."""

    version: Annotated[int, Field(ge=1)]
    num_samples: Annotated[int, Field(ge=1, lt=2**40)]
    num_classes: Annotated[int, Field(ge=1, lt=2**31)]
    shards: Annotated[list[Shard], Field(min_length=1)]
    classes_sha256: Sha256
    arrays: dict[Annotated[str, AfterValidator(_identifier)], Sha256]
    crc32_sha256: Sha256 | None = None
    name_sha256: Sha256 | None = None
    name_offset_sha256: Sha256 | None = None
    pairs_sha256: Sha256 | None = None
    prepared: Prepared

    def files(self) -> dict[str, str]:
        """The sha256 of every file but the shards and index.json itself."""
        files = {f"index/{name}.npy": sha256 for name, sha256 in self.arrays.items()}
        for name in (*OF_SAMPLES, "pairs"):
            sha256 = getattr(self, f"{name}_sha256")
            if sha256 is not None:
                files[f"index/{name}.npy"] = sha256
        return files | {"classes.txt": self.classes_sha256}


OF_SAMPLES = ("crc32", "name", "name_offset")  # arrays of version 3, whose checksums are no part of the fingerprint


def read_description(folder: Path) -> Description:
    """What the folder's index.json says.

    Raises FileNotFoundError without one, and ValueError with file, field, what was got and what was wanted.
    """
    file = folder / "index.json"
    if not os.path.isfile(file):  # also where the name is no name: too long, with a null
        raise FileNotFoundError(f"{folder} is no data set: it has no index.json (`partial-fc prepare` makes one)")
    values = parse_json(read_bytes(file, MOST_BYTES), file)
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise ValueError(f"{file} has the format {shortened(found)}, wanted {FORMAT!r}")
    version = values.get("version")
    if isinstance(version, int) and version > VERSION:
        raise ValueError(
            f"{file} has the format version {version}, this partial_fc reads up to {VERSION}: "
            "update partial_fc, or prepare the data set again with this one"
        )
    description = fits(Description, values, file)
    missing = [f"{name}_sha256" for name in OF_SAMPLES if getattr(description, f"{name}_sha256") is None]
    if description.version >= 3 and missing:
        raise ValueError(f"{file}: {missing[0]} is missing: {AGAIN}")
    for i, shard in enumerate(description.shards):
        if (shard.compression is None) != (shard.unpacked_bytes is None):
            raise ValueError(
                f"{file}: shards.{i}: got compression {shard.compression} and unpacked_bytes {shard.unpacked_bytes}, "
                f"wanted both or neither: {AGAIN}"
            )
    names = [plain_name(shard.name, file, f"shards.{i}.name") for i, shard in enumerate(description.shards)]
    if len(set(names)) < len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise ValueError(f"{file}: shards: got {twice} twice, wanted a file each: {AGAIN}")
    return description
