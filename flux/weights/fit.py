"""Whether the parts of a model fit each other, and whether the pipeline can give them what they want."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from flux.errors import FluxError
from flux.models.autoencoder import AutoEncoder
from flux.models.clip import CLIPTextModel
from flux.models.controlnet import ControlNet
from flux.models.t5 import T5Encoder
from flux.models.transformer import Flux, FluxParams
from flux.tokenizers import CLIPTokenizer, T5Tokenizer
from flux.weights import registry
from flux.weights.layouts import Part
from flux.weights.registry import ModelSpec

MASK_CELL = 8  # Fill's mask: pixels to one of the latent, along each side
MASK_CHANNELS = 4 * MASK_CELL**2  # of a patch of 2x2
KINDS = {
    registry.TEXT: "a model that is given text alone",
    registry.FILL: "FLUX.1 Fill",
    registry.CONTROL: "FLUX.1 Canny or Depth",
    registry.REFERENCE: "FLUX.1 Kontext",
}


def check_fit(
    files: Mapping[str, Part],
    flow: Flux,
    ae: AutoEncoder,
    clip: CLIPTextModel,
    t5: T5Encoder,
    tokenizers: tuple[CLIPTokenizer, T5Tokenizer],
) -> None:
    """FluxError, one line with every fault, for parts that cannot work together; reads no weights.

    files: "transformer", "ae", "clip", "t5" -> where each comes from, for that line.
    """
    labels = {kind: part.label for kind, part in files.items()}
    params = flow.params
    widths = (
        ("clip", "CLIP vectors", clip.params.hidden_size, params.vec_in_dim),
        ("t5", "T5 vectors", t5.params.d_model, params.context_in_dim),
        ("ae", "latent channels in patches of 2x2, ", 4 * ae.params.z_channels, params.out_channels),
    )
    faults = [
        f"{labels[kind]} gives {what} {gives} wide, {labels['transformer']} takes {takes}"
        for kind, what, gives, takes in widths
        if gives != takes
    ]
    if params.in_channels == 2 * params.out_channels + MASK_CHANNELS and ae.downscale != MASK_CELL:
        faults.append(
            f"{labels['transformer']} takes a mask of {MASK_CELL}x{MASK_CELL} pixels to one of the latent, "
            f"{labels['ae']} makes one of {ae.downscale}x{ae.downscale}"
        )
    sizes = (tokenizers[0].size, tokenizers[1].size)
    embeddings = (("clip", clip.params.vocab_size), ("t5", t5.params.vocab_size))
    faults += [
        f"{labels[kind]} embeds {rows} pieces of text, its tokenizer has {size}: "
        f"put the model's {'tokenizer/' if kind == 'clip' else 'tokenizer_2/'} into its folder"
        for (kind, rows), size in zip(embeddings, sizes, strict=True)
        if rows < size
    ]
    if faults:
        raise FluxError("these parts do not fit each other: " + "; ".join(faults))


def check_controlnet(label: str, network: ControlNet, flow: Flux, ae: AutoEncoder) -> None:
    """FluxError, one line with every fault, for a ControlNet that cannot work with a model."""
    ours, theirs = network.params, flow.params
    latent = 4 * ae.params.z_channels
    control = 4 * ours.hint_channels if network.takes_pixels else latent
    widths = (
        ("a hidden size of", ours.hidden_size, theirs.hidden_size),
        ("CLIP vectors as wide as", ours.vec_in_dim, theirs.vec_in_dim),
        ("T5 vectors as wide as", ours.context_in_dim, theirs.context_in_dim),
        ("a latent's channels, packed:", ours.in_channels, theirs.out_channels),
        ("a control picture's channels, packed:", ours.control_channels, control),
    )
    faults = [f"{what} {size}, not {wanted}" for what, size, wanted in widths if size != wanted]
    if ours.depth > theirs.depth or ours.depth_single_blocks > theirs.depth_single_blocks:
        faults.append(
            f"{ours.depth} double and {ours.depth_single_blocks} single blocks, "
            f"more than the model's {theirs.depth} and {theirs.depth_single_blocks}"
        )
    if network.takes_pixels and ae.downscale != 8:
        faults.append(f"convolutions to an eighth of the size, not to a latent's {ae.downscale}th")
    if faults:
        raise FluxError(f"{label} does not fit this model: it has {'; '.join(faults)}")


def input_kind(in_channels: int, out_channels: int, label: str) -> str:
    """What a transformer is given in every step, of `registry.INPUTS`, by its channels.

    FluxError, with its label, for one that is given something else. Kontext has a text's.
    """
    extra = in_channels - out_channels
    known = {0: registry.TEXT, out_channels: registry.CONTROL, out_channels + MASK_CHANNELS: registry.FILL}
    if extra in known:
        return known[extra]
    wanted = f"it takes {in_channels} channels where it gives {out_channels}: more input"
    if extra == 2 * out_channels + 4:
        wanted = "Flex.2: it wants a picture, a mask and a control picture at once"
    raise FluxError(f"{label}: {wanted}, which this program does not give it")


def fit_row(spec: ModelSpec, kind: str, label: str, name: str | None = None) -> ModelSpec:
    """The row for a transformer of a kind, of `registry.INPUTS` as its channels say.

    A row for text gives way to that of the kind, of which the words of a name tell the model, by default the
    label's; it keeps its time shift. FluxError, with the label, where a model with another input was asked
    for.
    """
    if kind == spec.input or (kind == registry.TEXT and spec.input == registry.REFERENCE):
        return spec
    if spec.input in (registry.FILL, registry.CONTROL):
        raise FluxError(
            f"{label}: {KINDS[kind]}, by its channels; {spec.name} needs a transformer of {KINDS[spec.input]}"
        )
    return replace(registry.of_kind(kind, name or Path(label).stem), shift=spec.shift)


def fit_adapted(spec: ModelSpec, params: FluxParams, label: str, adapters: Sequence[str]) -> ModelSpec:
    """The row for a transformer with the adapters in these files; label: the transformer's.

    A control adapter brings the input of the model that it makes of a dev, and its guidance.
    """
    kind = input_kind(params.in_channels, params.out_channels, label)
    if not adapters:
        return fit_row(spec, kind, label)
    row = fit_row(spec, kind, label, " ".join(Path(file).stem for file in adapters))
    return replace(spec, input=row.input, guidance=row.guidance)
