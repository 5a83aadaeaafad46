"""A look at the numbers of a file before a picture is made of them: a little of every tensor.

NaN makes a black picture after minutes, and the bytes of one 16-bit type taken for the other make noise. All
of a large file would take those minutes too; a page of each tensor takes milliseconds and finds what befalls
whole tensors. What a single number does is seen after the first step (flux.sampler).
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from flux.errors import FluxError
from flux.weights.headers import Entry

FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E5M2": "u1", "F8_E4M3": "u1"}
SAMPLE = 4096  # bytes of each tensor
LEAST = 256  # numbers from which on a file's magnitudes say something
TINY = 2.0**-40  # of most weights in bfloat16: those of float16's bytes are about 1e-16


def check(path: Path, entries: dict[str, Entry], names: Collection[str]) -> None:
    """FluxError, naming the file and the tensor, for NaN, infinity and bytes of another 16-bit type.

    entries: of the file's header. names: the tensors to look at; those that are not floats are passed over.
    """
    samples: dict[str, list[np.ndarray]] = {"F16": [], "BF16": []}
    with path.open("rb") as file:
        for name in names:
            entry = entries[name]
            if entry.dtype not in FLOATS or not entry.size:
                continue
            file.seek(entry.start + max(0, (entry.size - SAMPLE) // 16 * 8))  # the middle, at a whole number
            numbers = floats(file.read(min(SAMPLE, entry.size)), entry.dtype)
            if not np.isfinite(numbers).all():
                raise FluxError(f"{path}: {name} holds NaN or infinity: damaged, or a training that failed")
            if entry.dtype in samples and len(entry.shape) > 1:
                samples[entry.dtype].append(np.abs(numbers[numbers != 0]))
    found = {kind: np.concatenate(parts) for kind, parts in samples.items() if parts}
    if (wrong := _called_wrongly(found)) is not None:
        raise FluxError(f"{path}: its {wrong[0]} tensors hold the bytes of {wrong[1]}: converted wrongly")


def floats(data: bytes, dtype: str) -> np.ndarray:
    """Numbers of a type of FLOATS as float32; of F8_E4M3 alone which of them are NaN."""
    numbers = np.frombuffer(data, FLOATS[dtype])
    if dtype == "BF16":
        return (numbers.astype("<u4") << 16).view("<f4")
    if dtype == "F8_E5M2":  # the upper byte of a float16
        return (numbers.astype("<u2") << 8).view("<f2").astype("<f4")
    if dtype == "F8_E4M3":
        return np.where(numbers & 0x7F == 0x7F, np.float32("nan"), np.float32(0))
    with np.errstate(over="ignore"):
        return numbers.astype("<f4")


def _called_wrongly(found: dict[str, np.ndarray]) -> tuple[str, str] | None:
    """The type that a file's matrices are called and the one they are, by the size of their numbers.

    Weights lie about 0.01. Float16's bits taken for bfloat16 are about 1e-16, as the exponent has 3 bits of
    the mantissa; bfloat16's taken for float16 lie between 0.5 and 2, as the exponent lacks 3 of its bits.
    """
    brain, half = found.get("BF16", np.zeros(0)), found.get("F16", np.zeros(0))
    if len(brain) >= LEAST and np.mean(brain < TINY) > 0.5:
        return "BF16", "float16"
    if len(half) >= LEAST and np.mean((half >= 0.5) & (half < 2)) > 0.99:
        return "F16", "bfloat16"
    return None
