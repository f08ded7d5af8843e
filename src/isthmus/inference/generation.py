"""Generation on one device of those that answer together: the same loop runs on all, and the first one watches it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from isthmus.inference.block_decoding import BlockDecoding
from isthmus.inference.choosing import Chooser, Head
from isthmus.inference.decoding import Decoding
from isthmus.inference.strategies.base import Strategy, Tokens
from isthmus.inference.strategies.block_parallel import BlockParallel
from isthmus.inference.strategies.tensor_parallel import TensorParallel
from isthmus.models.shards import ShardReader
from isthmus.planning.shares import divide_layer
from isthmus.spec.errors import IsthmusError
from isthmus.spec.generation import GenerationSettings
from isthmus.spec.inference import GENERATING, InferencePlan, InferenceRequest
from isthmus.spec.transformer import LayerShare

OnTokens = Callable[[list[int]], bool]
"""Gets the token that each sequence was continued with; true ends the request early, one token later."""


class Generation:
    """Continues prompts. Reads this device's part of the head when it is made."""

    def __init__(self, strategy: Strategy, reader: ShardReader, plan: InferencePlan) -> None:
        """Raises ``IsthmusError`` for an encoder, and for a plan that divides tokens."""
        check_can_generate(reader, plan)
        assert isinstance(strategy, (TensorParallel, BlockParallel))
        self._strategy = strategy
        group = strategy.group
        shares = [LayerShare.whole(reader.spec)] if group is None else divide_layer(reader.spec, plan.weights)
        rank = 0 if group is None else group.rank
        reader.release()  # the model keeps the files mapped as they are, for its tables
        self._head = Head(reader, [share.vocabulary for share in shares], rank, plan.dtype, strategy.model.kernels)
        reader.release()

    @torch.inference_mode()
    def run(
        self,
        ids_BT: Tensor,
        attended_BT: Tensor,
        settings: GenerationSettings,
        on_tokens: OnTokens = lambda ids: False,
        given: Sequence[Sequence[int]] = (),
    ) -> Tensor:
        """The new tokens (B, n) int64, the same on every device; n is at most ``settings.max_new_tokens``. Prompts are
        padded on the left. Behind the end of a sequence comes padding. ``given``: the first tokens of each sequence
        (n, B), the same on every device, which somebody has seen already: under another plan a sum that is rounded
        otherwise could lead to others. Blocks on the other devices."""
        tokens, num_more = Tokens.of(ids_BT, attended_BT, is_decoder=True), settings.max_new_tokens - 1
        if isinstance(self._strategy, BlockParallel):
            decoding = BlockDecoding(self._strategy, tokens, num_more)
        else:
            decoding = Decoding(self._strategy, tokens, num_more)
        chooser = Chooser(self._head, self._strategy.group, settings)
        is_open = [True] * len(ids_BT)
        found: list[list[int]] = []
        stop = False
        hidden_BH = decoding.prefill()
        while True:
            ids, is_stopped = chooser.choose(hidden_BH, stop=stop)
            if is_stopped:
                break
            if len(found) < len(given):
                ids = given[len(found)]  # chosen all the same, so that what is drawn later does not change
            ids = [
                token if unfinished else settings.padding_token for token, unfinished in zip(ids, is_open, strict=True)
            ]
            is_open = [
                unfinished and token not in settings.end_tokens for token, unfinished in zip(ids, is_open, strict=True)
            ]
            found.append(ids)
            stop = on_tokens(ids)
            if len(found) == settings.max_new_tokens or not any(is_open):
                break
            hidden_BH = decoding.step(torch.tensor(ids))
        return torch.tensor(found).T


def check_can_generate(reader: ShardReader, plan: InferencePlan) -> None:
    """Raises ``IsthmusError`` if nothing can be generated from this model under this plan."""
    if not reader.spec.is_decoder:
        raise IsthmusError(
            f"model: {reader.spec.model_type!r} is an encoder; wanted a decoder, such as llama, to generate"
        )
    if plan.strategy not in ("single", "tensor", "block"):
        raise IsthmusError(
            f"strategy: got {plan.strategy!r}, wanted 'tensor' to generate: devices divide heads, not tokens or layers"
        )
    if divided := set(plan.originals) - set(GENERATING):
        raise IsthmusError(
            f"originals: got {', '.join(sorted(divided))}, wanted gather or tensor to generate: every device needs all "
            "of the last token"
        )
    if plan.algorithm == "scatter":
        raise IsthmusError("algorithm: got 'scatter', wanted another to generate: every device needs the last token")


def check_request(reader: ShardReader, request: InferenceRequest) -> None:
    """Raises ``IsthmusError`` for what cannot be asked of the model on any devices."""
    most = reader.spec.max_num_tokens
    if request.num_tokens > most:
        raise IsthmusError(f"tokens: got {request.num_tokens}, wanted at most the {most} it allows")
    if request.num_new_tokens:
        check_can_generate(reader, InferencePlan.even("single", 1))
        check_length(reader, request.num_tokens, request.num_new_tokens)


def check_length(reader: ShardReader, num_prompt_tokens: int, max_new_tokens: int) -> None:
    """Raises ``IsthmusError`` where the model does not know so many positions."""
    allowed = reader.spec.max_num_tokens
    if num_prompt_tokens == 0:
        raise IsthmusError("prompt: got no token, wanted one or more")
    if num_prompt_tokens >= allowed:
        raise IsthmusError(
            f"prompt: {num_prompt_tokens} tokens, and {reader.spec.model_type} at {reader.directory} allows {allowed} "
            "with what follows; shorten it"
        )
    if num_prompt_tokens + max_new_tokens > allowed:
        raise IsthmusError(
            f"max_new_tokens: got {max_new_tokens} after a prompt of {num_prompt_tokens} tokens, and "
            f"{reader.spec.model_type} at {reader.directory} allows {allowed}; "
            f"wanted at most {allowed - num_prompt_tokens}"
        )
