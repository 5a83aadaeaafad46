"""What a file is that does not belong to a FLUX.1 model: other models by their tensors, or no weights.

Folders hold such files beside a model; a reader passes them over and says so by these words.
"""

import re
from collections.abc import Iterable
from pathlib import Path

ADAPTER = "an adapter (give it with --adapter)"
CONTROLNET = "a ControlNet (give it with --controlnet)"
# Models by names of tensors that only they have; the first that fits counts.
MODELS: tuple[tuple[str, str], ...] = (
    (ADAPTER, r"\.(?:lora|lokr|hada|oft|boft|dora|glora)_?\w*(?:\.|$)|\.diff$"),
    ("Chroma", r"distilled_guidance_layer\."),
    ("FLUX.2", r"double_stream_modulation_img\."),
    (CONTROLNET, r"^(?:controlnet|pos_embed_input|input_hint_block|control_model)"),
    ("FLUX.1 Redux", r"^redux_(?:up|down)\."),
    ("an IP adapter", r"ip_adapter|^image_proj\."),
    ("Stable Diffusion 3", r"joint_blocks\.\d+\.|^(?:model\.diffusion_model\.)?pos_embed\.proj\."),
    (
        "Stable Diffusion or SDXL",
        r"^(?:model\.diffusion_model\.|unet\.)?(?:input_blocks|output_blocks|middle_block|down_blocks|up_blocks)\."
        r"|^conditioner\.embedders\.",
    ),
    ("Qwen-Image", r"transformer_blocks\.\d+\.img_mod\."),
    ("HunyuanVideo", r"individual_token_refiner"),
    ("HiDream", r"double_stream_blocks\."),
    ("SigLIP or CLIP's vision encoder", r"^(?:vision_model\.)?embeddings\.patch_embedding\."),
    ("Wan", r"(?:^|\.)patch_embedding\.|time_projection\.1\."),
    ("UMT5", r"encoder\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias"),
    ("Florence-2", r"^(?:model\.)?vision_tower\."),
)
_PATTERNS = [(name, re.compile(pattern, re.MULTILINE)) for name, pattern in MODELS]

# What else is found under the name of a file of weights, by how it begins.
BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: run `git lfs pull`"),
    (b"<!doctype html", "an HTML page, saved instead of the file: download it again, logged in"),
    (b"<html", "an HTML page, saved instead of the file: download it again, logged in"),
    (b"<?xml", "an XML page, saved instead of the file: download it again, logged in"),
    (b'{"error', "a server's error message: download it again, logged in"),
    (b"access to model", "a server's refusal: accept the licence there, log in, download it again"),
    (b"entry not found", "a server's error message: the file's name there is another one"),
    (b"pk\x03\x04", "a zip archive or PyTorch's file: unpack it, or convert it to safetensors"),
    (b"\x80\x02", "a pickle of PyTorch's: convert it to safetensors"),
)
# What browsers and download programs append to a name while they are at it.
UNFINISHED = (".part", ".partial", ".incomplete", ".crdownload", ".download", ".aria2", ".tmp")


def model(names: Iterable[str], besides: str = "") -> str | None:
    """The model or adapter that a file with these tensors is of, where it is not FLUX.1's; else None.

    besides: what it is known to be, of `MODELS`, which does not count.
    """
    text = "\n".join(names)
    return next((name for name, pattern in _PATTERNS if name != besides and pattern.search(text)), None)


def is_unfinished(path: Path) -> bool:
    """Whether a download program says, by its name or by a file beside it, that it is still at this file."""
    return path.suffix in UNFINISHED or path.with_name(path.name + ".aria2").exists()


def disguise(path: Path) -> str | None:
    """What a file that is not weights is instead, and what to do; None where that cannot be told."""
    try:
        with path.open("rb") as file:
            start = file.read(256).lstrip()
    except OSError:
        return None
    if not start:
        return "cut short to nothing: download it again"
    if not start.strip(b"\0"):
        return "a download that is not finished: it begins with zeros"
    return next((text for sign, text in BEGINNINGS if start.lower().startswith(sign)), None)
