"""Which layers a text selects: presets, names, blocks, parts of names and patterns, separated by commas.

Names are those of BFL's layout, of diffusers' or of kohya's adapter files. What one layout has none of is
looked for in the next, so that a name never selects layers that another layout calls the same.
"""

import difflib
import fnmatch
import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from flux.adapters.names import PREFIX, template
from flux.errors import FluxError
from flux.weights.keymaps import TRANSFORMER

_BLOCK = r"(?:double|single)_blocks\.\d+\."
_TEXT = r"text_model\.encoder\.layers\.\d+\..*|encoder\.block\.\d+\..*"

# Presets for which layers to train. A single block has attention and MLP fused in its two layers.
TARGETS: dict[str, str] = {
    "attention-mlp": rf"{_BLOCK}(?:(?:img|txt)_(?:attn|mlp)\..*|linear[12])|{_TEXT}",
    "attention": rf"{_BLOCK}(?:(?:img|txt)_attn\..*|linear[12])|.*self_attn\..*|.*SelfAttention\..*",
    "blocks": rf"{_BLOCK}.*|{_TEXT}",
    "all": ".*",
}
NEAREST = 3  # names that an error shows
KOHYA = "lora_unet_"

Spellings = dict[str, str]  # a layer's name in some layout -> its name here


def select(layers: Sequence[str], which: str) -> list[str]:
    """The layers, in their order, that the items of `which` select. FluxError for one that selects none."""
    if not items(which):
        raise FluxError(f"targets {which!r}: name layers, or one of {', '.join(TARGETS)}")
    chosen = {layer for item in items(which) for layer in _found(layers, item).values()}
    return [layer for layer in layers if layer in chosen]


def items(which: str) -> list[str]:
    """The items of a list: split at commas outside of brackets, which belong to a pattern."""
    found, depth, start = [], 0, 0
    for place, letter in enumerate(which):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth <= 0:
            found.append(which[start:place])
            start = place + 1
    return [item.strip() for item in (*found, which[start:]) if item.strip()]


def is_preset(which: str) -> bool:
    """Whether presets alone select."""
    return all(item in TARGETS for item in items(which))


def partly_named(layers: Sequence[str], which: str) -> dict[str, tuple[str, ...]]:
    """Selected layers of which only some parts were named: layer -> the parts of diffusers' names.

    A fused layer is trained whole. diffusers has its parts as layers: to_q, to_k, to_v and proj_mlp.
    """
    named: set[str] = set()
    whole: set[str] = set()
    for item in items(which):
        found = _found(layers, item)
        named |= found.keys()
        whole |= {layer for name, layer in found.items() if name == layer}
    out = {}
    for layer in select(layers, which):
        theirs = _theirs(layer)
        flat = [f"{KOHYA}{name.replace('.', '_')}" for name in theirs]
        parts = tuple(name for name, other in zip(theirs, flat, strict=True) if named & {name, other})
        if layer not in whole and 0 < len(parts) < len(theirs):
            out[layer] = parts
    return out


def _found(layers: Sequence[str], item: str) -> Spellings:
    """The names that an item selects, all of one layout."""
    if item in TARGETS:
        return {layer: layer for layer in layers if re.fullmatch(TARGETS[item], layer)}
    spellings = _spellings(tuple(layers))
    fault = ""
    if re.fullmatch(r"[\w.]+", item):
        tests = _literal(item)
    else:
        patterns, fault = _patterns(item)
        tests = [pattern.fullmatch for pattern in patterns]
    for test in tests:
        for names in spellings:
            if found := {name: layer for name, layer in names.items() if test(name)}:
                return found
    raise FluxError(_nothing(item, fault, spellings))


def _literal(item: str) -> list[Callable[[str], object]]:
    """A name, or whole parts of one; of kohya's names, which have no dots, the first parts."""
    bare = item
    while prefix := PREFIX.match(bare):
        bare = bare[prefix.end() :]
    return [lambda name: f".{bare}." in f".{name}.", lambda name: f"{name}_".startswith(f"{KOHYA}{bare}_")]


def _patterns(item: str) -> tuple[list[re.Pattern[str]], str]:
    """As a regular expression and as a file name's pattern, and why it may not be the former."""
    glob = re.compile(fnmatch.translate(item))
    try:
        return [re.compile(item), glob], ""
    except re.error as error:
        return [glob], f", and it is not a pattern ({error})"


def _nothing(item: str, fault: str, spellings: Sequence[Spellings]) -> str:
    """What to say of an item that selects nothing."""
    names = [name for group in spellings for name in group]
    inside = {re.sub(r"^.*?\.\d+\.", "", name): None for group in spellings[:2] for name in group}
    near = difflib.get_close_matches(item, list(dict.fromkeys([*TARGETS, *inside, *names])), NEAREST, 0.0)
    return (
        f"targets {item!r}: no layer has such a name{fault}; the nearest names: {', '.join(near)}; "
        f"presets are {', '.join(TARGETS)}"
    )


@lru_cache
def _spellings(layers: tuple[str, ...]) -> tuple[Spellings, ...]:
    """BFL's, diffusers' and kohya's names of the layers."""
    ours = {layer: layer for layer in layers}
    theirs = {name: layer for layer in layers for name in _theirs(layer)}
    flat = {f"{KOHYA}{name.replace('.', '_')}": layer for name, layer in (ours | theirs).items()}
    return ours, theirs, flat


@lru_cache
def _theirs(layer: str) -> tuple[str, ...]:
    """diffusers' names of a layer; several where it is fused here, none of a text encoder's."""
    stem = template(layer).replace("*", "{}")
    number = re.search(r"\.(\d+)\.", layer)
    found = [row.theirs for row in TRANSFORMER if row.ours == stem]
    return tuple(name.format(number[1]) if number else name for name in found[0]) if found else ()
