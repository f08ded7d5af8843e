"""Fine-tuning on a real GPU: conformance, exactness, the policies against each other, and FSDP2 with CPU offload.

Run it from the repository's root:

    python -m benchmarks.gpu.tune --dry-run                # prints sizes, memory and stages; needs no GPU
    python -m benchmarks.gpu.tune --rehearse               # every stage at toy size on the CPU; its times mean nothing
    python -m benchmarks.gpu.tune --scratch DIR [--minutes 90] [--accelerator-memory 24GiB]

Builds a random checkpoint with the layers of Qwen3-30B-A3B, as many of them as reach ``--parameters`` (10 billion) or
as host memory allows. Every stage runs in a process of its own under its share of ``--minutes`` and writes what it has
after each measurement, so a stage that is cut off loses only its last one. See benchmarks/gpu/README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.fsdp import run_fsdp
from benchmarks.gpu.plan import STAGES, Plan, configuration, describe, make_plan
from rich.console import Console
from tests import reference
from transformers import AutoConfig

from isthmus.data import standard_library_text, train_tokenizer
from isthmus.models.tiny import FAMILIES, write_random_checkpoint, write_tiny_checkpoint
from isthmus.planning.popularity import solve_router_bias
from isthmus.reporting.comparison import comparison_markdown
from isthmus.reporting.environment import environment
from isthmus.reporting.host_memory import PeakHostMemory
from isthmus.reporting.recorder import Recorder
from isthmus.spec.files import atomic_write
from isthmus.spec.report import BenchTuneRow, Spread
from isthmus.spec.units import parse_bytes, parse_emulate
from isthmus.tuning.bench import make_batches, measure, routing_logits
from isthmus.tuning.bound import StepBounds
from isthmus.tuning.data import MicroBatch
from isthmus.tuning.grouped import GroupedExperts
from isthmus.tuning.loader import ExpertLoader
from isthmus.tuning.placement import BudgetError
from isthmus.tuning.session import Session, SessionOptions

ROOT = Path(__file__).resolve().parents[2]
EXACTNESS_STEPS = 10
EXACTNESS_TOLERANCE = 1e-5
EXACTNESS_POLICIES = ("affinity", "paper", "mobius")
GROUPED_TOLERANCE = 1e-2
"""Of bf16 losses: grouped GEMMs round their sums elsewhere."""
TINY_EXPERTS_BYTES = 4 * 24 * 1024
"""Memory for about four experts of the tiny models beyond the least that a policy accepts."""

Save = Callable[[dict[str, Any]], None]
"""Writes what a stage knows so far, replacing what it wrote before. ``passed`` must be there."""


# --- stages, each in a process of its own -----------------------------------------------------------------------------


def check_conformance(plan: Plan, save: Save) -> None:
    """The suite that every accelerator passes."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/conformance/test_accelerator.py", "-k", plan.accelerator]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = (done.stdout.strip() or done.stderr.strip() or "pytest printed nothing").splitlines()
    save({"passed": done.returncode == 0, "summary": lines[-1], "tail": lines[-40:]})


def check_exactness(plan: Plan, save: Save) -> None:
    """Tiny models on the accelerator: in FP32 against plain transformers and AdamW on the CPU, and in bf16 with experts
    in groups against one after the other."""
    rows: list[dict[str, Any]] = []
    for family in FAMILIES[:2] if plan.is_rehearsal else FAMILIES:
        path = plan.directory / f"tiny-{family}"
        write_tiny_checkpoint(family, path, 0, "fp32")
        config = AutoConfig.from_pretrained(path)
        steps = reference.random_steps(
            EXACTNESS_STEPS, 3, vocab_size=config.vocab_size, is_encoder_decoder=config.is_encoder_decoder
        )
        wanted = reference.train(path, steps, learning_rate=1e-3).losses
        for policy in EXACTNESS_POLICIES:
            row: dict[str, Any] = {"family": family, "policy": policy}
            try:
                found = tiny_losses(plan, path, policy, steps)
            except Exception as error:  # the other families are still worth a look
                rows.append(row | {"passed": False, "error": f"{type(error).__name__}: {error}"})
            else:
                worst = max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))
                rows.append(row | {"passed": worst <= EXACTNESS_TOLERANCE, "worst_relative_difference": worst})
            save({"passed": all(row["passed"] for row in rows), "tolerance": EXACTNESS_TOLERANCE, "rows": rows})
        row = {"family": family, "policy": "mobius, bf16 in groups"}
        try:
            plain, grouped = (tiny_losses(plan, path, "mobius", steps, in_groups=choice) for choice in (False, True))
        except Exception as error:
            rows.append(row | {"passed": False, "error": f"{type(error).__name__}: {error}"})
        else:
            worst = max(abs(a - b) / abs(b) for a, b in zip(grouped, plain, strict=True))
            rows.append(row | {"passed": worst <= GROUPED_TOLERANCE, "worst_relative_difference": worst})
        save({"passed": all(row["passed"] for row in rows), "tolerance": EXACTNESS_TOLERANCE, "rows": rows})


def tiny_losses(
    plan: Plan, path: Path, policy: str, steps: list[list[MicroBatch]], *, in_groups: bool | None = None
) -> list[float]:
    """With a little more than the least memory, so that experts are computed on both sides and evicted. ``in_groups``:
    in bf16, resident experts by grouped GEMMs or one after the other; None: in FP32."""
    wanted = replace(session_options(plan), dtype="fp32" if in_groups is None else "bf16", policy=policy)
    options = with_least_memory(path, steps[0], wanted, more_bytes=TINY_EXPERTS_BYTES)
    with Session(path, options, steps[0], Recorder(enabled=False)) as session:
        loader = session.placement.loader
        if in_groups is not None and isinstance(loader, ExpertLoader):
            session.engine.resources.grouped = GroupedExperts.of(session.model, loader) if in_groups else None
        # In bf16 and at 1e-3, a tiny router flips choices on rounding alone.
        rate = 1e-3 if in_groups is None else 3e-4
        return [session.train_step(step, step=i, learning_rate=rate).loss for i, step in enumerate(steps, start=1)]


def session_options(plan: Plan) -> SessionOptions:
    return SessionOptions(
        dtype="bf16",
        accelerator=plan.accelerator,
        accelerator_memory_bytes=plan.accelerator_memory_bytes,
        emulation=parse_emulate("h2d=200MB/s,d2h=200MB/s,threads=1") if plan.is_rehearsal else None,
    )


def with_least_memory(
    path: Path, example: list[MicroBatch], options: SessionOptions, *, more_bytes: int
) -> SessionOptions:
    """``options`` with the least accelerator memory that the policy accepts, and ``more_bytes``."""
    try:
        Session(path, replace(options, accelerator_memory_bytes=1), example, Recorder(enabled=False)).close()
    except BudgetError as error:
        return replace(options, accelerator_memory_bytes=error.minimum_bytes + more_bytes)
    raise AssertionError("one byte of accelerator memory was enough")


def make_model(plan: Plan, save: Save) -> None:
    """The checkpoint, unit by unit. One that is whole is kept for the next run."""
    path, start_s = plan.model_path, time.perf_counter()
    if not (path / "complete").exists():
        shutil.rmtree(path, ignore_errors=True)
        tokenizer = train_tokenizer(standard_library_text(2_000_000), 512 if plan.is_rehearsal else 8192)
        config = configuration(plan.num_layers, is_toy=plan.is_rehearsal, vocab_size=len(tokenizer))
        write_random_checkpoint(config, path, 0, tokenizer, dtype="bf16")
        (path / "complete").touch()
    num_bytes = sum(file.stat().st_size for file in path.iterdir())
    save({"passed": True, "seconds": time.perf_counter() - start_s, "bytes": num_bytes})


def compare_policies(plan: Plan, save: Save) -> None:
    """All policies in turns on one model in one process, at one skew after the other."""
    options, console = plan.bench_options(), Console(stderr=True)
    batches = make_batches(options, plan.model_path)
    # Mobius needs more slots than the others: what it accepts, all accept.
    settings = replace(session_options(plan), policy="mobius")
    if plan.is_rehearsal:
        settings = with_least_memory(plan.model_path, batches[0], settings, more_bytes=1 << 20)
    rows: list[BenchTuneRow] = []
    recorder = Recorder(keep_spans=False)
    with PeakHostMemory() as memory, Session(plan.model_path, settings, batches[0], recorder) as session:
        bounds = StepBounds(session)
        logits = {layer: values.cpu() for layer, values in routing_logits(session, batches).items()}
        for skew in plan.skews:
            for layer, logits_TE in logits.items():
                top_k = session.model.moe_parts[layer].spec.top_k
                bias_E = torch.from_numpy(solve_router_bias(logits_TE.numpy(), top_k, skew, seed=layer)).float()
                session.model.add_router_bias(layer, bias_E.to(session.accelerator.device))
            rows += measure(session, bounds, options, batches, skew, 1.0, console)
            save(
                {
                    "passed": True,
                    "rows": [asdict(row) for row in rows],
                    "plan": asdict(session.plan),
                    "profile": asdict(session.profile),
                    "budget_bytes": session.accelerator.budget_bytes,
                    "peak_accounted_bytes": session.accelerator.peak_bytes,
                    "peak_reserved_bytes": None if plan.is_rehearsal else torch.cuda.max_memory_reserved(),
                    "peak_host_bytes": memory.peak_bytes,
                    "needed_host_bytes": session.store.total_bytes,
                }
            )


RUN: dict[str, Callable[[Plan, Save], None]] = {
    "conformance": check_conformance,
    "exactness": check_exactness,
    "model": make_model,
    "fsdp": run_fsdp,
    "policies": compare_policies,
}


# --- running and reporting --------------------------------------------------------------------------------------------


def run_stages(plan: Plan) -> dict[str, Any]:
    """Runs each stage in a process under its share of the time that is left. Without a model it ends early."""
    end_s = time.monotonic() + 60 * plan.minutes
    plan.directory.mkdir(parents=True, exist_ok=True)
    plan_file = plan.directory / "plan.json"
    plan_file.write_text(json.dumps(asdict(plan)))
    results: dict[str, Any] = {}
    for name, share in STAGES.items():
        limit_s = max(1.0, (end_s - time.monotonic()) * share)
        output = plan.directory / f"{name}.json"
        output.unlink(missing_ok=True)
        print(f"--- {name} (at most {limit_s / 60:.1f} minutes)", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu.tune", "--stage", name, str(plan_file)]
        start_s = time.monotonic()
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=limit_s).returncode
            ended = "finished" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            ended = "cut off, its time was up"
        found = json.loads(output.read_text()) if output.exists() else {"passed": False}
        found["passed"] = found["passed"] and ended == "finished"
        results[name] = found | {"ended": ended, "wall_s": time.monotonic() - start_s}
        print(f"    {ended} after {results[name]['wall_s']:.0f} s", flush=True)
        if name == "model" and not found["passed"]:
            break
    return results


def markdown(plan: Plan, results: dict[str, Any]) -> str:
    """What to put into benchmarks/results."""
    title = "# Rehearsal on the CPU: the numbers mean nothing" if plan.is_rehearsal else "# Fine-tuning on a GPU"
    parts = [title, f"```\n{describe(plan)}\n```", f"```json\n{json.dumps(environment(), indent=1)}\n```", "## Stages"]
    lines = []
    for name, result in results.items():
        verdict = "passed" if result["passed"] else "NOT passed"
        lines.append(f"- {name}: {verdict}, {result['ended']} ({result['wall_s']:.0f} s) {result.get('summary', '')}")
    for row in results.get("exactness", {}).get("rows", []):
        found = row.get("error") or f"{row['worst_relative_difference']:.1e}"
        verdict = "passed" if row["passed"] else "NOT passed"
        lines.append(f"- exactness of {row['family']} under {row['policy']}: {verdict}, {found}")
    parts.append("\n".join(lines))
    if "rows" in results.get("policies", {}):
        measured = results["policies"]["rows"]
        rows = [BenchTuneRow(**row | {"tokens_per_s": Spread(**row["tokens_per_s"])}) for row in measured]
        parts += ["## isthmus, tokens per second", comparison_markdown(rows)]
    if "tokens_per_s" in results.get("fsdp", {}):
        rate = results["fsdp"]["tokens_per_s"]
        parts.append("## FSDP2 with CPU offload, tokens per second, routers as they are")
        parts.append(f"{rate['median']:.1f} (p10 {rate['p10']:.1f}, p90 {rate['p90']:.1f})")
    return "\n\n".join(parts) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scratch", type=Path, default=Path("out/gpu"), help="checkpoint and stages' results; a fast disk")
    add("--output", type=Path, help="results: this .json, and .md beside it. Default: SCRATCH/results.json")
    add("--minutes", type=float, default=90.0)
    add("--parameters", type=float, default=10e9, help="wanted; there are fewer where host memory is short")
    add("--layers", type=int, help="set the number of layers instead")
    add("--accelerator-memory", default="24GiB")
    add("--host-memory", type=parse_bytes, help="plan for a host with this much free, such as 256GiB")
    add("--seq-len", type=int, default=512)
    add("--micro-batches", type=int, default=4)
    add("--steps", type=int, default=2, help="timed steps of a turn; there are two turns")
    add("--policies", default="gpipe-offload,mobius,cpu-experts,paper,affinity")
    add("--skew", help="G; for eight of 128 experts between 0.008 and 0.125. Default: uniform,0.03,0.06")
    add("--dry-run", action="store_true", help="print the plan and stop")
    add("--rehearse", action="store_true", help="every stage at toy size on the CPU")
    add("--stage", nargs=2, metavar=("NAME", "PLAN"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.skew = arguments.skew or ("uniform,0.2" if arguments.rehearse else "uniform,0.03,0.06")
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.stage:
        name, plan_file = arguments.stage
        plan = Plan(**json.loads(Path(plan_file).read_text()))
        RUN[name](plan, lambda result: atomic_write(plan.directory / f"{name}.json", json.dumps(result)))
        return
    plan = make_plan(arguments)
    print(describe(plan), flush=True)
    if arguments.dry_run:
        return
    if not plan.is_rehearsal and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: only --dry-run and --rehearse work")
    results = run_stages(plan)
    output = arguments.output or plan.directory / "results.json"
    whole = {"kind": "bench-tune-gpu", "config": asdict(plan), "environment": environment(), "stages": results}
    atomic_write(output, json.dumps(whole, indent=1) + "\n")
    atomic_write(output.with_suffix(".md"), markdown(plan, results))
    print(f"results: {output} and {output.with_suffix('.md')}")
    print(json.dumps({"benchmark": "gpu-tune", "passed": {name: result["passed"] for name, result in results.items()}}))


if __name__ == "__main__":
    main()
