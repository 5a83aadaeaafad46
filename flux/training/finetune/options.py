"""The options of a fine-tuning, and which of them may change when it is resumed."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flux import tables
from flux.adapters.writers import WRITERS
from flux.data import schema
from flux.errors import FluxError
from flux.outputs import name_fault
from flux.tables import option
from flux.training import losses, optimizers, schedules
from flux.training.flow_matching import DELTA_SCHEDULES
from flux.training.trainer import MAX_SEED
from flux.weights import registry

QUANTIZE = {"8": (8, "affine"), "4": (4, "affine"), "mxfp4": (4, "mxfp4")}  # -> bits, mode
PARTS = ("transformer", "ae", "clip", "t5")
AUTO = "auto"
ITERATIONS = 1000  # where neither iterations nor epochs are given
WARMUP = 100  # updates at most, and a tenth of all
MOST_ITERATIONS = 10**6  # weeks of work; and what is counted from them stays within 32 bits
MOST_RANK = 2**14  # of no layer of FLUX.1 is the least side longer
SMALL = 256  # a resolution below the usual smallest bucket
# What changes neither the result nor its meaning: these may be given anew when a run is resumed. A data set
# may have moved; that it is the same one is seen from its digest.
CHANGEABLE = (
    *("iterations", "epochs", "format", "save_every", "save_every_epochs", "state_every", "keep_states"),
    *("shard_base", "data", "trigger", "cache_dir"),
    *("log_every", "validate_every", "progress_prompts", "progress_every", "progress_seed"),
)


@dataclass(frozen=True)
class Options:
    """Everything that a fine-tuning depends on. None: by the model or by other options, see `resolved`."""

    data: str  # a folder, a list, a data.toml or a data set of the Hub
    data_options: dict[str, Any] = field(default_factory=dict)  # of flux.data.schema
    output_dir: str = "mlx_output"
    cache_dir: str | None = None  # output_dir/cache
    name: str | None = None  # of the adapter's files

    model: str = "dev"
    files: dict[str, str] = field(default_factory=dict)  # part -> file
    dtype: str | None = option(None, choices=("float32", "bfloat16", "float16"))
    quantize: str | None = option(None, choices=tuple(QUANTIZE))
    adapters: tuple[tuple[str, float], ...] = ()  # files and strengths to begin with; they are not trained
    fuse_adapters: bool = False

    rank: int = option(16, least=1, most=MOST_RANK)
    alpha: float | None = option(None, above=0)  # the rank
    dropout: float = option(0.0, least=0, below=1)
    targets: str = "attention-mlp"
    last_blocks: int | None = option(None, least=1)
    dora: bool = False
    train_clip: bool = False

    iterations: int | None = option(None, least=1, most=MOST_ITERATIONS)  # of each rank; see `Length`
    epochs: int | None = option(None, least=1, most=MOST_ITERATIONS)
    accumulate: int = option(1, least=1, most=MOST_ITERATIONS)
    optimizer: str = option("adamw", choices=optimizers.OPTIMIZERS)
    learning_rate: float | None = option(None, above=0)  # 1e-4; Prodigy 1
    schedule: str = option("constant", choices=schedules.SCHEDULES)
    restarts: int = option(1, least=1)
    warmup: int | None = option(None, least=0)  # updates
    weight_decay: float | None = option(None, least=0)  # 0.01 for AdamW, else 0
    adam_beta1: float | None = option(None, least=0, below=1)  # None: the optimizer's, as in the next two
    adam_beta2: float | None = option(None, least=0, below=1)
    adam_epsilon: float | None = option(None, above=0)
    clip_norm: float = option(1.0, least=0)  # 0: none
    ema: float | None = option(None, least=0, below=1)
    # auto: schnell's four times for a model of its kind, else sigmoid
    time_sampling: str = option(AUTO, choices=(AUTO, *losses.TIME_SAMPLING))
    time_scale: float = option(1.0, above=0)  # of sigmoid, shift and flux_shift
    time_mean: float = option(0.0)  # of logit_normal, as time_std
    time_std: float = option(1.0, above=0)
    loss: str = option("mse", choices=tuple(losses.LOSSES))
    delta: float = option(0.1, above=0)  # of huber and smooth_l1
    delta_schedule: str = option("constant", choices=DELTA_SCHEDULES)
    guidance: float = option(1.0, least=0)
    prior_weight: float = option(1.0, least=0)
    grad_checkpoint: bool = False
    shard_base: bool = False  # over the ranks; with grad_checkpoint
    seed: int = option(0, least=0, most=MAX_SEED)

    log_every: int | None = option(None, least=1)  # iterations, as the following; a twentieth of the run
    validate_every: int = option(100, least=1)
    progress_prompts: tuple[str, ...] = ()
    progress_every: int = option(500, least=1)
    progress_seed: int = option(0, least=0, most=MAX_SEED)
    save_every: int | None = option(None, least=1)
    save_every_epochs: int | None = option(None, least=1)
    format: str = option("native", choices=tuple(WRITERS))
    trigger: str | None = None
    state_every: int = option(200, least=1)
    keep_states: int = option(2, least=1)

    def __post_init__(self) -> None:
        faults = [f"{shown(name)} {fault}" for name, fault in tables.faults_of(self).items()]
        if self.name is not None and (fault := name_fault(self.name)):
            faults.append(f"--name {self.name!r} {fault}")
        if self.iterations is not None and self.epochs is not None:
            faults.append("give iterations or epochs, not both")
        if self.fuse_adapters and not self.adapters:
            faults.append("--fuse-adapter needs an adapter; name it with --adapter")
        if self.shard_base and self.dora:
            faults.append("--shard-base does not go with --dora, which needs whole weights at every step")
        if not all(prompt.strip() for prompt in self.progress_prompts):
            faults.append("a progress prompt is empty; say what the picture should show")
        if faults:
            raise FluxError("; ".join(faults))
        schema.check_defaults(self.data_options)

    @property
    def peak_rate(self) -> float:
        """The learning rate, also where the optimizer decides it."""
        return self.learning_rate or (1.0 if self.optimizer == "prodigy" else 1e-4)

    @property
    def file(self) -> str:
        """The name of the adapter's file at the end."""
        return f"{self.name or 'final_adapters'}.safetensors"

    def resolved(self) -> "Options":
        """With what follows from other options filled in, and files by their whole paths."""
        adamw = self.optimizer == "adamw"
        model = _absolute(self.model) if registry.find(self.model) is None else self.model
        return replace(
            self,
            data=_absolute(self.data),
            model=model,
            files={part: _absolute(file) for part, file in self.files.items()},
            adapters=tuple((_absolute(file), strength) for file, strength in self.adapters),
            iterations=ITERATIONS if self.iterations is None and self.epochs is None else self.iterations,
            alpha=float(self.rank) if self.alpha is None else self.alpha,
            learning_rate=self.peak_rate,
            weight_decay=(0.01 if adamw else 0.0) if self.weight_decay is None else self.weight_decay,
        )

    @property
    def quantization(self) -> tuple[int | None, str]:
        """Bits and mode of the base's weights; None for weights as they are."""
        return (None, "affine") if self.quantize is None else QUANTIZE[self.quantize]

    def with_size(self, image_size: tuple[int, int]) -> dict[str, Any]:
        """The data set's options where the model's pictures have this (height, width) by default.

        The usual bounds of buckets are widened where the resolution is outside of them.
        """
        given = {name: value for name, value in self.data_options.items() if value is not None}
        resolution = given.setdefault("resolution", image_size)
        if min(resolution) < SMALL:
            given.setdefault("min_bucket_reso", max(schema.SIZE_STEP, min(resolution) // 32 * 16))
            given.setdefault("bucket_reso_steps", schema.SIZE_STEP)
        given.setdefault("max_bucket_reso", max(1024, *resolution))
        return given

    def as_table(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_table(cls, table: dict[str, Any]) -> "Options":
        """The inverse of `as_table`."""
        table = dict(table)
        table["adapters"] = tuple((file, strength) for file, strength in table["adapters"])
        table["progress_prompts"] = tuple(table["progress_prompts"])
        data = table["data_options"]
        if data.get("resolution"):
            data["resolution"] = tuple(data["resolution"])
        return cls(**table)

    def shared_out(self, before: int, now: int) -> "Options":
        """The same training on another number of ranks: as many batches an update and in all.

        What is counted in iterations, of each rank, is counted anew. FluxError where an update's batches
        cannot be shared out evenly.
        """
        batches = self.accumulate * before
        if batches % now:
            raise FluxError(
                f"an update of this run takes {batches} batches, which {now} ranks cannot share out evenly: "
                f"start a number of ranks that divides {batches}"
            )
        counted = ("iterations", "validate_every", "progress_every", "save_every", "state_every")
        given = {name: getattr(self, name) for name in counted if getattr(self, name) is not None}
        given = {name: -(-value * before // now) for name, value in given.items()}
        return replace(self, accumulate=batches // now, **given)

    def changed(self, changes: dict[str, Any]) -> "Options":
        """For a resumed run: with the options that were given anew. FluxError for those that contradict."""
        wrong = []
        for name, value in changes.items():
            ours = getattr(self, name)
            same = value == ours or (isinstance(value, str) and _absolute(value) == ours)
            if isinstance(ours, dict):
                same = all(ours.get(key) == each for key, each in value.items())
            if not same and name not in CHANGEABLE:
                wrong.append(f"{shown(name)} {_words(value)} (the run has {_words(ours)})")
        if wrong:
            raise FluxError(
                f"another {', another '.join(wrong)} makes another run: leave it out, or start anew with "
                f"another --output-dir"
            )
        given = {name: value for name, value in changes.items() if name in CHANGEABLE}
        if "data" in given:
            given["data"] = _absolute(given["data"])
        if given.keys() & {"iterations", "epochs"}:
            given = {"iterations": None, "epochs": None, **given}
        new = replace(self, **given)
        longer = (new.iterations, new.epochs) != (self.iterations, self.epochs)
        if longer and self.schedule != "constant":
            raise FluxError(
                f"the schedule {self.schedule} depends on the run's length, which therefore cannot change"
            )
        return new


def shown(name: str) -> str:
    """An option as the command line calls it."""
    other = {
        "accumulate": "grad-accumulate",
        "targets": "lora-targets",
        "last_blocks": "lora-blocks",
        "rank": "lora-rank",
        "alpha": "lora-alpha",
        "dropout": "lora-dropout",
        "adapters": "adapter",
        "fuse_adapters": "fuse-adapter",
        "progress_prompts": "progress-prompt",
        "schedule": "lr-schedule",
        "delta": "huber-delta",
        "delta_schedule": "huber-schedule",
        "num_repeats": "repeats",
        "class_tokens": "class-prompt",
        "enable_bucket": "buckets",
        "bucket_no_upscale": "no-upscale",
        "flip_aug": "flip",
        "caption_dropout_rate": "caption-dropout",
    }
    return "--" + other.get(name, name.replace("_", "-"))


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items()) or "none"
    return "none" if value is None else str(value)


def _absolute(path: str) -> str:
    """A path that exists, from the root: the run may be resumed from another folder."""
    expanded = Path(path).expanduser()
    return str(expanded.absolute()) if expanded.exists() else path
