"""Files from strangers, spoilt by a seed: each is a clear line or sound, soon and within 1 GB.

A case that fails says its number; `python -m pytest tests/test_fuzz.py` gives the same again.
"""

import random
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flux import jsonfiles
from flux.errors import FluxError
from flux.weights import checkpoints, save, torchfile
from flux.weights.layouts import FOLDERS, Part
from tests import fuzzing, tiny, torch_files

KINDS = ("transformer", "ae", "clip", "t5")
SINGLE = {"transformer": "flux1-dev.safetensors", "ae": "ae.safetensors"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> save.Model:
    return tiny.model(*tiny.write_tokenizers(tmp_path_factory.mktemp("tokenizers")))


def part_files(folder: Path) -> dict[str, Path]:
    """The file of each part in a folder that this program wrote."""
    out = {}
    for kind in KINDS:
        single = folder / SINGLE.get(kind, "none")
        out[kind] = single if single.is_file() else next((folder / FOLDERS[kind]).glob("*.safetensors"))
    return out


def test_checkpoints(model, tmp_path):
    """1000 files of a network in both layouts."""
    save.save_bfl(tmp_path / "bfl", model, dtype=None)
    save.save_diffusers(tmp_path / "diffusers", model, dtype=mx.bfloat16)
    sources = {}
    for layout in ("bfl", "diffusers"):
        for kind, path in part_files(tmp_path / layout).items():
            config = jsonfiles.read(path.parent / "config.json") if layout == "diffusers" else {}
            part = Part(kind, (path,), config)
            network = checkpoints.load_part(part, mx.float32)
            mx.eval(network.parameters())
            sources[layout, kind] = fuzzing.File.read(path), config, network
    path = tmp_path / "spoilt.safetensors"
    ends: Counter[str] = Counter()
    with fuzzing.bounded_memory():
        for case in range(1000):
            rng = random.Random(case)
            (layout, kind), (file, config, original) = rng.choice(list(sources.items()))
            spoilt = fuzzing.mutate(file, rng)
            spoilt.write(path)

            def load(kind=kind, config=config):
                network = checkpoints.load_part(Part(kind, (path,), config), mx.float32)
                mx.eval(network.parameters())
                return network

            found = fuzzing.outcome(load, f"case {case}, {kind} of {layout}")
            ends["line" if isinstance(found, FluxError) else "sound"] += 1
            if isinstance(found, FluxError):
                assert str(path) in str(found), f"case {case}: no file in: {found}"
            elif spoilt.exact:
                assert tiny.same(found, original), f"case {case}: another {kind} was read"
            else:
                weights = [w for _, w in tree_flatten(found.parameters())]
                assert all(mx.issubdtype(w.dtype, mx.floating) for w in weights), f"case {case}"
    assert min(ends["line"], ends["sound"]) > 20, ends


def test_pytorch_files(tmp_path):
    """400 files in both formats."""
    rng = np.random.default_rng(0)
    arrays = {
        f"layers.{i}.weight": rng.standard_normal((4, 3)).astype(kind)
        for i, kind in enumerate((np.float32, np.float16, np.float64))
    }
    pickled, data = torch_files.table(torch_files.whole(arrays)), torch_files.arrays_of(arrays)
    sizes = {f"s-{name}": array.size for name, array in arrays.items()}
    path = tmp_path / "spoilt.bin"
    ends: Counter[str] = Counter()
    with fuzzing.bounded_memory():
        for case in range(400):
            rng = random.Random(case)
            spoilt = fuzzing.mutate_bytes(pickled, rng) if case % 4 else pickled
            if rng.random() < 0.5:
                torch_files.write_zip(path, spoilt, data)
            else:
                path.write_bytes(
                    torch_files.legacy(spoilt, {key: (sizes[key], content) for key, content in data.items()})
                )
            if spoilt is pickled:
                path.write_bytes(fuzzing.mutate_bytes(path.read_bytes(), rng))
            found = fuzzing.outcome(lambda: torchfile.load([path]), f"case {case}")
            ends["line" if isinstance(found, FluxError) else "sound"] += 1
            if not isinstance(found, FluxError):
                assert sum(array.nbytes for array in found.values()) < 4 * path.stat().st_size
    assert min(ends["line"], ends["sound"]) > 20, ends
