"""What a run leaves behind: ``report.json`` of the verbs that measure something."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from isthmus.spec.inference import InferencePlan
from isthmus.spec.plan import LayerMapping


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step of a tune run."""

    step: int
    loss: float
    """Mean over the step's target tokens, the router's auxiliary loss included where the family has one."""
    num_tokens: int
    duration_s: float
    bound_s: float
    """The least seconds that this hardware could need for the step (paper: the bound per step)."""
    h2d_bytes: int
    d2h_bytes: int
    num_experts_on_cpu: int
    """(layer, expert, wave) triples that had tokens and were computed on the CPU."""
    num_experts_on_accelerator: int
    optimizer_s: float
    learning_rate: float
    gradient_norm: float | None = None
    """Global norm before clipping, where nothing is clipped too. None: not told."""
    evaluation_loss: float | None = None
    """None: no evaluation after this step."""


@dataclass(frozen=True, kw_only=True)
class TuneSummary:
    """A tune run as a whole. Accuracies are None for policies that predict nothing."""

    tokens_per_s: float
    bound_share: float
    """Sum of ``bound_s`` over sum of ``duration_s``."""
    peak_accelerator_bytes: int
    accelerator_budget_bytes: int
    peak_host_bytes: int
    needed_host_bytes: int | None = None
    """What the method itself needs: weights, master weights, moments, gradients."""
    predictor_token_accuracy: float | None = None
    """Share of (token, expert) choices that were predicted."""
    predictor_least_popular_quarter_accuracy: float | None = None
    """Share of the experts called least popular (lowest quarter) that were."""
    micro_batches_in_flight: int | None = None
    """So many went forward and backward before the next began."""


@dataclass(frozen=True, kw_only=True)
class RankDevice:
    """The GPU that one of several processes took."""

    rank: int
    host: str
    number: int
    """Of those that the process sees."""
    address: str
    """On the PCIe bus."""
    root: str | None
    """The root port through which it reaches its host; None: not known."""


@dataclass(frozen=True, kw_only=True)
class TuneReport:
    """``report.json`` of a tune run. ``config`` and ``environment`` hold plain JSON values (lists, not tuples)."""

    schema_version: int = 1
    kind: Literal["tune"] = "tune"
    config: dict[str, object]
    environment: dict[str, object]
    steps: tuple[StepRecord, ...]
    summary: TuneSummary
    mapping: LayerMapping | None = None
    """Of several processes."""
    devices: tuple[RankDevice, ...] = ()
    """Likewise, of those that use a GPU."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, 10th and 90th percentile of paired runs."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True, kw_only=True)
class BenchTuneRow:
    """One policy under one skew at one CPU speed."""

    policy: str
    skew: str | float
    """``uniform``, or the wanted G = mean over layers of Σ_e p_e², p_e the share of tokens of expert e."""
    measured_skew: float
    """G as the router really routed."""
    cpu_speed: float
    """Fraction of this host's speed at which CPU experts ran."""
    tokens_per_s: Spread
    bound_share: float
    h2d_bytes_per_step: float
    share_of_tokens_on_cpu: float


@dataclass(frozen=True, kw_only=True)
class BenchTuneReport:
    """``report.json`` of a bench run. ``config`` and ``environment`` hold plain JSON values (lists, not tuples)."""

    schema_version: int = 1
    kind: Literal["bench-tune"] = "bench-tune"
    config: dict[str, object]
    environment: dict[str, object]
    rows: tuple[BenchTuneRow, ...]


@dataclass(frozen=True, kw_only=True)
class BenchInferRow:
    """One way of answering one request."""

    strategy: str
    codec: str
    dtype: str
    num_devices: int
    tokens: int
    """Of the whole request: of all its sequences."""
    latency_s: Spread
    predicted_latency_s: float
    bound_s: float
    bytes_sent_per_device: int
    """Of the device that sends most; payload and headers, without what TCP/IP adds."""
    num_exchanges: int
    """Of the leader."""
    max_rel_error: float | None = None
    """Largest difference from one device in FP32, by the largest size of a hidden state; where tokens are generated, of
    the prompt's. None: not compared."""
    transport: str = "sockets"
    algorithm: str = ""
    weights: tuple[float, ...] = ()
    """Each device's part of the work."""
    is_choice: bool = False
    """Whether the planner would take it, for this model."""
    num_sub_blocks: int = 1
    """Of the model that answered; 1: it is not decoupled."""
    num_new_tokens: int = 0
    """Generated for each sequence. 0: none, hidden states were asked for, and the four below are None."""
    time_to_first_token_s: Spread | None = None
    time_per_token_s: Spread | None = None
    """Of every one but the first, of all requests. None where there is only one."""
    predicted_time_to_first_token_s: float | None = None
    predicted_time_per_token_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class BenchInferReport:
    """``report.json`` of ``isthmus bench infer``. ``config`` and ``environment`` hold plain JSON values."""

    schema_version: int = 1
    kind: Literal["bench-infer"] = "bench-infer"
    config: dict[str, object]
    environment: dict[str, object]
    rows: tuple[BenchInferRow, ...]


@dataclass(frozen=True, kw_only=True)
class PredictedPlan:
    """A plan and what it is predicted to take."""

    plan: InferencePlan
    latency_s: float
    first_token_s: float
    """Of ``latency_s``, where tokens are generated; else all of it."""
    bound_s: float
    bytes_sent_per_device: int
    """Of the device that sends most."""
    num_exchanges: int
    memory_bytes_per_device: int
    """Of the device that needs most, beside the process itself."""


@dataclass(frozen=True, kw_only=True)
class PredictedDecoupling:
    """A decoupled form of a plain model, and the fastest plan that it would have."""

    num_sub_blocks: int
    original_layers: tuple[int, ...]
    """From 0."""
    predicted: PredictedPlan
    times_as_fast: float
    """As the plain model's plan."""


@dataclass(frozen=True, kw_only=True)
class PlanInferReport:
    """``report.json`` of ``isthmus plan infer``. ``config`` and ``environment`` hold plain JSON values."""

    schema_version: int = 1
    kind: Literal["plan-infer"] = "plan-infer"
    config: dict[str, object]
    environment: dict[str, object]
    chosen: PredictedPlan
    reason: str
    decoupled: PredictedDecoupling | None = None
    """None of a model that cannot be decoupled or is already, on one device, and where no such plan fits."""


@dataclass(frozen=True, kw_only=True)
class FidelityPoint:
    """How like the original a decoupled copy is after so much training, on text held out."""

    step: int
    minutes: float
    """Of training alone."""
    num_tokens: int
    loss: float
    """Encoders: 1 - ``spearman``. Decoders: nats a token."""
    cosine: float | None = None
    spearman: float | None = None
    original_loss: float | None = None
    """Decoders: the original's nats a token on the same text."""
    divergence: float | None = None
    """Decoders: mean Kullback–Leibler divergence of the copy's predictions from the original's, in nats a token."""


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """What the fine-tuned original and its decoupled copy reach on examples that neither was trained on."""

    task: str
    metric: str
    original: float
    decoupled: float


@dataclass(frozen=True, kw_only=True)
class DecoupleReport:
    """``report.json`` of ``isthmus decouple``. ``config`` and ``environment`` hold plain JSON values."""

    schema_version: int = 1
    kind: Literal["decouple"] = "decouple"
    config: dict[str, object]
    environment: dict[str, object]
    curve: tuple[FidelityPoint, ...]
    score: TaskScore | None = None
    """With ``--task``."""


@dataclass(frozen=True, kw_only=True)
class EvaluateRow:
    """One model's score in one metric of one task."""

    model: str
    num_sub_blocks: int
    """1: not decoupled."""
    original_layers: tuple[int, ...]
    """From 0; all of a model that is not decoupled."""
    task: str
    metric: str
    """Such as ``accuracy``, ``f1``, ``matthews``, ``exact_match``, ``probe accuracy``, ``spearman``, ``perplexity``."""
    mean: float
    std: float
    """Sample standard deviation over seeds; 0 for one."""
    num_seeds: int


@dataclass(frozen=True, kw_only=True)
class EvaluateReport:
    """``report.json`` of ``isthmus evaluate``. ``config`` and ``environment`` hold plain JSON values."""

    schema_version: int = 1
    kind: Literal["evaluate"] = "evaluate"
    config: dict[str, object]
    environment: dict[str, object]
    rows: tuple[EvaluateRow, ...]


@dataclass(frozen=True, kw_only=True)
class PretrainPoint:
    """A twin's loss on text held out after so much training."""

    step: int
    minutes: float
    num_tokens: int
    loss: float
    """Nats a predicted token."""


@dataclass(frozen=True, kw_only=True)
class Twin:
    """One of two models trained from scratch alike."""

    name: str
    num_sub_blocks: int
    """1: not decoupled."""
    original_layers: tuple[int, ...]
    curve: tuple[PretrainPoint, ...]


@dataclass(frozen=True, kw_only=True)
class PretrainReport:
    """``report.json`` of ``isthmus pretrain``. ``config`` and ``environment`` hold plain JSON values."""

    schema_version: int = 1
    kind: Literal["pretrain"] = "pretrain"
    config: dict[str, object]
    environment: dict[str, object]
    twins: tuple[Twin, ...]
