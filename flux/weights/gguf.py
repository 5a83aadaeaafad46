"""GGUF files: the header, read and checked before anything is allocated for what it promises.

The format (ggml's docs/gguf.md): "GGUF", a version, the numbers of tensors and of keys; the keys with their
values; for each tensor its name, its sizes from the last axis to the first, its type and where its blocks
begin; then, aligned, the blocks.
"""

import json
import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux.errors import FluxError
from flux.jsonfiles import shown
from flux.weights import ggml, headers, lazy
from flux.weights.headers import Entry, Header
from flux.weights.quantize import METADATA, PARTS

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_TENSORS, MOST_KEYS, MOST_ELEMENTS = 2**16, 2**12, 2**21  # elements: of an array among the keys
MOST_AXES, LONGEST_NAME = 4, 256
LAYOUT = json.dumps({"group_size": ggml.GROUP, "mode": "affine"})  # of what `load` leaves packed
SHAPES = "comfy.gguf.orig_shape."  # + a tensor's name: its true shape, where the blocks needed another

# ggml's numbers of types -> names; ggml.TYPES has those that are read.
TYPE_NAMES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K"},
    **{11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS"},
    **{18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8"},
    **{25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0"},
    **{39: "MXFP4", 40: "NVFP4", 41: "Q1_0"},
}
# Types of keys' values: struct's letters by GGUF's numbers.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

# llama.cpp's modules of a T5 encoder -> transformers': those of `enc.blk.N`, and the rest.
T5_BLOCK = {
    "attn_norm": "0.layer_norm",
    "attn_q": "0.SelfAttention.q",
    "attn_k": "0.SelfAttention.k",
    "attn_v": "0.SelfAttention.v",
    "attn_o": "0.SelfAttention.o",
    "attn_rel_b": "0.SelfAttention.relative_attention_bias",
    "ffn_norm": "1.layer_norm",
    "ffn_gate": "1.DenseReluDense.wi_0",
    "ffn_up": "1.DenseReluDense.wi_1",
    "ffn_down": "1.DenseReluDense.wo",
}
T5 = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"}


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do; False where it cannot be read."""
    try:
        if not path.is_file():  # a pipe would block
            return False
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> Header:
    """Reads and checks the header. Entries have ggml's types ("Q8_0") and a T5 has transformers' names.

    metadata: the keys that are one text or number, as texts. FluxError, naming the file, where it is damaged,
    cut short, or where a tensor is of a type that is not read.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    except OSError as error:
        raise FluxError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, struct.error) as error:
        fault = "it ends within its header" if isinstance(error, struct.error) else str(error)
        raise FluxError(f"{path}: not a GGUF file that this program can read: {fault}") from None


def load(path: Path, header: Header, packed: bool) -> dict[str, mx.array]:
    """All tensors of a file, lazily. packed: matrices of a type that MLX's quantized layers can hold stay in
    few bits, as `.weight`, `.scales` and `.biases` of groups of 32; all others are widened.
    """
    out: dict[str, mx.array] = {}
    spans = {name: (entry.start, entry.start + entry.size) for name, entry in header.tensors.items()}
    for name, raw in lazy.read(path, spans).items():
        entry, module = header.tensors[name], name.removesuffix(".weight")
        fits = len(entry.shape) == 2 and entry.shape[1] % ggml.GROUP == 0 and module != name
        if packed and fits and ggml.TYPES[entry.dtype].bits:
            arrays = ggml.repack(raw, entry.dtype, entry.shape)
            out |= {f"{module}.{part}": array for part, array in zip(PARTS, arrays, strict=True)}
        else:
            out[name] = ggml.dequantize(raw, entry.dtype, entry.shape)
    return out


@dataclass(frozen=True)
class Blocks(Entry):
    """A tensor of a GGUF file; dtype is a type of ggml's, of whose blocks it has a whole number."""

    @property
    def size(self) -> int:
        """In bytes."""
        kind = ggml.TYPES[self.dtype]
        return math.prod(self.shape) // kind.values * kind.size


class _Reader:
    """A cursor over the bytes of a file. Every count is bounded before it is believed."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position, self.left = data, 0, MOST_ELEMENTS

    def take(self, letters: str) -> tuple[Any, ...]:
        numbers = struct.unpack_from("<" + letters, self.data, self.position)
        self.position += struct.calcsize("<" + letters)
        return numbers

    def text(self, longest: int = 2**24) -> str:
        (length,) = self.take("Q")
        if length > min(longest, len(self.data) - self.position):
            raise ValueError(f"a text of {length} bytes")
        raw = self.data[self.position : self.position + length]
        self.position += length
        return raw.decode("utf-8", "replace")

    def value(self) -> Any:
        (kind,) = self.take("I")
        return self.array() if kind == ARRAY else self.element(kind)

    def element(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind not in NUMBERS:
            raise ValueError(f"a key of the unknown type {kind}")
        return self.take(NUMBERS[kind])[0]

    def array(self) -> list[Any]:
        kind, count = self.take("IQ")
        self.left -= count
        if self.left < 0 or kind == ARRAY:
            raise ValueError(f"an array of {count} elements of type {kind}")
        return [self.element(kind) for _ in range(count)]

    def header(self) -> Header:
        magic, version = self.take("4sI")
        if magic != MAGIC:
            raise ValueError("it does not begin with GGUF")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}; read are {VERSIONS[0]} and {VERSIONS[1]}")
        tensors, keys = self.take("QQ")
        if tensors > MOST_TENSORS or keys > MOST_KEYS:
            raise ValueError(f"it promises {tensors} tensors and {keys} keys")
        metadata = {self.text(LONGEST_NAME): self.value() for _ in range(keys)}
        entries = dict(self.entry(metadata) for _ in range(tensors))
        if len(entries) < tensors:
            raise ValueError("two tensors have the same name")
        texts = {key: str(value) for key, value in metadata.items() if not isinstance(value, list)}
        return Header(self.placed(entries, metadata), texts | {METADATA: LAYOUT})

    def entry(self, metadata: dict[str, Any]) -> tuple[str, Entry]:
        name = self.text(LONGEST_NAME)
        (axes,) = self.take("I")
        if axes > MOST_AXES or not name.isprintable():
            raise ValueError(f"{shown(name)} has {axes} axes")
        *sides, kind, offset = self.take(f"{axes}QIQ")
        dtype = TYPE_NAMES.get(kind, f"number {kind}")
        if dtype not in ggml.TYPES:
            raise ValueError(f"{name} has the type {dtype}; read are {', '.join(ggml.TYPES)}")
        shape, values = tuple(reversed(sides)), ggml.TYPES[dtype].values
        if max(shape, default=0) > headers.MAX_SIDE or (values > 1 and (not shape or shape[-1] % values)):
            raise ValueError(f"{name} has the shape {shape}; {dtype} has blocks of {values}")
        true = metadata.get(SHAPES + name)
        if isinstance(true, list) and all(type(n) is int and n > 0 for n in true):
            shape = tuple(true) if math.prod(true) == math.prod(shape) else shape
        is_t5 = str(metadata.get("general.architecture")).startswith("t5")
        return t5_name(name) if is_t5 else name, Blocks(dtype, shape, offset)

    def placed(self, entries: dict[str, Entry], metadata: dict[str, Any]) -> dict[str, Entry]:
        """The entries with their true starts; ValueError where two overlap or one ends behind the file."""
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**16 or alignment % 8:
            raise ValueError(f"its alignment is {alignment!r}")
        end = first = -(-self.position // alignment) * alignment
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            if first + entry.start < end or entry.start % alignment:
                raise ValueError(f"{name} overlaps another tensor")
            end = first + entry.start + entry.size
            if end > len(self.data):
                raise ValueError(f"cut short: {name} ends at {end}, and it has {len(self.data)} bytes")
        return {name: Blocks(e.dtype, e.shape, first + e.start) for name, e in entries.items()}


def t5_name(name: str) -> str:
    """llama.cpp's name of a T5's tensor -> transformers'; any other name stays."""
    module, _, parameter = name.rpartition(".")
    if (match := re.fullmatch(r"enc\.blk\.(\d+)\.(\w+)", module)) and match[2] in T5_BLOCK:
        return f"encoder.block.{match[1]}.layer.{T5_BLOCK[match[2]]}.{parameter}"
    if module in T5:
        return f"{T5[module]}.{parameter}"
    return "decoder." + name.removeprefix("dec.") if name.startswith("dec.") else name
