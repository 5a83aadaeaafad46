"""Datasets: what there is, and captions corrected."""

from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse

from flux.server import datasets, forms
from flux.server.schemas import (
    CaptionText,
    DatasetPictures,
    DatasetView,
    DownloadAnswer,
    PathName,
    PictureView,
)
from flux.server.state import Server, State

router = APIRouter(tags=["datasets"])


@router.get("/datasets")
def all_datasets(server: State) -> list[DatasetView]:
    """The datasets that there are."""
    return [view(server, name) for name in datasets.names(server.folders)]


def view(server: Server, name: str) -> DatasetView:
    """A dataset in numbers. Its name may be one that no request could give: it is only shown."""
    folder = server.folders.datasets / name
    found = datasets.in_folder(folder)
    has_config = folder.with_name(f"{name}.toml").is_file()
    return DatasetView(
        name=name, pictures=len(found), captioned=len(datasets.captions(found)), has_config=has_config
    )


@router.get("/datasets/{name}")
def one_dataset(name: PathName, server: State) -> DatasetPictures:
    """The pictures of a dataset with their captions."""
    found = datasets.pictures(server.folders, name)
    captions = datasets.captions(found)
    shown = [
        PictureView(
            name=picture.name,
            caption=captions.get(picture.name),
            url=f"/datasets/{quote(name)}/pictures/{quote(picture.name)}",
        )
        for picture in found
    ]
    return DatasetPictures(name=name, pictures=shown)


@router.get("/datasets/{name}/pictures/{file:path}", response_class=FileResponse)
def picture(name: PathName, file: str, server: State) -> FileResponse:
    """A picture of a dataset."""
    return FileResponse(datasets.picture_file(server.folders, name, file))


@router.post("/datasets/{name}/pictures", openapi_extra=forms.upload_form())
async def upload(name: PathName, request: Request, server: State) -> DownloadAnswer:
    """Put pictures into a dataset, new or not, as JPEG: a form with `files`."""
    files = await forms.store(request, server.folders.dataset(name))
    return DownloadAnswer(message="Upload complete", files=files)


@router.put("/datasets/{name}/captions/{file:path}")
def correct(name: PathName, file: str, body: CaptionText, server: State) -> CaptionText:
    """Correct the caption of a picture; the caption as it was written."""
    return CaptionText(caption=datasets.correct(server.folders, name, file, body.caption))
