"""``isthmus generate``: continues texts with a decoder, on one device or several."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from isthmus.cli.sharing import STRATEGY_HELP, Codec, Devices, Dtype, Refresh, Timeout, Weights, open_shared
from isthmus.spec.generation import Completion


def generate(
    model: Annotated[str, typer.Argument(help="Hugging Face id or checkpoint directory.")],
    prompt: Annotated[list[str] | None, typer.Option(help="What is to be continued; may be repeated.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A prompt in each line; - is standard input.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens for each prompt.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts, as a user's, into the chat template.")] = False,
    temperature: Annotated[float | None, typer.Option(min=0, help="Draw tokens. 0 or left out: greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among the k most likely tokens only.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest, of this probability together.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed draws the same tokens.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    devices: Devices = None,
    strategy: Annotated[Literal["auto", "tensor", "block"], typer.Option(help=STRATEGY_HELP)] = "auto",
    codec: Codec = "fp32",
    dtype: Dtype = "fp32",
    weights: Weights = None,
    refresh: Refresh = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines, as with several prompts.")] = False,
    timeout: Timeout = 60.0,
) -> None:
    """Continue texts, the same tokens as on one device.

    One prompt's text appears as it grows; several give JSON lines:
    {"prompt": …, "text": …, "num_tokens": …, "ended_by": …}.

        isthmus generate ./llama --prompt "Narrow links" --devices 192.168.1.10,192.168.1.11
        sudo isthmus testbed run -- isthmus generate ./llama --prompt "Narrow links" --dtype int8
    """
    from isthmus.inference.run import read_lines, request_of

    prompts = read_lines("prompt", prompt, prompt_file)
    request = request_of(model, prompts, batch_size=len(prompts), num_new_tokens=max_new_tokens)
    shared = {"strategy": strategy, "codec": codec, "dtype": dtype, "refresh": refresh}
    drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    with open_shared(model, request, devices=devices, weights=weights, timeout=timeout, **shared) as engine:
        if not engine.is_leader:
            engine.follow()
            return
        printer = _Printer(prompts, is_streaming=len(prompts) == 1 and not as_json)
        asked = {"max_new_tokens": max_new_tokens, "stop": stop or (), "chat": chat, **drawn}
        completions = engine.generate(prompts, stream=printer.tell, **asked)
    printer.end(completions)


class _Printer:
    """Text on stdout, as it grows or as JSON lines at the end; how fast it was on stderr, so that text can be piped."""

    def __init__(self, prompts: list[str], *, is_streaming: bool) -> None:
        self._prompts, self._is_streaming = prompts, is_streaming
        self._start_s = time.perf_counter()
        self._first_s: float | None = None

    def tell(self, number: int, piece: str) -> None:
        """``piece`` is the next of prompt ``number``."""
        if self._first_s is None:
            self._first_s = time.perf_counter()
        if self._is_streaming:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def end(self, completions: list[Completion]) -> None:
        end_s = time.perf_counter()
        if self._is_streaming:
            typer.echo()
        else:
            typer.echo("\n".join(map(_line, self._prompts, completions)))
        num_tokens = sum(len(completion.tokens) for completion in completions)
        first_s = (self._first_s or end_s) - self._start_s
        rate = num_tokens / (end_s - self._start_s)
        typer.echo(f"{num_tokens} tokens, the first after {first_s:.2f} s, {rate:.1f} tokens/s", err=True)


def _line(prompt: str, completion: Completion) -> str:
    content = {
        "prompt": prompt,
        "text": completion.text,
        "num_tokens": len(completion.tokens),
        "ended_by": completion.ended_by,
    }
    return json.dumps(content, ensure_ascii=False)
