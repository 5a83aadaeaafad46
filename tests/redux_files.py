"""A tiny FLUX.1 Redux of random weights in files, as diffusers, BFL and ComfyUI lay them."""

import json
from pathlib import Path

import mlx.core as mx

from flux.models.redux import ReduxImageEncoder, ReduxParams
from flux.models.siglip import SiglipParams, SiglipVision

from . import tiny

SIGLIP = SiglipParams(
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=33,
    patch_size=8,
)
REDUX = ReduxParams(redux_dim=32, txt_in_features=tiny.T5.d_model)
CONFIG = {"model_type": "siglip_vision_model", **vars(SIGLIP)}
PREPROCESSOR = {"size": {"height": 33, "width": 33}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.5] * 3}


def networks() -> tuple[SiglipVision, ReduxImageEncoder]:
    return tiny.randomize(SiglipVision(SIGLIP), 21), tiny.randomize(ReduxImageEncoder(REDUX), 22)


def tensors() -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """SigLIP's and the projector's, in the names and axes of files, with what is not used there."""
    siglip, redux = map(tiny.parameters, networks())
    siglip = {name: w.transpose(0, 3, 1, 2) if w.ndim == 4 else w for name, w in siglip.items()}
    siglip |= {"head.probe": mx.ones((1, 1, 32)), "head.attention.in_proj_weight": mx.ones((96, 32))}
    return {f"vision_model.{name}": w for name, w in siglip.items()}, redux


def save(path: Path, weights: dict[str, mx.array]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path), weights)
    return path


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_diffusers(folder: Path) -> Path:
    siglip, redux = tensors()
    save(folder / "image_encoder" / "model.safetensors", siglip)
    save(folder / "image_embedder" / "diffusion_pytorch_model.safetensors", redux)
    write_json(folder / "image_encoder" / "config.json", CONFIG)
    (folder / "feature_extractor").mkdir()
    write_json(folder / "feature_extractor" / "preprocessor_config.json", PREPROCESSOR)
    return folder


def write_comfyui(models: Path) -> Path:
    """ComfyUI's folder `models`: Redux in style_models/, SigLIP in clip_vision/. The path of Redux' file."""
    siglip, redux = tensors()
    save(models / "clip_vision" / "sigclip_vision_patch14_384.safetensors", siglip)
    return save(models / "style_models" / "flux1-redux-dev.safetensors", redux)
