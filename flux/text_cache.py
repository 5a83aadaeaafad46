"""What the text encoders say of prompts, kept on disk: a second picture of a prompt needs no T5.

A file for each prompt, of as many numbers as T5 gives: 4 MB for dev in 16-bit types, 2 MB for schnell, twice
as much in float32. Nothing is ever taken away: the folder may be deleted at any time.
"""

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux.adapters import Weighted
from flux.adapters.attach import fingerprint
from flux.conditioning import TextConditioning
from flux.data.cache import Cache
from flux.tokenizers import T5Tokenizer
from flux.version import __version__
from flux.weights.checkpoints import Checkpoint, default_dtype

ENCODERS = ("clip", "t5")


def default_folder() -> Path:
    """flux-mlx/texts in the user's folder of caches."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "flux-mlx" / "texts"


class TextCache:
    """Features of prompts in a folder. identity: all that they depend on beside the prompt (JSON values)."""

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]):
        self._cache = Cache(Path(folder).expanduser())
        self._identity = identity

    def get(self, text: str, clip_text: str | None) -> TextConditioning | None:
        """The features of a prompt, to the bit as they were put; None where absent or damaged."""
        found = self._cache.load(self._key(text, clip_text))
        return None if found is None else TextConditioning(**found)

    def put(self, text: str, clip_text: str | None, features: TextConditioning) -> None:
        """Keep the features of a prompt, whole or not at all. FluxError where the disk refuses."""
        mx.eval(features)
        self._cache.save(self._key(text, clip_text), features._asdict())

    def _key(self, text: str, clip_text: str | None) -> dict[str, Any]:
        return {"kind": "prompt", "text": text, "clip_text": clip_text, "identity": self._identity}


def identity(
    checkpoint: Checkpoint,
    dtype: mx.Dtype | None,
    bits: int | str | None,
    adapters: Sequence[Weighted],
    fuse_adapters: bool,
    tokenizer: T5Tokenizer,
    t5_padding: bool,
) -> dict[str, Any]:
    """All that features depend on beside the prompt, as JSON values: files, settings, machine, versions."""
    files = checkpoint.fingerprints()
    changing = [each for each in adapters if {*ENCODERS} & {*each.adapter.parts()}]
    return {
        "files": {name: files[name] for name in sorted(files.keys() - checkpoint.parts.keys() | {*ENCODERS})},
        "configs": {part: dict(checkpoint.parts[part].config) for part in ENCODERS},
        "dtype": str(dtype or default_dtype()),
        "bits": bits,
        "adapters": [[fingerprint(each.file), each.strength] for each in changing],
        "fused": bool(changing) and fuse_adapters,
        "tokens": [tokenizer.max_length, tokenizer.padded_length, t5_padding],
        "machine": [str(mx.default_device().type), version("mlx"), __version__],
    }
