"""A captioner: pictures and a task in, answers out."""

from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
from PIL import Image

from flux.captioning.pictures import PictureParams, prepare
from flux.captioning.tasks import Answer, Task
from flux.captioning.tokenizer import BartTokenizer
from flux.errors import FluxError
from flux.models.florence2 import Florence2, GenerationParams, generate
from flux.weights import florence2


@dataclass
class Captioner:
    """Florence-2 with all that belongs to it. generation: how answers are searched; may be replaced."""

    model: Florence2
    tokenizer: BartTokenizer
    pictures: PictureParams
    generation: GenerationParams

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: mx.Dtype) -> "Captioner":
        """Reads a checkpoint's folder, transformers' or Microsoft's. Raises FluxError for a faulty one."""
        folder = Path(folder)
        return cls(
            model=florence2.load(folder, dtype),
            tokenizer=BartTokenizer.from_folder(folder),
            pictures=picture_params(folder),
            generation=florence2.generation_params(folder),
        )

    def search(self, beams: int | None = None, max_tokens: int | None = None) -> None:
        """Changes how answers are searched: with so many beams, for so many tokens at most.

        None stands for the checkpoint's own, within what the network can write. FluxError beyond that.
        """
        own, limit = self.generation, self.model.language_model.max_tokens
        if max_tokens is not None and max_tokens > limit:
            raise FluxError(f"answers of {max_tokens} tokens; the captioner writes {limit} at most")
        self.generation = replace(
            own,
            num_beams=own.num_beams if beams is None else beams,
            max_new_tokens=min(own.max_new_tokens, limit) if max_tokens is None else max_tokens,
        )

    def answers(self, images: list[Image.Image], task: Task, texts: list[str] | None = None) -> list[Answer]:
        """What the task finds in each picture. texts: what it needs besides, one a picture.

        Places in the answers are pixels of the pictures as they were given.
        """
        texts = texts or [""] * len(images)
        tokens, mask = self.tokenizer([task.ask(text) for text in texts])
        written = generate(self.model, prepare(images, self.pictures), tokens, mask, self.generation)
        decoded = [self.tokenizer.decode(answer) for answer in written]
        return [task.answer(text, image.size) for text, image in zip(decoded, images, strict=True)]


def picture_params(folder: Path) -> PictureParams:
    """What preprocessor_config.json, or the newer processor_config.json, says; else Florence-2's own."""
    combined = florence2.read_json(folder, "processor_config.json").get("image_processor", {})
    config = florence2.read_json(folder, "preprocessor_config.json") or combined
    known = PictureParams()
    size = config.get("size", {})
    return PictureParams(
        height=size.get("height", known.height),
        width=size.get("width", known.width),
        mean=tuple(config.get("image_mean", known.mean)),
        deviation=tuple(config.get("image_std", known.deviation)),
    )
