"""The config of a training from scratch: what may stand in the file, and the file read into it.

Sections: `model` (sizes), `data` (pictures, captions), `datasets` by name and `default_dataset`, `training`
and in it `pipeline` (`steps`, `defaults`), `output`. Without `pipeline` the keys of a step stand in
`training` itself, and without `datasets` the data are `data.data_path`. A step looks a key up in its
table, then in `pipeline.defaults`, then in `training`, then here.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux.errors import FluxError
from flux.models.autoencoder import AutoEncoderParams
from flux.models.clip import CLIPTextParams
from flux.models.t5 import T5Params
from flux.models.transformer import FluxParams
from flux.tables import Faults, field_names, limits, nearest, option, partly, read
from flux.training.optimizers import CONFIGURED, DEFAULT_RATE
from flux.training.pretrain.adversary import DiscriminatorParams
from flux.training.pretrain.datasets import DATASETS, Local
from flux.training.schedules import SCHEDULERS

# What a step can train, and the groups that have an optimizer each.
GROUPS = {
    "vae": ("encoder", "decoder", "spade"),
    "discriminator": ("discriminator",),
    "flow": ("flow",),
    "text_encoder": ("clip", "t5"),
}
COMPONENTS = tuple(component for group in GROUPS.values() for component in group)
FREEZABLE = tuple(dict.fromkeys([*COMPONENTS, *GROUPS]))
UNSCALED = AutoEncoderParams(scale_factor=1.0, shift_factor=0.0)  # before latents have been measured


@dataclass(frozen=True)
class LpipsFiles:
    """Local files (.safetensors or .pth) or `hf://owner/repository/file`; looked for where not given.

    vgg: VGG16's convolutions under torchvision's names. linear: the learned weights of the `lpips` package
    (`lpips/weights/v0.1/vgg.pth` in its wheel).
    """

    linear: str | None = None
    vgg: str | None = None


@dataclass(frozen=True)
class Model:
    """Sizes. Channels that two networks share follow from one of them and are not keys."""

    autoencoder: AutoEncoderParams = field(
        default_factory=lambda: AutoEncoderParams(scale_factor=1.0, shift_factor=0.0)
    )
    discriminator: DiscriminatorParams = field(default_factory=DiscriminatorParams)
    transformer: FluxParams = field(default_factory=FluxParams)
    clip: CLIPTextParams = field(default_factory=CLIPTextParams)
    t5: T5Params = field(default_factory=T5Params)
    t5_length: int = option(256, least=1)
    clip_merges: int = option(8000, least=0)  # of the vocabulary trained on the captions
    t5_vocabulary: int = option(8000, least=8)
    tokenizer: str | None = None  # folders of vocabularies that are there already
    tokenizer_2: str | None = None
    lpips: LpipsFiles = LpipsFiles()


DERIVED = {
    "autoencoder": ("in_channels", "out_ch", "scale_factor", "shift_factor"),
    "transformer": ("in_channels", "out_channels", "vec_in_dim", "context_in_dim"),
    "clip": ("vocab_size",),
    "t5": ("vocab_size",),
}


@dataclass(frozen=True)
class Data:
    """The pictures of the default data set, and how they are shown.

    img_size: the side of what the model draws by default and, without `img_sizes`, of what it is trained on.
    reduced_min_sizes: other sides that every picture is trained on as well.
    img_sizes: buckets instead, a side or [width, height] each. A picture goes to the one with the nearest
    ratio of width to height; of several with that ratio to the largest that is not larger than it is.
    """

    data_path: str | None = None
    captions_file: str | None = None
    img_size: int = option(256, least=8)
    reduced_min_sizes: tuple[int, ...] = option((), least=8)
    img_sizes: tuple[int | tuple[int, int], ...] = option((), least=8)
    fixed_prompt_prefix: str = ""

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """(height, width) of each of `img_sizes`."""
        return heights_and_widths(self.img_sizes)

    @property
    def trained_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of all sizes that pictures are trained at."""
        return self.buckets or [(side, side) for side in (self.img_size, *self.reduced_min_sizes)]

    def prompt(self, caption: str) -> str:
        """The caption after the prefix, as a separate sentence unless the prefix goes on into it."""
        prefix = self.fixed_prompt_prefix
        if not prefix or not caption or prefix[-1].isspace():
            return prefix + caption
        return f"{prefix} {caption}" if prefix[-1] in ".,:;!?" else f"{prefix}. {caption}"


@dataclass(frozen=True)
class Output:
    """Where a run writes, how often, and what it draws."""

    output_path: str
    log_interval: int = option(10, least=1)  # steps
    checkpoint_save_interval: int | str = 500  # steps, or "10 minutes"
    keep_checkpoints: int = option(2, least=1)
    samples_per_checkpoint: int = option(4, least=0)
    sample_sizes: tuple[int | tuple[int, int], ...] = ()  # a side or [width, height]; the data's if empty
    sample_captions: tuple[str, ...] = ()  # the data's if empty
    test_image_address: tuple[str, ...] = ()  # pictures to be reconstructed; the data's if empty
    sample_steps: int = option(20, least=1)
    sample_cfg_scale: float = option(3.0, least=1)


@dataclass(frozen=True)
class Optimization:
    """Optimizers and schedulers by group; AdamW and a constant rate where none is given."""

    optimizers: dict[str, Any] = field(
        default_factory=dict, metadata=limits(choices=tuple(GROUPS), kinds=CONFIGURED)
    )
    schedulers: dict[str, Any] = field(
        default_factory=dict, metadata=limits(choices=tuple(GROUPS), kinds=SCHEDULERS)
    )


@dataclass(frozen=True)
class Transition:
    """When a step ends: after its epochs, or when an epoch's mean of `metric` is at most `threshold`."""

    mode: str = option("epoch", choices=("epoch", "loss_threshold"))
    metric: str | None = None
    threshold: float | None = None
    max_epochs: int | None = option(None, least=1)


@dataclass(frozen=True)
class Step:
    """One step of the pipeline: what it trains, on which losses, for how long.

    max_steps: updates in all; beside n_epochs, batches of each epoch.
    """

    name: str
    description: str = ""
    n_epochs: int | None = option(None, least=1)
    max_steps: int | None = option(None, least=1)
    dataset: str | None = None
    train_vae: bool = False
    gan_training: bool = False
    use_lpips: bool = False
    train_spade: bool = False
    train_diff: bool = False
    train_text_encoders: bool = False
    use_ema: bool = False
    ema_decay: float = option(0.9999, above=0, below=1)
    cfg_dropout_prob: float = option(0.1, least=0, most=1)
    time_shift: float = option(1.0, above=0)  # of the flow's times, towards the noise
    freeze: tuple[str, ...] = option((), choices=FREEZABLE)
    unfreeze: tuple[str, ...] = option((), choices=FREEZABLE)
    # Of the autoencoder's batches `crop_share` are squares of `crop_size` pixels, cut out of the pictures on
    # the grid of the latents where there is most to see, as many as have the pixels of the whole pictures.
    crop_size: int | None = option(None, least=8)
    crop_share: float = option(1.0, above=0, most=1)
    batch_size: int = option(8, least=1)  # a process
    gradient_accumulation_steps: int = option(1, least=1)  # batches an update
    clip_norm: float | None = option(None, above=0)  # the greatest norm of all gradients together
    use_fp16: bool = False  # networks compute in bfloat16; parameters and optimizers stay in float32
    # `mx.compile` of the step. Not in `repr`, as `workers`: the result differs by rounding alone.
    compile: bool = field(default=True, repr=False)
    # Threads that read pictures. Not in `repr`: what a run comes to does not depend on them.
    workers: int = field(default=2, repr=False, metadata=limits(least=0))
    lr: float = option(DEFAULT_RATE, above=0)
    lr_min: float | None = option(None, least=0, most=1)  # share of lr to which it falls without a scheduler
    kl_beta: float = option(1e-4, least=0)
    kl_warmup_steps: int = option(5000, least=0)
    kl_free_bits: float = option(0.0, least=0)
    lambda_adv: float = option(0.5, least=0)
    lambda_lpips: float = option(0.1, least=0)
    mse_weight: float = option(0.1, least=0)
    r1_interval: int = option(16, least=1)
    r1_gamma: float = option(5.0, least=0)
    instance_noise_std: float = option(0.0, least=0)
    optimization: Optimization = Optimization()
    transition_on: Transition = Transition()

    @property
    def epochs(self) -> int | None:
        """How many there are at most; None where max_steps alone says how long the step is."""
        given = [n for n in (self.n_epochs, self.transition_on.max_epochs) if n is not None]
        return min(given, default=None)

    @property
    def decodes(self) -> bool:
        """Whether pictures go through the autoencoder and back."""
        return self.train_vae or self.gan_training or self.train_spade

    @property
    def reconstructs(self) -> bool:
        """Whether pictures are compared with what comes back; not in a GAN alone, with SPADE or without."""
        return self.train_vae or (self.train_spade and not self.gan_training)

    @property
    def encodes_once(self) -> bool:
        """Whether all that the step needs of a picture is its latent, from an autoencoder that stays."""
        return self.train_diff and not self.decodes and "encoder" not in self.trained

    @property
    def trained(self) -> frozenset[str]:
        """The components that this step moves."""
        chosen: set[str] = set()
        if self.train_vae or self.gan_training:
            chosen |= {"encoder", "decoder"}
        chosen |= {"spade"} if self.train_spade else set()
        chosen |= {"discriminator"} if self.gan_training else set()
        chosen |= {"flow"} if self.train_diff else set()
        chosen |= {"clip", "t5"} if self.train_text_encoders else set()
        return frozenset(chosen - expand(self.freeze) | expand(self.unfreeze))

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups with a component that this step moves, in the order of GROUPS."""
        return tuple(group for group, parts in GROUPS.items() if self.trained & set(parts))


@dataclass(frozen=True)
class Training:
    """What holds for all steps."""

    seed: int = option(0, least=0, most=2**31 - 1)


@dataclass(frozen=True)
class Config:
    """A whole config, read."""

    model: Model
    data: Data
    training: Training
    steps: tuple[Step, ...]
    datasets: dict[str, Any]
    default_dataset: str | None
    model_checkpoint: str | None  # the folder of a run, or a file in it, with whose networks this one begins
    output: Output
    tables: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # as they were read

    def dataset_of(self, step: Step) -> str:
        """The name of the data set that a step is trained on."""
        return step.dataset or self.default_dataset or next(iter(self.datasets))


class ConfigError(FluxError):
    """A config with faults; `faults` has a line for each."""

    def __init__(self, path: Path, faults: list[str]):
        super().__init__(f"{path}: {'; '.join(faults)}")
        self.faults = faults


def heights_and_widths(sizes: tuple[int | tuple[int, int], ...]) -> list[tuple[int, int]]:
    """(height, width) of each of a config's sides or [width, height]."""
    return [(size[1], size[0]) if isinstance(size, tuple) else (size, size) for size in sizes]


def expand(names: tuple[str, ...]) -> set[str]:
    """Components and groups -> components. `spade` comes by its name only, being off by default."""
    parts = {part for name in names for part in GROUPS.get(name, (name,))}
    return parts - {"spade"} | {"spade"} & set(names)


def read_config(raw: dict[str, Any], faults: Faults) -> Config | None:
    """The config that a file's tables say, with lines in `faults` where single keys are wrong.

    These have their defaults then, so that the rest can still be checked; None where that is impossible.
    """
    sections = ("model", "data", "datasets", "default_dataset", "training", "output", "model_checkpoint")
    for name in raw:
        if name not in sections:
            faults.add("", f"unknown section {name!r}{nearest(str(name), sections)}")
    texts = {name: raw.get(name) for name in ("default_dataset", "model_checkpoint")}
    for name, text in texts.items():
        if not isinstance(text, (str, type(None))):
            faults.add(name, f"must be a text, not {text!r}")
    tables = {name: raw.get(name) or {} for name in sections if name not in texts}
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            faults.add(name, f"must be a table of keys, not {table!r}")
            return None
    training, steps = _split_training(tables["training"], faults)
    read_steps = (_step(step, i, defaults, faults) for i, (step, defaults) in enumerate(steps))
    parts = {
        "model": _model(tables["model"], faults),
        "data": _read(Data, tables["data"], "data", faults),
        "training": _read(Training, training, "training", faults),
        "steps": tuple(step for step in read_steps if step is not None),
        "datasets": _datasets(tables["datasets"], tables["data"], faults),
        **texts,
        "output": _read(Output, tables["output"], "output", faults),
        "tables": raw,
    }
    return None if None in (parts["model"], parts["data"], parts["output"]) else Config(**parts)


def _read(cls: type, table: Any, where: str, faults: Faults) -> Any:
    return read(cls, table, where, faults) or partly(cls, table)


def read_datasets(raw: Mapping) -> dict[str, Any]:
    """The data sets of a file that may have faults elsewhere; none where its tables are wrong."""
    named, data = raw.get("datasets") or {}, raw.get("data") or {}
    is_read = isinstance(named, Mapping) and isinstance(data, Mapping)
    return _datasets(named, data, Faults()) if is_read else {}


def _split_training(training: Mapping, faults: Faults) -> tuple[dict, list]:
    """The keys of the whole training, and the tables of its steps, each with that of its defaults."""
    of_step, of_all = field_names(Step), field_names(Training)
    shared = {k: v for k, v in training.items() if k in of_step}
    of_training = {k: v for k, v in training.items() if k in of_all}
    for name in training:
        if name not in (*of_step, *of_all, "pipeline"):
            text = f"unknown key {name!r}{nearest(str(name), [*of_all, *of_step, 'pipeline'])}"
            faults.add("training", text)
    if "pipeline" not in training:
        return of_training, [({"name": "train", **shared}, {})]
    pipeline = training["pipeline"]
    if not isinstance(pipeline, Mapping) or not isinstance(pipeline.get("steps"), list):
        faults.add("training.pipeline", "must be a table with a list of 'steps'")
        return of_training, []
    for name in pipeline:
        if name not in ("steps", "defaults"):
            text = f"unknown key {name!r}{nearest(str(name), ('steps', 'defaults'))}"
            faults.add("training.pipeline", text)
    if not pipeline["steps"]:
        faults.add("training.pipeline", "'steps' is empty")
    defaults = {**shared, **(pipeline.get("defaults") or {})}
    return of_training, [(step, defaults) for step in pipeline["steps"]]


def _inherit(step: Any, defaults: Mapping[str, Any]) -> Any:
    """A step's table with its defaults, of which its `unfreeze` takes back what they freeze."""
    if not isinstance(step, Mapping):
        return step
    table = {**defaults, **step}
    frozen, unfrozen = table.get("freeze"), step.get("unfreeze")
    if "freeze" not in step and isinstance(frozen, (list, tuple)) and isinstance(unfrozen, (list, tuple)):
        table["freeze"] = [name for name in frozen if name not in unfrozen]
    return table


def _step(table: Any, index: int, defaults: Mapping[str, Any], faults: Faults) -> Step | None:
    """A step from its table and its defaults, of which optimizers of what it does not train are left out."""
    name = table.get("name") if isinstance(table, Mapping) else None
    where = f'step "{name}"' if name else f"step {index + 1}"
    step = _read(Step, _inherit(table, defaults), where, faults)
    if step is None or "optimization" in table:
        return step
    chosen = step.optimization
    return dataclasses.replace(
        step,
        optimization=Optimization(
            {group: v for group, v in chosen.optimizers.items() if group in step.groups},
            {group: v for group, v in chosen.schedulers.items() if group in step.groups},
        ),
    )


def _model(table: Mapping, faults: Faults) -> Model | None:
    """Reads each network's table apart, because some of its fields are derived."""
    networks, defaults = {}, Model()
    for name, derived in DERIVED.items():
        default = getattr(defaults, name)
        given = read(type(default), table.get(name) or {}, f"model.{name}", faults, derived)
        if given is not None:
            networks[name] = dataclasses.replace(given, **{k: getattr(default, k) for k in derived})
    rest = {k: v for k, v in table.items() if k not in DERIVED}
    model = _read(Model, rest, "model", faults)
    return model and dataclasses.replace(model, **networks)


def _datasets(table: Mapping, data: Mapping, faults: Faults) -> dict[str, Any]:
    """The data sets by name; `data.data_path` is one more, called "data"."""
    hold = read(_Datasets, {"datasets": table}, "", faults)
    found = dict(hold.datasets) if hold else {}
    if isinstance(data.get("data_path"), str):
        found["data"] = Local(data["data_path"], data.get("captions_file"))
    return found


@dataclass(frozen=True)
class _Datasets:
    datasets: dict[str, Any] = field(default_factory=dict, metadata=limits(kinds=DATASETS))
