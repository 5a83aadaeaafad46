"""How alike pictures are: CLIP-I of DreamBooth's protocol (Ruiz et al. 2023, arXiv:2208.12242, section 4.2).

The mean cosine of CLIP's features over all pairs of a generated and a real picture. The paper's figures are
ViT-B/32's: 0.885 among real pictures of a subject, 0.803 for Stable Diffusion fine-tuned by DreamBooth.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from flux import images, jsonfiles
from flux.errors import FluxError
from flux.models.clip_vision import CLIPVision, CLIPVisionParams
from flux.weights import checkpoints, tensors

REPO = "openai/clip-vit-base-patch32"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of R, G and B
PARTS = ("vision_model.", "visual_projection.")  # of the file; the rest is the text encoder
KINDS = (".png", ".jpg", ".jpeg", ".webp")


def to_folder(folder: Path) -> Callable[[Sequence[np.ndarray]], float]:
    """The mean cosine of pictures (H, W, 3), uint8, with those of a folder, of all pairs, -1 to 1.

    FluxError for a folder without pictures and where CLIP cannot be loaded.
    """
    real = read_folder(folder)
    model = load()
    subject = features(model, real)
    return lambda pictures: float((features(model, pictures) @ subject.T).mean())


def load() -> CLIPVision:
    """CLIP ViT-B/32 from the Hub or its cache, in float32; FluxError where it cannot be loaded."""
    config = jsonfiles.read(checkpoints.fetch(REPO, "config.json"))
    return build(config, checkpoints.fetch(REPO, "model.safetensors"))


def build(config: dict, file: Path) -> CLIPVision:
    """The vision part of transformers' CLIPModel. config: of its config.json."""
    known = {field.name for field in fields(CLIPVisionParams)}
    vision = {**config.get("vision_config", {}), "projection_dim": config.get("projection_dim", 512)}
    model = CLIPVision(CLIPVisionParams(**{name: vision[name] for name in known & vision.keys()}))
    found = {name: a.astype(mx.float32) for name, a in tensors.load([file]).items() if name.startswith(PARTS)}
    found.pop("vision_model.embeddings.position_ids", None)  # 0, 1, 2 ...: older files hold them
    patch = "vision_model.embeddings.patch_embedding.weight"
    if patch in found:
        found[patch] = found[patch].transpose(0, 2, 3, 1)  # (O, I, H, W) -> (O, H, W, I)
    tensors.check(str(file), found, dict(tree_flatten(model.parameters())))
    model.load_weights(list(found.items()))
    return model


def prepare(picture: np.ndarray, side: int) -> np.ndarray:
    """As CLIP's processor does: the shorter side of (H, W, 3) uint8 to `side`, the middle, normalized."""
    height, width = picture.shape[:2]
    short = min(height, width)
    size = (side * width // short, side * height // short)  # (width, height)
    scaled = np.array(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
    top, left = (scaled.shape[0] - side) // 2, (scaled.shape[1] - side) // 2
    middle = scaled[top : top + side, left : left + side].astype(np.float32) / 255
    return (middle - np.array(MEAN, np.float32)) / np.array(STD, np.float32)


def features(model: CLIPVision, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Of pictures (H, W, 3) uint8 of any sizes: (N, D), each of length 1."""
    found = []
    for picture in pictures:  # one at a time: little memory, and they are few
        out = model(mx.array(prepare(picture, model.params.image_size))[None])[0]
        found.append(np.array(out / mx.linalg.norm(out)))
    return np.stack(found)


def read_folder(folder: Path) -> list[np.ndarray]:
    """The pictures of a folder; FluxError where there is none."""
    files = [path for path in sorted(folder.glob("*")) if path.suffix.lower() in KINDS]
    if not files:
        raise FluxError(f"{folder}: no pictures to compare with ({', '.join(KINDS)})")
    return [images.load(path)[0] for path in files]
