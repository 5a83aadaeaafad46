"""The model that a fine-tuning begins with, and the adapter that it trains."""

import warnings

import mlx.core as mx
import mlx.nn as nn

from flux import adapters, loading
from flux.adapters import Adapter, Adapters, Delta
from flux.adapters.training import DEFAULT_TARGET
from flux.data import cache
from flux.errors import FluxError
from flux.models.clip import CLIPTextModel
from flux.models.transformer import Flux
from flux.pipeline import FluxPipeline
from flux.training.finetune.options import Options
from flux.weights import checkpoints, registry
from flux.weights.checkpoints import Checkpoint
from flux.weights.registry import ModelSpec

LEARNED = "learned"  # the name of the trained adapter among those of the network


class Network(nn.Module):
    """What a fine-tuning trains parts of: the transformer, and CLIP where that is trained too."""

    def __init__(self, flow: Flux, clip: CLIPTextModel | None):
        super().__init__()
        self.flow = flow
        if clip is not None:
            self.clip = clip


class Base:
    """A model's files, and its pipeline, lazily loaded with its adapters and quantized."""

    def __init__(self, options: Options):
        """FluxError for a model or an adapter that cannot be found or loaded."""
        weighted = adapters.read_weighted(options.adapters)
        self.checkpoint: Checkpoint = checkpoints.find(options.model, **options.files)
        self._options = options
        self._dtype = getattr(mx, options.dtype) if options.dtype else checkpoints.default_dtype()
        bits, mode = options.quantization
        parts = loading.load(self.checkpoint, self._dtype, bits, weighted, options.fuse_adapters, mode=mode)
        check_input(parts.spec)
        self.pipeline = FluxPipeline.from_parts(parts)
        self.ae_params = parts.ae.params
        self.end_token = parts.clip_tokenizer.eos_token_id

    def identities(self) -> tuple[str, str]:
        """Of the autoencoder, and of the text encoders: what features on disk were made by."""
        parts, options = self.checkpoint.parts, self._options
        files = [*parts["clip"].files, *parts["t5"].files]
        for folder in (self.checkpoint.clip_tokenizer, self.checkpoint.t5_tokenizer):
            files += sorted(path for path in folder.iterdir() if path.is_file())
        settings = (self._dtype, options.quantize, options.adapters, self.checkpoint.spec.t5_length)
        return cache.identity(parts["ae"].files, self._dtype), cache.identity(files, settings)

    def drop_encoders(self, keep_clip: bool) -> None:
        """Lets go of what only encoding needed: the autoencoder, T5 and, unless it is trained, CLIP."""
        del self.pipeline.ae, self.pipeline.t5
        if not keep_clip:
            del self.pipeline.clip
        mx.clear_cache()

    def load_ae(self) -> None:
        """The autoencoder again, for `pipeline.decode`; `del pipeline.ae` lets go of it."""
        self.pipeline.ae = self.checkpoint.load_ae(self._dtype)


def check_input(spec: ModelSpec) -> None:
    """FluxError for a model that needs a picture besides texts; warns of one that may be given some."""
    if spec.input in (registry.FILL, registry.CONTROL):
        raise FluxError(
            f"{spec.name} is given a picture besides its text, which a data set here does not have: "
            "train an adapter of dev, which works with it too"
        )
    if spec.input == registry.REFERENCE:
        warnings.warn(f"{spec.name} is trained without references, as from text to picture", stacklevel=2)


def inject(network: Network, options: Options) -> dict[str, Adapters]:
    """Puts a new adapter beside the weights and leaves its weights as the only ones that are trained.

    Returns the adapters of each part, "flux" and maybe "clip". FluxError for targets that name no layers.
    """
    network.freeze()
    found = {}
    keys = mx.random.split(mx.random.key(options.seed), 2)
    for part, key in zip(("flux", "clip"), keys, strict=True):
        model = network.get({"flux": "flow"}.get(part, part))
        if model is None:
            continue
        # Names and patterns of the user's are those of the transformer's layers.
        preset = adapters.is_preset(options.targets) or part == "flux"
        which, last = (options.targets if preset else DEFAULT_TARGET), options.last_blocks
        names = adapters.targets(model, which, last if part == "flux" else None)
        new = adapters.new_adapter(
            model, names, options.rank, options.alpha or options.rank, key, options.dora
        )
        found[part] = Adapters(model)
        found[part].add(new, name=LEARNED, dropout=options.dropout, trainable=True)
        found[part].freeze_all_but(LEARNED)
    mx.eval(network.trainable_parameters())
    return found


def extract(parts: dict[str, Adapters]) -> Adapter:
    """The trained adapter as it is now, of all parts."""
    modules: dict[str, Delta] = {}
    for part in parts.values():
        modules |= part.extract(LEARNED).modules
    return Adapter(modules)
