"""The package as people install it: a wheel, in an environment of its own, outside the checkout."""

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    """The program's output. It must not see this checkout or this environment."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of what git would take along: the checkout may hold what no one else has."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "static/")):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    build = "import sys, setuptools.build_meta as m; print(m.build_wheel(sys.argv[1]))"
    run(sys.executable, "-c", build, folder, cwd=folder / "source")
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_file_of_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    listed = ["git", "ls-files", "flux"]
    tracked = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in tracked if (ROOT / name).exists()} <= names
    assert {"txt2image.py", "dreambooth.py", "caption.py"} <= names


def test_the_wheel_asks_for_the_requirements_and_no_more(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode()
    asked = {name.lower() for name in re.findall(r"^Requires-Dist: ([\w.-]+)", metadata, re.MULTILINE)}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert asked == {re.match(r"[\w.-]+", line)[0].lower() for line in lines if line[0] != "#"}


def test_an_installed_package_makes_a_picture(wheel, tmp_path):
    """pip install WHEEL, then flux-txt2image, where the checkout is not."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    # Its requirements are those of this environment: the test must work without a network.
    site = run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    (Path(own.strip()) / "requirements.pth").write_text(site)
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    where = run(python, "-c", "import flux; print(flux.__file__, flux.__version__)", cwd=tmp_path)
    assert where.startswith(own.strip())
    options = ("--model", "tiny", "--steps", "2", "--seed", "1", "--output", "apple.png")
    assert "apple.png" in run(python.with_name("flux-txt2image"), *options, "a red apple", cwd=tmp_path)
    assert (tmp_path / "apple.png").stat().st_size > 1000
    for program in ("flux-dreambooth", "flux-caption"):
        assert "usage" in run(python.with_name(program), "--help", cwd=tmp_path)
    run(python, "-m", "flux.adapters", "--help", cwd=tmp_path)
