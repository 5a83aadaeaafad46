"""CLIP's vision transformer and CLIP-I against transformers: the same random weights, the same pictures."""

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from flux.errors import FluxError
from flux.evaluation import clip_similarity

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIDE = 48
SHAPE = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def reference():
    """A whole CLIPModel of random weights, biases and norms too."""
    torch.manual_seed(1)
    text = {**SHAPE, "vocab_size": 40, "max_position_embeddings": 9}
    vision = {**SHAPE, "image_size": SIDE, "patch_size": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


@pytest.fixture
def folder(reference, tmp_path):
    reference.save_pretrained(tmp_path)
    return tmp_path


def pictures() -> list[np.ndarray]:
    """Of several sizes and shapes, smaller and larger than the network's."""
    rng = np.random.default_rng(2)
    sizes = [(64, 64), (80, 57), (40, 90)]
    return [
        np.array(Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8)).resize(size)) for size in sizes
    ]


def test_features(reference, folder):
    """The network's are equal; from files to features, up to the processor's rounding."""
    model = clip_similarity.build(reference.config.to_dict(), folder / "model.safetensors")
    x = np.random.default_rng(3).normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)
    with torch.no_grad():
        vision = reference.vision_model(torch.tensor(x.transpose(0, 3, 1, 2))).pooler_output
        expected = reference.visual_projection(vision).numpy()
    found = np.array(model(mx.array(x)))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_preprocessing():
    """Against CLIP's own processor, on pictures: the same pixels."""
    processor = transformers.CLIPImageProcessorPil if hasattr(transformers, "CLIPImageProcessorPil") else None
    processor = (processor or transformers.CLIPImageProcessor)(size={"shortest_edge": SIDE}, crop_size=SIDE)
    for picture in pictures():
        expected = processor(Image.fromarray(picture), return_tensors="np")["pixel_values"][0]
        found = clip_similarity.prepare(picture, SIDE)
        assert np.abs(found - np.array(expected).transpose(1, 2, 0)).max() < 1e-5


def test_a_file_that_is_another_network_is_refused(reference, folder):
    config = reference.config.to_dict()
    config["vision_config"]["num_hidden_layers"] = 3
    with pytest.raises(FluxError, match=r"model\.safetensors: missing: .*layers\.2"):
        clip_similarity.build(config, folder / "model.safetensors")
