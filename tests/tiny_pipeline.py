"""A FluxPipeline of random weights for tests, with FLUX's own latents: 16 channels, an eighth of the size."""

from dataclasses import replace
from pathlib import Path

from flux.loading import Parts
from flux.models.autoencoder import AutoEncoder, AutoEncoderParams
from flux.models.clip import CLIPTextModel
from flux.models.t5 import T5Encoder
from flux.models.transformer import Flux, FluxParams
from flux.pipeline import FluxPipeline
from flux.tokenizers import CLIPTokenizer, T5Tokenizer
from flux.weights import registry, save

from . import tiny

T5_LENGTH = 48
FLUX = replace(tiny.FLUX, in_channels=64, out_channels=64)
AE = AutoEncoderParams(ch=8, ch_mult=(1, 1, 2, 2), num_res_blocks=1, norm_groups=4)


EXTRA = {"text": 0, "reference": 0, "control": 64, "fill": 64 + 256}  # channels beside the noise's


def make_parts(
    tokenizers: Path,
    guidance: bool = True,
    ae: AutoEncoderParams = AE,
    flow: FluxParams = FLUX,
    row: str | None = None,
) -> Parts:
    """Parts of dev's kind (guidance, shift), schnell's or a row's. Tokenizers: `tiny.write_tokenizers`."""
    spec = registry.get(row or ("dev" if guidance else "schnell"))
    channels = 4 * ae.z_channels
    flow = replace(flow, in_channels=channels + EXTRA[spec.input], out_channels=channels)
    networks = [
        Flux(replace(flow, guidance_embed=guidance)),
        AutoEncoder(ae),
        CLIPTextModel(tiny.CLIP),
        T5Encoder(tiny.T5),
    ]
    return Parts(
        replace(spec, t5_length=T5_LENGTH),
        *(tiny.randomize(network, seed) for seed, network in enumerate(networks)),
        CLIPTokenizer.from_folder(tokenizers / "tokenizer"),
        T5Tokenizer.from_folder(tokenizers / "tokenizer_2", T5_LENGTH),
    )


def make_pipeline(tokenizers: Path, **options) -> FluxPipeline:
    return FluxPipeline.from_parts(make_parts(tokenizers, **options))


def write_checkpoint(
    folder: Path, guidance: bool = True, flow: FluxParams = FLUX, row: str | None = None
) -> Path:
    """A checkpoint of either kind or a row's in `folder`/model, diffusers' layout: 2 steps and 64x48."""
    clip_tokenizer, t5_tokenizer = tiny.write_tokenizers(folder / "vocabularies")
    parts = make_parts(folder / "vocabularies", guidance, flow=flow, row=row)
    spec = replace(parts.spec, steps=2, image_size=(64, 48))
    model = save.Model(parts.flow, parts.ae, parts.clip, parts.t5, clip_tokenizer, t5_tokenizer, spec)
    save.save_diffusers(folder / "model", model)
    return folder / "model"
