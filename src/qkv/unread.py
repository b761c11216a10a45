"""Tensors that are still on disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch import Tensor, nn


class Unread:
    """Tensors of an open checkpoint that a model waits for; each is read once."""

    def __init__(self, waiting: Mapping[str, Callable[[], Tensor]]) -> None:
        """waiting: what reads each, by its name in the model."""
        self._waiting = dict(waiting)

    def into(self, module: nn.Module, prefix: str = "", but: Collection[str] = ()) -> None:
        """Give a module the tensors that are its own; in the model their names begin with `prefix`.

        but: modules of the model whose tensors go on waiting.
        """
        later = tuple(f"{name}." for name in but)
        names = [name for name in self._waiting if name.startswith(prefix) and not name.startswith(later)]
        read = {name.removeprefix(prefix): self._waiting.pop(name)() for name in names}
        unexpected = module.load_state_dict(read, strict=False, assign=True).unexpected_keys
        assert not unexpected, f"{prefix} has no {unexpected}"
