"""The data sets of a config: what may stand in their tables, and the sources that they describe."""

from dataclasses import dataclass
from typing import Any

from flux.data.sources import Pictures, open_drawn, open_folder, open_hugging_face
from flux.data.webdataset import open_shards


@dataclass(frozen=True)
class Local:
    """Pictures of a folder or a list, read as for fine-tuning; captions_file: such as name<TAB>caption lines.

    uncaptioned: pictures without a caption are meant, as for an autoencoder alone.
    """

    path: str
    captions_file: str | None = None
    caption_column: str | None = None
    uncaptioned: bool = False


@dataclass(frozen=True)
class WebDataset:
    """Tar shards: a path, one with * or {000..012}, or a list of such. `image_key`s are suffixes (jpg;png).

    `caption_key`: a suffix, or a key of the samples' .json.
    """

    path: str | tuple[str, ...]
    image_key: str = "jpg;jpeg;png;webp"
    caption_key: str = "txt"


@dataclass(frozen=True)
class HuggingFace:
    """A data set of the Hub, or a folder that `datasets` has saved."""

    path: str
    name: str | None = None  # the configuration, where there are several
    split: str = "train"
    image_key: str = "image"
    caption_key: str = "text"


@dataclass(frozen=True)
class Drawn:
    """Pictures that a Python function draws as they are asked for: `source` is "package.module:function".

    The function takes nothing and returns what flux.data.sources.Pictures describes; also `sizes`, the
    (height, width) of each picture, if they are of several, and `subjects`, a table of what can be drawn and
    what else it is called, to be named beside words that the model does not know.
    """

    source: str


DATASETS = {"local": Local, "webdataset": WebDataset, "huggingface": HuggingFace, "drawn": Drawn}


def open_dataset(config: Any) -> Pictures:
    """The source that a data set's table describes."""
    if isinstance(config, WebDataset):
        return open_shards(config.path, config.image_key, config.caption_key)
    if isinstance(config, HuggingFace):
        return open_hugging_face(config.path, config.name, config.split, config.image_key, config.caption_key)
    if isinstance(config, Drawn):
        return open_drawn(config.source)
    return open_folder(config.path, config.captions_file, config.caption_column, config.uncaptioned)
