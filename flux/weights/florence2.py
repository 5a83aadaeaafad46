"""Florence-2's checkpoints: two naming schemes, two forms of config.json, the settings beside the weights.

Ours are transformers' names less the outer `model.` (florence-community/Florence-2-*). Microsoft's
checkpoints, and multimodalart/Florence-2-large-no-flash-attn, have the names of the code that came with the
paper.
"""

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from flux import jsonfiles
from flux.errors import FluxError
from flux.jsonfiles import shown
from flux.models.florence2 import Florence2, Florence2Params, GenerationParams, LanguageParams, VisionParams
from flux.weights import tensors, torchfile
from flux.weights.headers import MAX_BLOCKS

Rows = tuple[tuple[str, str], ...]


def _block(kind: str, attention: str) -> Rows:
    parts = (
        ("conv1.fn.dw", "conv1"),
        (f"{attention}.norm", "norm1"),
        (f"{attention}.fn", attention),
        ("conv2.fn.dw", "conv2"),
        ("ffn.norm", "norm2"),
        ("ffn.fn.net", "ffn"),
    )
    block = "vision_tower.blocks.{}.{}." + kind
    return tuple((f"{block}.{theirs}", f"{block}.{ours}") for theirs, ours in parts)


# How names begin, (theirs, ours); `{}` stands for a number that is the same in both. What follows stays.
TRANSFORMERS: Rows = (
    ("model.vision_tower", "vision_tower"),
    ("model.multi_modal_projector", "multi_modal_projector"),
    ("model.language_model", "language_model"),
)
ORIGINAL: Rows = (
    ("vision_tower.convs.{}.proj", "vision_tower.convs.{}.conv"),
    *_block("spatial_block", "window_attn"),
    *_block("channel_block", "channel_attn"),
    ("image_projection", "multi_modal_projector.image_projection.weight"),  # and transposed
    ("image_proj_norm", "multi_modal_projector.image_proj_norm"),
    ("image_pos_embed", "multi_modal_projector.image_position_embed"),
    ("visual_temporal_embed", "multi_modal_projector.visual_temporal_embed"),
    ("language_model.model", "language_model"),
)
EMBEDDING = "language_model.shared.weight"
COPIES = (  # of the embedding, in our names: files hold all of them, some, or one alone
    "language_model.encoder.embed_tokens.weight",
    "language_model.decoder.embed_tokens.weight",
    "language_model.lm_head.weight",
    "lm_head.weight",
)
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # whole or in shards; the first that is there
MAX_BEAMS = 100  # which a checkpoint may ask for; Florence-2's ask for 3
UNUSED = ("language_model.final_logits_bias",)  # zeros; transformers drops it as well

# config.json -> Florence2Params. Where a file lacks a field, transformers' default is meant.
VISION_NAMES = {"embed_dim": "dim_embed"}  # ours -> Microsoft's
VISION_DEFAULTS = VisionParams()
LANGUAGE_DEFAULTS = LanguageParams(
    vocab_size=50265,
    d_model=1024,
    encoder_layers=12,
    decoder_layers=12,
    encoder_attention_heads=16,
    decoder_attention_heads=16,
    encoder_ffn_dim=4096,
    decoder_ffn_dim=4096,
)
# What other networks of these families may have and ours has not: anything else than these would load, and
# err.
FIXED: dict[str, dict[str, Any]] = {
    "text_config": {"activation_function": "gelu", "scale_embedding": False},
    "vision_config": {
        "activation_function": "gelu",
        "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
    },
}


def rename(name: str, rows: Rows) -> str:
    """The name with its beginning replaced as the first row that fits says; unchanged where none does."""
    for old, new in rows:
        pattern = re.escape(old).replace(r"\{\}", r"(\d+)") + r"(?=\.|$)"
        if match := re.match(pattern, name):
            return new.format(*match.groups()) + name[match.end() :]
    return name


def to_ours(found: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A file's tensors, in either scheme or ours, under our names and in MLX's layout; the embedding once."""
    out: dict[str, mx.array] = {}
    for name, tensor in found.items():
        ours = rename(rename(name, TRANSFORMERS), ORIGINAL)
        if name == "image_projection":  # a bare matrix, (in, out)
            tensor = tensor.T
        if tensor.ndim == 4:  # convolutions: (O, I, H, W) -> (O, H, W, I)
            tensor = tensor.transpose(0, 2, 3, 1)
        if ours not in UNUSED:
            out[ours] = tensor
    copies = [out.pop(name) for name in COPIES if name in out]
    if EMBEDDING not in out and copies:
        out[EMBEDDING] = copies[0]
    return out


def to_transformers(ours: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Our tensors in transformers' names and layout; it makes the copies of the embedding itself."""
    rows = tuple((new, old) for old, new in TRANSFORMERS)
    return {
        rename(name, rows): tensor.transpose(0, 3, 1, 2) if tensor.ndim == 4 else tensor
        for name, tensor in ours.items()
    }


def params(config: Mapping[str, Any]) -> Florence2Params:
    """The network's shape from config.json, in either form. FluxError for what we do not have."""
    for part, values in FIXED.items():
        for key, value in values.items():
            if _table(config, part).get(key, value) != value:
                raise FluxError(f"{part}: {key} is {shown(config[part][key])}; only {value!r} is known")
    vision, text = _table(config, "vision_config"), _table(config, "text_config")
    nested = {  # Microsoft's nest these two
        "max_position_embeddings": _table(vision, "image_pos_embed").get("max_pos_embeddings", 50),
        "max_temporal_embeddings": _table(vision, "visual_temporal_embedding").get(
            "max_temporal_embeddings", 100
        ),
    }
    lengths = {name: jsonfiles.count(vision.get(name, default), name) for name, default in nested.items()}
    shape = Florence2Params(
        vision=VisionParams(**_shape(VISION_DEFAULTS, vision, "vision_config")),
        language=LanguageParams(**_shape(LANGUAGE_DEFAULTS, text, "text_config")),
        **lengths,
    )
    _check_shape(shape)
    return shape


def _check_shape(shape: Florence2Params) -> None:
    """FluxError for numbers that make no network, or one of more layers than any has."""
    stages = {len(value) for value in vars(shape.vision).values() if isinstance(value, tuple)}
    if len(stages) > 1:
        raise FluxError("vision_config: its lists should have the same number of stages")
    language, vision = shape.language, shape.vision
    for layers in (language.encoder_layers, language.decoder_layers, *vision.depths):
        jsonfiles.count(layers, "the number of layers", least=0, most=MAX_BLOCKS)
    heads = (language.encoder_attention_heads, language.decoder_attention_heads)
    pairs = [(language.d_model, h) for h in heads] + list(
        zip(vision.embed_dim, vision.num_heads, strict=True)
    )
    pairs += zip(vision.embed_dim, vision.num_groups, strict=True)
    if any(parts < 1 or width < 1 or width % parts for width, parts in pairs):
        raise FluxError("a width is not a multiple of its number of heads or groups")
    language_sizes = (value for name, value in vars(language).items() if not name.endswith("layers"))
    if min(language_sizes) < 1:
        raise FluxError("text_config: widths and numbers of tokens should be above 0")
    if min(vision.window_size, *vision.patch_size, *vision.patch_stride) < 1 or vision.mlp_ratio <= 0:
        raise FluxError("vision_config: sizes of windows, patches, strides and ratios should be above 0")


def _table(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object within a config, {} where it has none."""
    found = config.get(name, {})
    if not isinstance(found, dict):
        raise FluxError(f"{name} is {shown(found)}; it should be an object")
    return found


def _shape(defaults: VisionParams | LanguageParams, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    shape: dict[str, Any] = {}
    for field in fields(defaults):
        name = field.name if field.name in config else VISION_NAMES.get(field.name, field.name)
        if name in config:
            shape |= jsonfiles.fields(type(defaults), {field.name: config[name]}, where)
        else:
            shape[field.name] = getattr(defaults, field.name)
    return shape


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object in the folder; {} where there is no such file. FluxError where it is something else."""
    path = folder / name
    return jsonfiles.read(path) if path.is_file() else {}


def generation_params(folder: Path) -> GenerationParams:
    """How the checkpoint wants answers searched: generation_config.json over Florence-2's settings."""
    config = read_json(folder, "generation_config.json")
    known = {field.name: config[field.name] for field in fields(GenerationParams) if field.name in config}
    where = folder / "generation_config.json"
    found = replace(GenerationParams(), **jsonfiles.fields(GenerationParams, known, str(where)))
    jsonfiles.count(found.num_beams, f"{where}: num_beams", most=MAX_BEAMS)
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights: safetensors, whole or in shards, else PyTorch's format."""
    files = next(filter(None, (sorted(folder.glob(pattern)) for pattern in WEIGHTS)), [])
    if not files:
        raise FluxError(f"{folder}: no captioner here; expected config.json and model.safetensors")
    return files


def load(folder: Path, dtype: mx.Dtype) -> Florence2:
    """The network of a checkpoint's folder, its weights in dtype.

    Raises FluxError that names the file, and every missing, unexpected and misshapen tensor.
    """
    files = weight_files(folder)
    config = read_json(folder, "config.json")
    if not config:
        raise FluxError(f"{folder}: no config.json beside {files[0].name}")
    try:
        network = Florence2(params(config))
    except FluxError as error:
        raise FluxError(f"{folder / 'config.json'}: {error}") from None
    is_torch = files[0].suffix == ".bin"
    found = torchfile.load(files) if is_torch else tensors.load(files)
    weights = to_ours(found)
    tensors.check(str(files[0]), weights, dict(tree_flatten(network.parameters())))
    network.load_weights([(name, tensor.astype(dtype)) for name, tensor in weights.items()])
    network.eval()
    return network
