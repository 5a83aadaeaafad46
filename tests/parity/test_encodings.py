"""Encodings written by their own libraries, where these are installed, beside their own dequantization."""

import mlx.core as mx
import numpy as np
import pytest

from flux.weights import tensors

torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file


def linear(rows: int, columns: int, dtype=torch.float32) -> torch.nn.Module:
    torch.manual_seed(rows + columns)
    return torch.nn.Sequential(torch.nn.Linear(columns, rows, dtype=dtype))


def load(path, content: dict, metadata: dict | None = None) -> np.ndarray:
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, path, metadata)
    out = tensors.load([path])
    assert set(out) == {"0.weight", "0.bias"}
    return np.array(out["0.weight"].astype(mx.float32))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_4_bits(kind, nested, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    model = linear(48, 320)
    weight, state = bnb.functional.quantize_4bit(
        model[0].weight.data, blocksize=64, quant_type=kind, compress_statistics=nested
    )
    parts = {f"0.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    out = load(tmp_path / "f.safetensors", {"0.weight": weight, "0.bias": model[0].bias.data, **parts})
    wanted = bnb.functional.dequantize_4bit(weight, state).numpy()
    np.testing.assert_allclose(out, wanted, rtol=1e-6, atol=1e-8)
    assert np.abs(out - model[0].weight.detach().numpy()).max() < 0.03


def test_bitsandbytes_8_bits(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    model = linear(48, 320)
    weight, largest, _ = bnb.functional.int8_vectorwise_quant(model[0].weight.data.half())
    order = torch.tensor(0, dtype=torch.uint8)
    content = {"0.weight": weight, "0.SCB": largest, "0.weight_format": order, "0.bias": model[0].bias.data}
    wanted = bnb.functional.int8_vectorwise_dequant(weight, largest).numpy()
    np.testing.assert_allclose(load(tmp_path / "f.safetensors", content), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["qint8", "qint4", "qint2", "qfloat8"])
@pytest.mark.parametrize("columns", [320, 256])
def test_quanto(kind, columns, tmp_path):
    quanto = pytest.importorskip("optimum.quanto")
    model = linear(48, columns)
    quanto.quantize(model, weights=getattr(quanto, kind))
    quanto.freeze(model)
    wanted = model[0].weight.dequantize().detach().numpy()
    out = load(tmp_path / "f.safetensors", dict(model.state_dict()))
    np.testing.assert_allclose(out, wanted, rtol=1e-6, atol=1e-7)


def torchao_configs() -> dict:
    ao = pytest.importorskip("torchao.quantization")
    return {
        "int8": ao.Int8WeightOnlyConfig(version=2),
        "float8": ao.Float8WeightOnlyConfig(),
        "int4 in bytes": ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
    }


@pytest.mark.parametrize("kind", ["int8", "float8", "int4 in bytes"])
def test_torchao(kind, tmp_path):
    config, model = torchao_configs()[kind], linear(48, 320)
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    pytest.importorskip("torchao.quantization").quantize_(model, config)
    content, metadata = support.flatten_tensor_state_dict(model.state_dict())
    out = load(tmp_path / "f.safetensors", content, metadata)
    wanted = model[0].weight.dequantize().detach().numpy()
    np.testing.assert_allclose(out, wanted, rtol=1e-6, atol=1e-7)
