"""Adapter files -> an Adapter: every format of FLUX.1's field, told by its keys alone.

The formats differ in names (names.py), in the kinds of change (kinds.py), in whether layers are fused
(fused.py), and in where alpha stands: in the header as JSON, beside the matrices, or nowhere, when it equals
the rank.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import mlx.core as mx

from flux import jsonfiles
from flux.adapters import foreign, names
from flux.adapters.adapter import Adapter
from flux.adapters.changes import LYCORIS, PEFT, Delta, Replacement
from flux.adapters.folders import PEFT_CONFIG, PEFT_STEM, adapter_file
from flux.adapters.fused import Piece, fuse, swap_halves
from flux.adapters.kinds import Roles, read_delta
from flux.adapters.names import Target
from flux.adapters.peft_config import Configs, Json
from flux.errors import FluxError
from flux.weights import strangers, torchfile, values
from flux.weights import tensors as files

OWN = "flux_mlx."  # what the entries of our headers begin with
DORA_RULE = OWN + "dora"  # our header's entry: how a DoRA is weighed, where its name does not tell
MLP_RATIO = 4  # of every FLUX.1: the rows of linear1's last part, where a file leaves that part out
TORCH = (".bin", ".pt", ".pth", ".ckpt")  # PyTorch's files
SHOWN = 20  # how many keys an error line shows

# What a file is called in reports: the first pattern that one of its keys has.
FORMATS: tuple[tuple[str, str], ...] = (
    ("control LoRA (BFL)", r"(query_norm|key_norm)\.scale$"),
    ("XLabs", r"\.processor\.(qkv|proj)_lora"),
    ("mlx-examples", r"\.lora_a$"),
    ("mflux", r"\.lora_A$|\.ff(_context)?\.linear[12]\."),
    ("LoKr", r"\.lokr_w[12]"),
    ("LoHa", r"\.hada_w[12]"),
    ("GLoRA", r"\.[ab][12]\.weight$"),
    ("(IA)3", r"\.on_input$|\.ia3_l"),
    ("OFT or BOFT", r"\.oft_(blocks|diag|R)|\.boft_R"),
    ("kohya", r"^lora_(unet|te\d?)_"),
    ("native or ComfyUI", r"^(diffusion_model|text_encoders)\."),
    ("LyCORIS names", r"^(lycoris|lora_transformer)_"),
    ("PEFT", r"^base_model\.model\."),
    ("diffusers", r"^(transformer|text_encoder)\."),
)


def load(path: str | Path, strict: bool = False) -> Adapter:
    """Reads an adapter from a file of safetensors or PyTorch, or a folder of such. Lazy.

    strict: FluxError with all unexpected keys; otherwise they are in the adapter's `unexpected`.
    FluxError too where nothing in the file is an adapter for FLUX.1, or the file is one for another model.
    """
    path = adapter_file(Path(path).expanduser())
    beside = path.with_name(PEFT_CONFIG)
    config = jsonfiles.read(beside) if path.stem == PEFT_STEM and beside.is_file() else None
    if path.suffix.lower() in TORCH:
        tensors, metadata = torchfile.load([path]), {}
    else:
        tensors, header = files.load([path]), files.read_header(path)
        metadata = header.metadata
        # NaN is sound in our files' DoRA scales: a row that is not of a DoRA.
        values.check(path, header.tensors, [n for n in header.tensors if not n.endswith(names.MAGNITUDES)])
    try:
        adapter = read(tensors, metadata, config)
    except ValueError as error:  # FluxError, and MLX's where matrices do not fit together
        raise FluxError(f"{path}: {error}") from None
    if strict and adapter.unexpected:
        raise FluxError(f"{path}: {len(adapter.unexpected)} unexpected keys: {some(adapter.unexpected)}")
    return adapter


def read(tensors: Mapping[str, mx.array], metadata: Mapping[str, str], config: Json | None = None) -> Adapter:
    """The adapter in a file's tensors and header; config: PEFT's, where it stands in another file."""
    if other := foreign.model(tensors, metadata):
        raise FluxError(f"an adapter for {other}, not for FLUX.1")
    found, keys, unexpected = _sort(tensors)
    configs = Configs(metadata, config)
    rule = PEFT if metadata.get(DORA_RULE) == PEFT else LYCORIS
    ours = any(name.startswith(OWN) for name in metadata)
    modules: dict[str, dict[Target, Delta]] = {}
    norms: dict[str, Roles] = {role: {} for role in names.NORM_ROLES}
    for target, roles in found.items():
        if target.norm:
            for role, tensor in roles.items():
                parameter = "bias" if role == "norm bias" else target.norm
                norms[role][f"{target.module}.{parameter}"] = tensor
            continue
        delta = read_delta(target, roles, configs, rule, gaps=ours)
        if delta.shape != (None, None):
            modules.setdefault(target.module, {})[target] = delta
        unexpected += [f"{keys[target, role]} (its partner is missing)" for role in roles]
    _check_kinds(tensors, modules, configs)
    whole = {module: _whole(module, parts) for module, parts in modules.items()}
    name = next(
        (name for name, sign in FORMATS if any(re.search(sign, key) for key in tensors)), "bare names"
    )
    added = norms["diff"] | norms["norm bias"]
    return Adapter(whole, norms["replacement"], added, dict(metadata), name, unexpected)


def _sort(
    tensors: Mapping[str, mx.array],
) -> tuple[dict[Target, Roles], dict[tuple[Target, str], str], list[str]]:
    """The tensors by target and role, the key of each, and the unexpected keys."""
    found: dict[Target, Roles] = {}
    keys: dict[tuple[Target, str], str] = {}
    unexpected = []
    for name, tensor in tensors.items():
        key = names.find(name)
        if key is None:
            bundled = name.startswith("bundle_emb.")
            unexpected.append(
                f"{name} (an embedding for a word, which is not used here)" if bundled else name
            )
        elif (key.target, key.role) in keys:
            unexpected.append(f"{name} (says the same as {keys[key.target, key.role]})")
        else:
            keys[key.target, key.role] = name
            found.setdefault(key.target, {})[key.role] = tensor
    return found, keys, unexpected


def _check_kinds(
    tensors: Mapping[str, mx.array], modules: Mapping[str, Mapping[Target, Delta]], configs: Configs
) -> None:
    """FluxError where there is nothing but whole layers, or not all that PEFT's config promises."""
    deltas = [delta for parts in modules.values() for delta in parts.values()]
    if not any(d.bias is not None or not isinstance(d.change, Replacement | None) for d in deltas):
        if any("ip_adapter" in key for key in tensors):
            raise FluxError("an IP-Adapter, which shows the model a picture; that is not supported")
        if strangers.model(tensors) == strangers.CONTROLNET:
            raise FluxError(f"{strangers.CONTROLNET}, no adapter")
        raise FluxError(f"holds no adapter for FLUX.1 that is known here; its keys: {some(tensors)}")
    if configs.promises_biases() and not any(delta.new_bias is not None for delta in deltas):
        raise FluxError("PEFT's config says that biases were trained too, and the file has none of them")


def some(keys: Iterable[str]) -> str:
    """Names in one line: of very many the first and the count."""
    keys = list(keys)
    more = f" and {len(keys) - SHOWN} more ({len(keys)} in all)" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more


# --- Parts of a module -> the module ---


def _whole(module: str, parts: Mapping[Target, Delta]) -> Delta:
    """The change of our module from the changes of the parts that the file has."""
    (target, delta), *others = parts.items()
    if not others and target.end - target.first == target.parts:
        return swap_halves(delta) if target.swapped else delta
    hidden = _hidden(parts)
    if hidden is None:
        raise FluxError(f"{module}: its parts do not tell how wide it is")
    last = [
        d.shape[0] for target, d in parts.items() if target.end == target.parts and d.shape[0] is not None
    ]
    rest = last[0] if last else hidden * (MLP_RATIO if target.parts == 4 else 1)
    edges = [hidden * i for i in range(target.parts)] + [hidden * (target.parts - 1) + rest]
    pieces = [
        Piece(edges[target.first], delta, edges[target.end] - edges[target.first])
        for target, delta in parts.items()
    ]
    try:
        return fuse(pieces, edges[-1])
    except ValueError as error:
        found = ", ".join(f"{target.theirs} {tuple(delta.shape)}" for target, delta in parts.items())
        raise FluxError(f"{module}: {error}: {found}") from None


def _hidden(parts: Mapping[Target, Delta]) -> int | None:
    """The rows of q, k and v: as many as the layer's columns, or as the part has that is one of them."""
    for target, delta in parts.items():
        if delta.shape[1] is not None:
            return delta.shape[1]
        if delta.shape[0] is not None and target.end - target.first == 1 and target.first < 3:
            return delta.shape[0]
    return None
