"""Language modelling on text of the user's own."""

from __future__ import annotations

from pybatch.workloads.base import register
from pybatch.workloads.text import Text


@register
class TextFile(Text):
    """Predict the next byte of text of yours: a UTF-8 file (`data`), or all files ending in .txt below a folder."""

    name = "textfile"

    def __init__(
        self,
        data: str,
        model: str | None = None,
        *,
        size: str = "tiny",
        length: int = 16,
        vocabulary: int = 256,
        subset: float = 1.0,
    ) -> None:
        super().__init__(model, data, size=size, length=length, vocabulary=vocabulary, subset=subset)
