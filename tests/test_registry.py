"""The registry: names, aliases, repositories, and which row fits a file of one's own."""

import pytest

from flux.errors import FluxError
from flux.weights import registry


@pytest.mark.parametrize("name", ["schnell", "dev", "krea", "fill", "canny", "depth", "kontext", "tiny"])
def test_names_and_aliases(name):
    spec = registry.get(name)
    assert spec.name == name
    assert registry.get(f"flux-{name}") is spec
    if spec.repo:
        assert registry.find(spec.repo) is spec


def test_unknown_names():
    assert registry.find("flux-nano") is None
    assert registry.find("") is None  # the built-in model's empty repository is no name
    with pytest.raises(FluxError, match=r"'flux-nano'.*krea, fill, canny, depth, kontext, tiny"):
        registry.get("flux-nano")


def test_defaults_of_the_published_models():
    schnell, dev = registry.get("schnell"), registry.get("dev")
    assert (schnell.steps, schnell.shift, schnell.t5_length) == (4, False, 256)
    assert (dev.guidance, dev.shift, dev.t5_length) == (3.5, True, 512)
    assert registry.get("krea").repo == "black-forest-labs/FLUX.1-Krea-dev"
    rows = [registry.get(name) for name in ("fill", "canny", "depth", "kontext")]
    assert [row.repo for row in rows] == [
        f"black-forest-labs/FLUX.1-{name}-dev" for name in ("Fill", "Canny", "Depth", "Kontext")
    ]
    assert [(row.guidance, row.steps) for row in rows] == [(30, 50), (30, 50), (10, 30), (2.5, 28)]
    assert all(row.file == f"flux1-{row.name}-dev.safetensors" for row in rows)


def test_kind_of_a_file():
    assert registry.of_file("flux1-krea-dev.safetensors", True).name == "krea"
    assert registry.of_file("mine.safetensors", True).name == "dev"
    assert registry.of_file("mine.safetensors", False).name == "schnell"
