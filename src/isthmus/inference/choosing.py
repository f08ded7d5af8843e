"""Which token comes next: each device scores its words, and all devices end with the same choice.

Greedy, every device tells its best word and all pick the same one. Sampling, the first device draws from what the
others tell it (all their scores, or the best ``top_k`` of each, among which the best of all must be), and tells them.

Shapes: B batch, H hidden size, V words of the model, v of one device, N devices, k candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from isthmus.inference.kernels import Kernels
from isthmus.inference.linear import make_linear
from isthmus.models.shards import ShardReader
from isthmus.spec.generation import GenerationSettings
from isthmus.spec.transformer import Range
from isthmus.transport.base import Group


class Head:
    """The scores of one device's words. ``words`` are those of each device, ``num_bytes`` what this one's take."""

    def __init__(
        self, reader: ShardReader, words: Sequence[Range], rank: int, dtype: str, kernels: Kernels | None = None
    ) -> None:
        name = "token.weight" if reader.spec.is_head_tied else "head.weight"
        self.words = words
        self.own_words = words[rank]
        self._linear = make_linear(reader.read(name, rows=self.own_words), None, dtype, kernels)
        self.num_bytes = self._linear.num_bytes

    def __call__(self, hidden_BH: Tensor) -> Tensor:
        """Scores (B, v), FP32."""
        return self._linear(hidden_BH) if len(self.own_words) else hidden_BH.new_empty(len(hidden_BH), 0)


class Chooser:
    """Chooses the tokens of one request. ``choose`` is called on all devices together."""

    def __init__(self, head: Head, group: Group | None, settings: GenerationSettings) -> None:
        """The seed matters on the first device only. The draw is transformers': the same seed gives the same tokens as
        ``generate`` there."""
        self._head, self._group = head, group
        self._is_sampling, self._top_k = settings.is_sampling, settings.top_k
        self._warpers = _warpers(settings)
        self._generator = torch.Generator()
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed)

    def choose(self, hidden_BH: Tensor, *, stop: bool = False) -> tuple[list[int], bool]:
        """The next token of each sequence, and whether the first device said ``stop``."""
        scores_Bv = self._head(hidden_BH)
        if self._is_sampling:
            return self._draw(scores_Bv, stop)
        if self._group is None:
            return scores_Bv.argmax(-1).tolist(), stop
        return self._best_of_all(self._group, scores_Bv, stop)

    def _best_of_all(self, group: Group, scores_Bv: Tensor, stop: bool) -> tuple[list[int], bool]:
        # FP32 carries word numbers up to 2**24 exactly.
        told_N3B = torch.empty(group.world_size, 3, len(scores_Bv))
        told = told_N3B.unbind(0)
        own_3B = told[group.rank]
        if scores_Bv.shape[1]:
            best_B, index_B = scores_Bv.max(-1)
            own_3B[0] = best_B
            own_3B[1] = index_B + self._head.own_words.start
        else:
            own_3B[0] = -torch.inf
        own_3B[2] = stop
        group.all_gather(told, own_3B)
        best_1B = told_N3B[:, 0].argmax(0, keepdim=True)  # of equals the first, as on one device
        ids_B = told_N3B[:, 1].gather(0, best_1B)[0]
        return ids_B.long().tolist(), bool(told_N3B[0, 2, 0])

    def _draw(self, scores_Bv: Tensor, stop: bool) -> tuple[list[int], bool]:
        scores_BV = scores_Bv if self._group is None else self._gather(self._group, scores_Bv)
        told = torch.empty(len(scores_Bv) + 1, dtype=torch.int64)
        if scores_BV is not None:
            no_ids: Tensor = torch.empty(len(scores_BV), 0, dtype=torch.int64)  # none of the warpers looks at them
            probabilities_BV = self._warpers(no_ids, scores_BV).softmax(-1)  # pyright: ignore[reportArgumentType]
            told[:-1] = torch.multinomial(probabilities_BV, 1, generator=self._generator)[:, 0]
            told[-1] = stop
        if self._group is not None:
            self._group.broadcast(told)
        *ids, is_stopped = told.tolist()
        return ids, bool(is_stopped)

    def _gather(self, group: Group, scores_Bv: Tensor) -> Tensor | None:
        """The first device's (B, V), -inf for words that ``top_k`` excludes for sure. None on the others."""
        batch, words = len(scores_Bv), self._head.words
        counts = [len(part) if self._top_k is None else min(self._top_k, len(part)) for part in words]
        told = scores_Bv
        if self._top_k is not None:
            best_Bk, index_Bk = scores_Bv.topk(counts[group.rank], -1)
            told = torch.stack((best_Bk, (index_Bk + self._head.own_words.start).float()))
        sizes = [count * batch * (1 if self._top_k is None else 2) for count in counts]
        if group.rank != 0:
            group.gather(None, told.contiguous())
            return None
        outputs = torch.empty(sum(sizes)).split(sizes)
        group.gather(outputs, told.contiguous())
        scores_BV = scores_Bv.new_full((batch, words[-1].stop), -torch.inf)
        for part, count, own in zip(outputs, counts, words, strict=True):
            if self._top_k is None:
                scores_BV[:, own.start : own.stop] = part.view(batch, count)
            else:
                best_Bk, index_Bk = part.view(2, batch, count)
                scores_BV.scatter_(1, index_Bk.long(), best_Bk)
        return scores_BV


def _warpers(settings: GenerationSettings) -> LogitsProcessorList:
    """transformers' own, in its order."""
    warpers = LogitsProcessorList()
    if settings.temperature is not None and settings.temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k is not None:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None and settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    return warpers
