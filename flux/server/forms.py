"""Forms with files: what a client uploads is bounded and looked at before anything is made of it."""

import asyncio
import base64
from pathlib import Path
from typing import Any

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from flux import jsonfiles
from flux.data.pictures import NamedBytes
from flux.errors import FluxError
from flux.outputs import locked
from flux.server import downloads
from flux.server.downloads import check_pixels, stems
from flux.server.problems import sentence_of, wrong
from flux.server.schemas import EditRequest

IMAGE, MASK = ("image", "image[]"), ("mask",)  # OpenAI's clients call a list of pictures image[]
MOST_FILES, MOST_FIELDS = 17, 64
MOST_UPLOADS = 200  # pictures for a dataset in one form


async def read(request: Request) -> tuple[EditRequest, dict[str, Any]]:
    """The fields of a form, and [name, base64] of each of its images and, if there is one, its mask.

    Problem for a form that is not one of a picture to change.
    """
    check_kind(request)
    async with request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS) as form:
        body = fields(form)
        images, masks = await files(form, IMAGE), await files(form, MASK)
    if not images:
        raise wrong("the form has no file `image`, the picture to change")
    if len(masks) > 1:
        raise wrong(f"{len(masks)} files `mask` are given: there can be one")
    return body, {"images": images, "mask": masks[0] if masks else None}


def check_kind(request: Request) -> None:
    """Problem for what is not a form with files."""
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise wrong(f"the request should be a form (multipart/form-data), not {kind[:60]!a}")


async def store(request: Request, folder: Path) -> dict[str, str]:
    """Keep the files of a form as JPEG in a dataset's folder: the path of each, or "Error: " and why not."""
    check_kind(request)
    async with request.form(max_files=MOST_UPLOADS, max_fields=MOST_FIELDS) as form:
        given = [value for value in form.getlist("files") if isinstance(value, UploadFile)]
        if not given:
            raise wrong("the form has no `files`, the pictures to keep")
        with locked(folder):
            return {_name(upload, "picture"): await _stored(upload, folder) for upload in given}


async def _stored(upload: UploadFile, folder: Path) -> str:
    stem = downloads.stem_of(upload.filename or "") or "image"
    path = folder / f"{downloads.free(stem, stems(folder))}.jpg"
    try:
        await asyncio.to_thread(downloads.save, await upload.read(), "the file", path)
    except (FluxError, OSError) as error:
        return f"Error: {error}"
    return str(path)


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


async def files(form: FormData, names: tuple[str, ...]) -> list[list[str]]:
    """[name, base64] of the files of these names. Problem for one that is no picture."""
    given = [value for name in names for value in form.getlist(name) if isinstance(value, UploadFile)]
    return [await file(each, names[0]) for each in given]


async def file(upload: UploadFile, kind: str) -> list[str]:
    """[name, base64] of a file. Problem where it is no picture."""
    content = await upload.read()
    await asyncio.to_thread(check_pixels, NamedBytes(content, kind))
    return [_name(upload, kind), base64.b64encode(content).decode()]


def _name(upload: UploadFile, kind: str) -> str:
    """What a file is called for people."""
    name = (upload.filename or kind).replace("\\", "/").rpartition("/")[2]
    return name if name.isprintable() and name else kind


# --- As OpenAPI has them ---


def edit_form() -> dict[str, Any]:
    """The OpenAPI schema of the form: fields, and files."""
    fields = dict(EditRequest.model_json_schema()["properties"])
    fields["adapters"] = {"type": "string", "description": 'JSON: [{"name": ..., "strength": ...}]'}
    file = {"type": "string", "contentMediaType": "image/png"}
    files = {"image": file, "mask": file}
    schema = {"type": "object", "properties": {**fields, **files}, "required": ["prompt", "image"]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def upload_form() -> dict[str, Any]:
    """The OpenAPI schema of a form of pictures for a dataset."""
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    files = {"type": "array", "items": file, "minItems": 1}
    schema = {"type": "object", "properties": {"files": files}, "required": ["files"]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
