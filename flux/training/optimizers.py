"""Optimizers and learning rates of the trainings here."""

from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim

Schedule = Callable[[mx.array], mx.array]  # step -> learning rate


def warmup_decay(peak: float, steps: int, warmup: int, hold: float = 0.0) -> Schedule:
    """Linear from 0 to `peak` in `warmup` steps, constant for the share `hold` of the rest, linear to 0."""
    start = warmup + hold * (steps - warmup)

    def rate(step: mx.array) -> mx.array:
        up = (step + 1) / warmup
        down = (steps - step) / (steps - start)
        return peak * mx.clip(mx.minimum(up, down), 0, 1)

    return rate


class GramMuon(optim.Muon):
    """Muon whose Newton-Schulz iteration runs on X X^T, (m, m), and meets X itself, (m, n), only twice.

    Every step multiplies X by a polynomial of X X^T, and all those commute: the same result for a quarter of
    the arithmetic where n is much larger than m.
    """

    def _zeropower_via_newtonschulz5(self, X: mx.array, steps: int) -> mx.array:
        m, n = min(X.shape), max(X.shape)
        if n < 2 * m:
            return super()._zeropower_via_newtonschulz5(X, steps)
        wide = X.T if X.shape[0] > X.shape[1] else X  # (m, n)
        wide = wide / (mx.linalg.norm(wide) + 1e-7)
        a, b, c = 3.4445, -4.7750, 2.0315
        gram, product = wide @ wide.T, mx.eye(m, dtype=X.dtype)
        for _ in range(steps):
            factor = a * mx.eye(m, dtype=X.dtype) + b * gram + c * (gram @ gram)
            product = factor @ product
            gram = factor @ gram @ factor
        orthogonal = product @ wide
        return orthogonal.T if X.shape[0] > X.shape[1] else orthogonal


def muon(
    rate: Schedule, adam_rate: Schedule, is_other: Callable[[str, mx.array], bool] = lambda *_: False
) -> optim.Optimizer:
    """Muon for matrices and convolutions, AdamW for vectors and for whatever `is_other(name, array)` names.

    Muon (Jordan, 2024, https://kellerjordan.github.io/posts/muon) makes every step a matrix with singular
    values near one; embeddings and the layers next to the pixels are no good for it.
    """
    adam = optim.AdamW(adam_rate, betas=[0.9, 0.98], weight_decay=0.0, bias_correction=True)
    rest = GramMuon(rate, momentum=0.95, weight_decay=0.0)
    return optim.MultiOptimizer([adam, rest], [lambda name, p: p.ndim < 2 or is_other(name, p)])
