"""Where a key of an adapter file belongs: the names that trainers give to our modules, as tables.

A key is a prefix (which program, which network), a stem (which module) and a suffix (which tensor). Programs
differ in all three, and mix. kohya writes `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight` where
diffusers writes `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`. Dots and underscores are taken as
the same, so that one table of stems serves all of them.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from flux.weights.keymaps import TRANSFORMER

PREFIX = re.compile(
    r"base_model\.model\.|_orig_mod\.|module\.|model\.|diffusion_model\.|transformer\.|unet\."
    r"|lora_unet_|oft_unet_|lora_transformer_|lycoris_|lora_te\d?_"
    r"|(text_encoders\.)?(clip_l|t5xxl)\.transformer\.|text_encoder(_2)?\.|text_model[._]"
)
# PEFT puts an adapter's name after its suffixes (`lora_A.default.weight`), and these before a parameter's.
PEFT_NAME = re.compile(
    r"\.(lora_[AB]|lora_magnitude_vector|hada_w\w+|lokr_w\w+|ia3_l|oft_R|boft_[Rs])\.(?!weight$|bias$)[^.]+(?=\.|$)"
)
# Under these names a `.weight` or `.bias` of a layer is all of it, trained whole.
WHOLE = re.compile(r"^(base_model\.model|transformer|text_encoder)\.|\.modules_to_save\.|\.base_layer\.")
PEFT_WRAPPER = re.compile(r"\.modules_to_save\.[^.]+(?=\.\w+$)|\.base_layer(?=\.bias$)")

# What a key's last part says. The first that fits counts, so longer ones stand before their endings.
SUFFIXES: tuple[tuple[str, str], ...] = (
    (".lora_linear_layer.down.weight", "down"),
    (".lora_linear_layer.up.weight", "up"),
    (".lora_A.weight", "down"),
    (".lora_B.weight", "up"),
    (".lora_down.weight", "down"),
    (".lora_up.weight", "up"),
    (".lora_mid.weight", "mid"),
    (".lora.down.weight", "down"),
    (".lora.up.weight", "up"),
    ("_lora.down.weight", "down"),
    ("_lora.up.weight", "up"),
    (".down.weight", "down"),  # XLabs, whose stems end with _lora1 or _lora2
    (".up.weight", "up"),
    (".lora_A", "down or transposed"),  # old mflux
    (".lora_B", "up or transposed"),
    (".lora_a", "down transposed"),  # mlx-examples
    (".lora_b", "up transposed"),
    (".lora_B.bias", "up bias"),
    (".alpha", "alpha"),
    (".dora_scale", "dora_scale"),  # LyCORIS', of either axis
    (".lora_magnitude_vector.weight", "magnitude"),
    (".lora_magnitude_vector", "magnitude"),
    *((f".lokr_{name}", f"lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    *((f".hada_{name}", f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *((f".{name}.weight", f"glora {name}") for name in ("a1", "a2", "b1", "b2", "bm")),
    (".on_input", "on_input"),  # (IA)3 of LyCORIS, beside `.weight`
    (".ia3_l", "ia3_l"),
    (".oft_blocks", "oft_blocks"),
    *((f".oft_blocks.{i}", f"oft_blocks.{i}") for i in range(4)),  # sd-scripts, of each part of a fused layer
    (".oft_diag", "oft_diag"),
    (".rescale", "rescale"),
    (".oft_R.weight", "oft_R"),
    (".boft_R", "boft_R"),
    (".boft_s", "boft_s"),
    (".diff_b", "bias"),
    (".b_norm", "norm bias"),
    (".w_norm", "diff"),
    (".scale.diff", "diff"),  # ComfyUI, of a norm
    (".diff", "diff"),
    (".scale", "replacement"),  # of a norm, under BFL's name
    (".weight", "weight"),  # of a norm under diffusers' name, of (IA)3, or of a layer that was trained whole
    (".bias", "new bias"),
)
# What may be said of a norm -> which of its parameters that is about.
NORM_ROLES = {"replacement": "scale", "diff": "scale", "norm bias": "bias"}

MAGNITUDES = tuple(suffix for suffix, role in SUFFIXES if role in ("magnitude", "dora_scale"))

# Stems beside BFL's and diffusers', and our module.
XLABS: tuple[tuple[str, str], ...] = (
    ("double_blocks.{}.processor.qkv_lora1", "double_blocks.{}.img_attn.qkv"),
    ("double_blocks.{}.processor.qkv_lora2", "double_blocks.{}.txt_attn.qkv"),
    ("double_blocks.{}.processor.proj_lora1", "double_blocks.{}.img_attn.proj"),
    ("double_blocks.{}.processor.proj_lora2", "double_blocks.{}.txt_attn.proj"),
    ("single_blocks.{}.processor.qkv", "single_blocks.{}.linear1"),  # `_lora` is of the suffix
    ("single_blocks.{}.processor.proj", "single_blocks.{}.linear2"),
)
MLX_EXAMPLES: tuple[tuple[str, str], ...] = tuple(
    (f"double_blocks.{{}}.{mlp}.layers.{i}", f"double_blocks.{{}}.{mlp}.{i}")
    for mlp in ("img_mlp", "txt_mlp")
    for i in (0, 2)
)
MFLUX: tuple[tuple[str, str], ...] = (
    ("transformer_blocks.{}.ff.linear1", "double_blocks.{}.img_mlp.0"),
    ("transformer_blocks.{}.ff.linear2", "double_blocks.{}.img_mlp.2"),
    ("transformer_blocks.{}.ff_context.linear1", "double_blocks.{}.txt_mlp.0"),
    ("transformer_blocks.{}.ff_context.linear2", "double_blocks.{}.txt_mlp.2"),
)
ALIASES = XLABS + MLX_EXAMPLES + MFLUX

CLIP = tuple(
    f"text_model.encoder.layers.{{}}.{name}"
    for name in (*(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
)
T5 = tuple(
    f"encoder.block.{{}}.layer.{name}"
    for name in (
        *(f"0.SelfAttention.{x}" for x in "qkvo"),
        *(f"1.DenseReluDense.{x}" for x in ("wi_0", "wi_1", "wo")),
    )
)
TEXT_NORMS = (
    *(f"text_model.encoder.layers.{{}}.layer_norm{i}" for i in (1, 2)),
    "text_model.final_layer_norm",
    *(f"encoder.block.{{}}.layer.{i}.layer_norm" for i in (0, 1)),
)


@dataclass(frozen=True)
class Target:
    """Our module, and which of the parts of a fused layer: all of them, from `first` to before `end`.

    theirs: the module's name in the layout that the key follows, without prefix. swapped: that layout has the
    halves of the rows in the other order. norm: of a module that is a norm the name of its scale, else "".
    """

    module: str
    theirs: str
    first: int = 0
    end: int = 1
    parts: int = 1
    swapped: bool = False
    norm: str = ""


@dataclass(frozen=True)
class Key:
    """A key of a file, understood: where it belongs and which tensor of a change it is."""

    target: Target
    role: str


def _flat(stem: str) -> str:
    """A stem or template as the table has it: the block's number (the first one) open, no dots."""
    flat = stem.replace(".", "_")
    return flat.replace("{}", "*") if "{}" in flat else re.sub(r"_(\d+)_", "_*_", flat, count=1)


@lru_cache
def _targets() -> dict[str, Target]:
    """Flat stem -> Target, with `{}` in the names where the block's number goes."""
    targets: dict[str, Target] = {}
    for row in TRANSFORMER:
        parts, norm = len(row.theirs), "scale" if row.parameters == (("scale", "weight"),) else ""
        targets[_flat(row.ours)] = Target(row.ours, row.ours, 0, parts, parts, norm=norm)
        for i, theirs in enumerate(row.theirs):
            targets[_flat(theirs)] = Target(row.ours, theirs, i, i + 1, parts, row.swapped, norm)
    for stem, ours in ALIASES:
        whole = targets[_flat(ours)]
        end = 3 if stem.endswith("processor.qkv") else whole.end  # XLabs leaves the MLP of linear1 alone
        targets[_flat(stem)] = Target(ours, stem, 0, end, whole.parts)
    for name in (*CLIP, *T5, *TEXT_NORMS):
        norm = "weight" if name in TEXT_NORMS else ""
        targets[_flat(name.removeprefix("text_model."))] = Target(name, name, norm=norm)
    return targets


def find(key: str) -> Key | None:
    """What a key of a file means, or None where its name says nothing here."""
    whole = WHOLE.search(key) is not None
    key = PEFT_WRAPPER.sub("", PEFT_NAME.sub(r".\1", key))
    for suffix, role in SUFFIXES:
        target = find_module(key.removesuffix(suffix)) if key.endswith(suffix) else None
        if target is None:
            continue
        if role == "weight":
            role = "replacement" if target.norm else "whole weight" if whole else role
        fits = role in NORM_ROLES if target.norm else role not in ("replacement", "norm bias")
        if fits and (whole or role != "new bias"):
            return Key(target, role)
    return None


def find_module(name: str) -> Target | None:
    """The target of a module's name under any program's prefix, or None."""
    while match := PREFIX.match(name):
        name = name[match.end() :]
    name = name.rstrip("_.")  # some trainers' names end so
    target = _targets().get(_flat(name))
    number = re.search(r"[._](\d+)[._]", name)
    if target is None or number is None or "{}" not in target.module:
        return target
    return replace(target, module=target.module.format(number[1]), theirs=target.theirs.format(number[1]))


def template(module: str) -> str:
    """A module's name with `*` for the block's number."""
    return re.sub(r"\.\d+\.", ".*.", module, count=1)
