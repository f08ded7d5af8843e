"""``isthmus tune``: the options of a fine-tuning run, explained. What they do is in ``isthmus.tuning.run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def _option(panel: str, help_text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, **settings)


def _data(help_text: str, **settings: Any) -> Any:
    return _option("Data", help_text, **settings)


def _training(help_text: str, **settings: Any) -> Any:
    return _option("Training", help_text, **settings)


def _hardware(help_text: str, **settings: Any) -> Any:
    return _option("Hardware and placement", help_text, **settings)


def _output(help_text: str, *names: str, **settings: Any) -> Any:
    return _option("Output", help_text, *names, **settings)


Model = Annotated[str, typer.Argument(help="Mixture-of-Experts model: a Hugging Face id, or a checkpoint directory.")]

Data = Annotated[
    str,
    _data(
        "What to learn: a .jsonl or .json file (fields [b]text[/], [b]prompt[/]+[b]completion[/], or [b]messages[/]), "
        "a .txt file, or the name of a Hugging Face data set. With prompts, the loss is on completions only.",
        metavar="FILE|NAME",
    ),
]
Columns = Annotated[
    str | None,
    _data(
        "Fields to use when they have other names: [b]question,answer[/] are prompt and completion.", metavar="NAMES"
    ),
]
EvalData = Annotated[
    str | None, _data("Like --data, but only to evaluate on: the loss on what was not learnt.", metavar="FILE|NAME")
]
SeqLen = Annotated[
    int,
    _data("Tokens of one sequence. Documents are packed to this length and do not attend to each other.", min=1),
]

Steps = Annotated[int, _training("Optimizer steps in all (a resumed run counts those done before).", min=1)]
MicroBatchSize = Annotated[int, _training("Sequences computed at once. More need more accelerator memory.", min=1)]
MicroBatches = Annotated[
    int,
    _training(
        "Micro-batches of a step, their gradients added up. More reuse every loaded expert more often and cost no "
        "more weight traffic: raise this first when the links are what you wait for.",
        min=1,
    ),
]
MicroBatchesInFlight = Annotated[
    int | None,
    _training(
        "Micro-batches that go forward before the first goes backward, at most: their activations are kept at once. "
        "Fewer need less accelerator memory, load weights more often, and change no result. Left out: as many as fit, "
        "all if they do.",
        min=1,
        metavar="N",
    ),
]
LearningRate = Annotated[float, _training("Peak learning rate of AdamW.")]
Schedule = Annotated[
    Literal["constant", "linear", "cosine"], _training("How the learning rate goes on after the warm-up.")
]
Warmup = Annotated[
    float, _training("Share of the steps (below 1) or number of steps in which the learning rate rises from 0.", min=0)
]
WeightDecay = Annotated[float, _training("Decoupled weight decay of AdamW.", min=0)]
ClipNorm = Annotated[
    float,
    _training(
        "Scale gradients down to this global norm; exact. 0: off, which saves no time: steps wait for the norm anyway.",
        min=0,
    ),
]
Dtype = Annotated[
    Literal["bf16", "fp32"],
    _training("Precision of the computation. Master weights and moments are FP32 in both."),
]
Seed = Annotated[int, _training("Fixes the order of the data and everything else that is drawn.")]
NumLayers = Annotated[
    int | None, _training("Take only the first N layers of the model: to try things out.", min=1, metavar="N")
]

Policy = Annotated[
    Literal["affinity", "paper", "mobius", "gpipe-offload", "cpu-experts", "resident"],
    _hardware(
        "Who computes which expert. [b]affinity[/]: CPU, links and accelerator share them so that all end soonest. "
        "[b]paper[/]: APTMoE's published rule. [b]mobius[/]: load whole stages ahead. [b]gpipe-offload[/]: load stage "
        "by stage, nothing ahead. [b]cpu-experts[/]: every routed expert on the CPU. [b]resident[/]: all stay loaded "
        "(must fit).",
        metavar="POLICY",
    ),
]
Accelerator = Annotated[
    Literal["auto", "cuda", "emulated", "host"],
    _hardware(
        "[b]cuda[/]: a GPU. [b]host[/]: the CPU alone, nothing is copied. [b]emulated[/]: a GPU's separate memory and "
        "slow links played on the CPU, to see schedules without a GPU. [b]auto[/]: cuda where there is one, else host.",
        metavar="KIND",
    ),
]
AcceleratorMemory = Annotated[
    str | None,
    _hardware("Accelerator memory never to exceed, such as [b]8GiB[/]. Left out: what is free there.", metavar="SIZE"),
]
NumStages = Annotated[
    int | None,
    _hardware(
        "Consecutive layers form this many stages, loaded together. Left out: chosen to fit, or two per process.",
        min=1,
        metavar="N",
    ),
]
Emulate = Annotated[
    str | None,
    _hardware("Links of --accelerator emulated: [b]h2d=2GB/s,d2h=2GB/s,latency=20us,threads=1[/].", metavar="RATES"),
]
CpuSpeed = Annotated[
    float, _hardware("Run CPU experts at this fraction of their speed: what a machine with fewer cores would do.")
]

Output = Annotated[
    Path, _output("Where the fine-tuned model goes, loadable by from_pretrained; checkpoints too.", metavar="DIR")
]
Report = Annotated[
    Path | None, _output("Write the report (every step, and a summary) here too, as JSON.", metavar="FILE")
]
Timeline = Annotated[
    Path | None,
    _output("Write what ran where and when here: a Chrome trace, and a PNG beside it.", metavar="FILE"),
]
Trace = Annotated[
    Path | None,
    _output(
        "Write how many tokens chose each expert here, in every step that this process takes: for `isthmus plan tune "
        "--popularity`.",
        metavar="FILE.npz",
    ),
]
EvalEvery = Annotated[int, _output("Evaluate every N steps.", min=1, metavar="N")]
EvalBatches = Annotated[int, _output("Steps' worth of --eval-data that one evaluation takes.", min=1, metavar="N")]
SaveEvery = Annotated[
    int, _output("Write a checkpoint to resume from every N steps, and at the end. 0: only then.", min=0, metavar="N")
]
Resume = Annotated[
    bool, _output("Go on from the last checkpoint in --output, exactly as if uninterrupted.", "--resume")
]
Overwrite = Annotated[bool, _output("Delete the run that --output holds, and all else there.", "--overwrite")]
Plain = Annotated[
    bool | None, _output("Plain progress lines or a live display. Left out: live in a terminal.", "--plain/--live")
]


Wire = Annotated[
    Literal["bf16", "int8"] | None,
    _hardware(
        "Started by torchrun: how hidden states and their gradients travel. [b]bf16[/]: half of an fp32 model's bytes. "
        "[b]int8[/]: a quarter (of a bf16 model's half), one scale for 64 values. Left out: as they are."
    ),
]
Backend = Annotated[
    Literal["gloo", "nccl"],
    _hardware(
        "Started by torchrun, a GPU for each process: what carries tensors between them. [b]gloo[/]: through host "
        "memory. [b]nccl[/]: from GPU to GPU; no machine with two GPUs has tried it yet.",
        metavar="NAME",
    ),
]
RankTimeout = Annotated[
    float,
    _hardware("Started by torchrun: seconds that one process waits for another before it gives up.", metavar="SECONDS"),
]


def tune(
    model: Model,
    *,
    data: Data,
    columns: Columns = None,
    eval_data: EvalData = None,
    seq_len: SeqLen = 512,
    steps: Steps = 100,
    micro_batch_size: MicroBatchSize = 1,
    micro_batches: MicroBatches = 4,
    micro_batches_in_flight: MicroBatchesInFlight = None,
    learning_rate: LearningRate = 2e-5,
    schedule: Schedule = "cosine",
    warmup: Warmup = 0.03,
    weight_decay: WeightDecay = 0.0,
    clip_norm: ClipNorm = 1.0,
    dtype: Dtype = "bf16",
    seed: Seed = 0,
    num_layers: NumLayers = None,
    policy: Policy = "affinity",
    accelerator: Accelerator = "auto",
    accelerator_memory: AcceleratorMemory = None,
    num_stages: NumStages = None,
    emulate: Emulate = None,
    cpu_speed: CpuSpeed = 1.0,
    wire: Wire = None,
    backend: Backend = "gloo",
    rank_timeout: RankTimeout = 600.0,
    output: Output,
    report: Report = None,
    timeline: Timeline = None,
    trace: Trace = None,
    eval_every: EvalEvery = 50,
    eval_batches: EvalBatches = 8,
    save_every: SaveEvery = 200,
    resume: Resume = False,
    overwrite: Overwrite = False,
    plain: Plain = None,
) -> None:
    """Fine-tune a Mixture-of-Experts model whose experts do not fit the accelerator.

    Experts that few tokens chose are computed on the CPU beside their weights; popular ones are loaded in time.
    torchrun --nproc-per-node 4 -m isthmus tune … divides the model's layers among processes, in stages.
    """
    options = dict(locals())
    from isthmus.tuning.run import tune as run

    run(**options)
