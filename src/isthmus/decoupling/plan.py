"""``isthmus decouple --plan``: what each form would gain on devices, and how far it is from the original untrained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from isthmus.data import load_tokenizer, pad_token_id
from isthmus.decoupling.corpus import Corpus, read_corpus
from isthmus.decoupling.distillation import Distiller, Faithfulness, autocast
from isthmus.decoupling.pair import Source, Wanted, open_source, quiet
from isthmus.decoupling.slicing import fit_weights
from isthmus.models.transformer_families import read_family
from isthmus.planning.decoupling import DecouplingGain, forms, gain_of
from isthmus.reporting.progress import TrainingProgress
from isthmus.reporting.tables import stacked
from isthmus.spec.units import parse_bits_per_s
from isthmus.training.batches import fixed_batches

FIT_TEXTS = 512
TOKENS = 128
BANDWIDTHS = ("1000mbit", "125mbit", "50mbit")
OPERATIONS_PER_S = 24e9
"""A Raspberry Pi 4B's class, FP32."""


def plan_decouple(
    model: str | Path,
    *,
    sub_blocks: int | None,
    groups: int | None = None,
    original_layers: Sequence[int] | None = None,
    text: Sequence[str | Path] = (),
    plain: bool | None = None,
) -> Table:
    """A table of forms: those that ``sub_blocks`` (None: 2, 4 and 8) and ``groups`` or ``original_layers`` leave open.

    With ``text`` each is fitted to it and compared with the original, untrained (half a minute each). Raises
    ``IsthmusError`` for a model that cannot be decoupled and for forms that do not fit it.
    """
    quiet()
    source = open_source(model)
    wanted = _forms(source, sub_blocks, groups, original_layers)
    _, _, spec = read_family(source.directory)
    gains = [
        gain_of(
            spec,
            one.sub_blocks,
            one.original_layers or (),
            tokens=TOKENS,
            operations_per_s=OPERATIONS_PER_S,
            bandwidths_bytes_per_s=[parse_bits_per_s(bandwidth) / 8 for bandwidth in BANDWIDTHS],
        )
        for one in wanted
    ]
    results = _untrained(source, wanted, text, plain) if text else [None] * len(wanted)
    return _table(gains, results)


def _forms(
    source: Source, sub_blocks: int | None, groups: int | None, original_layers: Sequence[int] | None
) -> list[Wanted]:
    """Forms to weigh, each with its original layers, checked against the model."""
    config: Any = source.config
    all_forms = forms(config.num_hidden_layers, config.hidden_size) if hasattr(config, "num_hidden_layers") else []
    chosen = [form for form in all_forms if sub_blocks in (None, form[0])] or [(sub_blocks or 2, None)]
    found = []
    for num, originals in chosen:
        layers = original_layers or (originals if groups is None else None)
        asked = Wanted(sub_blocks=num, groups=groups, original_layers=None if layers is None else tuple(layers))
        checked: Any = asked.config(source.config)
        found.append(Wanted(sub_blocks=num, original_layers=tuple(checked.original_layers)))
    return list(dict.fromkeys(found))


def _untrained(
    source: Source, wanted: Sequence[Wanted], text: Sequence[str | Path], plain: bool | None
) -> list[Faithfulness]:
    with TrainingProgress(0, title="isthmus decouple --plan", plain=plain) as progress:
        progress.phase("reading text")
        tokenizer = load_tokenizer(source.directory)
        corpus: Corpus = read_corpus(text, tokenizer, seq_len=TOKENS, is_windows=source.is_causal)
        padding = pad_token_id(tokenizer)
        batches = fixed_batches(corpus.texts[:FIT_TEXTS], 4096, padding)
        held_out = fixed_batches(corpus.held_out, 4096, padding)
        original = source.load()
        results = []
        for one in wanted:
            decoupled = source.decoupled(original, one.config(source.config))
            what = f"fitting {one.sub_blocks} sub-blocks ({len(results) + 1} of {len(wanted)})"
            with autocast(torch.device("cpu"), "bf16"):
                fit_weights(original, decoupled, batches, progress=lambda share, what=what: progress.phase(what, share))
            results.append(Distiller(original, decoupled).evaluate(held_out))
        return results


def _table(gains: Sequence[DecouplingGain], results: Sequence[Faithfulness | None]) -> Table:
    table = Table(
        box=None,
        pad_edge=False,
        title=f"One request of {TOKENS} tokens on as many devices as sub-blocks; times by the original's on one",
        caption="Times are bounds at 24 GFLOP/s a device (a Raspberry Pi 4B's class), FP32 on the wire. How close a "
        "form comes to the original is known after training: isthmus decouple, isthmus evaluate.",
    )
    names = ["sub-blocks", "original layers", "exchanges", "KB sent", "÷ tensor parallel", "weights a device"]
    names += [f"time at {name.removesuffix('mbit')} Mbit/s" for name in BANDWIDTHS]
    if any(results):
        names.append("untrained")
    for name in names:
        table.add_column(stacked(name), justify="right")
    for gain, result in zip(gains, results, strict=True):
        cells = [
            str(gain.num_sub_blocks),
            ",".join(map(str, gain.original_layers)),
            str(gain.num_exchanges),
            f"{gain.sent_bytes / 1000:,.0f}",
            f"{gain.sent_bytes / gain.tensor_parallel_sent_bytes:.2f}",
            f"{gain.weight_ratio:.2f}",
            *(f"{ratio:.2f}" for ratio in gain.time_ratios),
        ]
        table.add_row(*cells, *([] if result is None else [result.describe()]))
    return table
