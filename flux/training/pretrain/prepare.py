"""What a run of pretraining needs before its steps: data, vocabularies, networks, the scale of latents."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from flux import known_words
from flux.data import pictures
from flux.data.buckets import Size
from flux.data.sources import Pictures, unreadable
from flux.distributed.ranks import DOWNLOAD, Ranks
from flux.errors import FluxError
from flux.known_words import KnownWords
from flux.training.matmul_convolution import use_products
from flux.training.pretrain import lpips
from flux.training.pretrain.batches import Batches
from flux.training.pretrain.config import Config, Step
from flux.training.pretrain.datasets import Drawn, open_dataset
from flux.training.pretrain.encoded import Encoded
from flux.training.pretrain.encoded import identity as encoded_identity
from flux.training.pretrain.losses import encode
from flux.training.pretrain.networks import Networks, Tokenizers
from flux.training.report import write_whole
from flux.training.vocabularies import save_clip, train_clip, train_t5

LATENTS = "latents"  # the folder
CONFIG = "run.json"  # what the run was begun or gone on with
MEASURED_PICTURES = 1024  # for the latents' mean and deviation


@dataclass(frozen=True)
class Prepared:
    """sources: the data sets by name. perceptual: LPIPS, where a step uses it."""

    sources: dict[str, Pictures]
    tokenizers: Tokenizers | None
    networks: Networks
    perceptual: lpips.LPIPS | None


def prepare(config: Config, folder: Path, ranks: Ranks, is_new: bool, quiet: bool) -> Prepared:
    """Opens the data, trains vocabularies that are not there yet, makes networks with random weights.

    is_new: whether the run begins, so that all pictures are looked at; else they have been seen.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FluxError(f"output.output_path: {folder} cannot be made: {error.strerror}") from None
    ranks.rank_zero_only(
        lambda: write_whole(folder / CONFIG, json.dumps(config.tables, indent=1, default=str))
    )
    used = dict.fromkeys(config.dataset_of(step) for step in config.steps)
    sources = {name: open_dataset(config.datasets[name]) for name in used}
    if is_new:
        read = {name: s for name, s in sources.items() if not isinstance(config.datasets[name], Drawn)}
        ranks.on_all_ranks(lambda: check_pictures(read, ranks, quiet), DOWNLOAD)
    tokenizers = open_tokenizers(config, folder, sources, ranks)
    mx.random.seed(config.training.seed)
    networks = Networks(config, tokenizers)
    perceptual = None
    if any(step.use_lpips for step in config.steps):
        perceptual = lpips.load(*lpips.find(config.model.lpips.vgg, config.model.lpips.linear))
    if mx.default_device() == mx.cpu:  # elsewhere MLX's convolutions are the faster ones
        use_products(networks.ae)
        if perceptual is not None:
            use_products(perceptual)
    return Prepared(sources, tokenizers, networks, perceptual)


def check_pictures(sources: dict[str, Pictures], ranks: Ranks, quiet: bool) -> None:
    """FluxError with all pictures that cannot be read, before hours of training; each rank takes its part."""
    pictures.refuse(
        [
            fault
            for source in sources.values()
            for fault in unreadable(source, range(ranks.rank, len(source), ranks.size), quiet)
        ]
    )


# --- vocabularies ---


def open_tokenizers(
    config: Config, folder: Path, sources: dict[str, Pictures], ranks: Ranks
) -> Tokenizers | None:
    """The config's, or ones that are trained on the captions; None where no step trains the flow."""
    texts = {text for source in flow_sources(config, sources) for text in prompts(config, source)}
    if not texts:
        return None
    clip, t5 = (folder / "vocabularies" / name for name in ("tokenizer", "tokenizer_2"))

    def train() -> None:
        if config.model.tokenizer is None and not clip.is_dir():
            vocab, merges = train_clip(sorted(texts), config.model.clip_merges)
            _whole(clip, lambda new: save_clip(vocab, merges, new))
        if config.model.tokenizer_2 is None and not t5.is_dir():
            size = config.model.t5_vocabulary
            _whole(t5, lambda new: train_t5(sorted(texts), size, new / "spiece.model"))

    ranks.rank_zero_only(train)  # the others wait for the files
    return trained_tokenizers(config, folder)


def flow_sources(config: Config, sources: dict[str, Pictures]) -> list[Pictures]:
    """The data sets that the flow is trained on."""
    names = dict.fromkeys(config.dataset_of(step) for step in config.steps if step.train_diff)
    return [sources[name] for name in names]


def prompts(config: Config, source: Pictures) -> Iterator[str]:
    """All captions of a data set, as they are trained on."""
    return (config.data.prompt(caption) for caption in source.captions)


def known_by(config: Config, sources: dict[str, Pictures]) -> KnownWords | None:
    """The words and sizes that the flow was trained on here and in the run that it began with, if any."""
    found = None
    if config.model_checkpoint is not None:
        found = known_words.read(Path(config.model_checkpoint).expanduser() / "model")
    sides = [side for size in config.data.trained_sizes for side in size]
    for source in flow_sources(config, sources):
        subjects = getattr(source, "subjects", {})
        known = KnownWords.of(prompts(config, source), subjects, (min(sides), max(sides)))
        found = known if found is None else found | known
    return found


def trained_tokenizers(config: Config, folder: Path) -> Tokenizers:
    """Those that the config names, or that a run has trained into its folder."""
    given = config.model.tokenizer, config.model.tokenizer_2
    clip, t5 = (folder / "vocabularies" / name for name in ("tokenizer", "tokenizer_2"))
    return Tokenizers(
        Path(given[0]).expanduser() if given[0] else clip,
        Path(given[1]).expanduser() if given[1] else t5,
        config.model.t5_length,
    )


def _whole(folder: Path, write: Callable[[Path], None]) -> None:
    """A folder that is there only when it is complete."""
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    write(new)
    new.rename(folder)


# --- latents ---


def latent_store(config: Config, step: Step, networks: Networks, folder: Path) -> Encoded:
    """Where the latents of a step's data are kept, for as long as its autoencoder is the same."""
    half, name = step.use_fp16, config.dataset_of(step)
    key = encoded_identity(networks.ae, name, config.datasets[name], half)
    downscale, channels = networks.ae.downscale, config.model.autoencoder.z_channels

    def shape(size: Size) -> tuple[int, ...]:
        return (2, size[0] // downscale, size[1] // downscale, channels)

    return Encoded(folder / LATENTS, key, shape, lambda x: encode(networks, x, half))


def measure_latents(batches: Batches, encoded: Encoded) -> tuple[float, float]:
    """Scale and shift with which the latents of the data's first pictures have deviation 1 and mean 0."""
    pictures = batches.first(MEASURED_PICTURES)
    records = [encoded.make(row, picture).reshape(2, -1) for row, picture in enumerate(pictures)]
    mean, logvar = np.concatenate(records, axis=1).astype(np.float64)
    return float(1 / np.sqrt(mean.var() + np.exp(logvar).mean())), float(mean.mean())
