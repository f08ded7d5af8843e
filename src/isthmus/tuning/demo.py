"""``isthmus demo``: the main job from nothing — a small MoE model, real text, fine-tuning, pictures, and the policies
compared.

Needs no download: the text is the standard library's source (or a file given), the model has random weights.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from rich.console import Console
from transformers import Qwen3MoeConfig

from isthmus.data import standard_library_text, train_tokenizer
from isthmus.models.tiny import write_random_checkpoint
from isthmus.reporting.comparison import plot_comparison
from isthmus.spec.files import atomic_write
from isthmus.spec.serialization import to_json
from isthmus.tuning.bench import BenchOptions, run_bench
from isthmus.tuning.run import tune

TEXT_BYTES = 3_000_000
VOCABULARY = 4096


def run_demo(output: Path = Path("demo-out"), *, text: Path | None = None, steps: int = 60) -> None:
    """Writes everything below ``output``, replacing an earlier demo. Blocks for a few minutes on two cores.

    ``text``: a file or directory to train on instead of the standard library's source.
    """
    console = Console(stderr=True)
    if output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="isthmus-demo-") as scratch:
        train, held_out = make_text(Path(scratch), text)
        model = make_model(Path(scratch) / "model")
        console.rule("1 · fine-tuning a Mixture-of-Experts model whose experts do not fit the (emulated) accelerator")
        report = tune(
            model,
            data=train,
            eval_data=held_out,
            output=output / "model",
            steps=steps,
            seq_len=128,
            micro_batches=4,
            micro_batch_size=2,
            learning_rate=2e-3,
            dtype="fp32",
            accelerator="emulated",
            emulate="h2d=400MB/s,d2h=400MB/s,threads=1",
            accelerator_memory="160MiB",
            cpu_speed=0.5,
            eval_every=max(1, steps // 3),
            eval_batches=4,
            save_every=0,
        )
        console.rule("2 · the policies compared on this machine")
        bench = run_bench(demo_bench(model), console)
    atomic_write(output / "policies.json", to_json(bench))
    plot_comparison(bench.rows, output / "policies.png", title="Policies compared")
    losses = [step.evaluation_loss for step in report.steps if step.evaluation_loss is not None]
    console.print(
        f"\nevaluation loss {losses[0]:.3f} → {losses[-1]:.3f}; {report.summary.tokens_per_s:.0f} tokens/s, "
        f"{report.summary.bound_share:.0%} of the bound\n"
        f"model        {output}/model (AutoModelForCausalLM.from_pretrained loads it)\n"
        f"timeline     {output}/model/timeline.png, timeline.json (chrome://tracing, ui.perfetto.dev)\n"
        f"popularity   {output}/model/popularity.png\n"
        f"losses       {output}/model/loss.png\n"
        f"policies     {output}/policies.png, policies.json"
    )


def make_text(scratch: Path, text: Path | None) -> tuple[Path, Path]:
    """(training text, held-out text): every tenth document is held out."""
    if text is not None:
        return text, text
    documents = standard_library_text(TEXT_BYTES)
    places = []
    for name, part in (("train", [d for i, d in enumerate(documents) if i % 10]), ("held-out", documents[::10])):
        place = scratch / name
        place.mkdir()
        for number, document in enumerate(part):
            (place / f"{number:04d}.txt").write_text(document)
        places.append(place)
    return places[0], places[1]


def make_model(path: Path) -> Path:
    """About 30 million parameters in 4 layers of 16 experts, two of them chosen per token."""
    tokenizer = train_tokenizer(standard_library_text(TEXT_BYTES), VOCABULARY)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=0.001,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    write_random_checkpoint(config, path, 0, tokenizer)
    return path


def demo_bench(model: Path) -> BenchOptions:
    return BenchOptions(
        model=model,
        skews=(None, 0.3),
        cpu_speeds=(0.25,),
        num_layers=4,
        num_turns=1,
        num_warm_steps=1,
    )
