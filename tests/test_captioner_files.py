"""A captioner's folder: what its files say must fit its network."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from flux.captioning.captioner import Captioner, picture_params
from flux.errors import FluxError
from flux.preprocessing import PictureParams
from flux.weights import registry


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(registry.TINY_CAPTIONER_FOLDER, tmp_path / "c")
    return tmp_path / "c"


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def fault(folder: Path) -> str:
    with pytest.raises(FluxError) as error:
        Captioner.from_folder(folder, mx.float32)
    assert str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["decoder_start_token_id", "eos_token_id", "forced_bos_token_id"])
def test_tokens_that_the_network_has_no_row_for(folder, name):
    """Would be read from beyond the embedding."""
    change(folder / "generation_config.json", **{name: 10**6})
    assert f"generation_config.json: {name} is 1000000; there are" in fault(folder)


def test_a_tokenizer_of_another_model(folder):
    file = json.loads((folder / "tokenizer.json").read_text())
    file["model"]["vocab"]["a"] = 10**6
    (folder / "tokenizer.json").write_text(json.dumps(file))
    assert "its tokenizer has 1000" in fault(folder)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_beams": 10**6}, "num_beams is 1000000; it should be a whole number from 1 to 100"),
        ({"num_beams": "3"}, "num_beams is '3'"),
        ({"length_penalty": []}, r"length_penalty is []"),
        ({"early_stopping": 1}, "early_stopping is 1; it should be true or false"),
    ],
)
def test_how_answers_are_searched(folder, values, words):
    change(folder / "generation_config.json", **values)
    assert words in fault(folder)


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        ("text_config", {"encoder_layers": 10**9}, "encoder_layers"),
        ("text_config", {"encoder_layers": 10**6}, "the number of layers is 1000000"),
        ("text_config", {"encoder_attention_heads": 0}, "not a multiple of its number of heads"),
        ("text_config", {"encoder_ffn_dim": 0}, "should be above 0"),
        ("vision_config", {"depths": [1] * 3}, "the same number of stages"),
        ("vision_config", {"depths": 5}, "depths is 5; it should be a list"),
        ("vision_config", {"window_size": 0}, "should be above 0"),
    ],
)
def test_shapes(folder, part, values, words):
    config = json.loads((folder / "config.json").read_text())
    change(folder / "config.json", **{part: config[part] | values})
    assert words in fault(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"size": 5},
        {"size": {"height": 10**9}},
        {"image_mean": [1]},
        {"image_std": [0, 1, 1]},
        {"image_std": "x"},
    ],
)
def test_settings_for_pictures(tmp_path, config):
    assert picture_params(tmp_path) == PictureParams()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(FluxError):
        picture_params(tmp_path)
