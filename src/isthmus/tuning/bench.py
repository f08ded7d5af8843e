"""``isthmus bench tune``: policies against each other on one model, paired and interleaved, over skew and CPU speed.

All policies train the same model in one process, in turns of a few steps on the same batches, so that noise of the
machine meets them alike. The link is set from the measured profile so that loading every expert for both passes takes a
wanted multiple of all computing.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import Qwen3MoeConfig

from isthmus.data import load_tokenizer, standard_library_text, train_tokenizer
from isthmus.models.tiny import write_random_checkpoint
from isthmus.planning.popularity import skewness, solve_router_bias
from isthmus.planning.problem import CostModel
from isthmus.reporting.comparison import comparison_markdown, comparison_table, plot_comparison
from isthmus.reporting.environment import environment
from isthmus.reporting.recorder import Recorder
from isthmus.spec.errors import IsthmusError
from isthmus.spec.files import atomic_write
from isthmus.spec.report import BenchTuneReport, BenchTuneRow, Spread
from isthmus.spec.serialization import to_json
from isthmus.spec.units import Emulation
from isthmus.tuning.bound import StepBounds
from isthmus.tuning.data import BatchStream, MicroBatch, load_dataset
from isthmus.tuning.policies import POLICIES
from isthmus.tuning.session import Session, SessionOptions


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is compared, on what. Sizes are of the model that is made when none is given."""

    model: Path | None = None
    policies: tuple[str, ...] = ("gpipe-offload", "mobius", "cpu-experts", "paper", "affinity")
    skews: tuple[float | None, ...] = (None, 0.2, 0.4)
    cpu_speeds: tuple[float, ...] = (1.0, 0.5, 0.25)
    num_layers: int = 8
    num_experts: int = 16
    hidden_size: int = 512
    intermediate_size: int = 1024
    seq_len: int = 128
    num_micro_batches: int = 4
    num_slots_in_layers: float = 3.5
    """Accelerator memory for experts, in layers' worth of experts: two stages of one layer, gradients, a little
    more."""
    load_to_compute: float = 2.5
    """Seconds to load every expert for both passes ÷ seconds of all computing on the accelerator."""
    num_warm_steps: int = 2
    num_steps: int = 2
    """Timed steps of a turn."""
    num_turns: int = 2
    longest_turn_s: float = 40.0
    """A policy whose step takes longer than a third of this gets a single timed step a turn."""
    seed: int = 0


@dataclass(slots=True)
class _Cell:
    seconds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    h2d_bytes: list[int] = field(default_factory=list)
    cpu_tokens: int = 0
    tokens: int = 0
    skews: list[float] = field(default_factory=list)


def bench_tune(
    *,
    model: Path | None = None,
    policies: str = "all",
    skew: str = "uniform,0.2,0.4",
    cpu_speed: str = "1,0.5,0.25",
    report: Path | None = None,
) -> BenchTuneReport:
    """``isthmus bench tune`` (see its ``--help`` for the texts). Prints the table; writes JSON and a picture beside it.
    Blocks for minutes."""
    options = BenchOptions(
        model=model,
        policies=BenchOptions.policies if policies == "all" else _names(policies),
        skews=tuple(None if part == "uniform" else _number(part, "skew") for part in _parts(skew)),
        cpu_speeds=tuple(_number(part, "cpu_speed") for part in _parts(cpu_speed)),
    )
    result = run_bench(options)
    if report is not None:
        atomic_write(report, to_json(result))
        atomic_write(report.with_suffix(".md"), comparison_markdown(result.rows))
        plot_comparison(result.rows, report.with_suffix(".png"), title="Fine-tuning: policies compared")
    return result


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str, field_name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise IsthmusError(f"{field_name}: got {text!r}, wanted numbers separated by commas, e.g. 0.2,0.4.") from None


def _names(text: str) -> tuple[str, ...]:
    unknown = [name for name in _parts(text) if name not in POLICIES]
    if unknown:
        raise IsthmusError(f"policies: got {unknown[0]!r}, wanted some of {', '.join(sorted(POLICIES))}, or all.")
    return tuple(_parts(text))


def run_bench(options: BenchOptions, console: Console | None = None) -> BenchTuneReport:
    """Measures every cell of policies × skews × CPU speeds."""
    console = console or Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as scratch:
        path = options.model or make_model(options, Path(scratch) / "model")
        batches = make_batches(options, path)
        emulation, budget_bytes = fit_link(options, path, batches[0], console)
        settings = SessionOptions(
            dtype="fp32",
            accelerator="emulated",
            accelerator_memory_bytes=budget_bytes,
            emulation=emulation,
            policy="affinity",
        )
        rows: list[BenchTuneRow] = []
        recorder = Recorder(keep_spans=False)
        with Session(path, settings, batches[0], recorder) as session:
            bounds = StepBounds(session)
            logits = routing_logits(session, batches)
            for wanted in options.skews:
                set_skew(session, logits, wanted, options.seed)
                for speed in options.cpu_speeds:
                    rows += measure(session, bounds, options, batches, wanted, speed, console)
            config = describe(options, session, emulation)
    result = BenchTuneReport(config=config, environment=environment(), rows=tuple(rows))
    console.print(comparison_table(result.rows))
    return result


def make_model(options: BenchOptions, path: Path) -> Path:
    """A Qwen3-MoE checkpoint of random weights, with a tokenizer of its own."""
    tokenizer = train_tokenizer(standard_library_text(2_000_000), 2048)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=2 * options.intermediate_size,
        moe_intermediate_size=options.intermediate_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_experts=options.num_experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    write_random_checkpoint(config, path, options.seed, tokenizer)
    return path


def make_batches(options: BenchOptions, path: Path, num_steps: int = 8) -> list[list[MicroBatch]]:
    """Real text: the standard library's source."""
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text("\n".join(standard_library_text(1_000_000)))
        dataset = load_dataset(text, load_tokenizer(path), seq_len=options.seq_len)
    stream = BatchStream(dataset, num_micro_batches=options.num_micro_batches, seed=options.seed)
    return [stream.next_step() for _ in range(num_steps)]


def fit_link(options: BenchOptions, path: Path, example: list[MicroBatch], console: Console) -> tuple[Emulation, int]:
    """(link rates, memory budget): the wanted load ÷ compute, and the wanted number of slots."""
    emulation: Emulation = {"h2d_bytes_per_s": 1e9, "d2h_bytes_per_s": 1e9, "num_threads": 1}
    settings = SessionOptions(
        dtype="fp32",
        accelerator="emulated",
        accelerator_memory_bytes=64 << 30,
        emulation=emulation,
        policy="cpu-experts",
    )
    with Session(path, settings, example, Recorder(enabled=False)) as session:
        spec, plan, profile = session.model.spec, session.plan, session.profile
        num_tokens = sum(batch.num_tokens for batch in example)
        compute_s = (
            num_tokens * spec.num_layers * (profile.dense_forward_s_per_token + profile.dense_backward_s_per_token)
        )
        costs = CostModel(profile, spec)
        for layer in spec.moe_layers:
            expert = spec.layers[layer]
            assert expert is not None
            counts = [num_tokens * expert.top_k // expert.num_experts] * expert.num_experts
            for is_backward in (False, True):
                compute_s += sum(costs.problem(layer, counts, is_backward=is_backward).accelerator_s)
        num_slots = int(
            options.num_slots_in_layers * max(layer.num_experts for layer in spec.layers if layer is not None)
        )
        budget_bytes = plan.dense_bytes + plan.activation_bytes + num_slots * plan.slot_bytes
    load_bytes = 2 * 4 * spec.num_expert_parameters
    rate = load_bytes / (options.load_to_compute * compute_s)
    num_experts = sum(layer.num_experts for layer in spec.layers if layer is not None)
    console.print(
        f"computing {compute_s:.2f} s a step on the accelerator; link {rate / 1e6:.0f} MB/s each way, so that loading "
        f"everything for both passes takes {options.load_to_compute:.1f} times as long; memory for {num_slots} of "
        f"{num_experts} experts"
    )
    return {"h2d_bytes_per_s": rate, "d2h_bytes_per_s": rate, "num_threads": 1}, budget_bytes


def routing_logits(session: Session, batches: Sequence[list[MicroBatch]]) -> dict[int, Tensor]:
    """Each router's logits (T, E) on the batches, without a bias."""
    seen: defaultdict[int, list[Tensor]] = defaultdict(list)
    hooks = []
    for layer, parts in session.model.moe_parts.items():

        def keep(
            module: torch.nn.Module, arguments: object, output: tuple[Tensor, ...], layer: int = layer, parts=parts
        ) -> None:
            seen[layer].append(output[parts.logits_index].detach().float().flatten(0, -2))

        hooks.append(session.model.routers[layer].register_forward_hook(keep))
    for step in batches[:4]:
        session.evaluate(step)
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(parts) for layer, parts in seen.items()}


def set_skew(session: Session, logits: dict[int, Tensor], wanted: float | None, seed: int) -> None:
    """Biases every router for the wanted G; None: the routers as they are."""
    for layer, logits_TE in logits.items():
        expert = session.model.spec.layers[layer]
        assert expert is not None
        bias_E = solve_router_bias(logits_TE.cpu().numpy(), expert.top_k, wanted, seed=seed + layer)
        session.model.add_router_bias(layer, torch.from_numpy(bias_E).float().to(session.accelerator.device))


def measure(
    session: Session,
    bounds: StepBounds,
    options: BenchOptions,
    batches: list[list[MicroBatch]],
    wanted: float | None,
    speed: float,
    console: Console,
) -> list[BenchTuneRow]:
    """All policies at one skew and speed, in turns."""
    cells = {policy: _Cell() for policy in options.policies}
    num_tokens = sum(batch.num_tokens for batch in batches[0])
    for _ in range(options.num_turns):
        for policy, cell in cells.items():
            turn(session, bounds, options, batches, policy, speed, cell)
    rows = []
    for policy, cell in cells.items():
        rates = sorted(num_tokens / seconds for seconds in cell.seconds)
        rows.append(
            BenchTuneRow(
                policy=policy,
                skew="uniform" if wanted is None else wanted,
                measured_skew=statistics.mean(cell.skews),
                cpu_speed=speed,
                tokens_per_s=Spread(
                    median=statistics.median(rates), p10=rates[len(rates) // 10], p90=rates[-1 - len(rates) // 10]
                ),
                bound_share=statistics.median(cell.shares),
                h2d_bytes_per_step=round(statistics.mean(cell.h2d_bytes)),
                share_of_tokens_on_cpu=cell.cpu_tokens / max(1, cell.tokens),
            )
        )
        row = rows[-1]
        console.print(
            f"G={row.measured_skew:.2f} cpu={speed:<6g} {policy:14s} {row.tokens_per_s.median:8.1f} tokens/s  "
            f"bound {row.bound_share:.2f}  h2d {row.h2d_bytes_per_step / 1e6:.0f} MB  "
            f"on CPU {row.share_of_tokens_on_cpu:.2f}"
        )
    return rows


def turn(
    session: Session,
    bounds: StepBounds,
    options: BenchOptions,
    batches: list[list[MicroBatch]],
    policy: str,
    speed: float,
    cell: _Cell,
) -> None:
    """Some steps of one policy: warm ones, then timed ones. Each timed step's optimizer overlaps the next step, as in a
    run."""
    session.use(policy, cpu_speed=speed)
    recorder = session.recorder
    num_steps, outcome = options.num_steps, None
    for number in range(options.num_warm_steps):
        start_s = recorder.now_s()
        outcome = session.train_step(batches[number % len(batches)], step=session.num_steps + 1, learning_rate=1e-6)
        if recorder.now_s() - start_s > options.longest_turn_s / 3:
            num_steps = 1
            break
    start_s = recorder.now_s()
    for number in range(num_steps):
        outcome = session.train_step(
            batches[(number + options.num_warm_steps) % len(batches)], step=session.num_steps + 1, learning_rate=1e-6
        )
        cell.h2d_bytes.append(outcome.h2d_bytes)
        cell.cpu_tokens += outcome.counts.cpu_tokens
        cell.tokens += outcome.counts.tokens
        cell.skews.append(skewness(list(outcome.counts.counts_LE.values())))
    seconds = (recorder.now_s() - start_s) / num_steps
    assert outcome is not None
    cell.seconds.append(seconds)
    cell.shares.append(bounds.bound_s(outcome) / seconds)


def describe(options: BenchOptions, session: Session, emulation: Emulation) -> dict[str, object]:
    plan = session.plan
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(options).items()}
    return plain | {
        "model": str(options.model) if options.model else "random Qwen3-MoE",
        "emulation": dict(emulation),
        "accelerator_budget_bytes": session.accelerator.budget_bytes,
        "num_slots": plan.num_slots,
        "slot_bytes": plan.slot_bytes,
        "num_stages": len(plan.stages),
        "num_waves": plan.num_waves,
    }
