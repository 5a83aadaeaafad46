"""The models that are known by name: where their files are and their defaults. No I/O."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from flux.errors import FluxError
from flux.sampler import AnyShift

# What a transformer is given besides texts: nothing; a picture and a mask (Fill); a control picture (Canny,
# Depth); pictures that it refers to (Kontext).
TEXT, FILL, CONTROL, REFERENCE = INPUTS = ("text", "fill", "control", "reference")
PIPELINES = {  # diffusers' classes for them
    TEXT: "FluxPipeline",
    FILL: "FluxFillPipeline",
    CONTROL: "FluxControlPipeline",
    REFERENCE: "FluxKontextPipeline",
}


@dataclass(frozen=True)
class ModelSpec:
    """One model. Its networks' shapes are read from its files, so that they are not listed here.

    repo: on the Hub, or "" for the built-in model. file: BFL's single file of the transformer.
    steps, guidance: FLUX's guidance, which is an input of the network. cfg_scale: true classifier-free
    guidance; 1 is none. shift: how times are shifted towards noise (sampler.timesteps): True as dev's, more
    in larger pictures. t5_length: tokens.
    image_size: (height, width) in pixels. input: of `INPUTS`, what the transformer is given besides texts.
    """

    name: str
    repo: str
    file: str
    steps: int
    guidance: float
    shift: AnyShift
    t5_length: int
    image_size: tuple[int, int] = (512, 512)
    cfg_scale: float = 1.0
    input: str = TEXT


MODELS: tuple[ModelSpec, ...] = (
    ModelSpec(
        name="schnell",
        repo="black-forest-labs/FLUX.1-schnell",
        file="flux1-schnell.safetensors",
        steps=4,
        guidance=0.0,  # the network has no such input
        shift=False,
        t5_length=256,
    ),
    ModelSpec(
        name="dev",
        repo="black-forest-labs/FLUX.1-dev",
        file="flux1-dev.safetensors",
        steps=50,
        guidance=3.5,
        shift=True,
        t5_length=512,
    ),
    ModelSpec(
        name="krea",
        repo="black-forest-labs/FLUX.1-Krea-dev",
        file="flux1-krea-dev.safetensors",
        steps=28,
        guidance=4.5,
        shift=True,
        t5_length=512,
    ),
    ModelSpec(
        name="fill",
        repo="black-forest-labs/FLUX.1-Fill-dev",
        file="flux1-fill-dev.safetensors",
        steps=50,
        guidance=30.0,
        shift=True,
        t5_length=512,
        image_size=(1024, 1024),
        input=FILL,
    ),
    ModelSpec(
        name="canny",
        repo="black-forest-labs/FLUX.1-Canny-dev",
        file="flux1-canny-dev.safetensors",
        steps=50,
        guidance=30.0,
        shift=True,
        t5_length=512,
        image_size=(1024, 1024),
        input=CONTROL,
    ),
    ModelSpec(
        name="depth",
        repo="black-forest-labs/FLUX.1-Depth-dev",
        file="flux1-depth-dev.safetensors",
        steps=30,
        guidance=10.0,
        shift=True,
        t5_length=512,
        image_size=(1024, 1024),
        input=CONTROL,
    ),
    ModelSpec(
        name="kontext",
        repo="black-forest-labs/FLUX.1-Kontext-dev",
        file="flux1-kontext-dev.safetensors",
        steps=28,
        guidance=2.5,
        shift=True,
        t5_length=512,
        image_size=(1024, 1024),
        input=REFERENCE,
    ),
    ModelSpec(
        name="tiny",
        repo="",
        file="",
        steps=20,
        guidance=1.0,
        shift=False,
        t5_length=32,
        image_size=(64, 64),
        cfg_scale=3.0,
    ),
)

CAPTIONERS = {  # by name: their repositories on the Hub, "" for the built-in one
    name: f"florence-community/Florence-2-{name}" for name in ("base", "large", "base-ft", "large-ft")
} | {"tiny": ""}

REDUX = "black-forest-labs/FLUX.1-Redux-dev"  # the repository of its two networks
TINY_DECODER = "madebyollin/taef1"  # the repository of TAEF1, FLUX.1's tiny autoencoder

TINY_FOLDER = Path(__file__).parents[1] / "assets" / "tiny"
TOKENIZERS_FOLDER = TINY_FOLDER.with_name("tokenizers")
TINY_CAPTIONER_FOLDER = TINY_FOLDER.with_name("tiny-captioner")


def find(name: str) -> ModelSpec | None:
    """The row of a name ("schnell"), an alias ("flux-schnell") or a repository of the registry, else None."""
    for spec in MODELS:
        if name in (spec.name, f"flux-{spec.name}") or (name and name == spec.repo):
            return spec
    return None


def get(name: str) -> ModelSpec:
    """The row of a name; FluxError for one that is not in the registry."""
    spec = find(name)
    if spec is None:
        known = ", ".join(spec.name for spec in MODELS)
        raise FluxError(f"unknown model {name!r}; known: {known}")
    return spec


def of_file(name: str, has_guidance: bool, shifted: bool | None = None, kind: str = TEXT) -> ModelSpec:
    """The row for a transformer that has none: by the words of its name, as far as its kind allows.

    has_guidance: whether it takes guidance as an input. shifted: whether its scheduler shifts times by the
    picture's size; None where nothing says so. kind: of `INPUTS`, as its channels say. A dev without the
    input for guidance has guidance 0.
    """
    said = words(name)
    row = of_kind(kind, name)
    if kind == TEXT and row.input == TEXT and not has_guidance:
        dev = shifted or (shifted is None and said & {"dev", "krea"} and "schnell" not in said)
        row = row if dev else get("schnell")
    return row if has_guidance else replace(row, guidance=0.0)


def of_kind(kind: str, name: str) -> ModelSpec:
    """The row for a transformer that was made of dev, of `INPUTS` as its channels say, by its name's words.

    Kontext has dev's channels: its name alone tells it.
    """
    said = words(name)
    if kind == FILL:
        return get("fill")
    if kind == CONTROL:
        return get("depth" if "depth" in said else "canny")
    return get(next((row for row in ("kontext", "krea") if row in said), "dev"))


def words(name: str) -> set[str]:
    """The words of a file's or folder's name, in lower case: "flux1-krea-dev_fp8", "flux1KreaDev"."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return set(re.findall(r"[a-z]+", apart.lower()))
