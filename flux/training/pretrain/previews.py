"""Pictures during a training, and the trained model as files. Neither touches the training's random state."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from flux import generation, images
from flux.known_words import KnownWords
from flux.loading import Parts
from flux.pipeline import FluxPipeline
from flux.requests import Request
from flux.training import losses
from flux.training.pretrain.batches import Batches
from flux.training.pretrain.config import Config, Step, heights_and_widths
from flux.training.pretrain.networks import Networks, Tokenizers
from flux.training.pretrain.spade import SpadeDecoder
from flux.trees import named_arrays
from flux.weights import save, tensors
from flux.weights.registry import ModelSpec

NETWORKS = "networks.safetensors"  # all of them, where FLUX's layout cannot hold them
SEED = 1000  # of the first sample; the same at every checkpoint, so that they can be compared


def write_samples(
    config: Config,
    step: Step,
    networks: Networks,
    tokenizers: Tokenizers | None,
    batches: Batches,
    name: str,
) -> None:
    """Pictures in `samples/`, called `{name}_{hash}{suffix}.webp`; the hash is that of what is shown.

    Of the autoencoder `-original`, `-nr_o` (reconstructed from the latents' mean) and `_ns_o` (from latents
    drawn at random about it); of the flow `-flow`, a picture of a caption.
    """
    folder = Path(config.output.output_path).expanduser() / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    count = config.output.samples_per_checkpoint
    for size in sample_sizes(config) if count else ():
        if step.decodes:
            for i, picture in enumerate(originals(config, batches, size)):
                shown = (picture, *reconstruct(networks, picture, SEED + i))
                for suffix, array in zip(("-original", "-nr_o", "_ns_o"), shown, strict=True):
                    images.save(folder / f"{name}_{digest(picture.tobytes())}{suffix}.webp", array)
        if step.train_diff:
            assert tokenizers is not None  # whoever trains a flow has read them
            texts = (list(config.output.sample_captions) or list(batches.captions(count)))[:count]
            drawn = draw(config, networks, tokenizers, texts, size)
            for i, (text, array) in enumerate(zip(texts, drawn, strict=True)):
                images.save(folder / f"{name}_{digest(f'{i} {size} {text}'.encode())}-flow.webp", array)


def digest(data: bytes) -> str:
    """Six hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:6]


def originals(config: Config, batches: Batches, size: tuple[int, int]) -> list[np.ndarray]:
    """The pictures that are reconstructed, (height, width) in size: the config's, or the data's first."""
    files = config.output.test_image_address
    if not files:
        return batches.first(config.output.samples_per_checkpoint, size)
    return [images.fit(images.over_white(*images.load(Path(file).expanduser())), size) for file in files]


def sample_sizes(config: Config) -> list[tuple[int, int]]:
    """(height, width) of each of the config's sides or [width, height]."""
    return heights_and_widths(config.output.sample_sizes or (config.data.img_size,))


def reconstruct(networks: Networks, picture: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture (H, W, 3) uint8 through encoder and decoder: by the latents' mean, and by drawn ones."""
    mean, logvar = networks.ae.moments(images.normalize(picture[None]))
    noise = mx.random.normal(mean.shape, key=mx.random.key(seed))
    both = mx.concatenate([mean, losses.posterior(mean, logvar, noise)])
    by_mean, drawn = images.to_uint8(images.denormalize(networks.ae.decoder(both)))
    return by_mean, drawn


def draw(
    config: Config,
    networks: Networks,
    tokenizers: Tokenizers,
    texts: Sequence[str],
    size: tuple[int, int],
) -> list[np.ndarray]:
    """A picture (H, W, 3) uint8 of each text, with classifier-free guidance."""
    pipeline = pipeline_of(config, networks, tokenizers)
    requests = [
        Request(text, seeds=(SEED + i,), image_size=size).resolved(pipeline) for i, text in enumerate(texts)
    ]
    latents = generation.denoise(pipeline, requests, generation.encode(pipeline, requests))
    pairs = zip(requests, latents, strict=True)
    return [images.to_uint8(pipeline.decode(x, request.latent_size))[0] for request, x in pairs]


def pipeline_of(config: Config, networks: Networks, tokenizers: Tokenizers) -> FluxPipeline:
    """What draws with the networks of a training."""
    return FluxPipeline.from_parts(
        Parts(
            spec(config),
            networks.flow,
            networks.ae,
            networks.clip,
            networks.t5,
            tokenizers.clip,
            tokenizers.t5,
        )
    )


def spec(config: Config) -> ModelSpec:
    """The defaults of the trained model."""
    side, output = config.data.img_size, config.output
    return ModelSpec(
        name="pretrained",
        repo="",
        file="",
        steps=output.sample_steps,
        guidance=1.0,
        shift=False,
        t5_length=config.model.t5_length,
        image_size=(side, side),
        cfg_scale=output.sample_cfg_scale,
    )


def save_networks(path: Path, networks: Networks) -> Path:
    """Writes all networks under our names, with the scale of the latents; the path."""
    params = networks.ae.params
    scale = {"scale_factor": str(params.scale_factor), "shift_factor": str(params.shift_factor)}
    tensors.save(path, dict(named_arrays(networks.parameters())), scale)
    return path


def load_networks(path: Path, networks: Networks) -> None:
    """Loads what `save_networks` wrote into networks of the same sizes."""
    networks.load_weights(list(tensors.load([path]).items()))
    metadata = tensors.read_header(path).metadata
    scale, shift = float(metadata["scale_factor"]), float(metadata["shift_factor"])
    networks.ae.params = dataclasses.replace(networks.ae.params, scale_factor=scale, shift_factor=shift)


def export(
    config: Config, networks: Networks, tokenizers: Tokenizers | None, known: KnownWords | None = None
) -> Path:
    """The trained model for `txt2image.py --model`; without a flow its autoencoder; the path written.

    FLUX's layout cannot hold a SPADE decoder: all networks are then one file of our names.
    """
    folder = Path(config.output.output_path).expanduser()
    if isinstance(networks.ae.decoder, SpadeDecoder):
        return save_networks(folder / NETWORKS, networks)
    if tokenizers is None:
        path = folder / "ae.safetensors"
        params = networks.ae.params
        save.save_network(path, "ae", networks.ae, save.autoencoder_config(params))
        return path
    model = save.Model(
        networks.flow, networks.ae, networks.clip, networks.t5, *tokenizers.folders, spec(config)
    )
    save.save_bfl(folder / "model", model)
    if known is not None:
        known.write(folder / "model")
    return folder / "model"
