"""Which files of a folder are which part of a model: BFL's layout, diffusers' and ComfyUI's, as one table."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux.errors import FluxError
from flux.weights import keymaps
from flux.weights.tensors import read_header

PARTS = ("transformer", "ae", "clip", "t5")
NAMES = {
    "transformer": "transformer",
    "ae": "autoencoder",
    "clip": "CLIP text encoder",
    "t5": "T5 text encoder",
}

# Where each part may lie, the best place first. A pattern with `*.safetensors` or a file name finds single
# files; `folder/stem` finds stem.safetensors, or the shards that stem.safetensors.index.json lists.
PLACES: dict[str, tuple[str, ...]] = {
    "transformer": (
        "flux1-*.safetensors",
        "transformer/diffusion_pytorch_model",
        "diffusion_models/*.safetensors",
        "unet/*.safetensors",
        "checkpoints/*.safetensors",
    ),
    "ae": (
        "ae.safetensors",
        "vae/diffusion_pytorch_model",
        "vae/ae.safetensors",
        "vae/*.safetensors",
        "checkpoints/*.safetensors",
    ),
    "clip": (
        "text_encoder/model",
        "text_encoders/clip_l*.safetensors",
        "clip/clip_l*.safetensors",
        "checkpoints/*.safetensors",
    ),
    "t5": (
        "text_encoder_2/model",
        "text_encoders/t5xxl_fp16.safetensors",
        "text_encoders/t5xxl*.safetensors",
        "clip/t5xxl_fp16.safetensors",
        "clip/t5xxl*.safetensors",
        "checkpoints/*.safetensors",
    ),
}

# The subfolder whose config.json speaks of a part, also where the weights are a single file beside it.
FOLDERS = {"transformer": "transformer", "ae": "vae", "clip": "text_encoder", "t5": "text_encoder_2"}

# Tensors by which a file is known to hold a part (bare names); adapters have none of them.
SIGNS: dict[str, frozenset[str]] = {
    "transformer": frozenset(
        {
            "double_blocks.0.img_attn.qkv.weight",
            "double_blocks.0.txt_attn.qkv.weight",
            "transformer_blocks.0.attn.to_q.weight",
            "transformer_blocks.0.attn.add_q_proj.weight",
        }
    ),
    "ae": frozenset({"encoder.conv_in.weight", "decoder.conv_in.weight"}),
    "clip": frozenset(
        {
            "text_model.embeddings.token_embedding.weight",
            "text_model.encoder.layers.0.mlp.fc1.weight",
        }
    ),
    "t5": frozenset({"shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"}),
}

TOKENIZERS = {
    "tokenizer": ("vocab.json", "tokenizer.json"),
    "tokenizer_2": ("spiece.model", "tokenizer.json"),
}


@dataclass(frozen=True)
class Part:
    """One network's files, and what a config beside them says ({} without one)."""

    kind: str  # of PARTS
    files: tuple[Path, ...]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What error lines call it: the file, or the folder of the shards."""
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)


def find_part(folder: Path, kind: str) -> Part | None:
    """A part's files in a folder, from the best place that has them; None where no place has.

    FluxError where one place has several that would do, or where shards are missing.
    """
    for place in PLACES[kind]:
        files = _single(folder, kind, place) if place.endswith(".safetensors") else _stem(folder / place)
        if files:
            return Part(kind, files, _read_config(folder / FOLDERS[kind] / "config.json"))
    return None


def part_of_file(path: Path, kind: str) -> Part:
    """The part in a file of its own, or in a folder such as diffusers' `transformer/`."""
    if path.is_file():
        return Part(kind, (path,), _read_config(path.parent / "config.json"))
    files = _stem(path / "diffusion_pytorch_model") or _stem(path / "model")
    if not files:
        raise FluxError(f"{path}: no such file (for the {NAMES[kind]}), nor a folder with one")
    return Part(kind, files, _read_config(path / "config.json"))


def _single(folder: Path, kind: str, pattern: str) -> tuple[Path, ...]:
    candidates = [file for file in sorted(folder.glob(pattern)) if not file.name.startswith(".")]
    found = [file for file in candidates if _holds(file, kind)]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        option = f"--{kind} FILE"
        raise FluxError(
            f"{found[0].parent}: several files hold a {NAMES[kind]}: {names}; choose with {option}"
        )
    return tuple(found)


def _holds(file: Path, kind: str) -> bool:
    bare = keymaps.own_names(kind, read_header(file).tensors).values()
    return not SIGNS[kind].isdisjoint(bare)


def _stem(stem: Path) -> tuple[Path, ...]:
    """The files of `folder/stem`: what the index lists, else the one file, else a variant (stem.fp16...)."""
    index = Path(f"{stem}.safetensors.index.json")
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise FluxError(f"{index}: not an index of safetensors files") from None
        absent = [name for name in names if not (stem.parent / name).is_file()]
        if absent:
            raise FluxError(f"{index}: lists files that are not there: {', '.join(absent)}")
        return tuple(stem.parent / name for name in names)
    single = Path(f"{stem}.safetensors")
    if single.is_file():
        return (single,)
    shards = sorted(stem.parent.glob(f"{stem.name}-*-of-*.safetensors"))
    return tuple(shards or sorted(stem.parent.glob(f"{stem.name}.*.safetensors"))[:1])


def _read_config(path: Path) -> dict[str, Any]:
    """A config.json's content, {} where there is none."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise FluxError(f"{path}: not valid JSON") from None
    if not isinstance(config, dict):
        raise FluxError(f"{path}: should hold a JSON object")
    return config


def find_tokenizer(folder: Path, name: str) -> Path | None:
    """The folder of a tokenizer ("tokenizer", "tokenizer_2") in a model's folder, or None."""
    path = folder / name
    return path if any((path / file).is_file() for file in TOKENIZERS[name]) else None
