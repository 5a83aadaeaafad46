"""What a model is: its row by contents and name, its times by its scheduler, what it must be given."""

import json
import warnings
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from flux import FluxPipeline, sampler
from flux.errors import FluxError
from flux.models.clip import CLIPTextModel
from flux.models.transformer import Flux
from flux.sampler import Shift
from flux.weights import checkpoints, keymaps, registry, save, tensors
from tests import tiny

DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> save.Model:
    return tiny.model(*tiny.write_tokenizers(tmp_path_factory.mktemp("tokenizers")))


@pytest.fixture(scope="module")
def undistilled(model) -> save.Model:
    """Without the input for guidance."""
    return replace(model, flux=tiny.randomize(Flux(replace(tiny.FLUX, guidance_embed=False)), 5))


def write(folder, model, scheduler=None, name=None):
    """diffusers' folder without this program's own defaults; the transformer's file under a name."""
    save.save_diffusers(folder, model, dtype=None)
    (folder / "defaults.json").unlink()
    path = folder / "scheduler/scheduler_config.json"
    path.unlink() if scheduler is None else path.write_text(json.dumps(scheduler))
    if name:
        next((folder / "transformer").glob("*.safetensors")).rename(folder / "transformer" / name)
    return folder


def spec(folder, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = checkpoints.find(str(folder), **options).spec
    return found, [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("scheduler", "name", "shift"),
    [
        (DYNAMIC, "dev", True),
        (DYNAMIC | {"base_shift": 0.5, "max_shift": 1.15}, "dev", True),
        (DYNAMIC | {"base_shift": 0.7, "max_image_seq_len": 8192}, "dev", Shift(0.7, 1.15, 256, 8192)),
        ({"use_dynamic_shifting": False, "shift": 3.0}, "dev", 3.0),
        ({"use_dynamic_shifting": False, "shift": 1.0}, "schnell", False),
        ({}, "schnell", False),
    ],
)
def test_times_are_the_schedulers(scheduler, name, shift, undistilled, tmp_path):
    """A dev without guidance does not get schnell's times."""
    found, lines = spec(write(tmp_path / "m", undistilled, scheduler))
    assert (found.name, found.shift, found.guidance) == (name, shift, 0.0)
    assert type(found.shift) is type(shift)
    assert [line for line in lines if "--cfg-scale 3.5 guides instead" in line] == (
        lines if name == "dev" else []
    )


def test_guidance_and_a_static_schedule(model, tmp_path):
    found, lines = spec(write(tmp_path / "m", model, {"shift": 1.0}))
    assert (found.name, found.shift, found.guidance) == ("dev", False, 3.5)
    assert lines == []


def test_without_any_config_the_name_decides_or_a_line_says(undistilled, tmp_path):
    for name, row, words in (
        ("flux-dev-de-distill.safetensors", "dev", "--cfg-scale 3.5 guides instead"),
        ("flux1-schnell_fp8.safetensors", "schnell", ""),
        ("mine.safetensors", "schnell", "--shift dev --steps 28"),
    ):
        found, lines = spec(write(tmp_path / name, undistilled, name=name), ae=None)
        assert found.name == row or name in str(tmp_path)
        assert (words in lines[0] and len(lines) == 1) if words else lines == []


def test_beyond_the_schedule(model, tmp_path):
    scheduler = DYNAMIC | {"use_karras_sigmas": True, "shift_terminal": 0.02, "invert_sigmas": False}
    _, lines = spec(write(tmp_path / "m", model, scheduler))
    assert len(lines) == 1
    assert lines[0].endswith("not done here: use_karras_sigmas True, shift_terminal 0.02")
    _, lines = spec(write(tmp_path / "n", model, {"_class_name": "DDIMScheduler"}))
    assert lines[0].endswith("not done here: DDIMScheduler")


@pytest.mark.parametrize(
    "scheduler",
    [
        {"shift": 0},
        {"shift": "x"},
        {"shift": None},
        DYNAMIC | {"base_shift": "x"},
        DYNAMIC | {"max_image_seq_len": 256},
        DYNAMIC | {"max_shift": 1e9},
    ],
)
def test_a_scheduler_that_makes_no_sense(scheduler, model, tmp_path):
    with pytest.raises(FluxError, match=r"scheduler_config\.json: its shift is not a time shift"):
        spec(write(tmp_path / "m", model, scheduler))


def test_kontext_is_told_by_its_name(model, tmp_path):
    for name, index in (("flux1-dev-kontext_fp8_scaled.safetensors", None), (None, "FluxKontextPipeline")):
        folder = write(tmp_path / str(index), model, DYNAMIC, name)
        if index:
            (folder / "model_index.json").write_text(json.dumps({"_class_name": index}))
        found, lines = spec(folder)
        assert (found.name, found.input, found.guidance) == ("kontext", "reference", 2.5)
        assert lines == []


def test_another_pipeline_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(FluxError, match="it is made for StableDiffusionXLPipeline"):
        checkpoints.find(str(tmp_path))


@pytest.mark.parametrize("shift", [True, False, 3.0, Shift(0.6, 1.2, 100, 5000)])
def test_a_shift_is_written_and_read(shift, model, tmp_path):
    save.save_diffusers(tmp_path / "m", replace(model, spec=replace(model.spec, shift=shift)))
    assert spec(tmp_path / "m")[0].shift == shift
    (tmp_path / "m/scheduler/scheduler_config.json").unlink()
    assert spec(tmp_path / "m")[0].shift == shift  # from this program's defaults.json
    save.save_diffusers(tmp_path / "m", replace(model, spec=replace(model.spec, shift=shift)))
    (tmp_path / "m/defaults.json").unlink()
    assert spec(tmp_path / "m")[0].shift == shift  # from diffusers' config


def test_reading_shifts():
    assert [sampler.read_shift(value) for value in ("dev", "none", "3", 2.5, True)] == [
        True,
        False,
        3,
        2.5,
        True,
    ]
    for wrong in ("schnell", "", "0", "-1", "nan", "inf", None, [1, 2, 3], [0.5, 1.15, 256, 256], {}):
        with pytest.raises(FluxError, match="a shift is dev, none or a factor"):
            sampler.read_shift(wrong)


def test_an_option_overrides(undistilled, tmp_path):
    folder = write(tmp_path / "m", undistilled, {"shift": 1.0})
    for option, shift in ((None, False), ("dev", True), ("3", 3.0)):
        assert FluxPipeline(str(folder), shift=option).spec.shift == shift


# --- What does not fit ---


def fault(folder, **files) -> str:
    with pytest.raises(FluxError) as error:
        FluxPipeline(str(folder), **files)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_inputs_that_cannot_be_given(model, tmp_path):
    """Flex.2's: 196 channels in for 64 out."""
    flux = tiny.randomize(Flux(replace(tiny.FLUX, in_channels=52)), 6)
    folder = write(tmp_path / "m", replace(model, flux=flux), DYNAMIC)
    line = fault(folder)
    assert "Flex.2: it wants a picture, a mask and a control picture" in line
    assert str(folder) in line


def test_a_mask_of_another_autoencoder(model, tmp_path):
    flux = tiny.randomize(Flux(replace(tiny.FLUX, in_channels=16 + 16 + 256)), 6)
    line = fault(write(tmp_path / "m", replace(model, flux=flux), DYNAMIC))
    assert "takes a mask of 8x8 pixels to one of the latent" in line
    assert "makes one of 2x2" in line


def test_other_models_by_their_name(model, tmp_path):
    own = tiny.parameters(model.flux)
    chroma = own | {"distilled_guidance_layer.in_proj.weight": mx.zeros((4, 4))}
    flux2 = own | {"double_stream_modulation_img.lin.weight": mx.zeros((4, 4))}
    folder = write(tmp_path / "m", model, DYNAMIC)
    for name, content in (("Chroma", chroma), ("FLUX.2", flux2)):
        tensors.save(tmp_path / "x.safetensors", content)
        assert fault(folder, transformer=str(tmp_path / "x.safetensors")) == (
            f"{tmp_path / 'x.safetensors'}: {name}, not a transformer of FLUX.1"
        )


def test_lite_and_flex_run(model, tmp_path):
    """Fewer blocks are a FLUX.1 like any other."""
    flux = tiny.randomize(Flux(replace(tiny.FLUX, depth=1, depth_single_blocks=2)), 6)
    assert FluxPipeline(str(write(tmp_path / "m", replace(model, flux=flux), DYNAMIC))).spec.name == "dev"


def test_parts_that_do_not_fit(model, tmp_path):
    folder = write(tmp_path / "m", model, DYNAMIC)
    clip = tiny.randomize(CLIPTextModel(replace(tiny.CLIP, hidden_size=64, num_attention_heads=1)), 3)
    path = tmp_path / "clip.safetensors"
    tensors.save(path, keymaps.to_file("clip", tiny.parameters(clip), False))
    line = fault(folder, clip=str(path))
    assert line.startswith("these parts do not fit each other: ")
    assert f"{path} gives CLIP vectors 64 wide, " in line
    assert line.endswith("takes 32")
    with pytest.raises(FluxError, match="holds no autoencoder, but CLIP text encoder"):
        checkpoints.find(str(folder), ae=str(path))


def test_a_tokenizer_of_another_size(model, tmp_path):
    folder = write(tmp_path / "m", model, DYNAMIC)
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).rename(tmp_path / name)
    line = fault(folder)
    assert "embeds 514 pieces of text, its tokenizer has 49408: put the model's tokenizer/" in line
    assert "embeds 200 pieces of text, its tokenizer has 32000: put the model's tokenizer_2/" in line


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("flux1-krea-dev_fp8_scaled", "krea"),
        ("flux1KreaDev_v10", "krea"),
        ("flux1-dev-kontext_fp8_scaled", "kontext"),
        ("flux1-schnell-dev-merge", "dev"),
    ],
)
def test_names_with_guidance(name, row):
    assert registry.of_file(name, True).name == row


def test_time_shift_of_dev_is_as_before():
    assert sampler.timesteps(8, 4096, True) == sampler.timesteps(8, 4096, Shift())
    np.testing.assert_allclose(sampler.timesteps(2, 256, 3.0), [1.0, 0.75, 0.0], rtol=1e-6)
