"""The published models' shapes, read off their tensors alone: every name, at full size, not allocated."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from flux.errors import FluxError
from flux.models.autoencoder import AutoEncoderParams
from flux.models.clip import CLIPTextParams
from flux.models.t5 import T5Params
from flux.models.transformer import FluxParams
from flux.weights import checkpoints, keymaps, prefixes, shapes

REFERENCE = Path(__file__).parent / "reference"
PUBLISHED = {
    "flux1-dev.bfl": ("transformer", FluxParams(), 780),
    "flux1-dev.diffusers": ("transformer", FluxParams(), 1160),
    "ae.bfl": ("ae", AutoEncoderParams(), 244),
    "ae.diffusers": ("ae", AutoEncoderParams(), 244),
    "clip_l.transformers": ("clip", CLIPTextParams(), 196),
    "t5xxl.transformers": ("t5", T5Params(), 220),
}


def tensors_of(name: str) -> dict[str, mx.array]:
    return {k: mx.zeros(shape) for k, shape in json.loads((REFERENCE / f"{name}.json").read_text()).items()}


def read(kind: str, tensors: dict[str, mx.array]):
    own = {bare: tensors[name] for name, bare in prefixes.bare_names_of(kind, tensors).items()}
    weights = keymaps.to_ours(kind, own)
    return shapes.params(kind, weights, {}), weights


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
    kind, params, count = PUBLISHED[name]
    tensors = tensors_of(name)
    assert len(tensors) == count
    found, weights = read(kind, tensors)
    assert found == params
    before = mx.get_active_memory()
    network = checkpoints.NETWORKS[kind](found)
    own = dict(tree_flatten(network.parameters()))
    assert {k: w.shape for k, w in own.items()} == {k: w.shape for k, w in weights.items()}
    assert mx.get_active_memory() - before < 2**24  # T5-XXL alone would be 19 GB


def test_other_kinds_of_flux():
    """schnell has no guidance embedder, Fill takes 384 channels, Canny and Depth take 128."""
    dev = tensors_of("flux1-dev.bfl")
    schnell = {k: w for k, w in dev.items() if not k.startswith("guidance_in.")}
    assert read("transformer", schnell)[0] == FluxParams(guidance_embed=False)
    for channels in (384, 128):
        wide = dev | {"img_in.weight": mx.zeros((3072, channels))}
        assert read("transformer", wide)[0] == FluxParams(in_channels=channels)


def test_a_config_says_what_tensors_cannot():
    found, _ = read("ae", tensors_of("ae.diffusers"))
    assert found.norm_groups == 32
    config = {"norm_num_groups": 16, "scaling_factor": 0.9, "shift_factor": 0.0, "latent_channels": 99}
    own = keymaps.to_ours("ae", tensors_of("ae.diffusers"))
    told = shapes.params("ae", own, config)
    assert (told.norm_groups, told.scale_factor, told.shift_factor, told.z_channels) == (16, 0.9, 0.0, 16)


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("ae", {"scaling_factor": 0}, "scaling_factor is 0; it should be above 0"),
        ("ae", {"scaling_factor": float("nan")}, "scaling_factor is nan; it should be a finite number"),
        ("ae", {"scaling_factor": "x"}, "scaling_factor is 'x'; it should be a finite number"),
        ("ae", {"shift_factor": [1]}, r"shift_factor is \[1\]; it should be a finite number"),
        ("ae", {"norm_num_groups": 0}, "norm_num_groups is 0; it should be a whole number from 1"),
        ("ae", {"norm_num_groups": 3}, r"128 channels in 3 norm groups: .*norm_num_groups. is wrong"),
        ("ae", {"norm_num_groups": True}, "norm_num_groups is True"),
        ("clip", {"num_attention_heads": 7}, "num_attention_heads 7 does not divide the width 768"),
        ("clip", {"num_attention_heads": 2.0}, "num_attention_heads is 2.0"),
        ("clip", {"layer_norm_eps": -1e-5}, "layer_norm_eps is -1e-05"),
        ("clip", {"hidden_act": ["gelu"]}, "hidden_act is"),
        ("t5", {"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon is inf"),
        (
            "t5",
            {"relative_attention_max_distance": 8},
            "32 buckets cannot hold relative attention to distances up to 8",
        ),
        ("transformer", {"axes_dims_rope": "16"}, "axes_dims_rope is '16'"),
        ("transformer", {"axes_dims_rope": [16, -56, 168]}, "axes_dims_rope is -56"),
    ],
)
def test_configs_that_make_no_network(kind, config, words):
    names = {"ae": "ae.bfl", "clip": "clip_l.transformers", "t5": "t5xxl.transformers"}
    tensors = keymaps.to_ours(kind, tensors_of(names.get(kind, "flux1-dev.bfl")))
    with pytest.raises(FluxError, match=words):
        shapes.params(kind, tensors, config)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("clip", "text_model.embeddings.token_embedding.weight"),
        ("t5", "shared.weight"),
        ("transformer", "img_in.weight"),
    ],
)
def test_tensors_without_rows_or_columns(kind, name):
    files = {"clip": "clip_l.transformers", "t5": "t5xxl.transformers", "transformer": "flux1-dev.bfl"}
    tensors = keymaps.to_ours(kind, tensors_of(files[kind]))
    axis = 1 if kind == "transformer" else 0
    shape = [0 if i == axis else side for i, side in enumerate(tensors[name].shape)]
    with pytest.raises(FluxError, match=rf"{name}: tensors without content"):
        shapes.params(kind, tensors | {name: mx.zeros(shape)}, {})
