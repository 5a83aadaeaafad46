"""Who may import whom: the rules of the README's map, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "flux").rglob("*.py"))

# Imports point down: a module may import its own level and those below.
LEVELS = {
    "flux.errors": 0,
    "flux.noise": 0,
    "flux.jsonfiles": 0,
    "flux.interrupts": 0,
    "flux.openblas": 0,
    "flux.version": 0,
    "flux.machine": 0,
    "flux.outputs": 0,
    "flux.stages": 0,
    "flux.tables": 1,
    "flux.trees": 0,
    "flux.models": 1,
    "flux.images": 1,
    "flux.sheets": 1,
    "flux.tokenizers": 1,
    "flux.vocabularies": 1,
    "flux.known_words": 1,
    "flux.sampler": 1,
    "flux.solvers": 1,
    "flux.step_cache": 2,
    "flux.preprocessing": 1,
    "flux.distributed.ranks": 1,
    "flux.distributed.gradients": 1,
    "flux.conditioning": 2,
    "flux.metadata": 2,
    "flux.arguments": 2,
    "flux.options": 2,
    "flux.inputs": 2,
    "flux.weights": 2,
    "flux.adapters": 2,
    "flux.distributed": 2,
    "flux.workflows": 2,
    "flux.captioning": 3,
    "flux.data": 3,
    "flux.denoising": 3,
    "flux.loading": 3,
    "flux.encoding": 4,
    "flux.requests": 4,
    "flux.previews": 5,
    "flux.text_cache": 3,
    "flux.generation": 4,
    "flux.pipeline": 4,
    "flux.training": 5,
    "flux.evaluation": 5,
    "flux.recipes": 6,
    "flux.server": 6,
}
NETWORK_PACKAGES = {"huggingface_hub", "datasets", "urllib", "requests", "http", "socket"}
NETWORK_PACKAGES |= {"httpx", "fsspec"}
REACHES_THE_NETWORK = {"flux.weights.checkpoints", "flux.data.datasets"}
REACHES_THE_NETWORK |= {"flux.server.downloads", "flux.server.cloud"}
TEST_PACKAGES = {"torch", "transformers", "diffusers", "peft", "accelerate", "prodigyopt", "lpips"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module that the file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def level(module: str) -> int | None:
    """The level of a module of this package, by its longest known prefix; None for the package itself."""
    parts = module.split(".")
    for end in range(len(parts), 1, -1):
        prefix = ".".join(parts[:end])
        if prefix in LEVELS:
            return LEVELS[prefix]
    return None


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path: Path):
    name, own = module_name(path), level(module_name(path))
    if name == "flux":
        return  # the package offers the public names of all its parts
    assert own is not None, f"{name} has no level: give it one in LEVELS"
    for other in imports(path):
        if other.startswith("flux.") and level(other) is not None:
            assert level(other) <= own, f"{name} imports {other}, which is above it"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_packages(path: Path):
    name = module_name(path)
    modules = [module for module in imports(path) if not module.startswith("urllib.parse")]
    packages = {module.split(".")[0] for module in modules if module != "urllib"}
    assert not packages & TEST_PACKAGES, f"{name} imports a package that only tests may use"
    if name not in REACHES_THE_NETWORK:
        assert not packages & NETWORK_PACKAGES, f"{name} may not reach the network"


@pytest.mark.parametrize("path", sorted((ROOT / "flux/models").rglob("*.py")), ids=module_name)
def test_networks_know_only_mlx(path: Path):
    known = ("mlx", "flux.models", "flux.errors", "dataclasses", "math", "functools", "collections", "typing")
    for module in imports(path):
        assert module.startswith(known), f"{module_name(path)} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_programs_know_the_command_line(path: Path):
    source = path.read_text()
    if '__name__ == "__main__"' in source or path.name in ("__main__.py", "arguments.py", "interrupts.py"):
        return
    for word in ("argparse", "sys.argv", "sys.exit"):
        assert word not in source, f"{module_name(path)} uses {word}"


def test_trainer_knows_no_network_and_no_adapter():
    trainer = ROOT / "flux/training/trainer.py"
    forbidden = ("flux.models", "flux.adapters", "flux.weights", "flux.pipeline")
    assert not [module for module in imports(trainer) if module.startswith(forbidden)]
