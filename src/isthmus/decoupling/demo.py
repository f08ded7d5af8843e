"""The part of ``isthmus demo`` that decouples: a small language model learns real text, its decoupled copy follows it.

Needs no download: the text is the standard library's source.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from rich.console import Console
from transformers import LlamaConfig

from isthmus.data import standard_library_text
from isthmus.decoupling.plan import plan_decouple
from isthmus.decoupling.pretraining import pretrain
from isthmus.decoupling.run import decouple
from isthmus.spec.errors import IsthmusError

TEXT_BYTES = 3_000_000
MINUTES = 2.0
LAYERS = 6
_TRAINED, _DECOUPLED = Path("trained", "original"), Path("decoupled")
"""Below the output, the models that come of it."""


def run_decouple_demo(output: Path, *, minutes: float = MINUTES) -> None:
    """Writes the model, its decoupled copy, a report and the curve of fidelity below ``output``, replacing an earlier
    demo's. Blocks for one and a half times ``minutes`` and a little more."""
    console = Console(stderr=True)
    if output.exists():
        shutil.rmtree(output)
    with tempfile.TemporaryDirectory(prefix="isthmus-demo-") as scratch:
        text = Path(scratch) / "text"
        text.mkdir()
        for number, document in enumerate(standard_library_text(TEXT_BYTES)):
            (text / f"{number:04d}.txt").write_text(document)
        small_llama().save_pretrained(scratch)
        config, model = Path(scratch) / "config.json", output / _TRAINED
        pretrain(config, data=[text], output=model.parent, sub_blocks=1, minutes=minutes / 2, learning_rate=2e-3)
        console.print(plan_decouple(model, sub_blocks=None, groups=2))
        decouple(model, output=output / _DECOUPLED, text=[text], sub_blocks=4, groups=2, minutes=minutes)


def demo_models(output: Path) -> tuple[Path, Path]:
    """The model and its decoupled copy that ``run_decouple_demo`` has written below ``output``. Raises ``IsthmusError``
    where it has not."""
    model, copy = output / _TRAINED, output / _DECOUPLED
    for directory in (model, copy):
        if not (directory / "config.json").is_file():
            raise IsthmusError(
                f"demo: there is no model in {directory}; run this first: isthmus demo --only decouple --output "
                f"{output.parent}"
            )
    return model, copy


def small_llama() -> LlamaConfig:
    """6 million parameters."""
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
