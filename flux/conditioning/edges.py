"""The edges of a picture as a control picture, by OpenCV, which is optional."""

from types import ModuleType

import numpy as np

from flux.errors import FluxError

# Gradients: a pixel above the second is an edge, and one between both that touches an edge. The usual ones.
LOW, HIGH = 100, 200


def opencv() -> ModuleType:
    """The module; FluxError, with what to do, where it is not installed."""
    try:
        import cv2
    except ImportError:
        raise FluxError(
            "edges are found by OpenCV, which is not installed: `pip install -r requirements-control.txt`, "
            "or give a picture of edges"
        ) from None
    return cv2


def canny(pixels: np.ndarray) -> np.ndarray:
    """Canny's edges of a picture (H, W, 3), uint8: white on black, of the same shape (Canny 1986)."""
    cv2 = opencv()
    edges = cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), LOW, HIGH)  # (H, W)
    return np.repeat(edges[..., None], 3, axis=2)
