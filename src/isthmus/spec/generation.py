"""How a text is to be continued, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from isthmus.spec.errors import IsthmusError


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Greedy unless ``temperature``, ``top_k`` or ``top_p`` is given; with ``temperature`` 0 whatever the others."""

    schema_version: int = 1
    max_new_tokens: int = 128
    temperature: float | None = None
    top_k: int | None = None
    """Only so many words, the best, can be drawn."""
    top_p: float | None = None
    """Only the best words, which together have at least this probability, can be drawn."""
    seed: int | None = None
    end_tokens: tuple[int, ...] = ()
    """What ends a sequence; the token itself belongs to it."""
    padding_token: int = 0
    """What stands behind a sequence that has ended before others of its batch."""

    def __post_init__(self) -> None:
        wanted = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (self.temperature is None or 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_k": (self.top_k is None or self.top_k >= 1, "1 or more"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0, at most 1"),
            "seed": (self.seed is None or 0 <= self.seed < 1 << 63, "0 … 2**63 - 1"),
        }
        for name, (is_right, what) in wanted.items():
            if not is_right:
                raise IsthmusError(f"{name}: got {getattr(self, name)}, wanted {what}")

    @property
    def is_sampling(self) -> bool:
        """Tokens are drawn; else each is the most likely one."""
        if self.temperature is None:
            return self.top_k is not None or self.top_p is not None
        return self.temperature > 0


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a prompt was continued with. ``tokens`` are the new ones, with the one that ended them; ``text`` is theirs,
    without special tokens and without the text that stopped it."""

    text: str
    tokens: tuple[int, ...]
    num_prompt_tokens: int
    ended_by: Literal["end", "stop", "length"]
    """A token that ends texts, one of the texts to stop at, or ``max_new_tokens``."""
