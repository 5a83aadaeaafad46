"""What a config's parts must be to each other. tables.py checks types and bounds of single keys."""

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux.data.datasets import is_saved_table
from flux.data.sources import unreadable
from flux.data.webdataset import shards
from flux.errors import FluxError
from flux.models.clip import ACTIVATIONS
from flux.tables import Faults, nearest, read_file
from flux.training.pretrain import fluxflow, lpips
from flux.training.pretrain.config import (
    Config,
    ConfigError,
    Step,
    expand,
    heights_and_widths,
    read_config,
    read_datasets,
)
from flux.training.pretrain.datasets import HuggingFace, Local, WebDataset, open_dataset
from flux.training.pretrain.losses import threshold_metrics
from flux.training.pretrain.state import state_of
from flux.training.schedules import ReduceOnPlateau

CLIP_LENGTH = 77  # what CLIPTokenizer pads to
LPIPS_SIDE = 16  # VGG16 halves a picture four times


def load(path: Path, decode: bool = False) -> Config:
    """Reads and checks a config. ConfigError with every fault, each with the name of its step.

    decode: all pictures are looked at, too, and counted.
    """
    faults = Faults()
    raw, notes = fluxflow.translate(read_file(path), faults)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    config = read_config(raw, faults)
    is_read = config is not None and not faults.lines
    if config is not None:
        check(config, faults)
    counts = _sources(read_datasets(raw), faults, decode)
    if config is not None and is_read and decode:
        _batches(config, counts, faults)
    if config is None or faults.lines:
        raise ConfigError(path, faults.lines)
    return config


def describe(config: Config) -> list[str]:
    """What the steps train, and the disk that the latents take that are kept, about; a line each."""
    lines = []
    for number, step in enumerate(config.steps, 1):
        lines.append(f"{number}. {step.name}: trains {', '.join(sorted(step.trained))}")
        dataset = config.datasets[config.dataset_of(step)]
        if step.encodes_once and isinstance(dataset, Local):
            size = len(open_dataset(dataset)) * latent_bytes(config)
            lines.append(f"   latents: about {size / 1e9:.2g} GB on disk")
    return lines


def latent_bytes(config: Config) -> int:
    """Of a picture's means and log variances, in all the sizes it is trained at, or in the largest bucket."""
    vae = config.model.autoencoder
    downscale = 2 ** (len(vae.ch_mult) - 1)
    areas = [height * width // downscale**2 for height, width in config.data.trained_sizes]
    area = max(areas) if config.data.buckets else sum(areas)
    return 2 * 4 * area * vae.z_channels


def check(config: Config, faults: Faults) -> None:
    """Adds a line to `faults` for everything that could not be built or would do nothing.

    Where reading has found faults, only what does not follow from them is looked at.
    """
    wrong = tuple(faults.lines)

    def is_whole(*sections: str) -> bool:
        return not any(line.startswith(sections) for line in wrong)

    _names(config, faults)
    for step in config.steps:
        where = f'step "{step.name}"'
        _frozen(step, where, faults)
        for rule in (_mode, _length, _metrics, _optimization) if is_whole(where) else ():
            rule(step, where, faults)
    if any(step.use_lpips for step in config.steps):
        _lpips(config, faults)
    if config.model_checkpoint is not None:
        try:
            state_of(config.model_checkpoint)
        except FluxError as error:
            faults.add("model_checkpoint", str(error))
    if is_whole("datasets", "data", "no data"):
        _datasets(config, faults)
    if is_whole("model", "data", "output", "step"):
        _sizes(config, faults)
    for name in config.output.test_image_address:
        if not Path(name).expanduser().is_file():
            faults.add("output.test_image_address", f"no file {name}")
    try:
        save_interval(config.output.checkpoint_save_interval)
    except ValueError as error:
        faults.add("output.checkpoint_save_interval", str(error))


def save_interval(value: int | str) -> tuple[float, float]:
    """(steps, seconds), one of them infinite, between two checkpoints. ValueError for what is neither."""
    if isinstance(value, int) and value > 0:
        return value, math.inf
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:m|min|minutes?)", str(value))
    if match and float(match[1]) > 0:
        return math.inf, 60 * float(match[1])
    raise ValueError(f"{value!r} must be a number of steps or like '10 minutes'")


def _lpips(config: Config, faults: Faults) -> None:
    try:
        lpips.find(config.model.lpips.vgg, config.model.lpips.linear)
    except FluxError as error:
        faults.add("model.lpips", str(error))


def _names(config: Config, faults: Faults) -> None:
    seen: set[str] = set()
    for step in config.steps:
        if step.name in seen:
            faults.add(f'step "{step.name}"', "another step has this name")
        if not re.fullmatch(r"[\w.-]+", step.name):
            faults.add(f'step "{step.name}"', "a name is made of letters, digits, '_', '-' and '.'")
        seen.add(step.name)


def _mode(step: Step, where: str, faults: Faults) -> None:
    if not (step.decodes or step.train_diff):
        faults.add(where, "no training mode: set train_vae, gan_training, train_spade or train_diff")
    if step.train_text_encoders and not step.train_diff:
        faults.add(where, "train_text_encoders needs train_diff: no other loss reaches the text encoders")
    if step.use_lpips and not step.reconstructs:
        faults.add(where, "use_lpips needs train_vae: a GAN alone has no reconstruction term")


def _frozen(step: Step, where: str, faults: Faults) -> None:
    both = expand(step.freeze) & expand(step.unfreeze)
    if both:
        faults.add(where, f"{', '.join(sorted(both))}: in freeze and in unfreeze")
    modes = {
        "train_vae": {"encoder", "decoder"},
        "gan_training": {"encoder", "decoder"},
        "train_spade": {"spade"},
        "train_diff": {"flow"},
        "train_text_encoders": {"clip", "t5"},
    }
    for mode, parts in modes.items():
        if getattr(step, mode) and parts <= expand(step.freeze):
            faults.add(where, f"{', '.join(sorted(parts))}: frozen, and trained by {mode}")
    if step.gan_training and "discriminator" in step.freeze:
        faults.add(where, "discriminator: frozen, and trained by gan_training")
    reached = {"encoder", "decoder"} if step.decodes else set()
    reached |= {"spade"} if step.train_spade else set()
    reached |= {"discriminator"} if step.gan_training else set()
    reached |= {"flow", "clip", "t5"} if step.train_diff else set()
    for part in sorted(expand(step.unfreeze) - reached):
        faults.add(where, f"{part}: in unfreeze, but no loss of this step reaches it")


def _length(step: Step, where: str, faults: Faults) -> None:
    if step.epochs is None and step.max_steps is None:
        faults.add(where, "no length: give n_epochs, max_steps or transition_on.max_epochs")


def _metrics(step: Step, where: str, faults: Faults) -> None:
    transition, known = step.transition_on, threshold_metrics(step)
    if transition.mode == "loss_threshold":
        if transition.metric is None:
            faults.add(where, "transition_on: the metric is missing")
        if transition.threshold is None:
            faults.add(where, "transition_on: the threshold is missing")
    elif transition.metric is not None or transition.threshold is not None:
        faults.add(where, "transition_on: metric and threshold need the mode loss_threshold")
    used = {"transition_on.metric": transition.metric}
    for group, scheduler in step.optimization.schedulers.items():
        if isinstance(scheduler, ReduceOnPlateau):
            used[f"schedulers.{group}.metric"] = scheduler.metric
    for key, metric in used.items():
        if metric is not None and metric not in known:
            faults.add(where, f"{key}: this step has no metric {metric!r}{nearest(metric, known)}")


def _optimization(step: Step, where: str, faults: Faults) -> None:
    for kind in ("optimizers", "schedulers"):
        for group in getattr(step.optimization, kind):
            if group not in step.groups:
                faults.add(where, f"optimization.{kind}.{group}: this step does not train it")


def _datasets(config: Config, faults: Faults) -> None:
    if not config.datasets:
        faults.add("", "no data: give data.data_path, or datasets by name")
    elif len(config.datasets) > 1 and config.default_dataset is None:
        for step in config.steps:
            if step.dataset is None:
                faults.add(f'step "{step.name}"', "no dataset, and no default_dataset")
    if config.default_dataset is not None and config.default_dataset not in config.datasets:
        faults.add("default_dataset", f"{config.default_dataset!r} is not among the datasets")
    for step in config.steps:
        if step.dataset is not None and step.dataset not in config.datasets:
            faults.add(f'step "{step.name}"', f"dataset {step.dataset!r} is not among the datasets")


def _sources(datasets: Mapping[str, Any], faults: Faults, decode: bool) -> dict[str, int]:
    """What is wrong with the data sets' files, whatever else is; how many pictures each has, if `decode`.

    Data sets of the Hub are not downloaded for this.
    """
    counts = {}
    for name, dataset in datasets.items():
        try:
            if isinstance(dataset, WebDataset) and not decode:
                shards([dataset.path] if isinstance(dataset.path, str) else dataset.path)
            elif not isinstance(dataset, HuggingFace) or is_saved_table(Path(dataset.path).expanduser()):
                source = open_dataset(dataset)
                counts[name] = len(source)
                for fault in unreadable(source) if decode else ():
                    faults.add(f"datasets.{name}", fault)
        except FluxError as error:
            faults.add(f"datasets.{name}", str(error))
    return counts


def _batches(config: Config, counts: Mapping[str, int], faults: Faults) -> None:
    for step in config.steps if config.datasets else ():
        batch = step.batch_size * step.gradient_accumulation_steps
        count = counts.get(config.dataset_of(step), batch)
        if count < batch:
            faults.add(f'step "{step.name}"', f"{count} pictures are less than a batch of {batch}")


def _sizes(config: Config, faults: Faults) -> None:
    """Pictures are whole latents and, for the flow, whole tokens; channels are whole groups."""
    has_flow = any(step.train_diff for step in config.steps)
    levels = len(config.model.autoencoder.ch_mult)
    grid = 2 ** (levels - 1) * (2 if has_flow else 1)
    data, output = config.data, config.output
    sides = {"data.img_size": [data.img_size], "data.reduced_min_sizes": data.reduced_min_sizes}
    for where, sizes in (("data.img_sizes", data.img_sizes), ("output.sample_sizes", output.sample_sizes)):
        sides[where] = [side for size in heights_and_widths(sizes) for side in size]
    if data.img_sizes and data.reduced_min_sizes:
        faults.add("data.reduced_min_sizes", "has no effect beside img_sizes, which are all sizes: give one")
    for where, values in sides.items():
        for side in values:
            if side < grid or side % grid:
                faults.add(where, f"{side} is not a multiple of {grid} pixels")
    vae = config.model.autoencoder
    for width in sorted({vae.ch, *(vae.ch * mult for mult in vae.ch_mult)}):
        if width % vae.norm_groups:
            faults.add("model.autoencoder", f"{width} channels cannot form {vae.norm_groups} equal groups")
    _judge(config, faults)
    _crops(config, grid, faults)
    clip = config.model.clip
    if clip.hidden_size % clip.num_attention_heads:
        heads = clip.num_attention_heads
        faults.add("model.clip", f"hidden_size {clip.hidden_size} is not a multiple of {heads} heads")
    if clip.hidden_act not in ACTIVATIONS:
        faults.add("model.clip.hidden_act", f"{clip.hidden_act!r} must be one of {', '.join(ACTIVATIONS)}")
    if clip.max_position_embeddings < CLIP_LENGTH:
        faults.add("model.clip.max_position_embeddings", f"must be at least {CLIP_LENGTH}, a text's tokens")
    for name in ("clip", "t5", "autoencoder", "transformer"):
        params = getattr(config.model, name)
        for field in dataclasses.fields(params):
            value = getattr(params, field.name)
            if type(value) is int and value < 1 and field.name != "depth_single_blocks":
                faults.add(f"model.{name}.{field.name}", f"{value} must be at least 1")


def _crops(config: Config, grid: int, faults: Faults) -> None:
    smallest = min(side for size in config.data.trained_sizes for side in size)
    for step in config.steps:
        where = f'step "{step.name}": crop_size'
        if step.crop_size is None:
            if step.crop_share < 1:
                faults.add(f'step "{step.name}"', "crop_share has no effect without crop_size")
        elif step.train_diff:
            faults.add(where, "the flow is trained on whole pictures: give it a separate step")
        elif step.crop_size > smallest or step.crop_size % grid:
            faults.add(where, f"{step.crop_size} must be a multiple of {grid}, at most {smallest} pixels")


def _judge(config: Config, faults: Faults) -> None:
    """What looks at pictures needs some size of them."""
    smallest = min(side for size in config.data.trained_sizes for side in size)
    params = config.model.discriminator
    for step in config.steps:
        if step.use_lpips and smallest < LPIPS_SIDE:
            faults.add(f'step "{step.name}"', f"use_lpips needs pictures of at least {LPIPS_SIDE} pixels")
        if step.gan_training and smallest < 2**params.layers:
            text = f"{params.layers} layers of the discriminator need pictures of {2**params.layers} pixels"
            faults.add(f'step "{step.name}"', text)
    if any(step.gan_training for step in config.steps) and params.channels % params.norm_groups:
        text = f"{params.channels} channels cannot form {params.norm_groups} equal groups"
        faults.add("model.discriminator", text)
