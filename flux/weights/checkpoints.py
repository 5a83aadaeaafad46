"""Find a model, read it, check it, load it. The only file of the package that reaches the Hub."""

import errno
import fnmatch
import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

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
from flux.models.controlnet import ControlNet
from flux.models.t5 import T5Encoder
from flux.models.transformer import Flux
from flux.tokenizers import CLIPTokenizer, T5Tokenizer
from flux.weights import (
    controlnets,
    florence2,
    keymaps,
    layouts,
    prefixes,
    quantize,
    registry,
    repositories,
    shapes,
    specs,
    tensors,
    values,
)
from flux.weights.layouts import PARTS, TOKENIZERS, Part
from flux.weights.registry import ModelSpec

REPOSITORY = r"[\w-][\w.-]*/[\w-][\w.-]*"
HUB_FILE = re.compile(rf"({REPOSITORY}):(.+)")  # a repository and a file in it
TINY = "or use --model tiny, which is built in"  # what always works
# huggingface_hub's errors, those of the HTTP library below it (whichever it is), and the disk's.
HUB_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    RuntimeError,
    HFValidationError,
    *HfHubHTTPError.__bases__,
)
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")  # of CLIP and of the captioner
CAPTIONER_FILES = ("*config.json", *TOKENIZER_FILES)  # beside the weights
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "transformer": Flux,
    "ae": AutoEncoder,
    "clip": CLIPTextModel,
    "t5": T5Encoder,
    "controlnet": ControlNet,
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
        """The transformer, as `load_part` gives it; so the other three."""
        return cast(Flux, load_part(self.parts["transformer"], dtype))

    def load_ae(self, dtype: mx.Dtype | None = None) -> AutoEncoder:
        """The autoencoder."""
        return cast(AutoEncoder, load_part(self.parts["ae"], dtype))

    def load_clip(self, dtype: mx.Dtype | None = None) -> CLIPTextModel:
        """The CLIP text encoder."""
        return cast(CLIPTextModel, load_part(self.parts["clip"], dtype))

    def load_t5(self, dtype: mx.Dtype | None = None) -> T5Encoder:
        """The T5 encoder."""
        return cast(T5Encoder, load_part(self.parts["t5"], dtype))

    def load_clip_tokenizer(self) -> CLIPTokenizer:
        """The CLIP tokenizer."""
        return CLIPTokenizer.from_folder(self.clip_tokenizer)

    def load_t5_tokenizer(self, max_length: int | None = None) -> T5Tokenizer:
        """The T5 tokenizer. max_length: tokens; the model's where None."""
        return T5Tokenizer.from_folder(self.t5_tokenizer, max_length or self.spec.t5_length)

    def fingerprints(self) -> dict[str, str]:
        """For each part and tokenizer a short text that differs where its files do."""
        out = {kind: " ".join(map(tensors.fingerprint, part.files)) for kind, part in self.parts.items()}
        for name, folder in (("CLIP tokenizer", self.clip_tokenizer), ("T5 tokenizer", self.t5_tokenizer)):
            digest = hashlib.sha256()
            for file in (*TOKENIZER_FILES, "merges.txt.gz", "spiece.model"):
                if (folder / file).is_file():
                    digest.update((folder / file).read_bytes())
            out[name] = digest.hexdigest()[:12]
        return out


def load_part(part: Part, dtype: mx.Dtype | None = None) -> nn.Module:
    """A part's network with its weights in dtype, lazily: read are the headers, and a page of each tensor.

    Layers that the file has in few bits stay so, with their scales in dtype.
    """
    dtype = dtype or default_dtype()
    found = {name: _cast(w, dtype) for name, w in tensors.load(part.files, packed=True).items()}
    names = prefixes.bare_names_of(part.kind, found)
    metadata = _look(part, names)
    try:
        wide, packed = quantize.split(found, metadata, part.config)
    except ValueError as error:
        raise FluxError(f"{part.label}: {error}") from None
    bare_tensors = {bare: wide[name] for name, bare in names.items() if name in wide}
    network, weights = _build(part, bare_tensors, metadata)
    diffusers = keymaps.is_diffusers(bare_tensors)
    expected = keymaps.to_file(part.kind, dict(tree_flatten(network.parameters())), diffusers)
    as_in_file = bare_tensors if diffusers or part.kind != "ae" else keymaps.unsqueeze_pointwise(bare_tensors)
    tensors.check(part.label, as_in_file, expected)
    packed_layers = {bare: packed[name] for name, bare in names.items() if name in packed}
    weights |= quantize.prepare(network, packed_layers, partial(keymaps.to_ours, part.kind))
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
    part: Part, bare_tensors: Mapping[str, mx.array], metadata: Mapping[str, str]
) -> tuple[nn.Module, dict[str, mx.array]]:
    """The network that a file's tensors are of, with quantized layers where it has them, and its weights."""
    try:
        weights = keymaps.to_ours(part.kind, bare_tensors)
        config = part.config or jsonfiles.parse_object(metadata.get("config", "{}"))
        network = NETWORKS[part.kind](shapes.params(part.kind, weights, config))
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise FluxError(f"{part.label}: no network fits its tensors and its config: {error}") from None
    return network, weights


def _cast(weight: mx.array, dtype: mx.Dtype) -> mx.array:
    """Packed integers of quantized layers stay."""
    return weight.astype(dtype) if mx.issubdtype(weight.dtype, mx.floating) else weight


# --- Finding ---


def find(model: str, **overrides: str | os.PathLike | None) -> Checkpoint:
    """A model by its name in the registry, its folder, its file, or its repository on the Hub.

    model: also `owner/name:file`, one file of a repository, and the folder of a training that wrote a model.
    Parts that a file lacks are looked for in its folder, or in the tree that it lies in.
    overrides: `transformer`, `ae`, `clip`, `t5` = a file (also `owner/name:file`), or a folder such as
    diffusers' `transformer/`, for that part. A folder is read where it is; a repository is downloaded into
    the Hub's cache first, only what is needed of it, and with HF_HUB_OFFLINE=1 only looked for there.
    Raises FluxError, in one line that says what to do, where something is not found. Warns, in a line each,
    of files and tensors that are passed over and of choices between files.
    """
    if unknown := overrides.keys() - set(PARTS):
        raise FluxError(f"no part is called {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    given = {
        kind: layouts.part_of_file(local_file(str(file)), kind)
        for kind, file in overrides.items()
        if file is not None
    }
    spec = registry.find(model)
    if spec and not spec.repo:
        return _in_folder(registry.TINY_FOLDER, spec, given, model)
    path = Path(model).expanduser()
    if path.is_dir() and (spec is None or "/" in model):  # "dev" is the model, not a folder of that name
        return _in_folder(layouts.model_folder(path), spec, given, path.resolve().name)
    if spec is None and path.exists():
        return _in_folder(layouts.tree_of(path), None, {**layouts.parts_of_file(path), **given}, path.stem)
    if spec is None and (hub := HUB_FILE.fullmatch(model)):
        return _from_hub(hub[1], None, given, hub[2])
    if spec is None and not re.fullmatch(REPOSITORY, model):
        known = ", ".join(row.name for row in registry.MODELS)
        raise FluxError(
            f"{model!r} is neither a model ({known}), nor a folder or file, nor a repository of the Hub"
        )
    return _from_hub(spec.repo if spec else model, spec, given)


def _in_folder(folder: Path, spec: ModelSpec | None, given: Mapping[str, Part], name: str) -> Checkpoint:
    """The model in a folder; given: parts that are there already. name: of the folder or repository."""
    absent = [kind for kind in PARTS if kind not in given]
    asked = spec.name if spec and spec.repo else ""
    try:
        found = layouts.find_parts(folder, absent, given, asked) if absent else {}
    except FluxError as error:
        if reason := layouts.why_no_model(folder):
            raise FluxError(reason) from None
        pipeline = specs.class_name(folder)
        known = ("", *registry.PIPELINES.values())
        made_for = f" (it is made for {pipeline})" if pipeline not in known else ""
        raise FluxError(f"{error}{made_for}") from None
    parts = found | {kind: layouts.with_config(folder, part) for kind, part in given.items()}
    spec = specs.spec_of(folder, parts["transformer"], spec, name)
    for line in layouts.foreign_tensors(parts.values()):
        warnings.warn(line, stacklevel=2)
    return Checkpoint(spec, parts, *(layouts.find_tokenizer(folder, name) for name in TOKENIZERS))


def local_file(name: str) -> Path:
    """The path of a file or folder that is given by its path, or as `owner/name:file` of the Hub."""
    path = Path(name).expanduser()
    hub = HUB_FILE.fullmatch(name)
    return fetch(hub[1], hub[2]) if hub and not path.exists() else path


def find_adapter(name: str) -> Path:
    """The file or folder of an adapter: by its path, or as `owner/name` or `owner/name:file` of the Hub.

    Of a repository that holds several adapters one must be named. FluxError where nothing can be had; what is
    no path and no repository's name comes back as it is, and whoever reads it says what is wrong.
    """
    return find_files(name, partial(repositories.adapter_patterns, name))


def find_controlnet(name: str) -> Part:
    """The file of a ControlNet, as by `find_files`; `load_part` reads it. FluxError where none is found."""
    return controlnets.part_of(find_files(name, partial(repositories.controlnet_patterns, name)))


def find_files(name: str, choose: Callable[[list[str]], list[str]]) -> Path:
    """A file or folder by its path, as `owner/name:file` of the Hub, or as the folder of a repository.

    choose: from the names of a repository's files to the patterns of those that are downloaded. FluxError
    where nothing can be had; what is no path and no repository's name comes back as it is.
    """
    if Path(name).expanduser().exists() or not re.fullmatch(REPOSITORY, name):
        return local_file(name)
    files = _list_files(name)
    if files is None:
        return _snapshot(name, ["*"], offline=True)  # what there is
    patterns = choose(list(files))
    _check_disk(name, files, patterns)
    return _snapshot(name, patterns, offline=False)


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


def _from_hub(
    repo: str, spec: ModelSpec | None, given: Mapping[str, Part], file: str | None = None
) -> Checkpoint:
    """A repository of the Hub: what is needed of it is downloaded, or was at an earlier time.

    file: its transformer, and maybe more; the rest is looked for in the repository.
    """
    if file is not None:
        given = {**layouts.parts_of_file(fetch(repo, file)), **given}
    files = _list_files(repo)
    name = repo.rpartition("/")[2]
    if files is None:  # nothing can be downloaded: what an earlier time has left
        folder = _snapshot(repo, [specs.INDEX], offline=True)
        try:
            return _in_folder(folder, spec, given, name)
        except FluxError as error:
            raise FluxError(f"{error} ({_unreachable(repo)})") from None
    patterns = repositories.patterns(repo, list(files), spec, [kind for kind in PARTS if kind not in given])
    _check_disk(repo, files, patterns)
    return _in_folder(_snapshot(repo, patterns, offline=False), spec, given, name)


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
    """One file of a repository, in the Hub's cache; FluxError where it cannot be loaded."""
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
