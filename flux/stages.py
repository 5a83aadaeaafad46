"""How long the stages of a program take, and how much memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


class Stages:
    """Times and peak memory of the stages: `with stages("decode"): ...`."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float]] = []  # name, seconds, GB

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        mx.reset_peak_memory()
        start = time.perf_counter()
        yield
        self.rows.append((name, time.perf_counter() - start, mx.get_peak_memory() / 1e9))

    def __str__(self) -> str:
        rows = [f"{name:8} {seconds:9.2f} {memory:9.3f}" for name, seconds, memory in self.rows]
        return "\n".join([f"{'stage':8} {'seconds':>9} {'peak GB':>9}", *rows])
