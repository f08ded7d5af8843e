"""A decoupled model on one device beside its original: one request, interleaved, medians and their ratio.

    python benchmarks/decoupled.py [--shapes minilm,bert-base] [--sub-blocks 2,4] [--tokens 128] [--repeats 30]

Random weights, which are as fast as trained ones; both as ``AutoModel`` gives them, FP32. The bound of the ratio is
that of multiplications: projections are as many in both, attention's scores are as many times more as there are
sub-blocks, in the layers that are decoupled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from transformers import AutoModel, BertConfig

import isthmus.models.decoupled.architectures  # noqa: F401  decoupled models register themselves
from isthmus.models.decoupled.configs import decoupled_config
from isthmus.reporting.environment import environment

SHAPES: dict[str, dict[str, int]] = {
    "minilm": dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12),
    "bert-base": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="minilm,bert-base")
    parser.add_argument("--sub-blocks", default="2,4")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for shape in arguments.shapes.split(","):
        counts = [int(count) for count in arguments.sub_blocks.split(",")]
        for row in measure(shape, counts, arguments.tokens, arguments.repeats):
            rows.append(row)
            print(
                f"{row['shape']:>10} {row['num_sub_blocks']} sub-blocks, {row['tokens']} tokens: "
                f"{row['median_ms']:.1f} ms, {row['ratio']:.3f} of the original's "
                f"(10th to 90th percentile {row['ratio_p10']:.3f} to {row['ratio_p90']:.3f}; "
                f"bound {row['bound_ratio']:.3f})"
            )
    print(json.dumps({"config": vars(arguments), "environment": environment(), "rows": rows}))


def measure(shape: str, counts: list[int], tokens: int, repeats: int) -> list[dict[str, Any]]:
    """A row a number of sub-blocks; the ratio is of neighbours in time."""
    base = BertConfig(**SHAPES[shape])  # type: ignore[arg-type]
    num_layers = base.num_hidden_layers
    originals = list(range(2, num_layers, 3))
    models: dict[int, Any] = {1: AutoModel.from_config(base, attn_implementation="sdpa").eval()}
    for count in counts:
        config = decoupled_config(base, {"num_sub_blocks": count, "original_layers": originals})
        models[count] = AutoModel.from_config(config, attn_implementation="sdpa").eval()
    ids = torch.randint(base.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    times: dict[int, list[float]] = {count: [] for count in models}
    with torch.inference_mode():
        for repeat in range(repeats + 3):
            for count, model in models.items():
                begun_s = time.perf_counter()
                model(input_ids=ids)
                if repeat >= 3:
                    times[count].append(time.perf_counter() - begun_s)
    rows = []
    for count in counts:
        ratios = sorted(ours / theirs for ours, theirs in zip(times[count], times[1], strict=True))
        rows.append(
            {
                "shape": shape,
                "num_sub_blocks": count,
                "original_layers": originals,
                "tokens": tokens,
                "median_ms": statistics.median(times[count]) * 1e3,
                "original_median_ms": statistics.median(times[1]) * 1e3,
                "ratio": statistics.median(ratios),
                "ratio_p10": ratios[len(ratios) // 10],
                "ratio_p90": ratios[-1 - len(ratios) // 10],
                "bound_ratio": bound_ratio(base, count, len(originals), tokens),
            }
        )
    return rows


def bound_ratio(base: Any, num_sub_blocks: int, num_originals: int, tokens: int) -> float:
    """Multiplications of the decoupled model by those of its original."""
    hidden = base.hidden_size
    projections = 4 * hidden * hidden + 2 * hidden * base.intermediate_size
    scores = 2 * tokens * hidden
    share = 1 - num_originals / base.num_hidden_layers
    return 1 + share * (num_sub_blocks - 1) * scores / (projections + scores)


if __name__ == "__main__":
    main()
