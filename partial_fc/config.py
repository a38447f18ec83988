"""Every setting: typed, documented, validated. Defaults stand here once; a run's YAML holds only what differs.

The text under a field is its documentation; `launch/train.py CONFIG --print-config` shows it beside the value.
"""

import difflib
import types
import typing
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from partial_fc.files import one_line, shortened
from partial_fc.storage import WANTED_URL, check_url, local_path

Beta = Annotated[float, Field(ge=0, lt=1)]


def _a_path(text: str) -> str:
    try:
        return str(local_path(text)) if text else text
    except ValueError as error:
        raise PydanticCustomError("url", "{error}", {"error": str(error)}) from None


def _a_place(text: str | None) -> str | None:
    """A URL of one place, or as `_a_path`."""
    if text is None or "://" not in text:
        return text and _a_path(text)
    try:
        return check_url(text)
    except ValueError:
        raise PydanticCustomError("url", WANTED_URL) from None


LocalPath = Annotated[str, AfterValidator(_a_path)]
ONE, SEVERAL = "<one set>", "<several sets>"  # which of a union's errors are said; no part of a key
Location = Annotated[str, AfterValidator(_a_place)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Run(Section):
    dir: LocalPath = ""
    """Folder of the run: config, metrics, checkpoints, evaluation, report. Empty: runs/<name of the config file>."""
    seed: int = 0
    """The data order, initial values, negatives and augmentation are pure functions of it."""
    steps: int | None = Field(None, ge=1)
    """Length of the run in steps; give this or run.epochs."""
    epochs: float | None = Field(None, gt=0)
    """Length of the run in passes over the data, of floor(N / global_batch_size) steps each."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of a rank for torch; unset: torch's own choice (torchrun sets OMP_NUM_THREADS=1)."""
    timeout: float = Field(600.0, ge=10)
    """Seconds, 10 or more, that ranks wait for one that stands still: then the run ends. Not in saving, evaluating."""

    @model_validator(mode="after")
    def _one_length(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                "give either run.steps or run.epochs, and make the other null: run.epochs=null run.steps=100"
            )
        return self


class Affine(Section):
    degrees: float = Field(0.0, ge=0, le=180)
    """Rotation about the middle is uniform in +- this."""
    translate: float = Field(0.0, ge=0, lt=1)
    """Shift is uniform in +- this fraction of width and height."""
    scale: float = Field(0.0, ge=0, lt=1)
    """Magnification is exp(u), u uniform in +- this: 0.1 is between 0.90 and 1.11."""


class TrainingSet(Section):
    data: Location
    """Folder of shards, or its URL."""
    weight: float = Field(1.0, ge=0.001, le=1000)
    """How often an epoch holds each sample: 2 is twice, 0.5 every second one, and the others in the next epoch."""
    name: str | None = Field(None, min_length=1)
    """Of its classes the part before the slash; unset: the folder's."""


class Data(Section):
    train: Annotated[
        Annotated[Location, Tag(ONE)] | Annotated[list[TrainingSet], Field(min_length=1), Tag(SEVERAL)],
        Discriminator(lambda value: SEVERAL if isinstance(value, list) else ONE),
    ]
    """Folder of training shards with their index, or its URL; or a list of such, each with data, weight and name."""
    drop: LocalPath | None = None
    """Text with a class, or the source name of a sample, a line, that are left out; of several sets as SET/NAME."""
    merge: LocalPath | None = None
    """by_name: classes of one name in different sets are one. Or a file: a class, a tab, the name that it gets."""
    cache_dir: LocalPath | None = None
    """Where copies of shards go that lie behind a URL or are compressed; unset: $PARTIAL_FC_CACHE, or the user's."""
    cache_bytes: int | None = Field(None, ge=1)
    """Most that these copies take on this machine, all runs together; unset: all but a tenth of the disk."""
    global_batch_size: int = Field(ge=1)
    """Samples of a step over all ranks; a multiple of data.streams x data.samples_per_identity."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches, one after another, that a rank's part of a step is cut into; only one's activations are kept."""
    samples_per_identity: int = Field(1, ge=1)
    """Samples of each identity in a step, for triplet and contrastive loss; all but one of them are read at random."""
    streams: int = Field(8, ge=1)
    """Runs of the epoch's sample sequence that are read side by side; need not fit the ranks."""
    shuffle_window: int = Field(8192, ge=1)
    """Samples of a stream that are shuffled among themselves; prepared shards are in random order already."""
    workers: int = Field(2, ge=0)
    """Reader processes per rank; 0 reads in the training process."""
    prefetch: int = Field(4, ge=1)
    """Batches that each reader process prepares ahead."""
    flip: bool = True
    """Mirror an image with probability 1/2."""
    affine: Affine | None = None
    """Small random rotation, shift and change of size; unset: none."""
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    """Pixel mean (RGB, 0 to 255), subtracted first."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (127.5, 127.5, 127.5)
    """Pixel deviation (RGB), divided by then."""
    max_undecodable: float = Field(0.001, ge=0, le=1)
    """A run stops when more than this fraction of its samples could not be decoded; below, batches are shorter."""
    label_noise: float = Field(0.0, ge=0, le=1)
    """Probability that a sample's label is replaced by another class, once for the whole run, by run.seed."""
    restart: bool = False
    """Accept a checkpoint made with another seed, data set or batch size; the new order holds from its step on."""

    @model_validator(mode="after")
    def _streams_divide(self):
        if self.global_batch_size % self.streams:
            raise ValueError(
                f"data.global_batch_size {self.global_batch_size} is no multiple of data.streams {self.streams}: "
                "change one of them"
            )
        return self


class Backbone(Section):
    name: str
    """smallnet, mobilefacenet, spherenet20, resnet28, iresnet18, 34, 50, 100 or 200, or timm/ and a model of timm."""
    embedding_dim: int = Field(512, ge=1)
    """Size of an embedding."""


class HeadOptim(Section):
    name: Literal["sgd", "adamw"] | None = None
    """Unset: optim.name. Class centers that a step leaves out are caught up exactly with sgd, stay with adamw."""
    lr: float | None = Field(None, gt=0)
    """Learning rate of the class centers at its peak; unset: optim.lr."""
    momentum: float | None = Field(None, ge=0, lt=1)
    """Of sgd; unset: optim.momentum."""
    weight_decay: float | None = Field(None, ge=0)
    """Unset: optim.weight_decay."""
    betas: tuple[Beta, Beta] | None = None
    """Of adamw; unset: optim.betas."""
    eps: float | None = Field(None, gt=0)
    """Of adamw; unset: optim.eps."""


class MarginChoice(Section):
    model_config = ConfigDict(extra="allow")

    name: str = "cosface"
    """As cosface or sphereface (see margins.BY_NAME), or module.Class of your own; beside it its own parameters."""
    warmup: dict[str, float] | None = None
    """Parameters that go linearly from these values to their own, as {steps: 10000, margin: 0.0}; unset: none."""

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {}) | ({} if self.warmup is None else {"warmup": self.warmup})


class HardNegatives(Section):
    neighbours: int = Field(16, ge=1)
    """Classes nearest to each of the batch's, by the cosine of the class centers, that join the random negatives."""
    every: int = Field(1000, ge=1)
    """Steps between refreshes of the table of nearest classes, each a search of all classes for all; none at step 0."""


class Head(Section):
    margin: MarginChoice = MarginChoice()
    embedding_losses: dict[str, dict[str, Any]] = {}
    """Beside the classifier, as {center: {weight: 0.003}}: center, triplet, contrastive, or your own module.Class."""
    sample_rate: float = Field(1.0, gt=0, le=1)
    """Probability of each negative class in a step; positives come on top."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability with which the head sees 0 instead of a number of an embedding, in training."""
    hard_negatives: HardNegatives | None = None
    """Prefer hard negatives, as {neighbours: 16, every: 1000}; unset: random negatives alone."""
    chunk: int | None = Field(None, ge=1)
    """Rows of logits that exist at once; unset: 1024 to 2048 on a CPU, elsewhere 16384, or 65536 with kernels."""
    cache_bytes: int = Field(0, ge=0)
    """Room on each rank, reserved whole, for (batch, rows in use) numbers that spare the update a matrix product."""
    cache_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of those numbers; bfloat16 takes half the room and rounds the centers' gradient to about 1e-3."""
    matmul_precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """What products round their operands to; sums stay float32. tf32 is for CUDA devices."""
    compile: bool | None = None
    """Elementwise parts by torch.compile, on GPUs by kernels; unset: where it works, from 2^24 numbers in use on."""
    init_std: float | None = Field(None, gt=0)
    """Standard deviation of initial class centers; unset: 1 / sqrt(embedding_dim), centers of length 1."""
    optim: HeadOptim = HeadOptim()

    @model_validator(mode="after")
    def _something_to_prefer(self):
        if self.hard_negatives is not None and self.sample_rate == 1:
            raise ValueError(
                "head.hard_negatives with head.sample_rate 1: every class is a negative already; lower "
                "head.sample_rate, or give head.hard_negatives=null"
            )
        return self


class Optim(Section):
    name: Literal["sgd", "adamw"] = "sgd"
    """Of the backbone: torch's own. Both decay all parameters, biases and norms too, as InsightFace's code does."""
    lr: float = Field(0.1, gt=0)
    """Learning rate at its peak."""
    lr_batch: int | None = Field(None, ge=1)
    """Global batch that both learning rates are stated for: scaled linearly to data.global_batch_size; unset: not."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of sgd."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Of adamw."""
    eps: float = Field(1e-8, gt=0)
    """Of adamw."""
    weight_decay: float = Field(5e-4, ge=0)
    """With sgd part of the gradient, with adamw apart from it, where InsightFace's ViTs have 0.1."""
    clip: float | None = Field(None, gt=0)
    """Largest norm of the backbone's gradient, which is scaled down to it; unset: as it is."""
    clip_jointly: bool = False
    """The norm is over backbone and class centers, both scaled alike; costs a pass over the rows in use, 2 products."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the rate rises linearly from lr / warmup_steps to lr."""
    schedule: Literal["polynomial", "cosine", "constant", "step"] = "polynomial"
    """After the warm-up: lr (1 - progress)^power, lr (1 + cos(pi progress)) / 2, lr, or lr times factor a milestone."""
    power: float = Field(2.0, ge=0)
    """Exponent of the polynomial schedule."""
    milestones: tuple[int, ...] = ()
    """Steps, counted from 0, from which the step schedule's rate is multiplied by factor, once more at each."""
    factor: float = Field(0.1, gt=0, le=1)
    """Of the step schedule."""

    @model_validator(mode="after")
    def _something_to_clip_to(self):
        if self.clip_jointly and self.clip is None:
            raise ValueError("optim.clip_jointly without optim.clip: give the largest norm, as optim.clip=5")
        return self

    @model_validator(mode="after")
    def _milestones_of_steps(self):
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError(
                f"optim.schedule is {self.schedule} and optim.milestones are {list(self.milestones)}: give both "
                "optim.schedule=step and optim.milestones=[16000, 24000], or neither"
            )
        rising = (self.warmup_steps, *self.milestones)
        if any(first >= second for first, second in zip(rising, rising[1:], strict=False)):
            raise ValueError(
                f"optim.milestones are {list(self.milestones)} after {self.warmup_steps} optim.warmup_steps: give "
                "steps that rise, all past the warm-up"
            )
        return self


class Engine(Section):
    name: Literal["ddp", "deepspeed"] = "ddp"
    """torch's DistributedDataParallel, or DeepSpeed (pip install -e '.[deepspeed]'), which partitions the backbone."""
    zero_stage: int = Field(0, ge=0, le=3)
    """Of deepspeed: ranks share out the optimizer's state from 1, gradients from 2, parameters with 3; 0: nothing."""
    offload: bool = False
    """Of deepspeed from zero_stage 1 on: the optimizer's state and its step stay on the host."""
    deepspeed: dict[str, Any] = {}
    """More of DeepSpeed's own config, as {zero_optimization: {sub_group_size: 1000000}}; nothing that we set."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Of the backbone's products. bf16, fp16: autocast; parameters, the last layer and the head stay float32."""
    loss_scale: float = Field(65536.0, gt=0)
    """Of fp16 at the start: halved where gradients overflow, which skips the step, doubled after 2000 steps without."""
    compile: bool = False
    """The backbone by torch.compile, a graph for each batch size: a minute at the start, and again at every resume."""
    channels_last: bool = False
    """Images and feature maps with their channels side by side, as CUDA's 16-bit convolutions like them."""
    checkpoint_activations: bool = False
    """Keep the inputs of the backbone's blocks alone and compute the rest again in backward: less memory, more time."""
    sync_batchnorm: bool = False
    """BatchNorm sees the micro-batch of all ranks. For CUDA devices: torch's has nothing else."""
    deterministic: bool = False
    """On CUDA the same run is the same bit for bit, also one that was killed; slower. On a CPU it is so anyway."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay a step, as 0.9999, of a moving average of the backbone, kept in checkpoints and evaluated beside it."""

    @model_validator(mode="after")
    def _what_the_engine_has(self):
        if self.name == "ddp":
            given = [name for name in ("zero_stage", "offload", "deepspeed") if getattr(self, name)]
            if given:
                raise ValueError(f"engine.{given[0]} is DeepSpeed's: give engine.name=deepspeed too, or leave it out")
            return self
        if self.offload and self.zero_stage == 0:
            raise ValueError("engine.offload with engine.zero_stage 0, which does not have it: give 1, 2 or 3")
        if self.ema is not None and self.zero_stage == 3:
            raise ValueError(
                "engine.ema with engine.zero_stage 3: an average wants whole parameters on every rank; give "
                "engine.zero_stage=2, or engine.ema=null"
            )
        if self.compile:
            raise ValueError("engine.compile is for engine.name=ddp alone: give engine.compile=false")
        return self


class Checkpoint(Section):
    every: int = Field(1000, ge=1)
    """Steps between checkpoints; the last step writes one too."""
    keep: int = Field(2, ge=1)
    """Checkpoints that stay; older ones are deleted when a newer one is complete."""
    dir: Annotated[str | None, AfterValidator(_a_place)] = Field(None, min_length=1)
    """Folder or URL, as s3://bucket/run, of this run's checkpoints and no other's; unset: <run.dir>/checkpoints."""


class Track(Section):
    log_every: int = Field(10, ge=1)
    """Steps between console lines and rows of metrics.jsonl."""
    wandb: Literal["online", "offline", "disabled"] | None = None
    """Unset: online where a key is set, else offline."""
    project: str = "partial_fc"
    """wandb project."""
    tensorboard: bool = False
    """The same numbers for TensorBoard, in <run.dir>/tensorboard; wants the extra tensorboard."""
    profile: tuple[int, int] | None = None
    """Steps, as [100, 105], that the torch profiler records on every rank, the last one excluded; unset: none."""

    @model_validator(mode="after")
    def _steps_to_profile(self):
        if self.profile is not None and not 0 <= self.profile[0] < self.profile[1]:
            raise ValueError(
                f"track.profile {list(self.profile)}: give the first step, counted from 0, and the one after the "
                "last, as [100, 105]"
            )
        return self


class EvaluationSet(Section):
    data: Location
    """Folder of shards, or its URL: all pairs are verified, each sample identified among one per identity; or pairs."""
    distractors: Location | None = None
    """Folder of shards, or its URL, whose identities join the gallery."""
    note: str = ""
    """What the set is, for the report."""


class Evaluate(Section):
    sets: dict[str, EvaluationSet] = {}
    """Name to data."""
    batch_size: int = Field(256, ge=1)
    """Images embedded at once by a rank."""
    untrained: bool = False
    """Evaluate the backbone as it was initialized, too."""
    flip: bool = False
    """Average an image's embedding with its mirror image's."""


class Config(Section):
    run: Run
    data: Data
    backbone: Backbone
    head: Head = Head()
    optim: Optim = Optim()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    track: Track = Track()
    evaluate: Evaluate = Evaluate()


def check_config(values: dict, what: str) -> Config:
    """Nested plain values over the defaults. Raises ValueError, which names `what`, with everything that is wrong."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(problem)}" for problem in error.errors())
        raise ValueError(f"{what} is no valid config:\n{problems}") from None


def _explain(problem: dict) -> str:
    location = tuple(part for part in problem["loc"] if part not in (ONE, SEVERAL))
    name = one_line(".".join(map(str, location)), 80)
    if problem["type"] == "extra_forbidden":
        nearest = _nearest(location)
        hint = f"did you mean {nearest}?" if nearest else f"there are {', '.join(_siblings(location))}"
        return f"{name}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{name}: missing; it has no default, give it in the YAML or as {name}=..."
    message = problem["msg"].removeprefix("Value error, ")
    return message if problem["type"] == "value_error" else f"{name}: got {shortened(problem['input'])}; {message}"


def _nearest(location: tuple) -> str | None:
    """The known key nearest to an unknown one, in its own section first.

    Then in another: there only one of nearly the same name (optim.betas is no help to who wrote track.tags), which no
    two sections have.
    """
    unknown = str(location[-1])
    section = ".".join(map(str, location[:-1]))
    match = difflib.get_close_matches(unknown, _siblings(location), n=1)
    if match:
        return f"{section}.{match[0]}" if section else match[0]
    elsewhere: dict[str, list[str]] = {}
    for key in _keys(Config):
        if len(key) == 2:
            elsewhere.setdefault(key[1], []).append(".".join(key))
    match = difflib.get_close_matches(unknown, elsewhere, n=1, cutoff=0.85)
    found = elsewhere[match[0]] if match else []
    return found[0] if len(found) == 1 else None


def _siblings(location: tuple) -> list[str]:
    """The names of the settings beside the one at `location`; of an item of a list those of any."""
    section = tuple(part for part in location[:-1] if not isinstance(part, int))
    return [str(key[-1]) for key in _keys(Config) if key[:-1] == section]


def _keys(section: type[BaseModel], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append((*prefix, name))
        inner = _section_of(field.annotation)
        if inner is not None:
            keys += _keys(inner, (*prefix, name))
    return keys


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, list):
        return next((found for a in typing.get_args(annotation) if (found := _section_of(a))), None)
    return None
