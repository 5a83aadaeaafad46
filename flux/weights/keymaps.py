"""Parameter names as data: BFL's names, which are ours, <-> diffusers'; the text encoders' variants.

A table's row names a module in both layouts. Every function here reads the same tables, so that import,
export and adapters cannot drift apart. Maps may be applied twice: a name that is right passes through.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

from flux.errors import FluxError
from flux.weights.headers import MAX_LEVELS, block_count

Tensors = dict[str, mx.array]


@dataclass(frozen=True)
class Row:
    """One module in both layouts; `{}` stands for a number that is the same in both.

    ours: BFL's name. theirs: diffusers' names; where there are several, the rows of ours (a fused layer)
    are theirs one under another: all but the last have `hidden` rows, the last has the rest. swapped: the
    halves of the rows stand in the other order. parameters: pairs (ours, theirs) of parameter names.
    """

    ours: str
    theirs: tuple[str, ...]
    swapped: bool = False
    parameters: tuple[tuple[str, str], ...] = (("weight", "weight"), ("bias", "bias"))


def _norm(ours: str, theirs: str) -> Row:
    return Row(ours, (theirs,), parameters=(("scale", "weight"),))


def _qkv(ours: str, *theirs: str) -> Row:
    block = "transformer_blocks.{}.attn."
    return Row("double_blocks.{}." + ours, tuple(block + name for name in theirs))


_SINGLE = "single_transformer_blocks.{}."

TRANSFORMER: tuple[Row, ...] = (
    Row("img_in", ("x_embedder",)),
    Row("txt_in", ("context_embedder",)),
    Row("time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
    Row("time_in.out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
    Row("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    Row("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    Row("guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
    Row("guidance_in.out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
    # Double blocks: the picture's stream, then the text's.
    Row("double_blocks.{}.img_mod.lin", ("transformer_blocks.{}.norm1.linear",)),
    _qkv("img_attn.qkv", "to_q", "to_k", "to_v"),
    _norm("double_blocks.{}.img_attn.norm.query_norm", "transformer_blocks.{}.attn.norm_q"),
    _norm("double_blocks.{}.img_attn.norm.key_norm", "transformer_blocks.{}.attn.norm_k"),
    Row("double_blocks.{}.img_attn.proj", ("transformer_blocks.{}.attn.to_out.0",)),
    Row("double_blocks.{}.img_mlp.0", ("transformer_blocks.{}.ff.net.0.proj",)),
    Row("double_blocks.{}.img_mlp.2", ("transformer_blocks.{}.ff.net.2",)),
    Row("double_blocks.{}.txt_mod.lin", ("transformer_blocks.{}.norm1_context.linear",)),
    _qkv("txt_attn.qkv", "add_q_proj", "add_k_proj", "add_v_proj"),
    _norm("double_blocks.{}.txt_attn.norm.query_norm", "transformer_blocks.{}.attn.norm_added_q"),
    _norm("double_blocks.{}.txt_attn.norm.key_norm", "transformer_blocks.{}.attn.norm_added_k"),
    Row("double_blocks.{}.txt_attn.proj", ("transformer_blocks.{}.attn.to_add_out",)),
    Row("double_blocks.{}.txt_mlp.0", ("transformer_blocks.{}.ff_context.net.0.proj",)),
    Row("double_blocks.{}.txt_mlp.2", ("transformer_blocks.{}.ff_context.net.2",)),
    # Single blocks.
    Row("single_blocks.{}.modulation.lin", (_SINGLE + "norm.linear",)),
    Row(
        "single_blocks.{}.linear1",
        (_SINGLE + "attn.to_q", _SINGLE + "attn.to_k", _SINGLE + "attn.to_v", _SINGLE + "proj_mlp"),
    ),
    _norm("single_blocks.{}.norm.query_norm", _SINGLE + "attn.norm_q"),
    _norm("single_blocks.{}.norm.key_norm", _SINGLE + "attn.norm_k"),
    Row("single_blocks.{}.linear2", (_SINGLE + "proj_out",)),
    # The final layer: diffusers has (scale, shift) where BFL has (shift, scale).
    Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
    Row("final_layer.linear", ("proj_out",)),
)

# A ControlNet: a transformer without final layer, an embedder of the control picture, and convolutions, which
# BFL's layout numbers together with the SiLUs between them. Other names are the same in both.
CONTROLNET: tuple[Row, ...] = (
    *(row for row in TRANSFORMER if not row.ours.startswith("final_layer.")),
    Row("pos_embed_input", ("controlnet_x_embedder",)),
    Row("input_hint_block.0", ("input_hint_block.conv_in",)),
    *(Row(f"input_hint_block.{2 * i + 2}", (f"input_hint_block.blocks.{i}",)) for i in range(6)),
    Row("input_hint_block.14", ("input_hint_block.conv_out",)),
)

_RESNET = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("nin_shortcut", "conv_shortcut"),
)
_ATTENTION = (
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
)


@lru_cache
def autoencoder(levels: int) -> tuple[Row, ...]:
    """The autoencoder's table; levels: how many resolutions it has (BFL counts the decoder's backwards)."""
    prefixes = [("encoder.down.{}.block.{}", "encoder.down_blocks.{}.resnets.{}", _RESNET)]
    for coder in ("encoder", "decoder"):
        prefixes += [
            (f"{coder}.mid.block_1", f"{coder}.mid_block.resnets.0", _RESNET),
            (f"{coder}.mid.attn_1", f"{coder}.mid_block.attentions.0", _ATTENTION),
            (f"{coder}.mid.block_2", f"{coder}.mid_block.resnets.1", _RESNET),
        ]
    pairs = [("encoder.down.{}.downsample.conv", "encoder.down_blocks.{}.downsamplers.0.conv")]
    for ours in range(levels):
        theirs = levels - 1 - ours
        prefixes += [(f"decoder.up.{ours}.block.{{}}", f"decoder.up_blocks.{theirs}.resnets.{{}}", _RESNET)]
        pairs += [(f"decoder.up.{ours}.upsample.conv", f"decoder.up_blocks.{theirs}.upsamplers.0.conv")]
    pairs += [("encoder.norm_out", "encoder.conv_norm_out"), ("decoder.norm_out", "decoder.conv_norm_out")]
    pairs += [(f"{a}.{x}", f"{b}.{y}") for a, b, names in prefixes for x, y in names]
    return tuple(Row(ours, (theirs,)) for ours, theirs in pairs)


# --- One module's name ---


@dataclass(frozen=True)
class Target:
    """Where a module of diffusers' lies in ours: the row, our module's name, and which part of it."""

    row: Row
    module: str
    part: int


@lru_cache
def _patterns(rows: tuple[Row, ...]) -> tuple[list, list]:
    """The rows' names compiled: [(pattern of ours, row)] and [(pattern of theirs, row, part)]."""

    def compiled(template: str) -> re.Pattern:
        return re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))

    ours = [(compiled(row.ours), row) for row in rows]
    theirs = [(compiled(name), row, part) for row in rows for part, name in enumerate(row.theirs)]
    return ours, theirs


def find_ours(rows: tuple[Row, ...], module: str) -> Target | None:
    """A module's name in diffusers' layout -> where it goes in ours, or None where no row has it."""
    return _find_ours(_patterns(rows)[1], module)


def _find_ours(patterns: list, module: str) -> Target | None:
    for pattern, row, part in patterns:
        if match := pattern.fullmatch(module):
            return Target(row, row.ours.format(*match.groups()), part)
    return None


def find_theirs(rows: tuple[Row, ...], module: str) -> tuple[Row, tuple[str, ...]] | None:
    """A module's name in our layout -> its row and diffusers' names for its parts, or None."""
    return _find_theirs(_patterns(rows)[0], module)


def _find_theirs(patterns: list, module: str) -> tuple[Row, tuple[str, ...]] | None:
    for pattern, row in patterns:
        if match := pattern.fullmatch(module):
            return row, tuple(name.format(*match.groups()) for name in row.theirs)
    return None


# --- Whole dictionaries of tensors ---


def from_diffusers(rows: tuple[Row, ...], tensors: Mapping[str, mx.array]) -> Tensors:
    """Tensors under diffusers' names -> under ours: layers fused, halves swapped. Lazy.

    Names that no row has stay as they are, and so do the parts of a fused layer that lacks one of its parts:
    the check for missing and unexpected names tells about both.
    """
    out: Tensors = {}
    parts: dict[tuple[str, Row], dict[int, str]] = {}
    _, patterns = _patterns(rows)
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        found = _find_ours(patterns, module)
        renamed = {theirs: ours for ours, theirs in found.row.parameters} if found else {}
        if found is None or parameter not in renamed:
            out[name] = tensor
        else:
            target = f"{found.module}.{renamed[parameter]}"
            parts.setdefault((target, found.row), {})[found.part] = name
    for (target, row), names in parts.items():
        if len(names) < len(row.theirs):
            out.update({name: tensors[name] for name in names.values()})
            continue
        pieces = [tensors[names[i]] for i in range(len(names))]
        if len({piece.shape[1:] for piece in pieces}) > 1 or pieces[0].ndim == 0:
            raise FluxError(f"{', '.join(names.values())}: tensors of these shapes cannot form one layer")
        fused = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)
        out[target] = swap_halves(fused) if row.swapped else fused
    return out


def to_diffusers(rows: tuple[Row, ...], tensors: Mapping[str, mx.array], hidden: int = 0) -> Tensors:
    """The inverse of `from_diffusers`. hidden: the rows of q, k and v, where a row has several parts."""
    out: Tensors = {}
    patterns, _ = _patterns(rows)
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        row, modules = _find_theirs(patterns, module) or (None, ())
        renamed = dict(row.parameters) if row else {}
        if row is None or parameter not in renamed:
            out[name] = tensor
            continue
        if row.swapped:
            tensor = swap_halves(tensor)
        cuts = [hidden * i for i in range(1, len(modules))]
        pieces = mx.split(tensor, cuts) if cuts else [tensor]
        out.update({f"{m}.{renamed[parameter]}": p for m, p in zip(modules, pieces, strict=True)})
    return out


def swap_halves(tensor: mx.array) -> mx.array:
    """(2 N, ...) -> the second N rows, then the first."""
    first, second = mx.split(tensor, 2)
    return mx.concatenate([second, first])


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether the names of a transformer's or an autoencoder's tensors are diffusers'."""
    signs = ("x_embedder.", "transformer_blocks.", "encoder.down_blocks.", "decoder.up_blocks.")
    return any(name.startswith(signs) for name in names)


def levels(names: Iterable[str]) -> int:
    """How many resolutions an autoencoder has, from the names of its tensors in either layout."""
    numbers = [re.match(r"(?:encoder\.down|encoder\.down_blocks)\.(\d+)\.", name) for name in names]
    return block_count([number[1] for number in numbers if number], "encoder.down", MAX_LEVELS)


# --- The autoencoder's weights: PyTorch keeps (O, I, H, W), MLX wants (O, H, W, I) ---


def _pointwise(name: str) -> bool:
    """The middle attention's projections: Linear here and in diffusers, 1x1 convolutions in BFL's files."""
    return ".mid.attn_1." in name and name.endswith(".weight") and ".norm." not in name


def squeeze_pointwise(tensors: Mapping[str, mx.array]) -> Tensors:
    """(O, I, 1, 1) -> (O, I) where a file writes the middle attention's weights as convolutions."""
    return {
        name: w.reshape(w.shape[:2]) if _pointwise(name) and w.shape[2:] == (1, 1) else w
        for name, w in tensors.items()
    }


def convolutions_to_mlx(tensors: Mapping[str, mx.array]) -> Tensors:
    """A network's tensors: (O, I, H, W) -> (O, H, W, I). Not for twice: both have four axes."""
    return {name: w.transpose(0, 2, 3, 1) if w.ndim == 4 else w for name, w in tensors.items()}


def convolutions_from_mlx(tensors: Mapping[str, mx.array]) -> Tensors:
    """(O, H, W, I) -> (O, I, H, W)."""
    return {name: w.transpose(0, 3, 1, 2) if w.ndim == 4 else w for name, w in tensors.items()}


def unsqueeze_pointwise(tensors: Mapping[str, mx.array]) -> Tensors:
    """(O, I) -> (O, I, 1, 1) for the middle attention's weights, as BFL's files have them."""
    return {
        name: w[:, :, None, None] if _pointwise(name) and w.ndim == 2 else w for name, w in tensors.items()
    }


# --- A whole part at once: "transformer", "ae", "clip", "t5" or "controlnet" ---


def to_ours(part: str, tensors: Mapping[str, mx.array]) -> Tensors:
    """A part's tensors as a file has them (bare names, either layout) -> as its network wants them. Lazy."""
    if part == "transformer":
        return from_diffusers(TRANSFORMER, tensors)
    if part == "ae":
        return convolutions_to_mlx(squeeze_pointwise(from_diffusers(autoencoder(levels(tensors)), tensors)))
    if part == "controlnet":
        return convolutions_to_mlx(from_diffusers(CONTROLNET, tensors))
    return dict(tensors)  # the text encoders have transformers' names everywhere


def to_file(part: str, tensors: Mapping[str, mx.array], diffusers: bool) -> Tensors:
    """The inverse of `to_ours`, in diffusers' layout or in BFL's. Lazy."""
    if part == "ae":
        tensors = convolutions_from_mlx(tensors)
        if diffusers:
            return to_diffusers(autoencoder(levels(tensors)), tensors)
        return unsqueeze_pointwise(tensors)
    if part == "transformer" and diffusers:
        return to_diffusers(TRANSFORMER, tensors, hidden=tensors["img_in.weight"].shape[0])
    if part == "controlnet":
        tensors = convolutions_from_mlx(tensors)
        hidden = tensors["img_in.weight"].shape[0]
        return to_diffusers(CONTROLNET, tensors, hidden) if diffusers else dict(tensors)
    return dict(tensors)
