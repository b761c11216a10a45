"""A full disk stops a run in one line; its last state is whole, and the run goes on when there is room."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_kills import assert_same_run
from test_train import run_config

from qkv.config import write_toml

MIB = 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={8 * MIB}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"this user may not mount a small file system ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
