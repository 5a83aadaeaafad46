"""Find a model, read it, check it, load it. The only file of the package that reaches the Hub."""

import errno
import fnmatch
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from mlx.utils import tree_flatten

from flux import jsonfiles
from flux.errors import FluxError
from flux.models.autoencoder import AutoEncoder
from flux.models.clip import CLIPTextModel
from flux.models.t5 import T5Encoder
from flux.models.transformer import Flux
from flux.tokenizers import CLIPTokenizer, T5Tokenizer
from flux.weights import florence2, keymaps, layouts, quantize, registry, shapes, tensors, values
from flux.weights.layouts import FOLDERS, NAMES, PARTS, TOKENIZERS, Part
from flux.weights.registry import ModelSpec

REPOSITORY = r"[\w-][\w.-]*/[\w-][\w.-]*"
DEFAULTS = "defaults.json"  # in a folder that this program wrote: the model's own defaults
TINY = "or use --model tiny, which is built in"  # what always works
# huggingface_hub's own errors, those of the HTTP library below it (whichever it is), and the disk's.
HUB_ERRORS = (OSError, RuntimeError, HFValidationError, *HfHubHTTPError.__bases__)
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
CAPTIONER_FILES = ("*config.json", *TOKENIZER_FILES)  # beside the weights
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "transformer": Flux,
    "ae": AutoEncoder,
    "clip": CLIPTextModel,
    "t5": T5Encoder,
}


def default_dtype() -> mx.Dtype:
    """bfloat16 on a GPU; float32 on a CPU, where products of 16-bit types are 30 times slower."""
    return mx.bfloat16 if mx.default_device().type == mx.DeviceType.gpu else mx.float32


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, all of them there and their headers sound; `load_...` read them lazily.

    dtype: the weights' type, by default `default_dtype()`. Loading raises FluxError that names the file and
    every missing, unexpected and misshapen tensor.
    """

    spec: ModelSpec
    parts: Mapping[str, Part]
    clip_tokenizer: Path
    t5_tokenizer: Path

    def load_flux(self, dtype: mx.Dtype | None = None) -> Flux:
        return load_part(self.parts["transformer"], dtype)

    def load_ae(self, dtype: mx.Dtype | None = None) -> AutoEncoder:
        return load_part(self.parts["ae"], dtype)

    def load_clip(self, dtype: mx.Dtype | None = None) -> CLIPTextModel:
        return load_part(self.parts["clip"], dtype)

    def load_t5(self, dtype: mx.Dtype | None = None) -> T5Encoder:
        return load_part(self.parts["t5"], dtype)

    def load_clip_tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_folder(self.clip_tokenizer)

    def load_t5_tokenizer(self, max_length: int | None = None) -> T5Tokenizer:
        """max_length: tokens; the model's own where None."""
        return T5Tokenizer.from_folder(self.t5_tokenizer, max_length or self.spec.t5_length)

    def fingerprints(self) -> dict[str, str]:
        """For each part and tokenizer a short text that differs where its files do."""
        out = {kind: " ".join(map(tensors.fingerprint, part.files)) for kind, part in self.parts.items()}
        for name, folder in (("CLIP tokenizer", self.clip_tokenizer), ("T5 tokenizer", self.t5_tokenizer)):
            digest = hashlib.sha256()
            for file in (*TOKENIZER_FILES, "spiece.model"):
                if (folder / file).is_file():
                    digest.update((folder / file).read_bytes())
            out[name] = digest.hexdigest()[:12]
        return out


def load_part(part: Part, dtype: mx.Dtype | None = None) -> nn.Module:
    """A part's network with its weights in dtype, lazily: read are the headers, and a page of each tensor."""
    dtype = dtype or default_dtype()
    found = tensors.load(part.files)
    names = keymaps.own_names(part.kind, found)
    own = {bare: found[name] for name, bare in names.items()}
    metadata = _look(part, names)
    network, weights = _build(part, own, metadata)
    diffusers = keymaps.is_diffusers(own)
    expected = keymaps.to_file(part.kind, dict(tree_flatten(network.parameters())), diffusers)
    found = own if diffusers or part.kind != "ae" else keymaps.unsqueeze_pointwise(own)
    tensors.check(part.label, found, expected)
    network.load_weights([(name, _cast(w, dtype)) for name, w in weights.items()])
    network.eval()
    return network


def _look(part: Part, names: Collection[str]) -> dict[str, str]:
    """The first file's metadata; FluxError where tensors of these names hold no numbers to work with."""
    headers = {file: tensors.read_header(file) for file in part.files}
    for file, header in headers.items():
        values.check(file, header.tensors, names & header.tensors.keys())
    return headers[part.files[0]].metadata


def _build(
    part: Part, own: Mapping[str, mx.array], metadata: Mapping[str, str]
) -> tuple[nn.Module, dict[str, mx.array]]:
    """The network that a file's tensors are of, with quantized layers where it has them, and its weights."""
    try:
        weights = keymaps.to_ours(part.kind, own)
        config = part.config or jsonfiles.parse_object(metadata.get("config", "{}"))
        network = NETWORKS[part.kind](shapes.params(part.kind, weights, config))
        quantize.prepare(network, metadata, weights)
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise FluxError(f"{part.label}: no network fits its tensors and its config: {error}") from None
    return network, weights


def _cast(weight: mx.array, dtype: mx.Dtype) -> mx.array:
    """Packed integers of quantized layers stay."""
    return weight.astype(dtype) if mx.issubdtype(weight.dtype, mx.floating) else weight


# --- Finding ---


def find(model: str, **overrides: str | os.PathLike | None) -> Checkpoint:
    """A model by its name in the registry, its folder, or its repository on the Hub.

    overrides: `transformer`, `ae`, `clip`, `t5` = a safetensors file (or a folder such as diffusers'
    `transformer/`) for that part. A folder is read where it is; a repository is downloaded into the Hub's
    cache first, only what is needed of it, and with HF_HUB_OFFLINE=1 only looked for there.
    Raises FluxError, in one line that says what to do, where something is not found.
    """
    if unknown := overrides.keys() - set(PARTS):
        raise FluxError(f"no part is called {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    given = {
        kind: layouts.part_of_file(Path(file).expanduser(), kind)
        for kind, file in overrides.items()
        if file is not None
    }
    spec = registry.find(model)
    if spec and not spec.repo:
        return _in_folder(registry.TINY_FOLDER, spec, given)
    path = Path(model).expanduser()
    if path.is_dir() and (spec is None or "/" in model):  # "dev" is the model, not a folder of that name
        return _in_folder(path, spec, given)
    if spec is None and path.exists():
        raise FluxError(f"{model}: a model is a folder; to take one part from a file, use --transformer FILE")
    if spec is None and not re.fullmatch(REPOSITORY, model):
        known = ", ".join(row.name for row in registry.MODELS)
        raise FluxError(f"{model!r} is neither a model ({known}), nor a folder, nor a repository of the Hub")
    return _from_hub(spec.repo if spec else model, spec, given)


def _in_folder(folder: Path, spec: ModelSpec | None, given: Mapping[str, Part]) -> Checkpoint:
    found = {kind: layouts.find_part(folder, kind) for kind in PARTS if kind not in given}
    if found and not any(found.values()):
        raise FluxError(f"{folder}: no weights here in BFL's, diffusers' or ComfyUI's layout")
    if absent := [kind for kind, part in found.items() if part is None]:
        wanted = "; ".join(f"no {NAMES[kind]} ({', '.join(layouts.PLACES[kind])})" for kind in absent)
        options = " ".join(f"--{kind} FILE" for kind in absent)
        raise FluxError(f"{folder}: {wanted}: put the files there or give {options}")
    parts = {**found, **given}
    spec = _defaults(folder, spec or _kind_of(parts["transformer"]))
    tokenizers = (
        layouts.find_tokenizer(folder, name) or _tokenizer(folder, name, spec) for name in TOKENIZERS
    )
    return Checkpoint(spec, parts, *tokenizers)


def _kind_of(part: Part) -> ModelSpec:
    """The registry's row for a transformer of one's own."""
    header = (name for file in part.files for name in tensors.read_header(file).tensors)
    has_guidance = any("guidance_in." in name or "guidance_embedder." in name for name in header)
    return registry.of_file(part.files[0].name, has_guidance)


def _defaults(folder: Path, spec: ModelSpec) -> ModelSpec:
    """The row with what the folder's own defaults.json, if any, says otherwise."""
    path = folder / DEFAULTS
    if not path.is_file():
        return spec
    try:
        own = json.loads(path.read_text(encoding="utf-8"))
        own["image_size"] = tuple(own.get("image_size", spec.image_size))
        return replace(spec, **own)
    except (ValueError, TypeError):
        raise FluxError(f"{path}: should hold a JSON object of ModelSpec's fields") from None


def find_captioner(model: str) -> Path:
    """The folder of a captioner: by its name in the registry, a folder, or a repository.

    A repository is downloaded into the Hub's cache first, as by `find`. Raises FluxError, in one line that
    says what to do, where it is not found.
    """
    repo, path = registry.CAPTIONERS.get(model), Path(model).expanduser()
    if repo == "":
        return registry.TINY_CAPTIONER_FOLDER
    if repo is None and path.is_dir():
        return path
    if repo is None and (path.exists() or not re.fullmatch(REPOSITORY, model)):
        known = ", ".join(registry.CAPTIONERS)
        raise FluxError(
            f"{model!r} is neither a captioner ({known}), nor a folder, nor a repository of the Hub"
        )
    return _captioner_from_hub(repo or model)


# --- The Hub ---


def _tokenizer(folder: Path, name: str, spec: ModelSpec) -> Path:
    """A tokenizer that a folder lacks (ComfyUI's do): the same model's on the Hub."""
    if spec.repo:
        try:
            snapshot = _snapshot(spec.repo, [f"{name}/*"], _offline())
        except FluxError as error:
            raise FluxError(f"{folder}: no {name}/ here, and from the Hub: {error}") from None
        if found := layouts.find_tokenizer(snapshot, name):
            return found
    files = " or ".join(TOKENIZERS[name])
    raise FluxError(f"{folder}: no {name}/ with {files}; copy that folder of a FLUX.1 repository there")


def _from_hub(repo: str, spec: ModelSpec | None, given: Mapping[str, Part]) -> Checkpoint:
    """A repository of the Hub: what is needed of it is downloaded, or was at an earlier time."""
    files = _list_files(repo)
    if files is None:  # nothing can be downloaded: every snapshot has the tokenizers, and maybe the rest
        folder = _snapshot(repo, [f"{name}/*" for name in TOKENIZERS], offline=True)
        try:
            return _in_folder(folder, spec, given)
        except FluxError as error:
            raise FluxError(f"{error} ({_unreachable(repo)})") from None
    patterns = _patterns(list(files), spec, [kind for kind in PARTS if kind not in given])
    _check_disk(repo, files, patterns)
    return _in_folder(_snapshot(repo, patterns, offline=False), spec, given)


def _captioner_from_hub(repo: str) -> Path:
    files = _list_files(repo)
    if files is None:
        folder = _snapshot(repo, list(CAPTIONER_FILES), offline=True)
        try:
            florence2.weight_files(folder)
        except FluxError as error:
            raise FluxError(f"{error} ({_unreachable(repo)})") from None
        return folder
    weights = next((kind for kind in florence2.WEIGHTS if fnmatch.filter(files, kind)), None)
    if weights is None:
        raise FluxError(f"{repo}: no captioner there; expected {' or '.join(florence2.WEIGHTS)}")
    patterns = [*CAPTIONER_FILES, weights]  # many repositories hold the weights in both formats
    _check_disk(repo, files, patterns)
    return _snapshot(repo, patterns, offline=False)


def _list_files(repo: str) -> dict[str, int] | None:
    """The files of a repository and their sizes; None where the Hub may not or cannot be asked."""
    if _offline():
        return None
    try:
        siblings = huggingface_hub.HfApi().model_info(repo, files_metadata=True, timeout=20).siblings or []
    except HUB_ERRORS as error:
        if isinstance(error, (HfHubHTTPError, HFValidationError)):
            raise FluxError(_advice(repo, error)) from None
        return None
    return {file.rfilename: file.size or 0 for file in siblings}


def _patterns(files: list[str], spec: ModelSpec | None, kinds: list[str]) -> list[str]:
    """What to download: of the two layouts that a repository may hold only one, BFL's where it is."""
    single = {"transformer": spec.file if spec else "flux1-*.safetensors", "ae": "ae.safetensors"}
    patterns = [f"{name}/*" for name in TOKENIZERS] + [DEFAULTS]
    for kind in kinds:
        patterns += [f"{FOLDERS[kind]}/config.json"]
        if kind in single and fnmatch.filter(files, single[kind]):
            patterns += [single[kind]]
        else:
            patterns += [f"{FOLDERS[kind]}/*.safetensors", f"{FOLDERS[kind]}/*.index.json"]
    return patterns


def _check_disk(repo: str, files: Mapping[str, int], patterns: list[str]) -> None:
    """FluxError, before a long download, where the disk has no room for what is not in the cache yet."""
    needed = sum(
        size
        for name, size in files.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        and not isinstance(huggingface_hub.try_to_load_from_cache(repo, name), str)
    )
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    disk = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise FluxError(
            f"{repo}: {needed / 1e9:.1f} GB to download and {free / 1e9:.1f} GB free at {disk}: make room, "
            f"or set HF_HOME to a larger disk, {TINY}"
        )


def _snapshot(repo: str, patterns: list[str], offline: bool) -> Path:
    """The folder in the Hub's cache with the files that match; they are downloaded unless offline."""
    try:
        return Path(
            huggingface_hub.snapshot_download(repo, allow_patterns=patterns, local_files_only=offline)
        )
    except HUB_ERRORS as error:
        raise FluxError(_advice(repo, error)) from None


def fetch(repo: str, file: str) -> Path:
    """One file of a repository, in the Hub's cache; FluxError where it cannot be had."""
    path = _snapshot(repo, [file], _offline()) / file
    if not path.is_file():
        raise FluxError(f"{repo} has no file {file} on the Hub, or none in the cache")
    return path


def _offline() -> bool:
    """As huggingface_hub reads it, but now and not when it was imported."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _advice(repo: str, error: Exception) -> str:
    """One line: what went wrong and what to do."""
    page = f"https://huggingface.co/{repo}"
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: accept its licence at {page} and log in with `hf auth login`, {TINY}"
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return f"{repo}: no such folder, and no repository at {page} (a private one needs `hf auth login`)"
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return f"{repo}: the disk is full: make room, or set HF_HOME to a larger disk, {TINY}"
    if isinstance(error, HfHubHTTPError):
        return f"{repo}: the Hub answered: {str(error).splitlines()[0]}: try again later, {TINY}"
    return f"{repo} is neither a folder nor in the Hub's cache, and {_unreachable(repo)}"


def _unreachable(repo: str) -> str:
    if _offline():
        return f"HF_HUB_OFFLINE=1 forbids to download {repo}: unset it, {TINY}"
    return f"huggingface.co cannot be reached for {repo}: check the network, {TINY}"
