"""Files of options from strangers: small ones that would take the machine are a line."""

import time
from pathlib import Path

import pytest

from flux import tables
from flux.errors import FluxError

LINES = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
CASES = {
    "aliases.yaml": ("a0: &a0 [x]\n" + "\n".join(LINES), "more than 100000 values"),
    "circle.yaml": ("a: &a [*a]", "more than 100000 values"),
    "deep.yaml": ("- " * 30_000, "nested too deeply"),
    "long.yaml": ("- a\n" * 60_000, "are the most that is read of YAML"),
    "deep.toml": ("a = " + "[" * 20_000, "nested too deeply"),
    "dots.toml": ("\na" + ".a" * 50_000 + " = 1", "line 2 has 50000 dots"),
    "long.toml": ("#" * 300_000, "bytes; 262144 are the most that is read"),
    "deep.json": ('{"a":' * 50_000, "nested 50000 deep"),
    "twice.json": ('{"a": 1, "a": 2}', "the key 'a' comes twice"),
}


@pytest.mark.parametrize("name", CASES)
def test_files_that_would_take_the_machine(tmp_path: Path, name: str):
    text, line = CASES[name]
    (tmp_path / name).write_text(text)
    start = time.process_time()
    with pytest.raises(FluxError, match=line) as error:
        tables.read_file(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: ")
    assert len(str(error.value)) < 300
    assert time.process_time() - start < 5


def test_aliases_of_yaml_are_read(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("base: &base {lr: 1}\nstep: {<<: *base, n: 2}\nlist: [*base, *base]\n")
    found = tables.read_file(tmp_path / "a.yaml")
    assert found == {"base": {"lr": 1}, "step": {"lr": 1, "n": 2}, "list": [{"lr": 1}, {"lr": 1}]}


def test_a_file_that_is_no_file(tmp_path: Path):
    (tmp_path / "a.toml").mkdir()
    with pytest.raises(FluxError, match=r"a\.toml: not a file"):
        tables.read_file(tmp_path / "a.toml")
