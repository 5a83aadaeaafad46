"""Adapter files -> an Adapter: every format of FLUX.1's field, told by its keys alone.

The formats differ in names (names.py), in whether layers are fused (fused.py), and in where alpha stands: in
the header as JSON, beside the matrices, or nowhere, when it equals the rank.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux import jsonfiles
from flux.adapters import checks, names
from flux.adapters.adapter import Adapter, Delta, Dense, Kronecker, LowRank, part_of
from flux.adapters.fused import Piece, fuse, swap_halves
from flux.adapters.names import Home
from flux.errors import FluxError
from flux.weights import tensors as files
from flux.weights import values

PEFT_METADATA = "lora_adapter_metadata"  # the header's entry in which diffusers keeps PEFT's config
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as PEFT itself saves
FOLDER_FILES = ("pytorch_lora_weights.safetensors", PEFT_FILE)
DIFFUSERS_PARTS = {"flux": "transformer", "clip": "text_encoder", "t5": "text_encoder_2"}
MLP_RATIO = 4  # of every FLUX.1: the rows of linear1's last part, where a file leaves that part out
SHOWN = 20  # how many keys an error line shows

# What a file is called in reports: the first pattern that one of its keys has.
FORMATS: tuple[tuple[str, str], ...] = (
    ("control LoRA (BFL)", r"(query_norm|key_norm)\.scale$"),
    ("XLabs", r"\.processor\.(qkv|proj)_lora"),
    ("mlx-examples", r"\.lora_a$"),
    ("mflux", r"\.lora_A$|\.ff(_context)?\.linear[12]\."),
    ("LoKr", r"\.lokr_w[12]"),
    ("kohya", r"^lora_(unet|te\d?)_"),
    ("native or ComfyUI", r"^(diffusion_model|text_encoders)\."),
    ("LyCORIS names", r"^(lycoris|lora_transformer)_"),
    ("PEFT", r"^base_model\.model\."),
    ("diffusers", r"^(transformer|text_encoder)\."),
)

Roles = dict[str, mx.array]  # the tensors of one home, by what names.py calls them
Config = Mapping[str, Any]  # PEFT's LoraConfig as JSON


def load(path: str | Path, strict: bool = False) -> Adapter:
    """Reads an adapter from a safetensors file, or from a folder as diffusers or PEFT writes it. Lazy.

    strict: FluxError with every key that found no home; otherwise they are in the adapter's `homeless`.
    FluxError too where nothing in the file is an adapter for FLUX.1.
    """
    path = _file(Path(path))
    config = None
    if path.name == PEFT_FILE and path.with_name(PEFT_CONFIG).is_file():
        config = jsonfiles.read(path.with_name(PEFT_CONFIG))
    tensors = files.load([path])
    header = files.read_header(path)
    # NaN is sound in our own files' DoRA scales: a row that is no DoRA.
    values.check(path, header.tensors, [n for n in header.tensors if not n.endswith(names.MAGNITUDES)])
    try:
        adapter = read(tensors, header.metadata, config)
    except ValueError as error:  # FluxError, and MLX's where matrices do not fit together
        raise FluxError(f"{path}: {error}") from None
    if strict and adapter.homeless:
        raise FluxError(f"{path}: {len(adapter.homeless)} keys found no home: {some(adapter.homeless)}")
    return adapter


def read(
    tensors: Mapping[str, mx.array], metadata: Mapping[str, str], config: Config | None = None
) -> Adapter:
    """The adapter in a file's tensors and header; config: PEFT's, where it stands in a file of its own."""
    found: dict[Home, Roles] = {}
    keys: dict[tuple[Home, str], str] = {}
    homeless = []
    for name, tensor in tensors.items():
        key = names.find(name)
        if key is None:
            homeless.append(name)
        elif (key.home, key.role) in keys:
            homeless.append(f"{name} (says the same as {keys[key.home, key.role]})")
        else:
            keys[key.home, key.role] = name
            found.setdefault(key.home, {})[key.role] = tensor
    checks.floats(
        {keys[home, role]: t for home, ts in found.items() for role, t in ts.items() if role != "alpha"}
    )
    configs = _configs(metadata, config)
    modules: dict[str, dict[Home, Delta]] = {}
    norms: dict[str, Roles] = {"replacement": {}, "diff": {}}
    for home, roles in found.items():
        if home.norm:
            for role, tensor in roles.items():
                norms[role][home.module + ".scale"] = tensor
            continue
        delta = _delta(home, roles, configs)
        if delta.change is not None:
            checks.size(delta.change.shape, home.theirs)
        if delta.shape != (None, None):
            modules.setdefault(home.module, {})[home] = delta
        homeless += [f"{keys[home, role]} (its partner is missing)" for role in roles]
    if not modules:
        raise FluxError(f"holds no adapter for FLUX.1 that is known here; its keys: {some(tensors)}")
    whole = {module: _whole(module, parts) for module, parts in modules.items()}
    name = next(
        (name for name, sign in FORMATS if any(re.search(sign, key) for key in tensors)), "bare names"
    )
    return Adapter(whole, norms["replacement"], norms["diff"], dict(metadata), name, homeless)


def some(keys: Iterable[str]) -> str:
    """Names in one line: of very many the first and the count."""
    keys = list(keys)
    more = f" and {len(keys) - SHOWN} more ({len(keys)} in all)" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return path / name
    raise FluxError(f"{path}: a folder without {' or '.join(FOLDER_FILES)}")


# --- Alpha ---


def _configs(metadata: Mapping[str, str], config: Config | None) -> dict[str, Config]:
    """PEFT's config for each network, under diffusers' name for it, where there is one."""
    if config is not None:
        return dict.fromkeys(DIFFUSERS_PARTS.values(), _with_patterns(config))
    try:
        packed = jsonfiles.parse_object(metadata.get(PEFT_METADATA, "{}"))
    except ValueError as error:
        raise FluxError(f"{PEFT_METADATA}: {error}") from None
    configs: dict[str, dict[str, Any]] = {}
    for name, value in packed.items():
        network, _, field = name.partition(".")
        configs.setdefault(network, {})[field] = value
    return {network: _with_patterns(config) for network, config in configs.items()}


def _with_patterns(config: Config) -> Config:
    """The config with its tables of patterns ready to match."""
    fields = ("alpha_pattern", "rank_pattern")
    return {**config, **{name: checks.Patterns(config.get(name) or {}, name) for name in fields}}


def _alpha(home: Home, roles: Roles, rank: int, configs: Mapping[str, Config]) -> float:
    """Alpha by the header, else by the tensor beside the matrices, else the rank."""
    beside = roles.pop("alpha", None)
    config = _config_of(home, configs)
    if config.get("lora_alpha") is not None:
        alpha = _pattern(home, config, "lora_alpha", "alpha_pattern")
        return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
    return float(rank) if beside is None else checks.scalar(beside, f"{home.theirs}: alpha")


def _config_of(home: Home, configs: Mapping[str, Config]) -> Config:
    return configs.get(DIFFUSERS_PARTS[part_of(home.module)], {})


def _pattern(home: Home, config: Config, name: str, patterns: str) -> float:
    """A number of PEFT's config for one module: of the first pattern that fits, else the usual one."""
    modules = (home.theirs, home.theirs.removeprefix("text_model."))  # newer transformers leave that out
    found = config[patterns].find(*modules)
    return checks.number(config.get(name), name) if found is None else found


# --- One home's tensors -> its change ---


def _delta(home: Home, roles: Roles, configs: Mapping[str, Config]) -> Delta:
    """Takes what it understands out of roles; what is left there has no partner."""
    change = _low_rank(home, roles, configs) or _kronecker(home, roles, configs)
    if change is None and "diff" in roles:
        change = Dense(roles.pop("diff"))
    bias = roles.pop("bias", None)
    if isinstance(change, LowRank) and "up bias" in roles:
        scaled = change.scale * roles.pop("up bias").astype(mx.float32)
        bias = scaled if bias is None else bias + scaled
    magnitude = roles.pop("magnitude", None) if change is not None else None
    if magnitude is not None:
        if magnitude.size != change.shape[0]:
            raise FluxError(
                f"{home.theirs}: a DoRA scale of shape {tuple(magnitude.shape)} for {change.shape[0]} rows: "
                "only one value a row is supported"
            )
        magnitude = magnitude.reshape(-1)  # (out, 1) in ComfyUI's files
    return Delta(change, bias, magnitude)


def _low_rank(home: Home, roles: Roles, configs: Mapping[str, Config]) -> LowRank | None:
    for suffix in (" transposed", " or transposed"):
        if "down" + suffix in roles and "up" + suffix in roles:
            a, b = roles.pop("down" + suffix), roles.pop("up" + suffix)
            turned = suffix == " transposed" or _is_transposed(a, b)
            roles["down"], roles["up"] = (a.T, b.T) if turned else (a, b)
    if "down" not in roles or "up" not in roles:
        return None
    down, up = roles.pop("down"), roles.pop("up")
    if down.ndim != 2 or up.ndim != 2:
        raise FluxError(f"{home.theirs}: matrices of shape {tuple(down.shape)} and {tuple(up.shape)}")
    if down.shape[0] != up.shape[1]:
        raise FluxError(
            f"{home.theirs}: down {tuple(down.shape)} and up {tuple(up.shape)} have no rank in common"
        )
    return LowRank(down, up, _alpha(home, roles, down.shape[0], configs))


def _is_transposed(down: mx.array, up: mx.array) -> bool:
    """Whether matrices whose names leave it open are (in, r) and (r, out). A square layer allows both: then
    the smaller rank is meant.
    """
    as_is, turned = down.shape[0] == up.shape[-1], down.shape[-1] == up.shape[0]
    return turned and (not as_is or down.shape[-1] < down.shape[0])


def _kronecker(home: Home, roles: Roles, configs: Mapping[str, Config]) -> Kronecker | None:
    w1, rank1 = _factor(roles, "lokr_w1")
    w2, rank2 = _factor(roles, "lokr_w2")
    if w1 is None or w2 is None:
        return None
    config = _config_of(home, configs)
    if config.get("peft_type") == "LOKR":  # PEFT scales a product and a plain factor alike
        alpha = _pattern(home, config, "alpha", "alpha_pattern")
        rank = checks.positive(_pattern(home, config, "r", "rank_pattern"), "r")
        return Kronecker(w1, w2, alpha / rank)
    rank = rank2 or rank1
    alpha = _alpha(home, roles, rank or 1, configs)
    return Kronecker(w1, w2, alpha / rank if rank else 1.0)


def _factor(roles: Roles, name: str) -> tuple[mx.array | None, int | None]:
    """One factor of a LoKr and its rank where it is a product itself (`lokr_t2`: with a core)."""
    if name in roles:
        return roles.pop(name), None
    if f"{name}_a" not in roles or f"{name}_b" not in roles:
        return None, None
    a, b = (roles.pop(f"{name}_{x}").astype(mx.float32) for x in "ab")
    if name == "lokr_w2" and "lokr_t2" in roles:
        core = roles.pop("lokr_t2").astype(mx.float32)
        a = a.T @ core.reshape(core.shape[:2])  # (r, out), (r, r, 1, 1) -> (out, r)
    return a @ b, b.shape[0]


# --- Parts of a module -> the module ---


def _whole(module: str, parts: Mapping[Home, Delta]) -> Delta:
    """The change of our module from the changes of the parts that the file has."""
    (home, delta), *others = parts.items()
    if not others and home.end - home.first == home.parts:
        return swap_halves(delta) if home.swapped else delta
    hidden = _hidden(parts)
    if hidden is None:
        raise FluxError(f"{module}: its parts do not tell how wide it is")
    pieces = [Piece(home.first * hidden, delta) for home, delta in parts.items()]
    last = [p.delta.shape[0] for p, home in zip(pieces, parts, strict=True) if home.end == home.parts]
    mlp = MLP_RATIO if home.parts == 4 else 1
    rows = hidden * (home.parts - 1) + (last[0] if last else hidden * mlp)
    try:
        return fuse(pieces, rows)
    except ValueError as error:
        found = ", ".join(f"{home.theirs} {tuple(delta.shape)}" for home, delta in parts.items())
        raise FluxError(f"{module}: {error}: {found}") from None


def _hidden(parts: Mapping[Home, Delta]) -> int | None:
    """The rows of q, k and v: as many as the layer's columns, which every change of a weight shows."""
    return next((d.shape[1] for d in parts.values() if d.shape[1] is not None), None)
