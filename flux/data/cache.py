"""Pictures and texts encoded once and kept on disk, keyed by their content and by all that shaped them.

The encoders come in as functions: this file knows no model. Once nothing is `missing`, they may leave memory.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import mlx.core as mx
import numpy as np

from flux import outputs
from flux.data import pictures
from flux.data.batches import Batch, Entry
from flux.data.pictures import Placed
from flux.errors import FluxError
from flux.weights import tensors

Tensors = dict[str, mx.array]
Item = TypeVar("Item")
# (1, H, W, 3) float32 in -1..1 -> mean and logarithm of the variance, each (1, h, w, z)
PictureEncoder = Callable[[mx.array], tuple[mx.array, mx.array]]
TextEncoder = Callable[[str], Tensors]  # a caption -> its features by name, without a batch axis

FORMAT = 1  # of the entries; a change of what they hold makes the old ones unknown
FLIPPED = "_flipped"
PROBES, PROBE_SIZE = 64, 1 << 16


class Cache:
    """Tensors in a folder, a safetensors file for each key. A damaged file counts as absent."""

    def __init__(self, folder: Path):
        self._folder = folder

    def path(self, key: Mapping[str, Any]) -> Path:
        """Where the tensors of a key (JSON values) are or would be."""
        name = hashlib.sha256(_text(key).encode()).hexdigest()[:40]
        return self._folder / name[:2] / f"{name}.safetensors"

    def load(self, key: Mapping[str, Any]) -> Tensors | None:
        """The tensors, read and compared with their check sum; None where they are absent or damaged."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            metadata = tensors.read_header(path).metadata
            found = cast(Tensors, mx.load(str(path), format="safetensors"))
            mx.eval(found)
        except (FluxError, OSError, RuntimeError, ValueError):
            return None
        sound = metadata.get("key") == _text(key) and metadata.get("checksum") == _checksum(found)
        return found if sound else None

    def save(self, key: Mapping[str, Any], entry: Tensors) -> None:
        """Writes the tensors, whole or not at all. FluxError where the disk refuses."""
        metadata = {"key": _text(key), "checksum": _checksum(entry)}
        tensors.save(self.path(key), entry, metadata, sync=False)  # many, with checksums

    def add(self, key: Mapping[str, Any], content: bytes) -> None:
        """Writes a file that another machine has made for this key. FluxError where the disk refuses."""
        path = self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with outputs.replacing(path, sync=False) as partial:
                partial.write_bytes(content)
        except OSError as error:
            raise FluxError(f"{path}: cannot be written: {error.strerror}") from None


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps({"format": FORMAT, **key}, sort_keys=True, ensure_ascii=False)


def _checksum(entry: Tensors) -> str:
    """CRC-32 of the bytes: finds what a failing disk changed, which the file's header cannot show."""
    total = 0
    for name, array in sorted(entry.items()):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(np.array(mx.contiguous(array).flatten().view(mx.uint8)).tobytes(), total)
    return f"{total:08x}"


def identity(files: Iterable[Path], *settings: object) -> str:
    """What tells an encoder from others: its files' sizes and samples of their bytes, and settings.

    A text encoder has 10 GB: reading all of it would take longer than to encode a small data set.
    """
    total = hashlib.sha256(repr(settings).encode())
    for path in files:
        size = path.stat().st_size
        total.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for i in range(PROBES):
                file.seek(max(0, size - PROBE_SIZE) * i // (PROBES - 1))
                total.update(file.read(PROBE_SIZE))
    return total.hexdigest()


class Store(Generic[Item]):
    """What becomes of items when they are encoded, in a cache. identity: of the encoder."""

    def __init__(self, cache: Cache, identity: str):
        self._cache = cache
        self._identity = identity

    def missing(self, items: Iterable[Item]) -> list[Item]:
        """Those that must be encoded; the others are sound on disk."""
        return [item for item in items if self._cache.load(self._key(item)) is None]

    def content(self, item: Item) -> bytes:
        """The file of an item that is not missing, for `add` on another machine."""
        return self._cache.path(self._key(item)).read_bytes()

    def add(self, item: Item, content: bytes) -> None:
        """Keeps what another machine has made of the item."""
        self._cache.add(self._key(item), content)

    def _key(self, item: Item) -> dict[str, Any]:
        raise NotImplementedError


class Latents(Store[tuple[Placed, int]]):
    """Encoded pictures: items are (picture, repeat), as of `Plan.variants`.

    identity: of the autoencoder. seed: of the plan, for crops and colours that vary.
    """

    def __init__(self, cache: Cache, identity: str, seed: int):
        super().__init__(cache, identity)
        self._seed = seed

    def encode(self, placed: Placed, repeat: int, encode: PictureEncoder) -> None:
        """Encodes a picture, with flip_aug its mirror image too, and keeps both with the mask, if any.

        The mask is the alpha averaged over each of the latent's pixels, in 0..1.
        """
        picture, mask = pictures.prepare(placed, self._seed, repeat)  # (H, W, 3), (H, W)
        views = {"": picture}
        if placed.sample.subset.flip_aug:
            views[FLIPPED] = picture[:, ::-1]
        entry: Tensors = {}
        for suffix, view in views.items():
            pixels = mx.array(view[None].astype(np.float32) / 127.5 - 1)  # (1, H, W, 3)
            mean, logvar = encode(pixels)
            entry["mean" + suffix], entry["logvar" + suffix] = mean[0], logvar[0]  # (h, w, z)
        if mask is not None:
            height, width, _ = entry["mean"].shape
            entry["mask"] = mx.array(_averaged(mask, height, width))
        mx.eval(entry)
        self._cache.save(self._key((placed, repeat)), entry)

    def load(self, entry: Entry) -> Tensors:
        """mean and logvar (h, w, z), and mask (h, w) where there is one, flipped as the entry says.

        The mask is at least the subset's mask_floor; it is kept without, so that the floor may change.
        """
        found = self._cache.load(self._key((entry.placed, entry.repeat)))
        if found is None:
            raise FluxError(
                f"the cache lost the latents of {entry.placed.sample.name}: --resume makes them anew"
            )
        suffix = FLIPPED if entry.flip else ""
        out = {"mean": found["mean" + suffix], "logvar": found["logvar" + suffix]}
        if "mask" in found:
            mask = found["mask"][:, ::-1] if entry.flip else found["mask"]
            out["mask"] = mx.maximum(mask, entry.placed.sample.subset.mask_floor)
        return out

    def _key(self, item: tuple[Placed, int]) -> dict[str, Any]:
        placed, repeat = item
        subset = placed.sample.subset
        key = {
            "kind": "latents",
            "picture": placed.digest,
            "bucket": placed.bucket,
            "flip": subset.flip_aug,
            "mask": subset.alpha_mask,
            "encoder": self._identity,
        }
        if placed.mask:
            key["mask_file"] = placed.mask
        if pictures.varies(placed.sample):
            varied = {"crop": subset.random_crop, "color": subset.color_aug}
            key |= {**varied, "seed": self._seed, "repeat": repeat}
        return key


def _averaged(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask (H, W), uint8, as shares (height, width), float32."""
    blocks = mask.reshape(height, mask.shape[0] // height, width, mask.shape[1] // width)
    return (blocks.mean(axis=(1, 3)) / 255).astype(np.float32)


class Texts(Store[str]):
    """Encoded captions. identity: of the text encoders and their tokenizers' lengths."""

    def encode(self, caption: str, encode: TextEncoder) -> None:
        """Encodes a caption and keeps it."""
        entry = encode(caption)
        mx.eval(entry)
        self._cache.save(self._key(caption), entry)

    def load(self, caption: str) -> Tensors:
        """A caption's features, as the encoder named them."""
        found = self._cache.load(self._key(caption))
        if found is None:
            raise FluxError(f"the cache lost the features of {caption!r}: --resume makes them anew")
        return found

    def _key(self, caption: str) -> dict[str, Any]:
        return {"kind": "text", "caption": caption, "encoder": self._identity}


def assemble(batch: Batch, latents: Latents, texts: Texts, masked: bool) -> Tensors:
    """A batch's arrays: mean and logvar (B, h, w, z), the text features (B, ...), is_reg (B,) float32.

    And, if masked (as `Plan.masked` says, so that all batches of a training are alike), mask (B, h, w),
    float32, 1 for a picture without one.
    """
    pictures_ = [latents.load(entry) for entry in batch.entries]
    features = [texts.load(entry.caption) for entry in batch.entries]
    out = {name: mx.stack([each[name] for each in pictures_]) for name in ("mean", "logvar")}
    out |= {name: mx.stack([each[name] for each in features]) for name in features[0]}
    if masked:
        ones = mx.ones(out["mean"].shape[1:3])
        out["mask"] = mx.stack([each.get("mask", ones) for each in pictures_])
    out["is_reg"] = mx.array([float(entry.is_reg) for entry in batch.entries])
    return out
