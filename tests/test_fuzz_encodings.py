"""Files in few bits, spoilt by a seed: as test_fuzz.py, for each encoding that a transformer comes in."""

import json
import random
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from flux.errors import FluxError
from flux.models.transformer import Flux
from flux.weights import checkpoints, quantize, tensors
from flux.weights.layouts import Part
from tests import fuzzing, gguf_files, test_mflux, tiny
from tests.test_checkpoints import write_raw

Raw = dict[str, tuple[str, tuple, bytes]]


def plain(name: str, w: mx.array) -> Raw:
    return {name: ("F32", w.shape, np.array(w.astype(mx.float32)).tobytes())}


def scaled_fp8(name: str, w: mx.array) -> Raw:
    scale = np.float32(0.01)
    data = np.array(mx.to_fp8(w / scale.item())).tobytes()
    names = name, name.removesuffix("weight") + "scale_weight"
    return {names[0]: ("F8_E4M3", w.shape, data), names[1]: ("F32", (), scale.tobytes())}


def nf4(name: str, w: mx.array) -> Raw:
    rng = np.random.default_rng(0)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(w.shape)}
    text = json.dumps(state).encode()
    table, largest = np.linspace(-1, 1, 16, dtype="<f4"), np.full(w.size // 64, 0.1, "<f4")
    return {
        name: ("U8", (w.size // 2, 1), rng.bytes(w.size // 2)),
        f"{name}.quant_map": ("F32", table.shape, table.tobytes()),
        f"{name}.absmax": ("F32", largest.shape, largest.tobytes()),
        f"{name}.quant_state.bitsandbytes__nf4": ("U8", (len(text),), text),
    }


def quanto(name: str, w: mx.array) -> Raw:
    data, scale = np.random.default_rng(0).bytes(w.size), np.full((w.shape[0], 1), 0.01, "<f4")
    return {f"{name}._data": ("I8", w.shape, data), f"{name}._scale": ("F32", scale.shape, scale.tobytes())}


def torchao(name: str, w: mx.array) -> Raw:
    data, scale = np.random.default_rng(0).bytes(w.size), np.full((w.shape[0], 1), 0.01, "<f4")
    layer = name.removesuffix("weight")
    return {
        f"{layer}_weight_qdata": ("I8", w.shape, data),
        f"{layer}_weight_scale": ("F32", scale.shape, scale.tobytes()),
    }


def in_gguf(name: str, w: mx.array) -> Raw:
    rng = np.random.default_rng(0)
    kind = "Q8_0" if "img" in name else "Q4_0"
    return {name: (kind, w.shape, gguf_files.blocks(kind, w.shape, rng))}


def encoded(encode, weights: dict[str, mx.array]) -> Raw:
    """The matrices of the blocks encoded, all else plain."""
    out: Raw = {}
    for name, w in weights.items():
        in_blocks = w.ndim == 2 and "blocks" in name and w.shape[1] % 64 == 0
        out |= encode(name, w) if in_blocks else plain(name, w)
    return out


def write_files(folder: Path) -> dict[str, Path]:
    weights = tiny.parameters(tiny.randomize(Flux(tiny.FLUX), 0))
    files = {"fp8": scaled_fp8, "nf4": nf4, "quanto": quanto, "torchao": torchao}
    out = {name: write_raw(folder / name, encoded(code, weights)) for name, code in files.items()}
    content = fuzzing.File.read(out["torchao"])
    layers = [name.replace("_weight_qdata", "weight") for name in content.names() if "qdata" in name]
    content.header["__metadata__"] = {name: json.dumps({"_type": "Int8Tensor"}) for name in layers}
    content.write(out["torchao"])
    out["GGUF"] = gguf_files.write(folder / "f.gguf", encoded(in_gguf, weights))
    network = quantize.quantize(tiny.randomize(Flux(tiny.FLUX), 0))
    out["MLX"] = folder / "mlx"
    tensors.save(out["MLX"], tiny.parameters(network), quantize.metadata_of(network))
    out["mflux"], _ = test_mflux.write(folder / "mflux", "transformer", 4).files
    return out


def test_encodings(tmp_path):
    """300 files of seven encodings."""
    paths = write_files(tmp_path)
    files = {name: fuzzing.File.read(path) for name, path in paths.items() if name != "GGUF"}
    gguf, ends = paths["GGUF"].read_bytes(), Counter[str]()
    head = min(entry.start for entry in tensors.read_header(paths["GGUF"]).tensors.values())
    rest = {"mflux": (paths["mflux"].with_name("1.safetensors"),)}  # of a model in several files
    config = {"mflux": test_mflux.CONFIGS["transformer"]}

    def part(name: str, path: Path) -> Part:
        return Part("transformer", (path, *rest.get(name, ())), config.get(name, {}))

    shapes = {}
    for name, path in paths.items():
        network = checkpoints.load_part(part(name, path), mx.float32)
        mx.eval(network.parameters())
        shapes[name] = {n: w.shape for n, w in tree_flatten(network.img_in.parameters())}
    with fuzzing.bounded_memory():
        for case in range(300):
            rng = random.Random(case)
            name = rng.choice(list(paths))
            path = tmp_path / ("spoilt.gguf" if name == "GGUF" else "spoilt.safetensors")
            if name == "GGUF":
                path.write_bytes(fuzzing.mutate_bytes(gguf[:head], rng) + gguf[head:])
            else:
                fuzzing.mutate(files[name], rng).write(path)

            def load(name=name, path=path):
                network = checkpoints.load_part(part(name, path), mx.float32)
                mx.eval(network.parameters())
                return network

            found = fuzzing.outcome(load, f"case {case}, {name}")
            ends["line" if isinstance(found, FluxError) else "sound"] += 1
            if not isinstance(found, FluxError):
                made = {n: w.shape for n, w in tree_flatten(found.img_in.parameters())}
                assert made == shapes[name], f"case {case}, {name}"
    assert min(ends["line"], ends["sound"]) > 10, ends
