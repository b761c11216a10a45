"""The house is as docs/architecture.md says: every file has a room, and imports only from rooms above it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "qkv"
ENTRANCES = {"__init__.py", "__main__.py"}
"""They name what others hold."""


def rooms() -> list[str]:
    """Files and folders of the table, from the ground up."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    first_cells = re.findall(r"(?m)^\| ((?:`[\w/.]+`(?:, )?)+) \|", text)
    return [name for cell in first_cells for name in re.findall(r"`([\w/.]+)`", cell)]


def room(path: Path, rooms: list[str]) -> int:
    """The number of a source file's room."""
    name = path.relative_to(SOURCE).as_posix()
    found = [i for i, r in enumerate(rooms) if name == r or (r.endswith("/") and name.startswith(r))]
    assert found, f"{name} has no room in docs/architecture.md"
    return found[0]


def imported(path: Path) -> set[Path]:
    """The files of this package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qkv":
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            places = [SOURCE.joinpath(*name.split(".")[1:]) for name in names]
            found |= {file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")}
    return {file for file in found if file.is_file()} - {SOURCE / "__init__.py"}


def test_imports_run_one_way():
    order = rooms()
    files = [f for f in sorted(SOURCE.rglob("*.py")) if f.relative_to(SOURCE).as_posix() not in ENTRANCES]
    for file in files:
        for other in imported(file):
            assert room(other, order) <= room(file, order), f"{file.name} imports {other.name}"


def test_every_room_is_there():
    assert [name for name in rooms() if not (SOURCE / name).exists()] == []
