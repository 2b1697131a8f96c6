"""The shape of the house: which file may import which, and what is written in one place alone."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "kernels").rglob("*.py"), *(ROOT / "sagan_fast").rglob("*.py")])
ALL_SOURCES = sorted([*SOURCES, *(ROOT / "benchmarks").rglob("*.py")])

# A part may import those of a lower floor, and itself. Data, visualize and evaluation stand beside the layers.
FLOOR = {
    "errors": 0, "kernels": 0, "version": 0, "words": 0,
    "choices": 1, "files": 1,
    "distributed": 2, "ops": 2,
    "functional": 3,
    "layers": 4,
    "models": 5,
    "data": 6, "interop": 6, "presets": 6, "visualize": 6,
    "evaluation": 7,
    "faces": 8, "training": 8, "view": 8,
    "commands": 9,
    "cli": 10,
}  # fmt: skip
NO_MIRROR = {"reference", "checks", "errors", "functional", "version", "__init__"}
"""Held by other tests: the references by every kernel's and op's test, errors by whoever raises them."""

OFFENDERS = {
    "import circles": set(),
    "launches": set(),
    "os.replace": set(),
    "isinstance of a data set": set(),
    "capabilities": set(),
}
"""Files that still break a rule. A file that is mended leaves the list: the tests below ask for exactly these."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> list[str]:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ["sagan_fast", *parts] if parts[0] == "kernels" else parts


@functools.cache  # every rule reads the same files
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imported_modules(path: Path) -> set[str]:
    """Every module that the file imports, those inside functions too; `from a import b` counts as a and as a.b."""
    module = module_of(path)
    found = set()
    for node in ast.walk(tree_of(path)):
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


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
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


def test_nothing_but_its_own_commands_imports_faces():
    """FaceBoxes is optional: `evaluate` imports it where face-rate is asked for, and inside a function."""
    others = [p for p in SOURCES if p.parent.name != "faces" and "faces" in p.read_text()]
    importing = {name_of(p) for p in others if any(part_of(name) == "faces" for name in imported_modules(p))}
    assert importing == {"sagan_fast/commands/faces.py", "sagan_fast/commands/evaluate.py"}
    for name in importing:
        top = [node for node in ast.parse((ROOT / name).read_text()).body if isinstance(node, ast.ImportFrom)]
        assert not any(part_of(node.module or "") == "faces" for node in top), name


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_part_has_a_floor(path):
    assert part_of(".".join(module_of(path))) in {*FLOOR, "__init__"}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.stem not in NO_MIRROR], ids=name_of)
def test_every_source_has_its_test(path):
    relative = path.relative_to(ROOT)
    folders = relative.parts[1:-1] if relative.parts[0] == "sagan_fast" else relative.parts[:-1]
    mirror = ROOT.joinpath("tests", *folders, f"test_{path.stem}.py")
    assert mirror.exists(), f"{relative} has no {mirror.relative_to(ROOT)}"


def circles(imports: dict[str, set[str]]) -> set[str]:
    """The modules that can be reached from themselves."""
    reached = {module: set(found) for module, found in imports.items()}
    changed = True
    while changed:
        changed = False
        for found in reached.values():
            more = set().union(*(reached[other] for other in found)) - found
            if more:
                found |= more
                changed = True
    return {module for module, found in reached.items() if module in found}


def test_no_file_imports_itself_by_way_of_others():
    files = {".".join(module_of(path)).removesuffix(".__init__"): path for path in ALL_SOURCES}
    imports = {module: (imported_modules(path) & set(files)) - {module} for module, path in files.items()}
    assert {name_of(files[module]) for module in circles(imports)} == OFFENDERS["import circles"]


def launches(tree: ast.AST) -> Iterator[ast.AST]:
    """Calls `some_kernel[grid](...)` and `some_kernel.warmup(...)`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Subscript) and ast.unparse(node.func.value).endswith("kernel"):
            yield node
        if isinstance(node.func, ast.Attribute) and node.func.attr == "warmup":
            yield node


def calls(tree: ast.AST, *names: str) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names:
            yield node


def isinstance_of_data_sets(tree: ast.AST) -> Iterator[ast.AST]:
    for node in calls(tree, "isinstance"):
        if re.search(r"\b[A-Z]\w*(Dataset|Images|Folder|Packed|Shapes)\b", ast.unparse(node.args[1])):
            yield node


CAPABILITY = re.compile(r"\b(arch|archs|capability|compute_capability|major|sm)\b")
NUMBERS = re.compile(r"\b(7|8|9|10|11|12|70|75|80|86|87|89|90|100|103|110|120|121)\b")


def capability_numbers(tree: ast.AST) -> Iterator[ast.AST]:
    """Comparisons, defaults, keywords and assignments that give an architecture by number."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield from [node] if CAPABILITY.search(text := ast.unparse(node)) and NUMBERS.search(text) else []
        elif isinstance(node, ast.keyword):
            yield from [node.value] if node.arg and is_capability(node.arg, node.value) else []
        elif isinstance(node, ast.arguments):
            plain = [*node.posonlyargs, *node.args]
            pairs = zip(plain[len(plain) - len(node.defaults) :], node.defaults, strict=True)
            for argument, value in [*pairs, *zip(node.kwonlyargs, node.kw_defaults, strict=True)]:
                yield from [argument] if value is not None and is_capability(argument.arg, value) else []
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                yield from [node] if is_capability(ast.unparse(target), node.value) else []


def is_capability(name: str, value: ast.AST) -> bool:
    return bool(CAPABILITY.search(name.lower().replace("_", " ")) and NUMBERS.search(ast.unparse(value)))


RULES = {
    "launches": (launches, {"kernels/launch.py"}, ALL_SOURCES),
    "os.replace": (
        lambda tree: calls(tree, "os.replace", "os.rename", "shutil.move"),
        {"sagan_fast/files.py"},
        SOURCES,
    ),
    "isinstance of a data set": (isinstance_of_data_sets, "sagan_fast/data/", SOURCES),
    "capabilities": (capability_numbers, {"kernels/configs.py", "benchmarks/machine.py"}, ALL_SOURCES),
}


@pytest.mark.parametrize("rule", RULES)
def test_is_written_in_one_place_alone(rule):
    find, home, sources = RULES[rule]
    breaking = {}
    for path in sources:
        name = name_of(path)
        if name.startswith(home) if isinstance(home, str) else name in home:
            continue
        found = [node.lineno for node in find(tree_of(path))]
        if found:
            breaking[name] = found
    assert set(breaking) == OFFENDERS[rule], breaking


def test_the_table_in_contributing_names_every_folder():
    table = [line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("|")]
    top = ("kernels", "sagan_fast", "benchmarks", "tests", "docs", "findings", "examples")
    inner = [p for name in ("kernels", "sagan_fast") for p in (ROOT / name).iterdir() if (p / "__init__.py").exists()]
    folders = [name_of(p) for p in (*(ROOT / name for name in top), *inner) if p.is_dir()]
    missing = [folder for folder in folders if not any(f"`{folder}/`" in line for line in table)]
    assert not missing


def test_layout_rules_catch_what_they_should():
    assert imported_modules(ROOT / "kernels" / "checks.py") >= {"torch", "collections.abc"}
    assert part_of("sagan_fast.kernels.attention") == "kernels"
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == {"b", "c"}
    for find, code in [
        (launches, "_fwd_kernel[(1,)](x)"),
        (launches, "spy.kernel.warmup(x, grid=(1,))"),
        (lambda tree: calls(tree, "os.replace"), "import os\ndef f():\n    os.replace(a, b)"),
        (isinstance_of_data_sets, "isinstance(data, (int, PackedDataset))"),
        (capability_numbers, "if arch >= 90: pass"),
        (capability_numbers, "def f(arch=90): pass"),
        (capability_numbers, "f(arch=80)"),
        (capability_numbers, "INTERPRETED_ARCH = 90"),
    ]:
        assert list(find(ast.parse(code))), code
