"""How much memory there is, on machines of each kind, and that the autoencoder heeds it."""

import mlx.core as mx
import numpy as np
import pytest

from flux import machine

from . import tiny, tiny_pipeline

GIB = 2**30


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"memory_size": 32 * GIB, "max_recommended_working_set_size": 21 * GIB}, 21 * GIB),  # Metal
        ({"device_name": "NVIDIA", "total_memory": 80 * GIB}, 80 * GIB),  # CUDA
        ({"architecture": "x86_64", "max_recommended_working_set_size": 0}, 3 * 4096),  # a CPU
    ],
)
def test_memory_by_device(monkeypatch, info, expected):
    monkeypatch.setattr(mx, "device_info", lambda device: info)
    monkeypatch.setattr(machine.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 3}.__getitem__)
    assert machine.memory() == expected
    assert machine.autoencoder_memory() == expected // 2


def test_memory_of_a_system_that_does_not_say(monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda device: {})
    monkeypatch.delattr(machine.os, "sysconf")
    assert machine.memory() == machine.UNKNOWN


def test_memory_of_this_machine():
    assert GIB // 4 < machine.memory() < 2**44


def test_a_pipeline_on_a_small_machine_decodes_in_tiles(monkeypatch, tmp_path):
    tiny.write_tokenizers(tmp_path)
    pipeline, size = tiny_pipeline.make_pipeline(tmp_path), (40, 40)
    latents = pipeline.noise([1], size)
    whole = np.array(pipeline.decode(latents, size))
    used = []
    in_pieces = type(pipeline.ae)._in_pieces
    monkeypatch.setattr(
        type(pipeline.ae),
        "_in_pieces",
        lambda self, part, x, memory, **steps: (
            used.append(memory) or in_pieces(self, part, x, memory, **steps)
        ),
    )
    monkeypatch.setattr(machine, "memory", lambda: 2 * 10**7)
    tiled = np.array(pipeline.decode(latents, size))
    assert used == [10**7]
    assert not np.array_equal(tiled, whole)
    assert np.abs(tiled - whole).mean() < 0.05
