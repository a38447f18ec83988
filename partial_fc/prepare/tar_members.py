"""The samples of a WebDataset shard, read once from its beginning to its end: grouped as webdataset groups them.

Successive members of one key make a sample; a key ends at the first dot of the base name. What belongs to no sample is
left out: no_key, a name without a dot; link, which webdataset skips; sparse, a file that is not stored as it is.
"""

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from webdataset.tariterators import base_plus_ext

from partial_fc.data.remote import compression_of, unpacked
from partial_fc.documents import MIB
from partial_fc.files import one_line
from partial_fc.prepare.images import as_utf8
from partial_fc.prepare.tar_places import base_name
from partial_fc.storage import Place

MOST_MEMBERS = 2_000_000  # of a shard
MOST_UNPACKED = 200  # times the bytes of a compressed shard, beside 64 MiB: more is no shard of images
_AT_ONCE = 1 << 20  # bytes read for the checksum of what is behind the last member


class Member(NamedTuple):
    name: str
    extension: str  # in lower case
    offset: int  # of its bytes in the plain tar
    data: bytes | None  # None: of no use, or too large


class Members:
    """Those of the shard `file`, which lies at `place`: its name says how it is compressed, errors name it.

    Once all samples are read, bytes and sha256 are those of the file, and unpacked_bytes those of its plain tar, None
    where it is one itself. A row for each member that belongs to no sample is added to `left_out`.
    """

    def __init__(self, file: Path, place: Place, last_dot: bool, left_out: list[dict[str, str]]):
        """last_dot: a key ends at the last dot of the base name."""
        self.file, self.place, self.last_dot, self.left_out = file, place, last_dot, left_out
        self.bytes, self.sha256 = 0, ""
        self.unpacked_bytes: int | None = None

    def samples(self, most_bytes: Callable[[str], int | None]) -> Iterator[tuple[str, list[Member]]]:
        """Key and members of each sample. most_bytes: of a member with this extension; None: of no use.

        Raises ValueError, which names the place, for no whole tar, once what came before is read.
        """
        compression, count = compression_of(base_name(self.place)), 0
        with self.file.open("rb") as stream:
            most = MOST_UNPACKED * os.fstat(stream.fileno()).st_size + 64 * MIB
            hashed = _Hashed(stream)
            try:
                with unpacked(hashed, compression, "it") as opened:
                    plain = _Counted(opened, most)
                    with tarfile.open(fileobj=plain, mode="r|", encoding="utf-8", errors="surrogateescape") as tar:
                        for sample in self._grouped(tar, most_bytes):
                            yield sample
                            count += 1
                        end = tar.offset  # tarfile takes a damaged header, and the file's end, for the archive's end
                    if not plain.ends_at(end):
                        raise tarfile.ReadError(f"damaged or cut off at byte {end:,}")
                    while plain.read(_AT_ONCE):
                        pass
            except (tarfile.TarError, EOFError, ValueError) as error:
                stream.seek(0)
                page = "; it begins like a page of HTML" * stream.read(64).lstrip().startswith(b"<")
                raise ValueError(
                    f"{self.place} is no whole tar: {one_line(error)} after {count} samples{page}: copy it again, or "
                    "leave it out"
                ) from None
            while hashed.read(_AT_ONCE):
                pass
        self.bytes, self.sha256 = hashed.bytes, hashed.sha256.hexdigest()
        self.unpacked_bytes = plain.bytes if compression else None

    def _grouped(
        self, tar: tarfile.TarFile, most_bytes: Callable[[str], int | None]
    ) -> Iterator[tuple[str, list[Member]]]:
        key: str | None = None
        members: list[Member] = []
        for number, member in enumerate(tar):
            tar.members = []  # tarfile keeps them all
            if number >= MOST_MEMBERS:
                raise tarfile.ReadError(f"it has more than {MOST_MEMBERS:,} members")
            if member.isdir():
                continue
            name = as_utf8(member.name)
            if not member.isreg() or member.issparse():
                self.left_out.append({"name": name, "reason": "sparse" if member.issparse() else "link"})
                continue
            own, extension = split_key(name, self.last_dot)
            if own is None or name.startswith("__") and name.split("/")[0].endswith("__"):
                if own is None:
                    self.left_out.append({"name": name, "reason": "no_key"})
                continue
            if own != key and members:
                yield key or "", members
                members = []
            key = own
            most, data = most_bytes(extension), None
            if most is not None and member.size <= most:
                stream = tar.extractfile(member)
                data = b"" if stream is None else stream.read()
            members.append(Member(name, extension, member.offset_data, data))
        if members:
            yield key or "", members


def split_key(name: str, last_dot: bool) -> tuple[str | None, str]:
    """Key and extension, in lower case, of a member's name; no key where there is none, as for webdataset."""
    if not last_dot:
        key, extension = base_plus_ext(name)
        return key, (extension or "").lower()
    stem, extension = os.path.splitext(name)
    return (stem, extension[1:].lower()) if extension else (None, "")


class _Hashed:
    """A stream that is read from its beginning to its end, and hashed meanwhile."""

    def __init__(self, stream: Any):
        self.stream, self.sha256, self.bytes = stream, hashlib.sha256(), 0

    def read(self, count: int) -> bytes:
        data = self.stream.read(count)
        self.sha256.update(data)
        self.bytes += len(data)
        return data


class _Counted:
    """A plain stream that is read from its beginning to its end, and remembers what it gave last."""

    def __init__(self, stream: Any, most: int):
        self.stream, self.most, self.bytes, self.last = stream, most, 0, b""

    def read(self, count: int) -> bytes:
        self.last = self.stream.read(count)
        self.bytes += len(self.last)
        if self.bytes > self.most:
            raise tarfile.ReadError(f"it unpacks to more than {self.most:,} bytes, {MOST_UNPACKED} times its own")
        return self.last

    def ends_at(self, offset: int) -> bool:
        """Whether the block there, at or behind the beginning of what was read last, is one of zeros."""
        last, begins = self.last, self.bytes - len(self.last)
        return (last + self.read(tarfile.BLOCKSIZE))[offset - begins :][: tarfile.BLOCKSIZE] == bytes(tarfile.BLOCKSIZE)
