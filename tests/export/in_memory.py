"""A stored tensor that is in memory after all."""

from __future__ import annotations

import torch


class InMemory:
    def __init__(self, content: torch.Tensor, *, mapped: bool = False) -> None:
        self.content, self.shape, self._mapped = content, tuple(content.shape), mapped

    def read_into(self, out: torch.Tensor) -> None:
        out.copy_(self.content)

    def mapped(self, dtype: torch.dtype) -> torch.Tensor | None:
        return self.content if self._mapped and dtype == self.content.dtype else None

    def elements(self, places: torch.Tensor) -> torch.Tensor:
        return self.content.flatten()[places]
