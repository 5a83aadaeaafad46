"""Features of prompts on disk: the same to the bit, without the encoders, never those of another model."""

import json

import mlx.core as mx
import numpy as np
import pytest

from flux import FluxPipeline
from flux.adapters import read_weighted
from flux.errors import FluxError
from flux.text_cache import identity

from . import tiny_pipeline

OPTIONS = {"seed": 3, "num_steps": 2, "image_size": (32, 32)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_pipeline.write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def no_encoder(*_):
    raise AssertionError("a text encoder was asked")


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


def draw(model, folder, prompt="a red apple", encoders=True, options=OPTIONS, **settings):
    pipeline = FluxPipeline(model, text_cache=folder, **settings)
    if not encoders:
        pipeline.t5 = pipeline.clip = no_encoder
    return pipeline.generate_images(prompt, **options)


def test_a_second_picture_of_a_prompt_needs_no_encoder(model, tmp_path):
    plain = draw(model, None)
    assert np.array_equal(draw(model, tmp_path), plain)
    assert len(files(tmp_path)) == 1
    assert np.array_equal(draw(model, tmp_path, encoders=False), plain)
    with pytest.raises(AssertionError, match="was asked"):
        draw(model, tmp_path, "two green birds", encoders=False)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_narrow_types_come_back_to_the_bit(model, tmp_path, dtype):
    made = [FluxPipeline(model, text_cache=tmp_path, dtype=dtype).encode("a red apple") for _ in range(2)]
    plain = FluxPipeline(model, dtype=dtype).encode("a red apple")
    for found in made:
        for a, b in zip(found.positive, plain.positive, strict=True):
            assert a.dtype == b.dtype == dtype
            assert mx.array_equal(a, b)


def test_negative_and_clip_prompts_have_their_files(model, tmp_path):
    options = OPTIONS | {"negative_prompt": "two green birds", "cfg_scale": 2.0, "clip_prompt": "an apple"}
    plain = draw(model, None, options=options)
    assert np.array_equal(draw(model, tmp_path, options=options), plain)
    assert len(files(tmp_path)) == 2
    assert np.array_equal(draw(model, tmp_path, options=options, encoders=False), plain)
    draw(model, tmp_path)  # whose CLIP reads the prompt
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-3] + b"abc", lambda b: b""])
def test_a_damaged_file_is_replaced(model, tmp_path, damage):
    plain = draw(model, tmp_path)
    (file,) = files(tmp_path)
    sound = file.read_bytes()
    file.write_bytes(damage(sound))
    assert np.array_equal(draw(model, tmp_path), plain)
    assert files(tmp_path) == [file]
    assert file.read_bytes() == sound


def test_what_changes_features_has_other_files(model, tmp_path):
    """Padding, type and bits; not what only the transformer or the sampling knows."""
    settings = ({}, {"t5_padding": False}, {"t5_padding": 24}, {"dtype": mx.bfloat16}, {"bits": 8})
    for i, setting in enumerate(settings):
        FluxPipeline(model, text_cache=tmp_path, **setting).encode("a red apple")
        assert len(files(tmp_path)) == i + 1
    FluxPipeline(model, text_cache=tmp_path, shift=3.0, noise="torch").encode("a red apple")
    assert len(files(tmp_path)) == len(settings)


def test_adapters_of_text_encoders_count_and_those_of_the_transformer_do_not(model, tmp_path):
    def lora(name, module, width):
        weights = {
            f"{module}.lora_A.weight": mx.ones((2, width)),
            f"{module}.lora_B.weight": mx.ones((width, 2)),
        }
        mx.save_safetensors(str(tmp_path / name), weights)
        return str(tmp_path / name)

    width = tiny_pipeline.tiny.CLIP.hidden_size
    clip = lora("clip.safetensors", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", width)
    hidden = tiny_pipeline.FLUX.hidden_size
    flow = lora("flow.safetensors", "transformer.transformer_blocks.0.attn.to_q", hidden)
    pipeline = FluxPipeline(model)

    def found(*adapters):
        weighted = read_weighted(adapters)
        return json.dumps(
            identity(pipeline.checkpoint, None, None, weighted, False, pipeline.t5_tokenizer, True)
        )

    assert found() == found((flow, 1.0))
    assert len({found(), found((clip, 1.0)), found((clip, 0.5))}) == 3


def test_other_weights_have_other_files(model, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    path = tiny_pipeline.write_checkpoint(other)
    file = next((path / "text_encoder").glob("*.safetensors"))
    weights = {name: 2 * w for name, w in mx.load(str(file)).items()}
    mx.eval(weights)
    mx.save_safetensors(str(file), weights)
    folder = other / "texts"
    for each in (model, str(path)):
        FluxPipeline(each, text_cache=folder).encode("a red apple")
    assert len(files(folder)) == 2


def test_long_prompts_are_warned_of_each_time(model, tmp_path):
    long = "apple " * 200
    for _ in range(2):
        with pytest.warns(UserWarning, match="the prompt is longer than"):
            FluxPipeline(model, text_cache=tmp_path).encode(long)


def test_a_folder_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FluxError, match="cannot be written"):
        draw(model, tmp_path / "file")
