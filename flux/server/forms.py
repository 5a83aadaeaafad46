"""Forms with files: what a client uploads is bounded and looked at before anything is made of it."""

import asyncio
import base64
from typing import Any

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from flux import jsonfiles
from flux.data.pictures import NamedBytes
from flux.server.downloads import check_pixels
from flux.server.problems import sentence_of, wrong
from flux.server.schemas import EditRequest

IMAGE, MASK = ("image", "image[]"), ("mask",)  # OpenAI's clients call a list of pictures image[]
MOST_FILES, MOST_FIELDS = 4, 64


async def read(request: Request) -> tuple[EditRequest, dict[str, list[str]]]:
    """The fields of a form, and [name, base64] of its image and, if there is one, its mask.

    Problem for a form that is not one of a picture to change.
    """
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise wrong(f"the request should be a form (multipart/form-data), not {kind[:60]!a}")
    async with request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS) as form:
        body = fields(form)
        image, mask = await file(form, IMAGE), await file(form, MASK)
    if image is None:
        raise wrong("the form has no file `image`, the picture to change")
    return body, {"image": image} | ({} if mask is None else {"mask": mask})


def fields(form: FormData) -> EditRequest:
    """What a form says beside its files."""
    found: dict[str, Any] = {key: value for key, value in form.items() if isinstance(value, str)}
    try:
        if "adapters" in found:
            found["adapters"] = jsonfiles.parse(found["adapters"])
        return EditRequest.model_validate(found)
    except ValidationError as error:
        raise wrong(sentence_of(error.errors())) from None
    except ValueError as error:
        raise wrong(f"adapters: {error}") from None


async def file(form: FormData, names: tuple[str, ...]) -> list[str] | None:
    """[name, base64] of the one file of these names; None without one. Problem for several, or no picture."""
    files = [value for name in names for value in form.getlist(name) if isinstance(value, UploadFile)]
    if not files:
        return None
    if len(files) > 1:
        raise wrong(f"{len(files)} files `{names[0]}` are given: the model changes one picture")
    content = await files[0].read()
    await asyncio.to_thread(check_pixels, NamedBytes(content, names[0]))
    name = (files[0].filename or names[0]).replace("\\", "/").rpartition("/")[2]
    return [name if name.isprintable() and name else names[0], base64.b64encode(content).decode()]
