"""Pictures with ControlNets against diffusers' pipelines: the same files, noise and control pictures.

diffusers draws the control picture's latent from the autoencoder's distribution; here, and so in these tests
on both sides, it is the mean.
"""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import pytest

from flux import FluxPipeline
from flux.conditioning import ControlInput, Edit, Picture

from .. import controlnets
from .test_pipeline import NEGATIVE, PROMPT, T5_LENGTH, networks, psnr, tokenizers

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
PIL = pytest.importorskip("PIL.Image")

STEPS, SEEDS = 4, (5, 6)


@dataclass
class Case:
    """ControlNets of these kinds, each with a mode, a strength and shares of the steps."""

    kinds: tuple[str, ...]
    modes: tuple[int | None, ...] = (None,)
    strengths: tuple[float, ...] = (0.8,)
    starts: tuple[float, ...] = (0.0,)
    ends: tuple[float, ...] = (1.0,)
    options: dict = field(default_factory=dict)  # of diffusers' pipeline, besides


CASES = {
    "single": Case(("single",)),
    "union": Case(("union",), (4,)),
    "without guidance": Case(("schnell",)),
    "xlabs": Case(("xlabs",)),
    "a part of the steps": Case(("single",), starts=(0.2,), ends=(0.75,)),
    "several": Case(("union", "union"), (2, 0), strengths=(0.7, 0.4), starts=(0.0, 0.5), ends=(0.5, 1.0)),
    "true guidance": Case(("single",), options={"negative_prompt": NEGATIVE, "true_cfg_scale": 2.5}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """diffusers' parts of a model of dev's kind, and the folder that they are saved in."""
    folder = tmp_path_factory.mktemp("model")
    parts = networks(guidance=True) | tokenizers(folder / "vocabularies")
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    diffusers.FluxPipeline(**parts).save_pretrained(folder / "model")
    spiece = folder / "vocabularies" / "tokenizer_2" / "spiece.model"
    (folder / "model" / "tokenizer_2" / "spiece.model").write_bytes(spiece.read_bytes())
    return parts, folder / "model"


@pytest.fixture(autouse=True)
def mean(monkeypatch):
    vae = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(vae, "sample", lambda self, generator=None: self.mode())


def picture(size: tuple[int, int], seed: int) -> np.ndarray:
    """Blobs of colour, (H, W, 3), uint8."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.array(PIL.fromarray(small).resize((size[1], size[0]), PIL.Resampling.BICUBIC))


def made(model, folder, case: Case, size, edit: Edit | None = None, image=None) -> tuple[np.ndarray, ...]:
    """Our pictures, diffusers', and ours without ControlNets."""
    parts, checkpoint = model
    references = [controlnets.write(folder / str(i), kind, seed=i) for i, kind in enumerate(case.kinds)]
    maps = [picture(size, seed=i) for i in range(len(references))]
    one = len(references) == 1
    kind = "FluxControlNetImg2ImgPipeline" if edit else "FluxControlNetPipeline"
    reference = getattr(diffusers, kind)(
        **parts,
        controlnet=references[0] if one else diffusers.FluxMultiControlNetModel(references),
    )
    reference.set_progress_bar_config(disable=True)
    given = {
        "control_image": [PIL.fromarray(pixels) for pixels in maps],
        "control_mode": list(case.modes),
        "controlnet_conditioning_scale": list(case.strengths),
        "control_guidance_start": list(case.starts),
        "control_guidance_end": list(case.ends),
    }
    options = {name: value[0] for name, value in given.items()} if one else given
    if edit:
        options |= {"image": PIL.fromarray(edit.image.pixels), "strength": edit.strength}
    expected = reference(
        PROMPT,
        height=size[0],
        width=size[1],
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS],
        num_images_per_prompt=len(SEEDS),
        max_sequence_length=T5_LENGTH,
        output_type="np",
        **options,
        **case.options,
    ).images
    settings = {"image_size": size, "num_steps": STEPS, "guidance": 3.0, "edit": edit, "n_images": len(SEEDS)}
    settings |= {"negative_prompt": case.options.get("negative_prompt")}
    settings |= {"cfg_scale": case.options.get("true_cfg_scale")}
    inputs = [
        ControlInput(Picture.from_array(pixels), mode, strength, start, end)
        for pixels, mode, strength, start, end in zip(
            maps, case.modes, case.strengths, case.starts, case.ends, strict=True
        )
    ]
    names = [str(folder / str(i)) for i in range(len(references))]
    ours = pipeline(checkpoint, controlnets=names).generate_images(
        PROMPT, seed=SEEDS[0], controlnets=inputs, **settings
    )
    plain = pipeline(checkpoint).generate_images(PROMPT, seed=SEEDS[0], **settings)
    return ours, (expected * 255).round().astype(np.uint8), plain


def pipeline(folder, **options) -> FluxPipeline:
    flux = FluxPipeline(str(folder), dtype=mx.float32, noise="torch", **options)
    flux.t5_tokenizer.max_length = T5_LENGTH
    return flux


def check(ours: np.ndarray, expected: np.ndarray, plain: np.ndarray) -> None:
    assert ours.shape == expected.shape
    assert psnr(ours, expected) >= 60
    assert psnr(ours, plain) < 40  # the ControlNet has an effect


@pytest.mark.parametrize("name", CASES)
def test_pictures_are_diffusers(model, tmp_path, name):
    check(*made(model, tmp_path, CASES[name], (64, 64)))


@pytest.mark.parametrize("size", [(96, 64), (48, 112)])
@pytest.mark.parametrize("name", ["union", "xlabs"])
def test_of_other_sizes(model, tmp_path, name, size):
    check(*made(model, tmp_path, CASES[name], size))


def test_of_a_picture_that_is_changed(model, tmp_path):
    """FluxControlNetImg2ImgPipeline: start and end are shares of the steps that are made."""
    case = Case(("single",), starts=(0.3,))
    edit = Edit(Picture.from_array(picture((64, 64), seed=9)), strength=0.75)
    check(*made(model, tmp_path, case, (64, 64), edit))
