"""TAEF1's decoder against diffusers' AutoencoderTiny: the same random weights, in every layout of files."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flux.errors import FluxError
from flux.models.autoencoder_tiny import TinyDecoder, TinyDecoderParams
from flux.weights import tiny_decoder

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# madebyollin/taef1's config.json is AutoencoderTiny's defaults with 16 channels.
TAEF1 = {"latent_channels": 16}
SMALL = {
    "latent_channels": 4,
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (2, 1),
}


def reference(config):
    torch.manual_seed(3)
    return diffusers.AutoencoderTiny(**config).eval()


def save(folder, layout, module):
    """The module in a layout of files; what `load` is to be given."""
    if layout == "diffusers":
        module.save_pretrained(folder)
        return folder
    before = {"madebyollin": "", "ComfyUI": "taesd_decoder.", "TAESD": "decoder."}[layout]
    weights = {}
    for name, w in module.decoder.state_dict().items():
        number, rest = name.removeprefix("layers.").split(".", 1)
        weights[f"{before}{int(number) + 1}.{rest}"] = mx.array(w.numpy())
    file = folder / "taef1_decoder.safetensors"
    mx.save_safetensors(str(file), weights)
    return file


@pytest.mark.parametrize("layout", ["diffusers", "madebyollin", "ComfyUI", "TAESD"])
@pytest.mark.parametrize("config", [TAEF1, SMALL], ids=["TAEF1", "small"])
def test_decoder(tmp_path, layout, config):
    module = reference(config)
    network = tiny_decoder.load(str(save(tmp_path, layout, module)), mx.float32)
    assert network.downscale == (8 if config is TAEF1 else 2)
    z = 2 * np.random.default_rng(1).normal(size=(2, config["latent_channels"], 6, 10)).astype(np.float32)
    with torch.no_grad():
        expected = module.decode(torch.from_numpy(z)).sample.numpy().transpose(0, 2, 3, 1)
    found = np.array(network(mx.array(z.transpose(0, 2, 3, 1))))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


def test_names_and_shapes_of_the_real_one():
    """All of diffusers' decoder of the published config, and nothing else."""
    names = {
        name: tuple(w.permute(0, 2, 3, 1).shape if w.ndim == 4 else w.shape)
        for name, w in reference(TAEF1).decoder.state_dict().items()
    }
    ours = tree_flatten(TinyDecoder(TinyDecoderParams()).parameters())
    assert {name: w.shape for name, w in ours} == names


def test_scale_and_shift_of_its_config(tmp_path):
    save(tmp_path, "diffusers", reference(SMALL | {"scaling_factor": 0.5, "shift_factor": 0.25}))
    params = tiny_decoder.load(str(tmp_path)).params
    assert (params.scale_factor, params.shift_factor) == (0.5, 0.25)


def test_errors(tmp_path):
    file = save(tmp_path, "madebyollin", reference(SMALL))
    weights = mx.load(str(file))
    mx.eval(weights)

    def refused(changed):
        mx.save_safetensors(str(file), changed)
        with pytest.raises(FluxError) as error:
            tiny_decoder.load(str(tmp_path))
        assert "\n" not in str(error.value)
        return str(error.value)

    lacking = {name: w for name, w in weights.items() if name != "3.conv.2.bias"}
    assert "missing: layers.2.conv.2.bias" in refused(lacking)
    assert "unexpected: whatever" in refused(weights | {"whatever": mx.ones(3)})
    assert "layers.2.conv.4.weight is (8, 3, 3, 5)" in refused(
        weights | {"3.conv.4.weight": mx.ones((8, 5, 3, 3))}
    )
    assert "holds no tiny decoder" in refused({"0.weight": mx.ones((8, 3, 3, 3))})
    with pytest.raises(FluxError, match="no such file or folder"):
        tiny_decoder.load(str(tmp_path / "none.safetensors"))


def test_other_settings_are_refused(tmp_path):
    save(tmp_path, "diffusers", reference(SMALL))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"act_fn": "gelu"}))
    with pytest.raises(FluxError, match="act_fn must be relu, not 'gelu'"):
        tiny_decoder.load(str(tmp_path))
