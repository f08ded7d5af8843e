"""What the benchmarks on emulated testbeds share: models of random weights, and runs whose reports are kept."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from isthmus.testbed import Testbed

RUN_TIMEOUT_S = 1500.0


def random_bert_base(directory: Path) -> Path:
    """BERT-base, written once."""
    from transformers import BertConfig

    return random_model(directory, BertConfig())


def llama(**changes: Any) -> Any:
    """The configuration of a Llama of 134M parameters."""
    from transformers import LlamaConfig

    shape: dict[str, Any] = dict(
        vocab_size=32000,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=2048,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    return LlamaConfig(**(shape | changes))


def random_model(directory: Path, config: Any, decoupled: Mapping[str, Any] | None = None) -> Path:
    """A checkpoint of random weights, which are as fast as trained ones, written once: decoders with their head, and
    ``decoupled`` so, where fields of ``DecoupledConfig`` are given."""
    if not (directory / "config.json").is_file():
        import torch
        from transformers import AutoModel, AutoModelForCausalLM

        import isthmus.models.decoupled.architectures  # noqa: F401  decoupled models register themselves
        from isthmus.models.decoupled.configs import decoupled_config

        is_decoder = config.model_type != "bert"
        config = config if decoupled is None else decoupled_config(config, dict(decoupled))
        torch.manual_seed(0)
        if is_decoder:
            model = AutoModelForCausalLM.from_config(config)
        else:
            model = AutoModel.from_config(config, add_pooling_layer=False)
        model.save_pretrained(directory)
    return directory


def moe_and_text(name: str, folder: Path, *, num_characters: int) -> tuple[Path, Path]:
    """(random checkpoint below ``folder``, text of the standard library), made once. ``qwen3``: a Qwen3-MoE of 8 layers
    of 8 experts, 29M parameters; ``mixtral``: 4 layers of 16 experts, 60M."""
    model, text = folder / name, folder / "text.txt"
    if not (model / "tokenizer.json").is_file():
        from transformers import MixtralConfig, Qwen3MoeConfig

        from isthmus.data import standard_library_text, train_tokenizer
        from isthmus.models.tiny import write_random_checkpoint

        documents = standard_library_text(num_characters)
        folder.mkdir(parents=True, exist_ok=True)
        text.write_text("\n".join(documents))
        shape: dict[str, Any] = dict(
            vocab_size=512,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=64,
            num_experts_per_tok=2,
            max_position_embeddings=512,
            router_aux_loss_coef=0.01,
            tie_word_embeddings=False,
        )
        if name == "qwen3":
            shape |= dict(hidden_size=256, num_hidden_layers=8, num_experts=8, moe_intermediate_size=512)
            config: Any = Qwen3MoeConfig(**shape, intermediate_size=512)
        else:
            shape |= dict(hidden_size=384, num_hidden_layers=4, num_local_experts=16, intermediate_size=768)
            config = MixtralConfig(**shape)
        write_random_checkpoint(config, model, 0, train_tokenizer(documents, 512))
    return model, text


def tune_command(folder: Path, options: argparse.Namespace, num_steps: int, more: Mapping[str, object]) -> list[str]:
    """``isthmus tune`` of the small Qwen3-MoE below ``folder``, in place and in FP32, into ``run`` and ``report.json``
    where it is started. ``options``: with ``seq_len`` and ``micro_batches``; ``more``: options by name."""
    model, text = moe_and_text("qwen3", folder, num_characters=1_000_000)
    values: dict[str, object] = {
        "--output": "run",
        "--report": "report.json",
        "--steps": num_steps,
        "--seq-len": options.seq_len,
        "--micro-batches": options.micro_batches,
        "--dtype": "fp32",
        "--accelerator": "host",
    }
    command = [str(Path(sys.executable).with_name("isthmus")), "tune", str(model), "--data", str(text)]
    command += [str(part) for item in (values | dict(more)).items() for part in item]
    return [*command, "--overwrite", "--plain"]


def run_once(
    testbed: Testbed,
    command: Sequence[str],
    report: Path,
    *,
    cache: Path,
    again: bool = False,
    devices: Sequence[int] | None = None,
    run: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """The report that ``command`` writes, run on the testbed unless it is there (or ``again``); what the devices said
    is beside it. ``cache``: where profiles are kept. ``run`` instead of the testbed's own."""
    if again or not report.is_file():
        report.parent.mkdir(parents=True, exist_ok=True)
        report.unlink(missing_ok=True)
        environment = {"ISTHMUS_CACHE": str(cache), "COLUMNS": "160"}
        outcome = (run or testbed.run)(
            command, devices=devices, output=report.parent, env=environment, timeout_s=RUN_TIMEOUT_S
        )
        if outcome.exit_code:
            raise SystemExit(f"{' '.join(command)} failed: see {report.parent}/device-*.err")
    return json.loads(report.read_text())


def run_job(
    testbed: Testbed,
    job: Mapping[str, Any],
    folder: Path,
    *,
    cache: Path,
    again: bool = False,
    devices: Sequence[int] | None = None,
    run: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """The report of a job of ``testbed_device.py`` in ``folder``; one that was of another job is not taken."""
    report, written = folder / "report.json", folder / "job.json"
    text = json.dumps(dict(job), indent=1)
    again = again or not written.is_file() or written.read_text() != text
    folder.mkdir(parents=True, exist_ok=True)
    written.write_text(text)
    script = Path(__file__).with_name("testbed_device.py")
    command = [sys.executable, str(script), str(written.resolve()), str(report.resolve())]
    return run_once(testbed, command, report, cache=cache, again=again, devices=devices, run=run)


def write_results(folder: Path, name: str, text: str, content: Mapping[str, Any]) -> None:
    """A table and its numbers beside each other; both printed too, the JSON last on one line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    line = json.dumps({"benchmark": name, **content})
    (folder / f"{name}.json").write_text(line + "\n")
    print(text)
    print(line)
