"""What requests and answers look like: made from the programs' tables wherever these have one."""

import dataclasses
import json
import typing
from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from flux.data.schema import Group, Subset
from flux.server.commands import DETAIL
from flux.server.downloads import MOST_URLS
from flux.server.folders import NAME, PATH
from flux.tables import Bounds
from flux.training.finetune import Options

Name = Annotated[str, Field(pattern=NAME, description="of the dataset and of what is made from it")]
Id = Annotated[
    str | None,
    Field(pattern=NAME, description="yours: the same request with it is answered, not done again"),
]
PathName = Annotated[str, Path(pattern=NAME)]
MOST_SEED = 2**53 - 10  # JSON's numbers are exact up to there, also those of ten pictures
TEXT = 10_000  # signs of a prompt
SIZE = r"^(auto|[1-9][0-9]{1,4}x[1-9][0-9]{1,4})$"


def with_example(**example: Any) -> ConfigDict:
    """The configuration of a request that may have other keys, too, with an example."""
    return ConfigDict(extra="allow", json_schema_extra={"examples": [example]})


def field_of(field: dataclasses.Field, hint: Any) -> tuple[Any, Any]:
    """A field of a table of options as pydantic takes it: never required, with its bounds."""
    bounds: Bounds = field.metadata.get("bounds", Bounds())
    if bounds.choices:
        return Literal[bounds.choices] | None, None  # type: ignore[valid-type]
    limits: dict[str, Any] = {"ge": bounds.least, "gt": bounds.above, "le": bounds.most, "lt": bounds.below}
    limits["multiple_of"] = bounds.multiple
    given = {name: limit for name, limit in limits.items() if limit is not None}
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    kind = kinds[0] if len(kinds) == 1 and kinds[0] in (int, float, str, bool) else Any
    return (Annotated[kind, Field(**given)] if given and kind is not Any else kind) | None, None


def fields_of(*classes: type, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of tables of options, by name."""
    found: dict[str, Any] = {}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.name not in without:
                found[field.name] = field_of(field, hints[field.name])
    return found


# --- Datasets ---


class Body(BaseModel):
    """The body of a request, whose texts can be written into files."""

    @model_validator(mode="before")
    @classmethod
    def _has_whole_characters(cls, values: Any) -> Any:
        try:
            json.dumps(values, ensure_ascii=False, default=repr).encode()
        except UnicodeEncodeError:
            raise ValueError("a text holds half of a character (a lone surrogate)") from None
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        return values


class DownloadRequest(Body):
    """Pictures to put into a dataset."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"urls": ["https://example.com/image1.png"], "output_name": "my_dataset"}]
        }
    )
    urls: list[Annotated[str, Field(min_length=1, max_length=4000)]] = Field(
        min_length=1, max_length=MOST_URLS
    )
    output_name: Name


class DownloadAnswer(BaseModel):
    """files: of each URL (of an upload: each name) the picture's path, or "Error: " and the reason."""

    message: str
    files: dict[str, str]


class CaptionRequest(Body):
    """A dataset to caption."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"output_name": "my_dataset", "trigger_word": "sks dog"}]}
    )
    output_name: Name
    trigger_word: str = Field("", max_length=200)
    prompt: str = Field(DETAIL, min_length=1, max_length=TEXT, pattern=r"\S")
    overwrite: bool = Field(True, description="false keeps the captions that there are")
    id: Id = None


class CaptionAnswer(BaseModel):
    """captions: by the pictures' names."""

    message: str
    captions: dict[str, str]


class Waiting(BaseModel):
    """The job goes on: look at /jobs/ID."""

    message: str
    job_id: str


class DatasetConfigBase(Body):
    """A data.toml: any of its keys."""

    model_config = with_example(
        output_name="my_dataset", trigger_word="sks dog", num_repeats=5, resolution=512
    )
    output_name: Name
    trigger_word: str = Field("", max_length=200)


side = Annotated[int, Field(ge=16, le=16384, multiple_of=16)]
DatasetConfig = create_model(
    "DatasetConfig",
    __base__=DatasetConfigBase,
    **fields_of(Group, Subset, without=("resolution", "class_tokens"))
    | {
        "num_repeats": (Annotated[int, Field(ge=1, le=100_000)], 10),
        "resolution": (side | Annotated[list[side], Field(min_length=2, max_length=2)], 1024),
        "batch_size": (Annotated[int, Field(ge=1, le=65536)], 1),
        "shuffle_caption": (bool, False),
        "caption_extension": (Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,20}$")], ".txt"),
        "keep_tokens": (Annotated[int, Field(ge=0)], 1),
    },
)


class ConfigAnswer(BaseModel):
    """path: of the data.toml."""

    message: str
    path: str


class DatasetView(BaseModel):
    """A dataset: how many pictures, how many of them have captions, and whether it has a data.toml."""

    name: str
    pictures: int
    captioned: int
    has_config: bool


class PictureView(BaseModel):
    """A picture of a dataset: caption is null where it has none."""

    name: str
    caption: str | None
    url: str


class DatasetPictures(BaseModel):
    """The pictures of a dataset."""

    name: str
    pictures: list[PictureView]


class CaptionText(Body):
    """A picture's caption."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"caption": "sks dog, on a red sofa"}]})
    caption: str = Field(min_length=1, max_length=TEXT, pattern=r"\S")


# --- Training ---


class AdapterRequest(BaseModel):
    """name: of a run, of a file of a run (my_model/my_model-0001), or of a file in models/."""

    name: str = Field(max_length=300, pattern=PATH)
    strength: float = Field(1.0, ge=-10, le=10)


class TrainRequestBase(Body):
    """A training: what dreambooth.py takes, under its names or those of other trainers."""

    model_config = with_example(
        output_name="my_model", max_train_epochs=5, learning_rate=8e-4, pretrained_model="flux1-dev.sft",
        clip_l="clip_l.safetensors", t5xxl="t5xxl_fp16.safetensors", ae="ae.sft", network_dim=4,
        save_every_n_epochs=1, enable_bucket=True, full_bf16=False,
    )  # fmt: skip
    output_name: Name
    dataset: Annotated[str | None, Field(pattern=NAME, description="if it is not that of output_name")] = None
    id: Id = None
    max_train_epochs: int | None = Field(None, ge=1, le=10**6)
    network_dim: int | None = Field(None, ge=1, le=2**14)
    save_every_n_epochs: int | None = Field(None, ge=1)
    pretrained_model: str | None = Field(None, description="relative to models/, or a model's name")
    clip_l: str | None = Field(None, description="relative to models/, as t5xxl and ae")
    t5xxl: str | None = None
    ae: str | None = None
    enable_bucket: bool | None = None
    full_bf16: bool | None = None
    adapters: list[AdapterRequest | str] | None = Field(None, description="to begin with")
    progress_prompts: list[str] | str | None = Field(None, description="drawn now and then")
    resolution: int | str | None = Field(None, description="a side, or HEIGHTxWIDTH")


ELSEWHERE = ("data", "data_options", "files", "output_dir", "cache_dir", "name", "mask_dir")
DOCUMENTED = tuple(TrainRequestBase.model_fields)
TrainRequest = create_model(
    "TrainRequest",
    __base__=TrainRequestBase,
    **fields_of(Options, Group, Subset, without=(*ELSEWHERE, *DOCUMENTED)),
)


class TrainAnswer(BaseModel):
    """run_id: of the job. notes: what of the request is not used, and why."""

    message: str
    run_id: str
    notes: list[str] = []


class Status(BaseModel):
    """progress: 0 to 1. loss: of the last update. logs: the last 10 lines."""

    run_id: str
    state: str
    progress: float
    loss: float | None
    message: str
    logs: list[str]


# --- Jobs ---


class TrainJob(BaseModel):
    """A training, as /train takes it."""

    kind: Literal["train"]
    request: TrainRequest  # type: ignore[valid-type]


class CaptionJob(BaseModel):
    """Captions, as /caption-images takes them."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"kind": "caption", "request": {"output_name": "my_dataset", "id": "monday"}}]
        }
    )
    kind: Literal["caption"]
    request: CaptionRequest


JobRequest = Annotated[TrainJob | CaptionJob, Field(discriminator="kind")]


class JobView(BaseModel):
    """A job. Times are seconds since 1970; progress is 0 to 1; the numbers are those of the last update."""

    id: str
    kind: str
    name: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    message: str
    created: float
    started: float | None
    ended: float | None
    progress: float
    iteration: int | None
    iterations: int | None
    loss: float | None


class JobDetail(JobView):
    """A job with its request and the last lines that its program printed."""

    request: dict[str, Any]
    logs: list[str]


class FileView(BaseModel):
    """A file of a run."""

    name: str
    kind: Literal["adapter", "sample", "plot", "numbers", "options"]
    bytes: int
    changed: float
    url: str


class Deleted(BaseModel):
    """What is gone."""

    message: str


class AdapterView(BaseModel):
    """An adapter: `name` is what a request for pictures names it by."""

    name: str
    bytes: int
    changed: float
    url: str


class Error(BaseModel):
    """One sentence, also in the form that OpenAI's clients read."""

    detail: str
    error: dict[str, Any]


# --- Pictures ---


Unused = Annotated[str | None, Field(description="taken, as clients send it, without effect")]


class PictureRequest(Body):
    """A request of OpenAI's images API; from `seed` on the fields are this server's."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"prompt": "a red apple", "size": "512x512", "n": 1, "seed": 1, "steps": 20}]
        },
    )
    prompt: str = Field(min_length=1, max_length=TEXT, pattern=r"\S")
    model: str | None = Field(
        None, max_length=300, pattern=PATH, description="of /v1/models; OpenAI's names: the server's"
    )
    n: int = Field(1, ge=1, le=10)
    size: str | None = Field(None, pattern=SIZE, description="WIDTHxHEIGHT, or auto")
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="of jpeg and webp")
    background: Literal["opaque", "auto"] | None = None
    quality: Unused = None
    style: Unused = None
    moderation: Unused = None
    input_fidelity: Unused = None
    user: Unused = None
    stream: bool = False
    partial_images: int | None = Field(None, ge=0, le=3)
    seed: int | None = Field(
        None, ge=0, le=MOST_SEED, description="of the first picture; the next have the next"
    )
    steps: int | None = Field(None, ge=1, le=500)
    guidance: float | None = Field(None, ge=0, le=100)
    negative_prompt: str | None = Field(None, max_length=TEXT)
    cfg_scale: float | None = Field(None, ge=1, le=100)
    adapters: list[AdapterRequest] = Field([], max_length=16)
    keep_alive: float | None = Field(
        None, ge=-1, le=10**7, description="seconds that the model stays; -1: ever"
    )


class EditRequest(PictureRequest):
    """The fields of a form beside its files."""

    strength: float | None = Field(None, ge=0, le=1, description="how much changes")


class Made(BaseModel):
    """A picture: the base64 of its file."""

    b64_json: str
    seed: int


class PicturesAnswer(BaseModel):
    """OpenAI's answer, with the seeds that make the same pictures again."""

    created: int
    data: list[Made]
    seeds: list[int]
    model: str
    size: str
    output_format: str


class ModelView(BaseModel):
    """A model as OpenAI's API shows it."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "flux-mlx"


class ModelList(BaseModel):
    """The models that there are."""

    object: Literal["list"] = "list"
    data: list[ModelView]
