"""Which files of a Hub repository to download for a model: names alone, no network."""

import fnmatch
import re

from flux.errors import FluxError
from flux.weights import contents, specs
from flux.weights.layouts import FOLDERS, TOKENIZERS
from flux.weights.registry import ModelSpec


def patterns(repo: str, files: list[str], spec: ModelSpec | None, kinds: list[str]) -> list[str]:
    """What to download: of the two layouts that a repository may hold only one, BFL's where it is."""
    patterns = [f"{name}/*" for name in TOKENIZERS] + [specs.DEFAULTS, specs.SCHEDULER, specs.INDEX]
    for kind in kinds:
        patterns += [f"{FOLDERS[kind]}/config.json", *_of_part(repo, files, spec, kind)]
    return patterns


def _of_part(repo: str, files: list[str], spec: ModelSpec | None, kind: str) -> list[str]:
    """The files of a repository to download for a part; FluxError where only the user can choose."""
    single = {"transformer": spec.file if spec else "flux1-*.safetensors", "ae": "ae.s*f*t*"}
    top = fnmatch.filter([file for file in files if "/" not in file], single.get(kind, ""))
    folder = [file for file in files if file.startswith(f"{FOLDERS[kind]}/")]
    weights = [file for file in folder if file.endswith((*contents.SUFFIXES, ".index.json"))]
    if len(top) == 1 or (top and not weights and kind == "ae"):
        return top[:1]
    if weights:
        full = [file for file in weights if not re.search(r"\.(fp16|bf16|non_ema)[.-]", file)]
        return full or weights
    if kind != "transformer":
        return []
    others = top or [file for file in files if "/" not in file and file.endswith(contents.SUFFIXES)]
    others = [file for file in others if not re.match(r"ae\.|.*lora|.*vae|t5xxl|clip_l", file.lower())]
    if len(others) != 1:
        found = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
        raise FluxError(f"{repo}: {found or 'no transformer'} there; choose a file with --model {repo}:FILE")
    return others


def controlnet_patterns(repo: str, files: list[str]) -> list[str]:
    """What to download for a repository's ControlNet; FluxError where only the user can choose."""
    found = [file for file in files if "/" not in file and file.endswith(contents.SUFFIXES)]
    usual = [
        file for file in found if re.fullmatch(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors", file)
    ]
    if not usual and len(found) != 1:
        shown = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        raise FluxError(
            f"{repo}: {shown or 'no ControlNet'} there; choose a file with --controlnet {repo}:FILE"
        )
    return [*(usual or found), "*.safetensors.index.json", "config.json"]


def adapter_patterns(repo: str, files: list[str]) -> list[str]:
    """What to download for a repository's adapter; FluxError for none, and where only the user can choose."""
    found = [file for file in files if "/" not in file and file.endswith((".safetensors", ".bin"))]
    usual = [file for file in found if file.startswith(("pytorch_lora_weights.", "adapter_model."))]
    found = sorted(usual or found, key=lambda file: file.endswith(".bin"))[: 1 if usual else None]
    if len(found) != 1:
        shown = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        raise FluxError(f"{repo}: {shown or 'no adapter'} there; choose a file with --adapter {repo}:FILE")
    return [*found, "adapter_config.json"]


def redux_patterns(files: list[str]) -> list[str]:
    """What to download of a repository of Redux or SigLIP: diffusers' folders, else what lies at the top."""
    folders = ("image_embedder", "image_encoder", "feature_extractor")
    if any(file.startswith(folders) for file in files):
        return [f"{folder}/*" for folder in folders]
    return [file for file in files if "/" not in file and file.endswith((*contents.SUFFIXES, ".json"))]


def tiny_decoder_patterns(files: list[str]) -> list[str]:
    """What to download of a repository of a tiny autoencoder: diffusers' file, else a decoder by its name."""
    usual = [file for file in files if file == "diffusion_pytorch_model.safetensors"]
    named = [file for file in files if re.fullmatch(r"[^/]*decoder[^/]*\.safetensors", file)]
    return [*(usual or named or ["*.safetensors"]), "config.json"]
