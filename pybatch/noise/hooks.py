"""A hook of the one model it was put on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Hook:
    """Calls `call`, but in the model it was put on alone.

    `copy.deepcopy(model)` (an average of weights, say) and a saved model take the model's hooks along. A copied handle
    would watch passes that are none of its training's, so there the hook does nothing.
    """

    def __init__(self, call: Callable[..., Any] | None) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if self._call is None else self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None)

    def __reduce__(self) -> tuple[type[Hook], tuple[None]]:
        return Hook, (None,)
