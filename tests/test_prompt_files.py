"""The prompts' folder: which files are read."""

import pytest

from flux import arguments
from flux.errors import FluxError


def test_links(tmp_path):
    """Within the folder they are files like others; what lies elsewhere is nobody's prompt."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "a.txt").write_text("a red apple")
    (folder / "b.txt").symlink_to("a.txt")
    assert arguments.find_prompts([], None, str(folder)) == ["a red apple"] * 2
    (tmp_path / "linked").symlink_to(folder)
    assert arguments.find_prompts([], None, str(tmp_path / "linked")) == ["a red apple"] * 2
    (tmp_path / "private").write_text("a secret")
    (folder / "c.txt").symlink_to(tmp_path / "private")
    with pytest.raises(FluxError, match=r"c\.txt is a link to a file elsewhere"):
        arguments.find_prompts([], None, str(folder))
