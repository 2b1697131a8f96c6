"""The shape of the house: imports point down only, every source file has its mirror in tests/."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "kernels").rglob("*.py"), *(ROOT / "sagan_fast").rglob("*.py")])

# A part may import those of a lower floor, and itself. Data, visualize and evaluation stand beside the layers.
FLOOR = {
    "errors": 0, "kernels": 0, "testing": 0,
    "ops": 1,
    "functional": 2,
    "layers": 3,
    "models": 4,
    "data": 5, "interop": 5, "presets": 5, "visualize": 5,
    "evaluation": 6,
    "training": 7,
    "commands": 8,
    "cli": 9,
}  # fmt: skip
NO_MIRROR = {"reference", "checks", "plan", "testing", "errors", "functional", "__init__"}
"""Held by other tests: the references and plans by every kernel's and op's, errors by whoever raises them."""


def module_of(path: Path) -> list[str]:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ["sagan_fast", *parts] if parts[0] == "kernels" else parts


def imported_modules(path: Path) -> set[str]:
    module = module_of(path)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module[: len(module) - node.level] if path.stem != "__init__" else module[: -node.level]
                base = ".".join([*parent, base] if base else parent)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def part_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "sagan_fast" and len(parts) > 1 else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    assert not any(name.split(".")[0] == "kernels" for name in imported_modules(path)), "write sagan_fast.kernels"
    here = part_of(".".join(module_of(path)))
    if here == "__init__":
        return  # sagan_fast/__init__.py re-exports from every floor
    for name in imported_modules(path):
        part = part_of(name)
        if part is None or part == here or part not in FLOOR:
            continue
        assert FLOOR[part] < FLOOR[here], f"{here} (floor {FLOOR[here]}) imports {name} (floor {FLOOR[part]})"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_part_has_a_floor(path):
    assert part_of(".".join(module_of(path))) in {*FLOOR, "__init__"}


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.stem not in NO_MIRROR], ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_source_has_its_test(path):
    relative = path.relative_to(ROOT)
    folders = relative.parts[1:-1] if relative.parts[0] == "sagan_fast" else relative.parts[:-1]
    mirror = ROOT.joinpath("tests", *folders, f"test_{path.stem}.py")
    assert mirror.exists(), f"{relative} has no {mirror.relative_to(ROOT)}"


def test_layout_rules_catch_what_they_should():
    assert imported_modules(ROOT / "kernels" / "checks.py") >= {"torch", "collections.abc"}
    assert part_of("sagan_fast.kernels.attention") == "kernels"
