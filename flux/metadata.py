"""What a picture remembers of how it was made: written into its file and read again."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flux import images
from flux.errors import FluxError
from flux.version import __version__

PROGRAM = "flux-mlx"
PARTS = ("transformer", "ae", "clip", "t5")
# One of each ControlNet.
CONTROLNETS = ("controlnet", "control", "control_mode", "control_strength", "control_start", "control_end")
LISTS = ("reference", *CONTROLNETS)
# The options that make pictures what they are, in the order in which they are written.
OPTIONS = (
    *("model", *PARTS, "dtype", "rounding", "quantize", "adapter", "fuse_adapter", "no_t5_padding"),
    *("t5_padding", "negative_prompt", "clip_prompt", "cfg_scale", "cfg_end", "nag", "guidance"),
    *("solver", "schedule", "shift", "steps", "cache"),
    *("image", "strength", "mask", "expand", "fit", "grow", "feather", "crop_mask", "no_keep"),
    *("reference", *CONTROLNETS, "control_edges"),
    *("redux", "redux_blend", "redux_model", "siglip", "pictures"),
    *("image_size", "noise", "seed", "n_images", "n_rows", "decoding_batch_size"),
)
FLAGS = ("fuse_adapter", "no_t5_padding", "no_keep", "control_edges", "redux_blend")
REPEATED = ("adapter", "redux", *LISTS)  # one a line, the first two with a strength
DEFAULTS = {  # not written
    "rounding": "bfloat16",
    "solver": "euler",
    "schedule": "model",
    "noise": "mlx",
    "cfg_end": 1.0,
    "fit": "crop",
    "grow": 0,
    "feather": 0,
}
SAMPLERS = {"euler": "Euler", "heun": "Heun", "dpmpp2m": "DPM++ 2M", "unipc": "UniPC"}  # A1111's names

File = tuple[Path, dict[str, str]]  # a picture's path and the text that is written into it


@dataclass(frozen=True)
class Recipe:
    """How pictures are made: `n_images` of each prompt, the i-th of them from `seed + i`.

    options: the others of OPTIONS; None and False are not written. image_size: (height, width); adapter:
    (file, strength) of each. picture: of the pictures of one prompt the only one that is kept.
    pictures: the SHA-256 of each picture that they are made from, by the file's name.
    """

    prompts: tuple[str, ...]
    seed: int
    n_images: int
    n_rows: int
    options: Mapping[str, object]
    adapter: Sequence[tuple[str, float]] = ()
    image_size: tuple[int, int] = (512, 512)
    picture: int | None = None
    pictures: Mapping[str, str] = field(default_factory=dict)

    def files(self, output: str | Path, raw: bool) -> list[File]:
        """The files that the pictures become: a grid or, with `raw`, one for each picture.

        Each of several files names its prompt alone but all of that prompt's pictures: they may have been
        decoded together, and then sums are in another order.
        """
        path = Path(output)
        kept = range(self.n_images) if self.picture is None else [self.picture]
        if not raw:
            seeds = [self.seed + k for _ in self.prompts for k in kept]
            return [(path, self.text(self.prompts, seeds, self.picture))]
        texts = [self.text([prompt], [self.seed + k], k) for prompt in self.prompts for k in kept]
        return [(path.with_name(f"{path.stem}.{i}{path.suffix}"), text) for i, text in enumerate(texts)]

    def text(self, prompts: Sequence[str], seeds: Sequence[int], picture: int | None) -> dict[str, str]:
        """What is written into a file of these prompts and seeds; `read` reads it."""
        values: dict[str, Any] = dict(self.options)
        values |= {name: "\n".join(map(str, values.get(name) or ())) or None for name in LISTS}
        for name, pairs in (("adapter", self.adapter), ("redux", values.get("redux") or ())):
            values[name] = "\n".join(f"{file}:{strength}" for file, strength in pairs) or None
        values["pictures"] = "\n".join(f"{digest} {name}" for name, digest in self.pictures.items()) or None
        values["image_size"] = "x".join(map(str, self.image_size))
        values |= {"seed": self.seed, "n_images": self.n_images}
        values["n_rows"] = min(self.n_rows, len(prompts) * self.n_images)
        values = {name: values.get(name) for name in OPTIONS} | {"picture": picture}
        return {
            "prompt": "\n".join(prompts),
            **{name: str(v) for name, v in values.items() if _is_written(name, v)},
            "seeds": " ".join(map(str, seeds)),
            "version": f"{PROGRAM} {__version__}",
        }

    def check(self, output: str | Path, raw: bool, size: tuple[int, int]) -> None:
        """FluxError where a file that the pictures become could not be written, by its name or its size.

        size: (height, width) of each picture; `image_size`, unless it is another one that is changed.
        """
        height, width = size
        count = len(self.prompts) * self.n_images
        rows = 1 if raw or self.picture is not None else self.n_rows
        columns = 1 if raw or self.picture is not None else math.ceil(count / rows)
        images.check_output(self.files(output, raw)[-1][0], (rows * height, columns * width))

    def sources(self) -> list[str]:
        """What the pictures are made with: names of models, of their parts, of adapters and of pictures."""
        names: list[Any] = [self.options.get(name) for name in ("model", *PARTS, "redux_model", "siglip")]
        controlnets: Any = self.options.get("controlnet") or ()
        names += [*controlnets, *(file for file, _ in self.adapter), *self.pictures]
        return [str(name) for name in names if name]

    def save(
        self, output: str | Path, raw: bool, pictures: Sequence[np.ndarray], bare: bool = False
    ) -> list[Path]:
        """Write the pictures (H, W, 3), uint8, prompt by prompt; their paths. bare: without this recipe."""
        files = self.files(output, raw)
        if self.picture is not None:
            pictures = [pictures[self.picture]]
        if not raw:
            pictures = [images.grid(pictures, 1 if self.picture is not None else self.n_rows)]
        return _write(files, pictures, bare)

    def save_finished(
        self, output: str | Path, pictures: Sequence[np.ndarray], bare: bool = False
    ) -> list[Path]:
        """Write the first pictures of a run that was stopped, each in a file, as with `raw`; their paths."""
        if self.picture is not None:
            return []
        return _write(self.files(output, raw=True)[: len(pictures)], pictures, bare)


def _write(files: Sequence[File], pictures: Sequence[np.ndarray], bare: bool) -> list[Path]:
    for (path, text), picture in zip(files, pictures, strict=True):
        images.save(path, picture, *() if bare else (text, parameters(text)))
    return [path for path, _ in files]


def _is_written(name: str, value: object) -> bool:
    """Whether an option must be said; 0 is not False."""
    return value is not None and value is not False and value != DEFAULTS.get(name)


def parameters(text: Mapping[str, str]) -> str:
    """A recipe as AUTOMATIC1111's web UI writes it, which other programs and web sites read.

    Its names, three parts: prompt, negative prompt, and a line of settings; LoRAs are a part of the prompt.
    """
    files = [line.rpartition(":") for line in text.get("adapter", "").split("\n") if line]
    loras = "".join(f" <lora:{Path(file).stem}:{strength}>" for file, _, strength in files)
    height, width = text["image_size"].split("x")
    settings = {
        "Steps": text["steps"],
        "Sampler": SAMPLERS[text.get("solver", "euler")],
        "Schedule type": text["schedule"].title() if "schedule" in text else None,
        "CFG scale": text["cfg_scale"],
        "Distilled CFG Scale": text.get("guidance"),
        "Seed": text["seeds"].split()[0],
        "Size": f"{width}x{height}",
        "Model": Path(text["transformer"] if "transformer" in text else text["model"]).stem,
        "Version": text["version"],
    }
    lines = [text["prompt"] + loras]
    if "negative_prompt" in text:
        lines.append(f"Negative prompt: {text['negative_prompt']}")
    quoted = {
        key: json.dumps(v, ensure_ascii=False) if re.search("[,:]", v) else v
        for key, v in settings.items()
        if v
    }
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in quoted.items())])


def read(path: str | Path) -> tuple[dict[str, object], list[str]]:
    """A picture's options, as text by the names of OPTIONS, FLAGS as bool, and its prompts.

    With "picture", a number, where it is one of a prompt's pictures, and "pictures", the SHA-256 of each
    that it is made from, by the file's name. FluxError for a picture that this program has not made.
    """
    text = images.read_metadata(path)
    if not text.get("version", "").startswith(PROGRAM):
        raise FluxError(
            f"{path} does not say how it was made: only pictures of this program can be made again"
        )
    options: dict[str, object] = {name: text[name] for name in OPTIONS if name in text}
    options |= {name: name in text for name in FLAGS}
    made_from = [line.split(" ", 1) for line in text.get("pictures", "").splitlines()]
    options["pictures"] = {name: digest for digest, name in made_from}
    if "picture" in text:
        options["picture"] = int(text["picture"])
    return options, text["prompt"].split("\n")


def unmade(recipes: Sequence[Recipe], outputs: Sequence[str], raw: bool) -> list[int]:
    """Which recipes' files must be made: they are not there, were made otherwise, or are older than a source.

    outputs, raw: as for `Recipe.files`, an output for each recipe.
    """
    changed = _last_change({name for recipe in recipes for name in recipe.sources()})
    return [
        i
        for i, (recipe, output) in enumerate(zip(recipes, outputs, strict=True))
        if not all(_is_made(path, text, changed) for path, text in recipe.files(output, raw))
    ]


def _is_made(path: Path, text: dict[str, str], changed: float) -> bool:
    """Whether a file is there, made in the same way, and newer than the time of the last change."""
    try:
        return path.is_file() and path.stat().st_mtime > changed and images.read_metadata(path) == text
    except FluxError:  # a damaged file
        return False


def _last_change(names: Iterable[str]) -> float:
    """When any of these files, or of those in these folders, was last written; 0 where none is there."""
    given = [Path(name) for name in names if Path(name).exists()]
    return max((file.stat().st_mtime for path in given for file in (path, *path.rglob("*"))), default=0.0)
