"""The public names: complete, and free until they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qkv


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, qkv; print([m for m in ('torch', 'numpy', 'qkv.errors') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    for name in qkv.__all__:
        assert getattr(qkv, name) is not None
    assert dir(qkv) == sorted(qkv.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'frompretrained'"):
        qkv.frompretrained  # noqa: B018


def test_type_checkers_see_the_names_where_they_are() -> None:
    """The imports that only type checkers read name the same homes as those at run time."""
    tree = ast.parse(Path(qkv.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    homes = {
        node.module: tuple(a.name for a in node.names) for node in imports if node.module.startswith("qkv.")
    }
    assert homes == qkv._HOMES
    assert sorted(name for names in homes.values() for name in names) == sorted(qkv.__all__)
