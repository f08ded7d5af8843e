"""Decoupled models on emulated weak devices: one request by bandwidth, with and without exchanges that overlap with
computing, the planner's choices over a grid, tokens, uneven devices, links that drop while requests come, and how exact
it all is; what is wanted stands beside.

Raises testbeds (root, see `isthmus testbed`) and runs ``testbed_device.py`` on their devices. Models have random
weights, as fast as trained ones: BERT-base (12 layers, hidden 768) and its decoupled form exactly as it was scored (4
sub-blocks, layers 2, 5, 8 and 11 original, queries, keys and values from h/4 to h), and a Llama of 134M parameters with
its decoupled form (4 sub-blocks, one original layer in three). FP32 is computed, batch 1. What has a report is not
measured again unless --again is given, so a sweep can be stopped and continued.

    sudo python benchmarks/decoupled_testbed.py --output out/decoupled [--parts latency,grid] [--quick]
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import decoupled_tables as tables
from testbed_runs import llama, random_model, run_job, write_results

from isthmus.spec.decoupling import proportional_widths
from isthmus.spec.testbed import DeviceSpec, TestbedSpec
from isthmus.testbed import Testbed

PARTS = ("exact", "latency", "overlap", "generation", "uneven", "drop", "grid")
LATENCY_MBIT = (1000, 250, 200, 125, 50, 25)
OVERLAP_MBIT = (125, 50, 25)
GRID_MEMORIES = ("ample", "tight")
GRID_MBIT, GRID_TOKENS, GRID_DEVICES = (1000, 250, 125, 50, 25), (1, 16, 128, 512), (2, 3, 4)
SLOW_MBIT = 50
"""From here down the baselines take seconds, and half as many requests tell as much."""


def main() -> None:
    arguments = parse_arguments()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"parts: got {', '.join(sorted(unknown))}, wanted some of {', '.join(PARTS)}")
    if unknown := set(arguments.memories.split(",")) - set(GRID_MEMORIES):
        raise SystemExit(f"memories: got {', '.join(sorted(unknown))}, wanted some of {', '.join(GRID_MEMORIES)}")
    bench = Bench(arguments)
    found: dict[str, Any] = {}
    if set(parts) - {"uneven"}:
        device = DeviceSpec(cpu_share=arguments.cpu, bandwidth_bits_per_s=1e9)
        with bench.testbed((device,) * 4) as testbed:
            for part in parts:
                if part != "uneven":
                    found[part] = getattr(bench, part)(testbed)
    if "uneven" in parts:
        shares = [float(share) for share in arguments.uneven.split(",")]
        devices = tuple(DeviceSpec(cpu_share=share, bandwidth_bits_per_s=1e9) for share in shares)
        with bench.testbed(devices) as testbed:
            found["uneven"] = bench.uneven(testbed, shares)
    text = "\n".join(tables.WRITERS[part](found[part], arguments) for part in PARTS if part in found)
    summaries = {part: tables.SUMMARIES[part](content) for part, content in found.items()}
    config = {name: str(value) for name, value in vars(arguments).items()}
    write_results(
        arguments.output, "decoupled_testbed", text, {"config": config, "summaries": summaries, "parts": found}
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for reports, tables and models")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="few cells of each part and few requests, in 10 minutes")
    parser.add_argument("--tiny", action="store_true", help="models of no size, to see that everything runs")
    parser.add_argument("--cpu", type=float, default=0.45, help="cores of each device")
    parser.add_argument("--quota-ms", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=128, help="of all parts but the grid")
    parser.add_argument("--repeats", type=int, help="requests to each plan; without: 10, with --quick 4")
    parser.add_argument("--bandwidths", help="Mbit/s, of latency, overlap and grid, instead of theirs")
    parser.add_argument("--grid-repeats", type=int, default=5, help="least requests to each plan in a cell of the grid")
    parser.add_argument("--cell-seconds", type=float, default=10.0, help="short requests are repeated up to this")
    parser.add_argument(
        "--within", type=float, default=1.5, help="plans of the grid predicted to be slower are left out"
    )
    parser.add_argument("--memories", default=",".join(GRID_MEMORIES), help="of the grid")
    parser.add_argument("--tight", type=float, default=0.75, help="memory of a device, by that of all weights")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--uneven", default="0.2,0.45,0.6,0.6", help="cores, the leader's first")
    parser.add_argument("--slow-link", type=int, default=3, help="which of the uneven devices is at 25 Mbit/s")
    parser.add_argument("--uneven-mbit", type=float, default=125.0, help="links of the other uneven devices")
    parser.add_argument("--drop-mbit", type=float, default=250.0, help="before it drops to a tenth")
    parser.add_argument("--name", default="decoupled", help="of the testbed")
    parser.add_argument("--again", action="store_true", help="measure what has a report too")
    return parser.parse_args()


class Bench:
    """The parts. Each gives what its tables are written from."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._output: Path = arguments.output.resolve()
        self._repeats: int = arguments.repeats or (4 if arguments.quick else 10)

    def testbed(self, devices: tuple[DeviceSpec, ...]) -> Testbed:
        quota_s = self._arguments.quota_ms / 1e3
        return Testbed.up(TestbedSpec(name=self._arguments.name, devices=devices, cpu_quota_s=quota_s))

    # --- models -------------------------------------------------------------------------------------------------------

    def _bert(self, *names: str) -> dict[str, str]:
        from transformers import BertConfig

        size: dict[str, Any] = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4)
        config = BertConfig(**(size if self._arguments.tiny else {}))
        originals = list(range(2, config.num_hidden_layers, 3))
        form = {"num_sub_blocks": 4, "original_layers": originals}
        shares = [float(share) for share in self._arguments.uneven.split(",")]
        widths = list(proportional_widths(config.hidden_size, shares))
        forms: dict[str, Mapping[str, Any] | None] = {
            "plain": None,
            "decoupled": form,
            "uneven slices": {**form, "num_sub_blocks": len(shares), "sub_block_widths": widths},
        }
        return {name: str(random_model(self._directory("bert", name), config, forms[name])) for name in names}

    def _llama(self) -> dict[str, str]:
        size: dict[str, Any] = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4)
        config = llama(**(size if self._arguments.tiny else {}))
        form = {"num_sub_blocks": 4, "original_layers": list(range(2, config.num_hidden_layers, 3))}
        forms = {"plain": None, "decoupled": form}
        return {name: str(random_model(self._directory("llama", name), config, forms[name])) for name in forms}

    def _directory(self, family: str, name: str) -> Path:
        tiny = "tiny-" if self._arguments.tiny else ""
        widths = f"-{self._arguments.uneven.replace(',', '-')}" if name == "uneven slices" else ""
        return self._output / "models" / f"{tiny}{family}-{name.replace(' ', '-')}{widths}"

    def _run(self, testbed: Testbed, folder: str, job: dict[str, Any], **options: Any) -> dict[str, Any]:
        cache, again = self._output / "cache", self._arguments.again
        print(f"--- {folder}", flush=True)
        begun_s = time.monotonic()
        found = run_job(testbed, job, self._output / folder, cache=cache, again=again, **options)
        print(f"{time.monotonic() - begun_s:.0f} s", flush=True)
        return found

    # --- parts --------------------------------------------------------------------------------------------------------

    def exact(self, testbed: Testbed) -> dict[str, Any]:
        """Every way of original layers in every codec, beside one device."""
        testbed.set_bandwidth(1000)
        job = {"kind": "exact", "models": self._bert("decoupled"), "tokens": [self._arguments.tokens]}
        return self._run(testbed, "exact", {**job, "codecs": ["fp32", "bf16", "int8", "int4"]})

    def latency(self, testbed: Testbed) -> list[dict[str, Any]]:
        """The planner's choice for the decoupled model beside one device and the baselines, by bandwidth."""
        cells = []
        for mbit in self._bandwidths((1000, 125, 50) if self._arguments.quick else LATENCY_MBIT):
            testbed.set_bandwidth(mbit)
            job = {
                "kind": "compare",
                "models": self._bert("plain", "decoupled"),
                "decoupled": ["decoupled"],
                "tokens": [self._arguments.tokens],
                "codecs": ["fp32", "int8"],
                "dtypes": ["fp32"],
                "alone": ["plain", "decoupled"],
                "baselines": ["gloo", "gloo-own"],
                "repeats": self._repeats if mbit > SLOW_MBIT else -(-self._repeats // 2),
                "refresh": True,
            }
            cells.append({"mbit_per_s": mbit, **self._run(testbed, f"latency/{mbit}-mbit", job)})
        return cells

    def overlap(self, testbed: Testbed) -> list[dict[str, Any]]:
        """The fastest plan that exchanges all at once beside the same in portions, in turns. Differences are a few
        percent, so there are twice as many requests."""
        cells = []
        for mbit in self._bandwidths(OVERLAP_MBIT):
            testbed.set_bandwidth(mbit)
            job = {
                "kind": "compare",
                "overlap": True,
                "models": self._bert("decoupled"),
                "decoupled": ["decoupled"],
                "tokens": [self._arguments.tokens],
                "codecs": ["fp32", "int8"],
                "dtypes": ["fp32"],
                "alone": [],
                "repeats": 2 * self._repeats,
                "refresh": True,
            }
            cells.append({"mbit_per_s": mbit, **self._run(testbed, f"overlap/{mbit}-mbit", job)})
        return cells

    def generation(self, testbed: Testbed) -> dict[str, Any]:
        """Tokens of the decoupled decoder beside those of the ordinary one under our own tensor parallelism."""
        testbed.set_bandwidth(125)
        job = {
            "kind": "compare",
            "models": self._llama(),
            "decoupled": ["decoupled"],
            "tokens": [64],
            "new_tokens": self._arguments.new_tokens,
            "codecs": ["fp32"],
            "dtypes": ["fp32"] if self._arguments.quick else ["fp32", "int8"],
            "alone": ["plain"],
            "own_tensor": True,
            "repeats": 2 if self._arguments.quick else 4,
            "refresh": True,
        }
        return self._run(testbed, "generation", job)

    def uneven(self, testbed: Testbed, shares: Sequence[float]) -> dict[str, Any]:
        """Planned placement beside an even one; one link is at 25 Mbit/s."""
        testbed.set_bandwidth(self._arguments.uneven_mbit)
        testbed.set_bandwidth(25, [self._arguments.slow_link])
        models = self._bert("decoupled", "uneven slices")
        job = {
            "kind": "compare",
            "models": models,
            "decoupled": list(models),
            "tokens": [self._arguments.tokens],
            "codecs": ["fp32", "int8"],
            "dtypes": ["fp32"],
            "alone": ["decoupled"],
            "even": ["decoupled"],
            "repeats": self._repeats,
            "refresh": True,
        }
        folder = f"uneven/{'-'.join(map(str, shares))}-slow-{self._arguments.slow_link}"
        return self._run(testbed, folder, job)

    def drop(self, testbed: Testbed) -> dict[str, Any]:
        """All links drop to a tenth while requests come."""
        before, after = self._arguments.drop_mbit, self._arguments.drop_mbit / 10
        testbed.set_bandwidth(before)
        num_before = 5 if self._arguments.quick else 10
        job = {
            "kind": "requests",
            "models": self._bert("decoupled"),
            "tokens": [self._arguments.tokens],
            "codec": "fp32",
            "num_requests": 2 * num_before,
            "pause_s": 0.5,
            "drop_before": num_before,
            "mbit_per_s": [before, after],
        }

        def run(*arguments: Any, **options: Any) -> Any:
            output = Path(options["output"]) / "device-0.out"
            output.unlink(missing_ok=True)
            watcher = threading.Thread(target=_drop_at, args=(testbed, output, num_before - 1, after), daemon=True)
            watcher.start()
            return testbed.run(*arguments, **options)

        return self._run(testbed, "drop", job, run=run)

    def grid(self, testbed: Testbed) -> list[dict[str, Any]]:
        """The runtime planner's choice beside whatever is fastest, over bandwidth, tokens, devices and memory."""
        quick = self._arguments.quick
        cells = []
        for num_devices in (2, 4) if quick else GRID_DEVICES:
            for mbit in self._bandwidths((1000, 125, 25) if quick else GRID_MBIT):
                testbed.set_bandwidth(mbit)
                for memory in self._arguments.memories.split(","):
                    job = {
                        "kind": "grid",
                        "models": self._bert("decoupled"),
                        "tokens": list((16, 128) if quick else GRID_TOKENS),
                        "memory": memory,
                        "tight": self._arguments.tight,
                        "within": self._arguments.within,
                        "repeats": 3 if quick else self._arguments.grid_repeats,
                        "cell_s": self._arguments.cell_seconds / (2 if quick else 1),
                        "refresh": True,
                    }
                    folder = f"grid/{num_devices}-devices-{mbit}-mbit-{memory}"
                    found = self._run(testbed, folder, job, devices=range(num_devices))
                    cells.append({"num_devices": num_devices, "mbit_per_s": mbit, **found})
        return cells

    def _bandwidths(self, usual: Sequence[int]) -> Sequence[int]:
        given = self._arguments.bandwidths
        return usual if given is None else [int(part) for part in given.split(",")]


def _drop_at(testbed: Testbed, output: Path, number: int, mbit: float) -> None:
    """Waits until that request was answered, then limits all links; gives up with its process."""
    while not output.is_file() or f"request {number}:" not in output.read_text():
        time.sleep(0.05)
    testbed.set_bandwidth(mbit)


if __name__ == "__main__":
    main()
