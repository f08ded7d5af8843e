"""The keys and values of past tokens, of this device's heads only.

Shapes: L layers, B batch, G cached heads, C slots, T tokens, K slots in use, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """One request's. All of it is reserved at once; the system gives memory only to slots that are written.

    With a sliding window there are as many slots as the window is long, and a new token takes the place of the one
    that leaves it: keys carry their positions, so their order does not matter.
    """

    def __init__(self, *, num_layers: int, num_heads: int, head_size: int, capacity: int, attended_BT: Tensor) -> None:
        """``capacity``: the prompt and all new tokens, or the window if that is shorter. ``attended_BT`` is False where
        the prompt is padded."""
        batch, num_tokens = attended_BT.shape
        self.capacity = capacity
        self.num_tokens = num_tokens
        """Tokens so far, padding included."""
        self._kv = torch.empty(num_layers, batch, 2, num_heads, capacity, head_size)
        self.mask_B11C: Tensor | None = None
        """What a token may not see of the slots: -inf there, else 0. None where nothing was padded."""
        kept_BK = attended_BT[:, -capacity:]
        if not kept_BK.all():
            self.mask_B11C = torch.zeros(batch, 1, 1, capacity)
            self._in_slots(self.mask_B11C, torch.zeros(kept_BK.shape).masked_fill(~kept_BK, -torch.inf)[:, None, None])

    def fill(self, layer: int, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        """Keeps what a later token may see of the prompt's keys and values."""
        for slots_BGCD, new_BGTD in zip(self._kv[layer].unbind(1), (key_BGTD, value_BGTD), strict=True):
            self._in_slots(slots_BGCD.transpose(2, 3), new_BGTD[:, :, -self.capacity :].transpose(2, 3))

    def of_layer(self, layer: int) -> Tensor:
        """Keys, then values: (B, 2, G, C, D)."""
        return self._kv[layer]

    def next_slot(self) -> tuple[int, int]:
        """Makes room for one more token of each sequence: its slot, and how many are in use with it."""
        slot = self.num_tokens % self.capacity
        self.num_tokens += 1
        if self.mask_B11C is not None:
            self.mask_B11C[..., slot] = 0.0
        return slot, min(self.num_tokens, self.capacity)

    def add_token(self) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor | None]:
        """``next_slot``, as views. For every layer: where the new key and value go (B, 2, G, D), and the keys and
        values (B, G, K, D) that the token sees, itself among them. And their mask (B, 1, 1, K), if there is one."""
        slot, num_used = self.next_slot()
        new = self._kv.select(4, slot).unbind(0)
        used = self._kv.narrow(4, 0, num_used).unbind(0)
        views = [(new_B2GD, used_B2GKD[:, 0], used_B2GKD[:, 1]) for new_B2GD, used_B2GKD in zip(new, used, strict=True)]
        return views, None if self.mask_B11C is None else self.mask_B11C[..., :num_used]

    def _in_slots(self, slots: Tensor, kept: Tensor) -> None:
        """Writes the last tokens of the prompt (last dimension) where ``add_token`` will look for them."""
        num_kept = kept.shape[-1]
        if num_kept == self.capacity:
            kept = kept.roll(self.num_tokens % self.capacity, -1)
        slots[..., :num_kept] = kept
