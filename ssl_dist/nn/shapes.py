"""Networks that have shapes and no values: tensors on torch's meta device take no memory."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_DRAWS = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """A context in which modules are built on the meta device."""
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchDispatchMode):
    """Initial values are not drawn. To draw on the meta device, torch imports sympy and torch._dynamo: more than a
    second of a command that needs neither."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if function in _DRAWS and args[0].is_meta else function(*args, **(kwargs or {}))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch asks this of a mode. To keep torch._dynamo out of it, torch would import it."""
        return False
