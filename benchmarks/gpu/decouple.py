"""Decoupling on a real GPU: twins of BERT-base's size from scratch, the original decoupled, both evaluated and timed.

Run it from the repository's root:

    python -m benchmarks.gpu.decouple --rehearse                       # every stage at toy size on the CPU
    python -m benchmarks.gpu.decouple --scratch DIR --minutes 90 [--data wiki.txt] [--task sst2/]

Half of ``--minutes`` goes to the twins (masked words, sequences of 128 tokens), the rest to two decoupled copies of the
trained original, 4 and 2 sub-blocks. Without ``--data`` the text is the standard library's source. ``results.json`` is
written after each stage, so a run that is cut off keeps what it has; ``pretrain`` and ``decouple`` resume.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, BertConfig

from isthmus.data import standard_library_text
from isthmus.decoupling.pretraining import pretrain
from isthmus.decoupling.run import decouple
from isthmus.evaluation.run import evaluate
from isthmus.reporting.environment import environment
from isthmus.spec.files import atomic_write
from isthmus.spec.serialization import to_json

TEXT_BYTES = 30_000_000
BASE = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=16_384)
TOY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=512)
TOKENS = 128
TIMED = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, default=Path("gpu-decouple"))
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--data", action="append", help="text; may be repeated")
    parser.add_argument("--task", action="append", default=[], help="as in isthmus evaluate; may be repeated")
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--rehearse", action="store_true", help="toy size on the CPU; times mean nothing")
    arguments = parser.parse_args()
    if arguments.rehearse:
        arguments.minutes, arguments.batch_tokens = 0.2, 512
    elif not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here; --rehearse runs every stage at toy size on the CPU")
    _Run(arguments).run()


class _Run:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.scratch = arguments, arguments.scratch
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.device = "cpu" if arguments.rehearse else "cuda"
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
        self.results: dict[str, Any] = {"config": plain, "environment": environment()}

    def run(self) -> None:
        text = self.arguments.data or [self._text()]
        shape = TOY if self.arguments.rehearse else BASE
        config = self.scratch / "config.json"
        BertConfig(**shape, max_position_embeddings=TOKENS).to_json_file(config)  # type: ignore[arg-type]
        groups = shape["num_hidden_layers"] // 3
        common: dict[str, Any] = {"device": self.device, "batch_tokens": self.arguments.batch_tokens, "resume": True}
        twins = self.scratch / "twins"
        report = pretrain(
            config, data=text, output=twins, sub_blocks=4, groups=groups, minutes=self.arguments.minutes / 2, **common
        )
        self._keep("twins", report)
        original, copies = twins / "original", []
        for number in (4, 2):
            copies.append(self.scratch / f"decoupled-{number}")
            report = decouple(
                original,
                output=copies[-1],
                text=text,
                sub_blocks=number,
                groups=groups,
                minutes=self.arguments.minutes / 4,
                **common,
            )
            self._keep(f"decoupled_{number}", report)
        models = [original, *copies]
        self._keep("latency_ms", {str(model): self._latency_ms(model) for model in models})
        texts = () if self.arguments.task else tuple(map(str, text))
        report = evaluate(models, tasks=self.arguments.task, text=texts, device=self.device)
        self._keep("evaluation", report)

    def _text(self) -> Path:
        path = self.scratch / "text.txt"
        if not path.exists():
            num_bytes = 1_000_000 if self.arguments.rehearse else TEXT_BYTES
            atomic_write(path, "\n".join(standard_library_text(num_bytes)))
        return path

    def _latency_ms(self, directory: Path) -> float:
        """Median time of one request of 128 tokens."""
        model = AutoModel.from_pretrained(directory).eval().to(self.device)
        ids = torch.randint(model.config.vocab_size, (1, TOKENS), device=self.device)
        times_ms = []
        with torch.inference_mode():
            for _ in range(TIMED):
                begun_s = time.perf_counter()
                model(input_ids=ids)
                if self.device == "cuda":
                    torch.cuda.synchronize()
                times_ms.append((time.perf_counter() - begun_s) * 1e3)
        return statistics.median(times_ms[TIMED // 5 :])

    def _keep(self, stage: str, result: Any) -> None:
        self.results[stage] = result if isinstance(result, dict) else json.loads(to_json(result))
        atomic_write(self.scratch / "results.json", json.dumps(self.results, indent=1))


if __name__ == "__main__":
    main()
