"""The models that are known by name: where their files are and their defaults. No I/O."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from flux.errors import FluxError
from flux.sampler import AnyShift


@dataclass(frozen=True)
class ModelSpec:
    """One model. Its networks' shapes are read from its files, so that they are not listed here.

    repo: on the Hub, or "" for the built-in model. file: BFL's single file of the transformer.
    steps, guidance: FLUX's guidance, which is an input of the network. cfg_scale: true classifier-free
    guidance; 1 is none. shift: how times are shifted towards noise (sampler.timesteps): True as dev's, more
    in larger pictures. t5_length: tokens.
    image_size: (height, width) in pixels.
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


def of_file(name: str, has_guidance: bool, shifted: bool | None = None) -> ModelSpec:
    """The row for a transformer that has none: by the words of its name, as far as its kind allows.

    has_guidance: whether it takes guidance as an input. shifted: whether its scheduler shifts times by the
    picture's size; None where nothing says so. A dev without that input has guidance 0.
    """
    said = words(name)
    if has_guidance:
        return get("krea" if "krea" in said else "dev")
    if shifted or (shifted is None and said & {"dev", "krea"} and "schnell" not in said):
        return replace(get("krea" if "krea" in said else "dev"), guidance=0.0)
    return get("schnell")


def words(name: str) -> set[str]:
    """The words of a file's or folder's name, in lower case: "flux1-krea-dev_fp8", "flux1KreaDev"."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return set(re.findall(r"[a-z]+", apart.lower()))
