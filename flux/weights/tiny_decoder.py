"""A tiny autoencoder's decoder on disk: diffusers' AutoencoderTiny, or taef1_decoder.safetensors.

diffusers numbers the decoder's layers from the first with weights, madebyollin from the clamp before it.
ComfyUI's names have `taesd_decoder.` before madebyollin's.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import mlx.core as mx

from flux.errors import FluxError
from flux.models.autoencoder_tiny import TinyDecoder
from flux.weights import checkpoints, layouts, registry, repositories, single
from flux.weights.contents import look

DIFFUSERS = "decoder.layers."
NUMBERED = re.compile(r"(?:taesd_decoder\.|decoder\.)?(\d+)\.(.+)")
UNUSED = ("encoder.", "taesd_encoder.")  # beside a decoder
USUAL = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2}  # of diffusers' config


def load(name: str = registry.TINY_DECODER, dtype: mx.Dtype | None = None) -> TinyDecoder:
    """The decoder of a file, a folder or a repository of the Hub, lazily; dtype: as other models' if None.

    FluxError, in one line, where none can be found, and for every tensor that is at fault.
    """
    file = _file(checkpoints.find_files(name, repositories.tiny_decoder_patterns))
    config = layouts.read_config(file.parent / "config.json")
    config = config if config.get("_class_name") == "AutoencoderTiny" else {}
    for key, usual in USUAL.items():
        if config.get(key, usual) != usual:
            raise FluxError(f"{file.parent / 'config.json'}: {key} must be {usual}, not {config[key]!r}")
    dtype = dtype or checkpoints.default_dtype()
    return cast(TinyDecoder, single.load("tiny decoder", file, config, to_ours, TinyDecoder, dtype))


def _file(path: Path) -> Path:
    """The file of a path that may be a folder, where only one file holds a decoder."""
    if not path.exists():
        raise FluxError(f"{path}: no such file or folder, and no repository of the Hub (for a tiny decoder)")
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    fitting = [file for file in files if _holds(file)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise FluxError(f"{path}: several tiny decoders ({', '.join(f.name for f in fitting)}); name one")
    raise FluxError(f"{path}: holds no tiny decoder (TAEF1: taef1_decoder.safetensors, or diffusers' folder)")


def _holds(file: Path) -> bool:
    """Whether a file has a tiny decoder: a layer makes three channels. FluxError if damaged."""
    found = look([file])
    if found.fault and not found.foreign:
        raise FluxError(found.fault)
    ours = {_ours(name): entry.shape for name, entry in found.entries.items()}
    blocks = any(re.fullmatch(r"layers\.\d+\.conv\.0\.weight", name) for name in ours)
    return blocks and any(shape[:1] == (3,) for name, shape in ours.items() if name.startswith("layers."))


def to_ours(found: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A file's tensors under the network's names, in MLX's axes, without the encoder's."""
    return {
        _ours(name): tensor.transpose(0, 2, 3, 1)
        if tensor.ndim == 4
        else tensor  # (O, I, H, W) -> (O, H, W, I)
        for name, tensor in found.items()
        if not name.startswith(UNUSED)
    }


def _ours(name: str) -> str:
    """The network's name of a tensor; of one that is not known its own."""
    if name.startswith(DIFFUSERS):
        return name.removeprefix("decoder.")
    number = NUMBERED.fullmatch(name)
    return f"layers.{int(number[1]) - 1}.{number[2]}" if number else name
