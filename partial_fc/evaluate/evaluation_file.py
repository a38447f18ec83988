"""evaluation.json: what an evaluation leaves, its format, and how it is read again."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from partial_fc import storage
from partial_fc.documents import MIB, parse_json, read_bytes
from partial_fc.evaluate.protocol import DIR_FARS, FARS
from partial_fc.files import shortened
from partial_fc.schema import Document, fits
from partial_fc.storage import Place

FORMAT, VERSION = "partial_fc-evaluation", 2
BYTES = 16 * MIB  # a set takes 20 kB

Share = Annotated[float, Field(ge=0, le=1)]
Cosine = Annotated[float, Field(ge=-2, le=2)]  # thresholds lie just above a cosine
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Text = Annotated[str, Field(max_length=4096)]


def _name(name: str) -> str:
    if not name.isprintable():
        raise ValueError("a name without control characters")
    return name


Name = Annotated[str, Field(max_length=256), AfterValidator(_name)]


class _Tar(Document):
    tar: Share
    far: Share
    threshold: Cosine


class _Dir(Document):
    dir: Share


class _Histogram(Document):
    edges: list[Cosine] = Field(min_length=2, max_length=10_001)
    genuine: list[Count]
    impostor: list[Count]

    @model_validator(mode="after")
    def _bins(self) -> "_Histogram":
        if not len(self.genuine) == len(self.impostor) == len(self.edges) - 1:
            raise ValueError("one number a bin")
        if any(low >= high for low, high in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError("edges that rise")
        if not (any(self.genuine) and any(self.impostor)):
            raise ValueError("a genuine and an impostor pair or more")
        return self


class _Pair(Document):
    a: Count
    b: Count
    score: Cosine
    same: bool


_Pairs = Annotated[list[_Pair], Field(max_length=1000)]


class _Examples(Document):
    right: _Pairs
    wrong: _Pairs
    hardest: _Pairs


class _Result(Document):
    """Of one set."""

    data: Text
    fingerprint: Text | None = None  # early evaluations have none, nor a note, num_fold_pairs and dir_at_far
    note: Text | None = None
    num_samples: Count
    num_identities: Count | None
    num_distractors: Count
    num_genuine: Count
    num_impostor: Count
    num_fold_pairs: Count = 0
    rank1: Share | None
    cmc: list[Share] = Field(max_length=100_000)
    fold_accuracy: Share | None
    tar_at_far: dict[str, _Tar | None]
    dir_at_far: dict[str, _Dir | None] | None = None
    roc: list[Annotated[list[Share], Field(min_length=2, max_length=2)]] = Field(min_length=1, max_length=10_000)
    histogram: _Histogram
    examples: _Examples

    @model_validator(mode="after")
    def _rates(self) -> "_Result":
        for name, at, wanted in (("tar_at_far", self.tar_at_far, FARS), ("dir_at_far", self.dir_at_far, DIR_FARS)):
            if at is not None and not set(wanted) <= set(at):
                raise ValueError(f"{name} with {', '.join(wanted)}")
        if not any(far > 0 for far, _ in self.roc):
            raise ValueError("a roc with a false accept rate above 0")
        return self


class _Evaluation(Document):
    step: Count
    models: dict[Literal["trained", "untrained", "averaged"], Annotated[dict[Name, _Result], Field(max_length=256)]]


class _Header(Document):
    format: str = FORMAT
    version: int = Field(ge=0)


def read_evaluation(file: Place) -> dict[str, Any] | None:
    """What is in evaluation.json, a file here or at a URL; None without one.

    Raises ValueError, which names the file and the field, for what is no evaluation or of a newer version.
    """
    if storage.remote(file):
        if not storage.exists(file):
            return None
        data = storage.read(file, BYTES)
        if len(data) > BYTES:
            raise ValueError(f"{file} has more than {BYTES:,} bytes, which is the limit: is it the right file?")
    else:
        try:
            data = read_bytes(file, BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None
    values = parse_json(data, file)
    header = fits(_Header, values, file)
    if header.format != FORMAT:
        raise ValueError(f"{file} has the format {shortened(header.format)}, wanted {FORMAT!r}")
    if header.version > VERSION:
        raise ValueError(
            f"{file} has the format version {header.version}, this partial_fc reads up to {VERSION}: update partial_fc "
            "or evaluate again"
        )
    fits(_Evaluation, values, file)
    return values
