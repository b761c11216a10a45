"""Checkpoints for other programs: a plain Hugging Face folder, or ONNX files that were checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from qkv import hub
from qkv.errors import InputError
from qkv.export import onnx
from qkv.export.check import check
from qkv.files import expanded
from qkv.hub import Checkpoint
from qkv.hub import folder as folders

Format = Literal["hf", "onnx"]


def export(source: str | Path, folder: str | Path, format: Format) -> dict[str, Any]:
    """Write a checkpoint, a folder or a Hub id, to a folder: an adapter as the whole model that it makes.

    Returns what to tell of it. Raises InputError if the folder holds another one, and like `hub.load`,
    `hub.save` and `save_onnx`. Earlier ONNX files in the folder are replaced.
    """
    folder = expanded(folder)
    if format == "hf" and folders.holds_checkpoint(folder):
        raise InputError(f"{folder} holds a checkpoint, which would be lost: give another folder")
    if format == "onnx":
        check_free(folder)
        largest = save_onnx(folder, hub.load(source))
        written = sorted(path.name for path in folder.glob("*.onnx*"))
        return {"folder": str(folder), "files": written, "largest_difference": largest}
    hub.save(folder, hub.load(source))
    return {"folder": str(folder)}


def check_free(folder: Path) -> None:
    """Raise InputError if ONNX files cannot go to this folder: torch's weights there would go."""
    onnx.check_installed()
    for name in (folders.WEIGHTS, folders.INDEX, folders.ADAPTER_WEIGHTS):
        if (folder / name).exists():
            raise InputError(f"{folder} has a {name}, which ONNX files would replace: give another folder")


def save_onnx(folder: str | Path, checkpoint: Checkpoint) -> float:
    """Write a checkpoint's folder with ONNX files in place of model.safetensors, whole or not at all.

    The model must be on the CPU, in float32, as `hub.load` gives it. Returns the largest difference
    between its answers and those of ONNX Runtime on ragged sizes. Raises InputError if they are not the
    same, if a package is missing, or like `hub.save`.
    """
    onnx.check_installed()
    differences: list[float] = []

    def write(staging: Path) -> None:
        for file, graph in onnx.graphs(checkpoint).items():
            onnx.write(staging / file, graph)
        differences.append(check(checkpoint, onnx.Runtime(staging).run))

    hub.save(folder, checkpoint, write)
    return differences[0]
