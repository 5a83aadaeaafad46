"""Captioning on several machines, or GPUs: what the ranks that mlx.launch started tell each other."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx

from flux.errors import FluxError

Value = TypeVar("Value")


class Ranks:
    """The group that this process is in; alone, a group of one."""

    def __init__(self):
        self._group = mx.distributed.init()
        self.rank, self.size = self._group.rank(), self._group.size()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank. A value is what JSON can say."""
        if self.size == 1:
            return [value]
        content = json.dumps(value).encode()
        lengths = self._all(mx.array([len(content)])).tolist()  # (ranks,)
        padded = mx.array(list(content.ljust(max(lengths))), dtype=mx.uint8)
        rows = self._all(padded).reshape(self.size, -1).tolist()  # (ranks, the longest)
        return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]

    def together(self, work: Callable[[], Value]) -> Value:
        """What work gives, here. Where it raises FluxError on any rank, every rank raises the first."""
        value, fault = None, None
        try:
            value = work()
        except FluxError as error:
            fault = str(error)
        faults = [fault for fault in self.gather(fault) if fault is not None]
        if faults:
            raise FluxError(faults[0])
        return value

    def _all(self, x: mx.array) -> mx.array:
        out = mx.distributed.all_gather(x, group=self._group, stream=mx.cpu)
        mx.eval(out)
        return out
