"""How like two pictures are: PSNR and SSIM. Pictures are (H, W, 3) uint8."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

PEAK = 255
WINDOW, DEVIATION = 11, 1.5  # pixels, of SSIM's Gaussian
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601


def psnr(pictures: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Peak signal to noise ratio of each pair, dB: two (B, H, W, 3) uint8 -> (B,)."""
    mse = np.square(pictures.astype(np.float32) - others).mean(axis=(1, 2, 3))
    return 10 * np.log10(PEAK**2 / np.maximum(mse, 1e-3))


def ssim(picture: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity of the luma of two pictures (H, W, 3), the mean over all pixels; 1: equal.

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", eq. 13,
    with its Gaussian window of 11x11; beyond the edges the pictures are mirrored.
    """
    x, y = (np.pad(each @ np.array(LUMA), WINDOW // 2, mode="reflect") for each in (picture, other))
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x, variance_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return float((luminance * structure).mean())


def _blurred(x: np.ndarray) -> np.ndarray:
    """(H + 10, W + 10) -> (H, W)."""
    distance = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(distance**2) / (2 * DEVIATION**2))
    weights /= weights.sum()
    for axis in (0, 1):
        x = sliding_window_view(x, WINDOW, axis=axis) @ weights
    return x
