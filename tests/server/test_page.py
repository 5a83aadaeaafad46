"""The page in a real browser: a run watched from start to end, a caption corrected, a picture made."""

import os
import shutil
from pathlib import Path

import pytest

from .serving import Process, png, write_dataset

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
SHOTS = os.environ.get("FLUX_SCREENSHOTS")  # a folder that pictures of the page are written into


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    process = Process(tmp_path_factory.mktemp("page"), "--token", "s3cret")
    process.http.headers["Authorization"] = "Bearer s3cret"
    write_dataset(process, "red-thing")
    yield process
    process.stop()


@pytest.fixture(scope="module")
def page(server):
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        page.set_default_timeout(60_000)
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(str(server.http.base_url))
        page.get_by_label("Token").fill("s3cret")
        page.keyboard.press("Enter")
        yield page
        browser.close()
        assert not faults


def shot(page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}.png", full_page=True)


def test_a_run_is_watched_from_start_to_end(page):
    page.get_by_role("link", name="Runs").click()
    page.get_by_role("combobox", name="Dataset").select_option("red-thing")  # its label has the choices in it
    page.locator("#train-form").get_by_label("Model").fill("tiny")
    for label, value in {"Epochs": 4, "Rank": 2, "Learning rate": 0.001, "A sample every": 6}.items():
        page.get_by_label(label).fill(str(value))
    page.get_by_label("Sample prompt").fill("sks thing")
    page.get_by_role("button", name="Train").click()
    job = page.locator("#job")
    job.locator("h3", has_text="red-thing").wait_for()
    page.locator("#job[data-state=done]").wait_for()
    assert job.locator("progress").evaluate("bar => bar.value") == 1
    assert "done, loss 0." in job.locator(".numbers").inner_text()
    assert len(job.locator("polyline").get_attribute("points").split()) == 12
    assert job.locator(".samples img").count() == 3
    assert "red-thing.safetensors" in job.locator("pre").inner_text()
    shot(page, "server-run")


def test_a_caption_is_corrected_by_keyboard(server, page):
    page.get_by_role("link", name="Datasets").click()
    page.get_by_role("button", name="red-thing").focus()
    page.keyboard.press("Enter")
    text = page.get_by_label("caption of image0.png")
    text.focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("sks thing, on a table")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_text("the caption of image0.png is saved").wait_for()
    assert (server.root / "datasets/red-thing/image0.txt").read_text() == "sks thing, on a table\n"
    assert page.locator(".cards img").first.evaluate("image => image.naturalWidth") == 64
    shot(page, "server-dataset")


def test_files_are_downloaded(page):
    page.get_by_role("link", name="Runs").click()
    page.get_by_role("button", name="train red-thing").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download red-thing.safetensors", exact=True).click()
    assert download.value.suggested_filename == "red-thing.safetensors"
    assert Path(download.value.path()).stat().st_size > 10_000


def test_pictures_are_uploaded_and_changed(server, page):
    page.get_by_role("link", name="Datasets").click()
    page.get_by_text("New pictures").click()
    form = page.locator("#upload-form")
    form.get_by_label("Name").fill("sent")
    files = [{"name": f"{name}.png", "mimeType": "image/png", "buffer": png()} for name in "ab"]
    form.get_by_label("Files").set_input_files(files)
    form.get_by_role("button").last.click()
    page.get_by_text("Upload complete").wait_for()
    assert sorted(path.name for path in (server.root / "datasets/sent").iterdir()) == ["a.jpg", "b.jpg"]
    page.get_by_role("link", name="Pictures").click()
    page.get_by_label("Prompt", exact=True).fill("a red apple")
    page.get_by_text("Change a picture").click()
    page.get_by_label("Picture", exact=True).set_input_files(files[0])
    page.get_by_label("How much changes").fill("0.5")
    page.get_by_role("button", name="Make the picture").click()
    page.get_by_text("the picture is made").wait_for()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the picture").click()
    content = Path(download.value.path()).read_bytes()
    assert b"strength" in content  # among what it remembers of how it was made
    page.get_by_label("Picture", exact=True).set_input_files([])


def test_a_picture_is_made_on_a_phone(page):
    page.set_viewport_size({"width": 375, "height": 812})
    page.get_by_role("link", name="Pictures").click()
    page.get_by_label("Prompt", exact=True).fill("a red apple on a blue background")
    page.get_by_label("Seed").fill("1")
    page.get_by_label("red-thing", exact=True).check()
    page.get_by_label("strength of red-thing", exact=True).fill("0.5")
    page.get_by_role("button", name="Make the picture").click()
    page.get_by_text("the picture is made").wait_for()
    assert page.locator("#picture img").evaluate("image => image.naturalWidth") == 64
    assert "seed 1, 64x64" in page.locator("#picture figcaption").inner_text()
    for part in ("Runs", "Datasets", "Pictures"):
        page.get_by_role("link", name=part).click()
        page.locator(f"#{part.lower()}").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 375  # nothing sticks out
    shot(page, "server-picture")
