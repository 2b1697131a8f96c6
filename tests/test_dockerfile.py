"""The Dockerfile copies what the package is made of, and .dockerignore lets no more and no less through."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "Dockerfile").read_text().splitlines()
SETUP = (ROOT / "setup.py").read_text()


def copied():
    return {name for line in LINES if line.startswith("COPY ") for name in line.split()[1:-1]}


def test_what_is_copied_exists_and_is_what_is_let_through():
    ignored, *kept = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored == "*" and {line[1:] for line in kept if line.startswith("!")} == copied()
    assert all((ROOT / name).exists() for name in copied())


def test_the_package_needs_nothing_that_is_not_copied():
    roots = {path.split("/")[0] for path in re.findall(r'"([a-z_]+)"', re.search(r"package_dir=(\{.*\})", SETUP)[1])}
    assert {"kernels", "sagan_fast"} <= roots & copied() and {"setup.py", "pyproject.toml"} <= copied()


def test_its_extras_and_its_command_are_those_of_the_package():
    (extras,) = (re.search(r"\.\[(.*)\]", line) for line in LINES if "pip install" in line)
    assert all(re.search(rf'^        "{name}": ', SETUP, re.MULTILINE) for name in extras[1].split(","))
    (entry,) = (line.partition(" ")[2] for line in LINES if line.startswith("ENTRYPOINT"))
    assert f'"{ast.literal_eval(entry)[0]} = ' in SETUP
