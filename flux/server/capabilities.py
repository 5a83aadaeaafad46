"""What the server can do, from the programs' option tables: nothing is listed here a second time."""

import dataclasses
from functools import cache
from importlib import import_module
from typing import Any

from flux import images
from flux.adapters.writers import WRITERS
from flux.arguments import Parser
from flux.data.schema import Group, Subset
from flux.options import build_parser as txt2image_parser
from flux.tables import Bounds
from flux.training.finetune.arguments import build_parser as dreambooth_parser
from flux.training.finetune.foreign_options import NAMES
from flux.version import __version__
from flux.weights import registry


@cache
def capabilities() -> dict[str, Any]:
    """The programs' options, the keys of a data.toml, models, formats."""
    parsers = {
        "txt2image": txt2image_parser(),
        "dreambooth": dreambooth_parser(),
        "caption": import_module("caption").build_parser(),
    }
    return {
        "version": __version__,
        "programs": {name: _options(parser) for name, parser in parsers.items()},
        "dataset": [_field(field) for cls in (Group, Subset) for field in dataclasses.fields(cls)],
        "names_of_other_trainers": {ours: list(names) for ours, names in NAMES.items()},
        "models": [_model(spec) for spec in registry.MODELS],
        "captioners": list(registry.CAPTIONERS),
        "adapter_formats": list(WRITERS),
        "picture_formats": sorted(images.readable_suffixes()),
    }


def _options(parser: Parser) -> list[dict[str, Any]]:
    """The options of a program as its --help has them."""
    return [
        {
            "option": max(action.option_strings or [action.dest], key=len),
            "group": group.title or "",
            "help": (action.help or "").replace("%%", "%"),
            "choices": None if action.choices is None else [str(choice) for choice in action.choices],
            "is_flag": action.nargs == 0,
        }
        for group in parser._action_groups
        for action in group._group_actions
    ]


def _field(field: dataclasses.Field) -> dict[str, Any]:
    """A key of a table of options: its default and its bounds, where it has some."""
    bounds = dataclasses.asdict(field.metadata.get("bounds", Bounds()))
    given = {name: value for name, value in bounds.items() if value not in (None, (), False)}
    default = None if field.default is dataclasses.MISSING else field.default
    return {"key": field.name, "default": default, **given}


def _model(spec: registry.ModelSpec) -> dict[str, Any]:
    names = ("name", "repo", "steps", "guidance", "cfg_scale", "image_size")
    return {name: getattr(spec, name) for name in names}
