"""The noise of a seed against PyTorch's own CPU generator, to the bit."""

import numpy as np
import pytest

from flux.noise import randn

torch = pytest.importorskip("torch")


def reference(seed: int, *shape: int) -> np.ndarray:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()


def on_avx2() -> bool:
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


SEEDS = [0, 1, 7, 42, 2**31, 2**32 - 1, 2**32 + 5, 123456789012345, 2**63, 2**64 - 1]


@pytest.mark.skipif(not on_avx2(), reason="PyTorch's other code paths differ in the last bit")
@pytest.mark.parametrize("seed", SEEDS)
def test_equal_to_the_bit(seed: int):
    for count in (*range(1, 70), 624, 625, 1000, 4095, 4096, 65536 + 24):
        assert np.array_equal(randn(seed, count), reference(seed, count)), count


@pytest.mark.skipif(not on_avx2(), reason="PyTorch's other code paths differ in the last bit")
def test_a_large_latent_is_equal_to_the_bit():
    """Of 2048x2048 pixels: enough numbers for every branch."""
    assert np.array_equal(
        randn(20240801, 16 * 256 * 256).reshape(1, 16, 256, 256), reference(20240801, 1, 16, 256, 256)
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_anywhere_equal_but_for_the_last_bits(seed: int):
    np.testing.assert_allclose(randn(seed, 5000), reference(seed, 5000), rtol=1e-5, atol=1e-6)
