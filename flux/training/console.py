"""The live line of a training: where it is, the last metrics, the time a batch, and a bar."""

import sys
import time

from tqdm import tqdm

SHOWN = {
    "vae": "VAE",
    "mse": "MSE",
    "kl": "KL",
    "lpips": "LPIPS",
    "generator": "G",
    "discriminator": "D",
    "r1": "R1",
    "flow": "Flow",
}


class Console:
    """On a terminal one line, written over, with a bar; elsewhere a line whenever metrics are logged."""

    def __init__(self, step: str, number: int, steps: int, total: int, done: int, quiet: bool):
        self._title = f"Step {step} ({number}/{steps})"
        self._start = time.monotonic()
        self._live = sys.stderr.isatty() and not quiet
        self._quiet = quiet
        self._bar = tqdm(
            total=total,
            initial=done,
            disable=not self._live,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}|",
            leave=False,
        )

    def update(
        self, place: dict[str, int], of: dict[str, int | None], means: dict[str, float] | None, seconds: float
    ) -> None:
        """place, of: epoch and batch, and how many there are. means: of the metrics, when they are logged."""
        if means is not None:
            self._metrics = means
        text = self.line(place, of, getattr(self, "_metrics", {}), seconds)
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(1)
        if means is not None and not self._live and not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def line(
        self, place: dict[str, int], of: dict[str, int | None], metrics: dict[str, float], seconds: float
    ) -> str:
        """Such as `[00:15:23] Step vae_gan (2/3) | Epoch 5/20 | Batch 127/500 | VAE 0.1 | 3.2s/batch`."""
        elapsed = int(time.monotonic() - self._start)
        clock = f"[{elapsed // 3600:02d}:{elapsed // 60 % 60:02d}:{elapsed % 60:02d}]"
        places = [f"{name.title()} {place[name]}" + (f"/{of[name]}" if of[name] else "") for name in of]
        values = [f"{label} {metrics[name]:.4g}" for name, label in SHOWN.items() if name in metrics]
        return " | ".join([f"{clock} {self._title}", *places, *values, f"{seconds:.3g}s/batch"])

    def close(self) -> None:
        self._bar.close()
