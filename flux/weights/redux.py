"""FLUX.1 Redux on disk: its projector, and SigLIP's vision encoder, in diffusers' folder or as single files.

diffusers' folder holds image_embedder/, image_encoder/ and feature_extractor/. BFL's
flux1-redux-dev.safetensors is the projector alone, under the same names; SigLIP is then beside it or, in
ComfyUI's tree, in clip_vision/.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from flux.errors import FluxError
from flux.models.redux import ReduxImageEncoder
from flux.models.siglip import SiglipVision
from flux.preprocessing import PictureParams, params_of
from flux.weights import layouts, single, tensors
from flux.weights.contents import SUFFIXES, Found, look

NAMES = {"redux": "FLUX.1 Redux", "siglip": "SigLIP's vision encoder"}
NETWORKS: dict[str, Callable[..., nn.Module]] = {"redux": ReduxImageEncoder, "siglip": SiglipVision}
# A file holds a network if it has this tensor; CLIP's patches have no bias.
SIGNS = {"redux": r"redux_up\.weight", "siglip": r"(?:vision_model\.)?embeddings\.patch_embedding\.bias"}
# The folders in which diffusers and ComfyUI keep it, in the order of the search; "" is the model's itself.
FOLDERS = {
    "redux": ("image_embedder", "style_models", ""),
    "siglip": ("image_encoder", "clip_vision", ""),
}
EXPECTED = {
    "redux": "image_embedder/, style_models/, flux1-redux-dev.safetensors",
    "siglip": "image_encoder/, clip_vision/, sigclip_vision_patch14_384.safetensors",
}
PREFIX = {"redux": "", "siglip": "vision_model."}  # which transformers 5 leaves out
# Beside what is loaded: the attention that pools patches into a vector, and the text half of a whole SigLIP.
UNUSED = {
    "redux": r"$^",
    "siglip": r"head\..*|embeddings\.position_ids|text_model\..*|logit_(?:scale|bias)|scaled_fp8",
}
PREPROCESSOR = "preprocessor_config.json"
SIGLIP_PICTURES = PictureParams(384, 384, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class ReduxFiles:
    """Where both networks are, and what says how pictures are made ready for SigLIP, if anything does."""

    redux: Path
    siglip: Path
    siglip_config: Mapping[str, Any]
    preprocessor: Path | None

    def fingerprints(self) -> dict[str, str]:
        """For each network a short text that differs where its file does."""
        return {NAMES[kind]: tensors.fingerprint(getattr(self, kind)) for kind in NAMES}


def find(model: Path, siglip: Path | None = None) -> ReduxFiles:
    """The files of Redux in a folder, or of one file with what is around it.

    siglip: the file or folder of SigLIP, where it is elsewhere. FluxError where either is nowhere; warns of a
    choice among several files.
    """
    root = _root(model)
    redux = _file("redux", model)
    if siglip is None:
        siglip, where = _search("siglip", root), root
    else:
        siglip, where = _file("siglip", siglip), _root(siglip)
    settings = (siglip.parent / PREPROCESSOR, where / "feature_extractor" / PREPROCESSOR)
    return ReduxFiles(redux, siglip, _config(siglip), next((p for p in settings if p.is_file()), None))


def _root(path: Path) -> Path:
    """The model's folder of a path in it."""
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    inner = {name for names in FOLDERS.values() for name in names if name}
    return folder.parent if folder.name in inner else folder


def _file(kind: str, path: Path) -> Path:
    """The file of a network that is given by its file or its folder."""
    if path.is_dir():
        return _search(kind, _root(path))
    if not path.exists():
        raise FluxError(f"{path}: no such file or folder (for {NAMES[kind]})")
    found = look([path])
    if found.fault and not found.foreign:
        raise FluxError(found.fault)
    if not _holds(kind, found):
        instead = f", but {found.fault.removeprefix(f'{path}: ')}" if found.fault else ""
        raise FluxError(f"{path}: holds no {NAMES[kind]}{instead}")
    return path


def _search(kind: str, root: Path) -> Path:
    """The file of a network in a model's folder."""
    faults = []
    for folder in (root / name for name in FOLDERS[kind]):
        files = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
        found = [look([path]) for path in files]
        faults += [one.fault for one in found if one.fault and not one.foreign]
        if fitting := [one.files[0] for one in found if _holds(kind, one)]:
            if len(fitting) > 1:
                rest = ", ".join(path.name for path in fitting[1:])
                warnings.warn(f"{folder}: took {fitting[0].name} for {NAMES[kind]}, not {rest}", stacklevel=2)
            return fitting[0]
    tail = f"; {'; '.join(faults)}" if faults else ""
    option = "--siglip FILE" if kind == "siglip" else "--redux-model FILE"
    raise FluxError(f"{root}: no {NAMES[kind]} ({EXPECTED[kind]}): put it there or give {option}{tail}")


def _holds(kind: str, found: Found) -> bool:
    return any(re.fullmatch(SIGNS[kind], name) for name in found.entries)


def _config(siglip: Path) -> dict[str, Any]:
    """What the config.json beside it says of a SigLIP, or of a whole one's vision encoder; {} without."""
    config = layouts.read_config(siglip.parent / "config.json")
    vision = config.get("vision_config", config)
    return vision if isinstance(vision, dict) and "siglip" in str(config.get("model_type")) else {}


# --- Loading ---


def load_redux(files: ReduxFiles, dtype: mx.Dtype) -> ReduxImageEncoder:
    """The projector, its weights in dtype, lazily. FluxError naming every tensor that is at fault."""
    return cast(ReduxImageEncoder, _load("redux", files.redux, {}, dtype))


def load_siglip(files: ReduxFiles, dtype: mx.Dtype) -> tuple[SiglipVision, PictureParams]:
    """SigLIP's vision encoder, as `load_redux`, and how to make pictures ready for it.

    FluxError too where its settings are for pictures of another size than the network takes.
    """
    network = cast(SiglipVision, _load("siglip", files.siglip, files.siglip_config, dtype))
    side = network.params.image_size
    usual = PictureParams(side, side, SIGLIP_PICTURES.mean, SIGLIP_PICTURES.deviation)
    if files.preprocessor is None:
        return network, usual
    pictures = params_of(layouts.read_config(files.preprocessor), usual, str(files.preprocessor))
    if (pictures.height, pictures.width) != (side, side):
        size = f"{pictures.height}x{pictures.width}"
        raise FluxError(f"{files.preprocessor}: for pictures of {size}; {files.siglip} takes {side}x{side}")
    return network, pictures


def _load(kind: str, file: Path, config: Mapping[str, Any], dtype: mx.Dtype) -> nn.Module:
    return single.load(kind, file, config, partial(to_ours, kind), NETWORKS[kind], dtype)


def to_ours(kind: str, found: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A file's tensors under the network's names, in MLX's layout, without those that it does not use.

    UNUSED says which these are; names that are not known stay, for the check.
    """
    prefix = PREFIX[kind]
    bare = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return {
        name: tensor.transpose(0, 2, 3, 1) if tensor.ndim == 4 else tensor  # (O, I, H, W) -> (O, H, W, I)
        for name, tensor in bare.items()
        if not re.fullmatch(UNUSED[kind], name)
    }
