"""Which of a file's tensors are which part of a model: what single files write before and beside the names.

An all-in-one file has a prefix before each part's names; programs, `torch.compile` and averaging put more of
them in front. So a prefix is not looked up but found: whatever known words stand before a name that only this
part has.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from flux.weights import keymaps

# What may stand before a part's names, several of them one after another; the first are how this project
# writes a part into a file with others, as ComfyUI does.
PREFIXES: dict[str, tuple[str, ...]] = {
    "transformer": ("model.diffusion_model.", "diffusion_model.", "unet."),
    "ae": ("vae.", "first_stage_model.", "autoencoder."),
    "clip": ("text_encoders.clip_l.", "clip_l.", "cond_stage_model.", "text_encoder."),
    "t5": ("text_encoders.t5xxl.", "t5xxl.", "text_encoder_2."),
    "controlnet": ("controlnet.", "control_net."),
}
WRAPPERS = (
    "model.",
    "_orig_mod.",
    "module.",
    "transformer.",
    "state_dict.",
    "net.",
)  # of programs and of torch.compile
AVERAGES = ("ema.", "ema_model.", "model_ema.")  # a second copy of everything

# A file holds a part if it has one of these weights; adapters have other names after the module's.
_BLOCKS = [name for row in keymaps.TRANSFORMER for name in (row.ours, *row.theirs) if "{}" in name]
SIGNS: dict[str, str] = {
    "transformer": "(?:" + "|".join(re.escape(name).replace(r"\{\}", r"\d+") for name in _BLOCKS) + ")",
    "ae": (
        r"(?:en|de)coder\.(?:conv_(?:in|out)|(?:down|up)\.\d+\.block\.\d+\.conv[12]"
        r"|(?:down|up)_blocks\.\d+\.resnets\.\d+\.conv[12])"
    ),
    "clip": r"(?:text_model\.)?(?:embeddings\.token_embedding|encoder\.layers\.\d+\.mlp\.fc1)",
    "t5": r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.[qkvo]",
    "controlnet": r"(?:controlnet_(?:single_)?blocks\.\d+|controlnet_x_embedder|pos_embed_input)",
}

# Beside the weights in some files and used by no network here: bare names that match, whole.
_OTHER_PARTS = "|".join(re.escape(p) for names in PREFIXES.values() for p in names)
FOREIGN: dict[str, str] = {
    "transformer": "",
    "ae": r"|loss\..*",
    "clip": r"|text_projection(?:\.weight)?|visual_projection\..*|vision_model\..*",
    "t5": r"|decoder\..*|lm_head\..*",
    "controlnet": "",
}
_FOREIGN = (
    r"__\w+__|scaled_fp8|logit_scale|(?:optimizer|lr_scheduler)\..*|(?:.*\.)?position_ids|epoch|step|global_step"
    rf"|(?:{'|'.join(map(re.escape, AVERAGES))}).*|(?:{_OTHER_PARTS}).*"
)
MARKERS = frozenset({"scaled_fp8"})  # read by those who read the encoding


@lru_cache
def _sign(part: str) -> re.Pattern:
    """A full name with the part's prefix as its first group, and whether it is an average's as its second."""
    either = "|".join(map(re.escape, (*PREFIXES[part], *WRAPPERS)))
    average = "|".join(map(re.escape, AVERAGES))
    return re.compile(
        rf"((?:{either})*(({average}))?(?:{either})*){SIGNS[part]}\.(?:weight(?:\.\w+)*|_weight_qdata)"
    )


@lru_cache
def _foreign(part: str) -> re.Pattern:
    return re.compile(_FOREIGN + FOREIGN[part])


@lru_cache(maxsize=8)  # each file is asked about for every part
def _all_prefixes(names: tuple[str, ...]) -> dict[str, list[str]]:
    """`_prefixes` of every part."""
    return {part: _prefixes(part, names) for part in PREFIXES}


def _prefixes(part: str, names: Iterable[str]) -> list[str]:
    """What stands before a part's names in a file, for each copy of it; [] where the file does not hold it.

    The copy with the most names comes first, averages last.
    """
    found: dict[str, tuple[bool, int]] = {}
    for name in names:
        if match := _sign(part).fullmatch(name):
            _, count = found.get(match[1], (True, 0))
            found[match[1]] = (match[2] is None, count + 1)
    return sorted(found, key=lambda prefix: found[prefix], reverse=True)


def parts_in(names: Iterable[str]) -> list[str]:
    """The parts ("transformer", "ae", "clip", "t5") that a file with these names holds."""
    return [part for part, prefixes in _all_prefixes(tuple(names)).items() if prefixes]


def bare_names_of(part: str, names: Iterable[str]) -> dict[str, str]:
    """The names in a file that belong to a part ("transformer", "ae", "clip", "t5") -> bare names.

    Takes off the prefix, gives `text_model.` to a CLIP that lacks it, reads `encoder.embed_tokens` as T5's
    `shared` (the same tensor), and leaves out what is known to be foreign; unknown names stay, for the check.
    """
    names = tuple(names)
    found = _all_prefixes(names)
    prefix = next(iter(found[part]), "")
    # Of copies, and of other parts where this one has no prefix.
    others = tuple(p for prefixes in found.values() for p in prefixes if p != prefix and p.startswith(prefix))
    bare_names = {
        name: name.removeprefix(prefix)
        for name in names
        if name.startswith(prefix) and not (others and name.startswith(others))
    }
    bare_names = {name: bare for name, bare in bare_names.items() if not _foreign(part).fullmatch(bare)}
    if part == "clip":
        return {name: _with_text_model(bare) for name, bare in bare_names.items()}
    return _one_embedding(bare_names) if part == "t5" else bare_names


def foreign_names(names: Iterable[str]) -> list[str]:
    """The names in a file that no part of a model takes."""
    names = tuple(names)
    taken = [bare_names_of(part, names) for part in parts_in(names)]
    known = MARKERS.union(*taken)
    # The second embedding is the first one again.
    return [
        name
        for name in names
        if name not in known
        and name.rpartition(".")[2] not in MARKERS
        and not name.endswith("encoder.embed_tokens.weight")
    ]


def _with_text_model(bare: str) -> str:
    lacks = bare.startswith(("embeddings.", "encoder.", "final_layer_norm."))
    return "text_model." + bare if lacks else bare


def _one_embedding(bare_names: Mapping[str, str]) -> dict[str, str]:
    """T5's `encoder.embed_tokens` is `shared` again: read as `shared` where that is absent, else left out."""
    second, first = "encoder.embed_tokens.weight", "shared.weight"
    if first in bare_names.values():
        return {name: bare for name, bare in bare_names.items() if bare != second}
    return {name: first if bare == second else bare for name, bare in bare_names.items()}
