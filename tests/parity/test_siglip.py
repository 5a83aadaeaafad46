"""SigLIP's vision tower and Redux' projector against transformers and diffusers: the same random weights."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flux.models.redux import ReduxImageEncoder, ReduxParams
from flux.models.siglip import SiglipParams, SiglipVision

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

# Of patches that cover the picture and that do not, of one head and several, of a head size no power of two.
SHAPES = {
    "two layers": (32, 56, 2, 4, 48, 16),
    "a rest beyond the patches": (72, 90, 3, 1, 45, 14),
    "heads of 18": (36, 40, 1, 2, 33, 8),
    "a layer of so400m": (1152, 4304, 1, 16, 60, 14),
}


def randomized(module):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0, 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return module.eval()


def copied(network, module):
    """The network with the weights of transformers' or diffusers' module, whose names are the same."""
    names = dict(tree_flatten(network.parameters()))
    weights = {name: p.detach().numpy() for name, p in module.named_parameters() if name in names}
    assert weights.keys() == names.keys()
    axes = (0, 2, 3, 1)
    network.load_weights([(n, mx.array(w.transpose(axes) if w.ndim == 4 else w)) for n, w in weights.items()])
    return network


def error(found, expected):
    return np.linalg.norm(np.array(found) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("count", [1, 3])
def test_siglip(shape, count):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = dict(zip((*names, "image_size", "patch_size"), shape, strict=True))
    reference = randomized(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**config)))
    network = copied(SiglipVision(SiglipParams(**config)), reference)
    side = config["image_size"]
    x = np.random.default_rng(count).normal(size=(count, 3, side, side)).astype(np.float32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(x)).last_hidden_state.numpy()
    found = network(mx.array(x.transpose(0, 2, 3, 1)))
    assert found.shape == expected.shape == (count, network.params.tokens, config["hidden_size"])
    assert error(found, expected) <= 1e-5
    for change in ({"hidden_act": "gelu"}, {"layer_norm_eps": 1e-2}):
        other = copied(SiglipVision(SiglipParams(**config | change)), reference)
        assert error(other(mx.array(x.transpose(0, 2, 3, 1))), expected) > 1e-5


@pytest.mark.parametrize(("features", "text"), [(32, 48), (20, 7)])
def test_redux(features, text):
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder as Reference

    reference = randomized(Reference(features, text))
    network = copied(ReduxImageEncoder(ReduxParams(features, text)), reference)
    x = np.random.default_rng(2).normal(size=(2, 5, features)).astype(np.float32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(x)).image_embeds.numpy()
    assert error(network(mx.array(x)), expected) <= 1e-5
