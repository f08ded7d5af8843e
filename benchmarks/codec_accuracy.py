"""What a codec on the wire costs in accuracy: fine-tuned decoupled models classify a task's development examples on
several devices, and on one with nothing sent.

    isthmus evaluate ./minilm ./minilm-4 --task sst2_dev.tsv --train sst2_train.tsv --save kept/
    torchrun --nproc-per-node 4 benchmarks/codec_accuracy.py kept/minilm-4/sst2-seed-* \\
        --task sst2_dev.tsv --train sst2_train.tsv

Processes on one machine stand for the devices: the exchanges are those of real ones, only their time is not. FP32 is
computed; pooler and classifier are the first device's. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from isthmus.data import load_tokenizer, pad_token_id
from isthmus.evaluation.encoding import Place, batches
from isthmus.evaluation.finetuning import encode_examples, predict
from isthmus.evaluation.metrics import METRICS
from isthmus.evaluation.tasks import Task, open_task
from isthmus.inference.engine import Engine
from isthmus.models.shards import ShardReader
from isthmus.reporting.environment import environment
from isthmus.spec.inference import CODECS, ORIGINAL_PLANS, InferencePlan
from isthmus.transport.base import Group
from isthmus.transport.sockets import SocketGroup

PLACE = Place(torch.device("cpu"), "fp32")
BATCH_TOKENS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--task", required=True, help="as for isthmus evaluate")
    parser.add_argument("--train", help="what the models were trained on: all of the task is for development")
    parser.add_argument("--codecs", default="fp32,int8,int4", help=f"some of {','.join(CODECS)}")
    parser.add_argument("--ways", default="tokens,sequence", help=f"some of {','.join(ORIGINAL_PLANS)}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    digest = " ".join(ShardReader(directory).digest() for directory in arguments.models)
    rows: list[dict[str, Any]] = []
    with SocketGroup.from_environment(digest=digest, timeout_s=600.0) as group:
        for directory in arguments.models:
            rows += measure(directory, arguments, group)
    if group.rank == 0:
        config = {name: str(value) for name, value in vars(arguments).items()}
        print(json.dumps({"config": config, "environment": environment(), "rows": rows}))


def measure(directory: Path, arguments: argparse.Namespace, group: Group) -> list[dict[str, Any]]:
    """A row for each way and codec; on the first device."""
    task, rows = open_task(arguments.task, arguments.train), list[dict[str, Any]]()
    wanted = np.array([task.labels.index(example.label) for example in task.development])
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    encoded = encode_examples(load_tokenizer(directory), task.development, max_length=128)
    alone = predict(model, encoded, load_tokenizer(directory), PLACE)
    for way in arguments.ways.split(","):
        for codec in arguments.codecs.split(","):
            with Engine(directory, group=group, plan=plan_of(directory, way, codec, group.world_size)) as engine:
                if not engine.is_leader:
                    engine.follow()
                    continue
                labels = np.empty_like(alone)
                for places, logits in classified(engine, model, task):
                    labels[places] = logits.argmax(dim=1).numpy()
            row = {
                "model": str(directory),
                "way": way,
                "codec": codec,
                "metric": task.metric,
                "value": METRICS[task.metric](labels, wanted),
                "alone": METRICS[task.metric](alone, wanted),
                "num_other_labels": int((labels != alone).sum()),
                "num_examples": len(labels),
            }
            rows.append(row)
            print(
                f"{directory}: {way}, {codec} on the wire: {task.metric} {row['value']:.4f}, one device "
                f"{row['alone']:.4f}; {row['num_other_labels']} of {row['num_examples']} labels differ",
                flush=True,
            )
    return rows


def plan_of(directory: Path, way: str, codec: str, num_devices: int) -> InferencePlan:
    form = ShardReader(directory).spec.decoupling
    if form is None:
        raise SystemExit(f"{directory}: not decoupled")
    return InferencePlan(
        strategy="block",
        devices=tuple(range(num_devices)),
        weights=(1.0,) * num_devices,
        codec=codec,
        originals=(way,) * len(form.original_layers),
    )


@torch.inference_mode()
def classified(engine: Engine, model: Any, task: Task) -> Iterator[tuple[np.ndarray, Tensor]]:
    """(which development examples, their logits), a batch at a time."""
    tokenizer, pooler = engine.tokenizer, getattr(model.base_model, "pooler", None)
    encoded = encode_examples(tokenizer, task.development, max_length=128)
    for places, batch in batches(encoded, BATCH_TOKENS, pad_token_id(tokenizer), PLACE):
        hidden_BTH = engine.hidden(batch["input_ids"], batch["attention_mask"].bool())
        yield places, model.classifier(hidden_BTH if pooler is None else pooler(hidden_BTH))


if __name__ == "__main__":
    main()
