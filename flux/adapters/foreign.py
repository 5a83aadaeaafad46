"""Adapters for other models than FLUX.1, told by the names and shapes of their layers or by the header.

Their text encoders, and some of their layers, have the names and shapes of FLUX.1's: such a file would fit in
part, and the picture would be another one than was asked for.
"""

import re
from collections.abc import Mapping

import mlx.core as mx

# Models by keys that only their adapters have (any separator stands as `.`). The first that fits counts. Of
# SHARING the other keys are FLUX.1's too; one key of the others among a whole FLUX.1 adapter is just unknown.
SHARING = ("FLUX.2", "Chroma", "Qwen-Image", "HunyuanVideo")
KEYS: tuple[tuple[str, str], ...] = (
    (
        "FLUX.2",
        r"(double|single)\.stream\.modulation|attn\.to\.qkv\.mlp\.proj|\.ff(\.context)?\.linear\.(in|out)\.",
    ),
    ("Chroma", r"distilled\.guidance\.layer"),
    ("Qwen-Image", r"transformer\.blocks\.\d+\.(img|txt)\.(mod\.1|mlp\.net)\."),
    ("HunyuanVideo", r"individual\.token\.refiner|(img|txt)\.mlp\.fc[12]\.|\.token\.refiner\."),
    ("HiDream", r"(double|single)\.stream\.blocks\."),
    ("Stable Diffusion 3", r"joint\.blocks\.|\.context\.block\.|\.x\.block\."),
    ("Wan", r"(^|\.)blocks\.\d+\.(cross|self)\.attn\.|(^|\.)blocks\.\d+\.ffn\."),
    ("Z-Image or Lumina", r"(^|\.)layers\.\d+\.(attention|feed\.forward)\.|(noise|context)\.refiner\."),
    (
        "Stable Diffusion XL",
        r"\.te2\.text\.model|^text\.encoder\.2\.text\.model\.|\.label\.emb\.|add\.embedding\.linear",
    ),
    ("Stable Diffusion XL", r"(input|middle|output|down|up|mid)\.blocks?\..*transformer\.blocks\.[2-9]"),
    ("Stable Diffusion 1 or 2", r"(^|\.)(input|output|down|up|middle|mid)\.blocks?\.(\d+\.)?"),
    ("LTX-Video, PixArt or CogVideoX", r"(^|\.)transformer\.blocks\.\d+\.attn[12]\."),
)
# Models as a header names them: the first pattern that fits. FLUX.1 and its kin have no name here.
NAMES: tuple[tuple[str, str], ...] = (
    ("FLUX.2", r"flux[-_. ]?2"),
    ("Chroma", r"chroma"),
    ("", r"flux"),
    ("Stable Diffusion XL", r"sdxl|stable-diffusion-xl|pony|illustrious"),
    ("Stable Diffusion 3", r"sd3|stable-diffusion-(v?3|3\.5)"),
    ("Stable Diffusion 1 or 2", r"^sd_?v?[12]|stable-diffusion-v[12]"),
    ("Qwen-Image", r"qwen"),
    ("Wan", r"^wan"),
    ("HunyuanVideo", r"hunyuan"),
    ("HiDream", r"hidream"),
    ("Z-Image or Lumina", r"z-?image|lumina"),
    ("LTX-Video, PixArt or CogVideoX", r"^ltx|pixart|cogvideo"),
)
OWN = re.compile(
    r"(^|\.)(double|single)(\.transformer)?\.blocks\.\d+\.|transformer\.blocks\.\d+\.attn\.(to|add)\."
)
LAST_DOUBLE = 18  # of the double blocks of FLUX.1
ENTRIES = ("modelspec.architecture", "ss_base_model_version")


def model(tensors: Mapping[str, mx.array], metadata: Mapping[str, str]) -> str | None:
    """The model that an adapter is for, where that is not FLUX.1; else None."""
    keys = [re.sub(r"[_.]+", ".", key) + "." for key in tensors]
    by_keys = next((name for name, sign in KEYS if any(re.search(sign, key) for key in keys)), None)
    if by_keys in SHARING or (by_keys and not any(OWN.search(key) for key in keys)):
        return by_keys
    return _by_blocks(keys) or _by_shapes(tensors) or _by_header(metadata)


def _by_blocks(keys: list[str]) -> str | None:
    """Stable Diffusion 3 has diffusers' names of FLUX.1's double blocks, more of them, and no single ones."""
    found = (re.search(r"(single\.)?transformer\.blocks\.(\d+)\.", key) for key in keys)
    blocks = [(match[1] is not None, int(match[2])) for match in found if match]
    return (
        "Stable Diffusion 3" if blocks and max(blocks) > (False, LAST_DOUBLE) and not max(blocks)[0] else None
    )


def _by_shapes(tensors: Mapping[str, mx.array]) -> str | None:
    """FLUX.2's single blocks have 9 h rows and 4 h columns where FLUX.1's have 7 h and 5 h."""
    hidden = rows = 0
    for key, tensor in tensors.items():
        if re.search(r"single_blocks[._]\d+[._]linear1\.", key) and tensor.ndim == 2:
            if re.search(r"(lora_down|lora_A)(\.\w+)?\.weight$", key):
                hidden = tensor.shape[1]
            if re.search(r"(lora_up|lora_B)(\.\w+)?\.weight$", key):
                rows = tensor.shape[0]
    return "FLUX.2" if hidden and rows == 9 * hidden else None


def _by_header(metadata: Mapping[str, str]) -> str | None:
    for entry in ENTRIES:
        text = metadata.get(entry, "").lower()
        found = next((name for name, sign in NAMES if text and re.search(sign, text)), None)
        if found is not None:
            return found or None
    return None
