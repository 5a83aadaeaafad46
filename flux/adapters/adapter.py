"""A whole adapter as data: the changes of every module. Knows neither file formats nor networks.

Modules have the names of our networks: BFL's for the transformer, transformers' for the text encoders.
The three sets of names have nothing in common, so one dictionary holds them all.
"""

from dataclasses import dataclass, field, replace

import mlx.core as mx

from flux.adapters.changes import Delta, LowRank

# How the first part of a module's name tells its network.
PARTS = {"clip": "text_model.", "t5": "encoder."}


def part_of(module: str) -> str:
    """The network that a module belongs to: "flux", "clip" or "t5"."""
    return next((part for part, start in PARTS.items() if module.startswith(start)), "flux")


@dataclass(frozen=True, eq=False)
class Adapter:
    """A whole adapter.

    modules: module's name -> Delta. replaced, added: name of a norm's parameter -> its new value, or what is
    added to it. metadata: the file's. format: of the file it came from. unexpected: the file's keys that are
    not known here, with the reason where it is not the name.
    """

    modules: dict[str, Delta]
    replaced: dict[str, mx.array] = field(default_factory=dict)
    added: dict[str, mx.array] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    format: str = "native"
    unexpected: list[str] = field(default_factory=list)

    def part(self, part: str) -> "Adapter":
        """What of it belongs to one network: "flux", "clip" or "t5"."""

        def of_part(names: dict) -> dict:
            return {name: value for name, value in names.items() if part_of(name) == part}

        return replace(
            self, modules=of_part(self.modules), replaced=of_part(self.replaced), added=of_part(self.added)
        )

    def parts(self) -> list[str]:
        """The networks that it changes, in the order flux, clip, t5."""
        names = {part_of(name) for names in (self.modules, self.replaced, self.added) for name in names}
        return [part for part in ("flux", "clip", "t5") if part in names]

    def ranks(self) -> dict[str, int]:
        """The rank of every low-rank change."""
        return {n: d.change.rank for n, d in self.modules.items() if isinstance(d.change, LowRank)}

    def alphas(self) -> dict[str, float]:
        """The alpha of every low-rank change."""
        return {n: d.change.alpha for n, d in self.modules.items() if isinstance(d.change, LowRank)}
