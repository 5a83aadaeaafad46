"""PSNR and SSIM by hand."""

import numpy as np
import pytest

from flux.evaluation.likeness import psnr, ssim


def test_psnr_by_hand():
    pictures = np.zeros((2, 8, 8, 3), np.uint8)
    values = psnr(pictures, pictures + np.array([1, 10], np.uint8)[:, None, None, None])
    assert values == pytest.approx([20 * np.log10(255), 20 * np.log10(25.5)], abs=1e-3)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (24, 20, 3), np.uint8)


def test_ssim_of_equal_pictures_is_one_and_falls_with_noise():
    first, noise = picture(), np.random.default_rng(1).normal(size=(24, 20, 3))
    values = [ssim(first, np.clip(first + amount * noise, 0, 255).astype(np.uint8)) for amount in (0, 5, 40)]
    assert values[0] == pytest.approx(1)
    assert 1 > values[1] > 0.97 > values[2]
    assert abs(ssim(first, picture(2))) < 0.2


def test_ssim_of_flat_pictures_is_its_luminance_term():
    a, b = (np.full((12, 13, 3), value, np.uint8) for value in (100, 150))
    c1 = 2.55**2
    assert ssim(a, b) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))


def test_ssim_of_a_pixel_by_the_formula():
    """The mean over all pixels, each with the weighted moments of its window, mirrored at the edges."""
    x, y = (picture(i)[:12, :13] @ np.array([0.299, 0.587, 0.114]) for i in (3, 4))
    row = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    w = np.outer(row, row) / row.sum() ** 2
    c1, c2 = 2.55**2, 7.65**2
    a, b = (np.pad(each, 5, mode="reflect") for each in (x, y))
    values = []
    for i in range(12):
        for j in range(13):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mx, my = (w * p).sum(), (w * q).sum()
            vx, vy, cov = (
                (w * (p - mx) ** 2).sum(),
                (w * (q - my) ** 2).sum(),
                (w * (p - mx) * (q - my)).sum(),
            )
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    found = ssim(picture(3)[:12, :13], picture(4)[:12, :13])
    assert found == pytest.approx(np.mean(values))
