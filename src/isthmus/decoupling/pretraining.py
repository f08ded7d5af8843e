"""``isthmus pretrain``: an original and a decoupled model from scratch, twins in all but their form.

The published way (DeTransformer, DATE 2024, section V): the same configuration, first weights, tokens, order, steps and
learning rate for both, masked or causal language modelling. Size is a matter of configuration alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from isthmus.data import load_tokenizer, pad_token_id, read_records, train_tokenizer
from isthmus.decoupling.corpus import Corpus, read_corpus
from isthmus.decoupling.distillation import autocast
from isthmus.decoupling.pair import Wanted, quiet
from isthmus.decoupling.processes import device_of, process_group, progress_of, ranks
from isthmus.decoupling.slicing import copy_weights
from isthmus.decoupling.trainer import Trainer, TrainingOptions, TrainingRecord
from isthmus.models.attention import use_blocked_attention
from isthmus.reporting.environment import environment
from isthmus.spec.errors import IsthmusError
from isthmus.spec.files import atomic_write
from isthmus.spec.report import PretrainPoint, PretrainReport, Twin
from isthmus.spec.serialization import to_json
from isthmus.training.batches import Batch, BatchStream, fixed_batches
from isthmus.training.heap import keep_freed_memory
from isthmus.training.interruption import StopSignals
from isthmus.training.output import check_output, clear_output, published

MASKED_SHARE = 0.15
IGNORED = -100
EVALUATION_TOKENS = 4096
DEFAULT_MINUTES = 60.0
TWINS = ("original", "decoupled")


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """What ``isthmus pretrain`` was asked for. Names, defaults and meanings are those of ``pretrain``."""

    config: str | Path
    data: Sequence[str | Path]
    output: str | Path
    sub_blocks: int
    groups: int | None
    original_layers: Sequence[int] | None
    heads: str
    tokenizer: str | Path | None
    minutes: float | None
    steps: int | None
    learning_rate: float
    batch_tokens: int
    seq_len: int
    dtype: str
    device: str
    seed: int
    resume: bool
    overwrite: bool
    plain: bool | None

    @property
    def twins(self) -> tuple[str, ...]:
        return TWINS[:1] if self.sub_blocks == 1 else TWINS

    @property
    def wanted(self) -> Wanted:
        layers = None if self.original_layers is None else tuple(self.original_layers)
        return Wanted(sub_blocks=self.sub_blocks, groups=self.groups, original_layers=layers, heads=self.heads)

    def training(self, num_steps: int | None) -> TrainingOptions:
        """For the first twin, and with its ``num_steps`` for the second."""
        steps = num_steps or self.steps
        minutes = self.minutes if self.minutes is not None or steps is not None else DEFAULT_MINUTES
        share = None if minutes is None or num_steps is not None else minutes / len(self.twins)
        return TrainingOptions(num_steps=steps, minutes=share, learning_rate=self.learning_rate)


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """Nats a predicted token, on text held out."""

    loss: float

    def describe(self) -> str:
        return f"loss {self.loss:.4f}, perplexity {math.exp(self.loss):.3f}"


def pretrain(
    config: str | Path,
    *,
    data: Sequence[str | Path],
    output: str | Path,
    sub_blocks: int = 4,
    groups: int | None = None,
    original_layers: Sequence[int] | None = None,
    heads: str = "all",
    tokenizer: str | Path | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    learning_rate: float = 1e-3,
    batch_tokens: int = 2048,
    seq_len: int = 128,
    dtype: str = "bf16",
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    plain: bool | None = None,
) -> PretrainReport | None:
    """Trains both twins one after the other into ``output/original`` and ``output/decoupled``, with the same steps;
    with one sub-block the original alone.

    Parameters are those of ``isthmus pretrain`` (see its ``--help``); ``minutes`` is for both together. Under torchrun
    every process calls this. Returns the report, also written to ``output/report.json`` (None on ranks but the first).

    Raises ``ValueError`` or ``OSError`` for input that cannot work, naming the field and the fix, and ``Interrupted``.
    """
    options = PretrainOptions(**locals())
    options.training(None).check()
    base = _read_config(config)
    if sub_blocks > 1:
        options.wanted.config(base)  # refuses what does not fit before anything slow happens
    quiet()
    with process_group() as rank, progress_of(rank, "isthmus pretrain", steps, plain) as progress:
        with StopSignals(progress.message) as stop:
            if rank == 0:
                check_output(Path(output), [config, *data], resume=resume, overwrite=overwrite)
            progress.phase("reading text")
            tokenizer_and_text = _read_text(base, data, tokenizer, seq_len, seed)
            if overwrite and rank == 0:
                clear_output(Path(output))
            keep_freed_memory()
            return _train(options, base, *tokenizer_and_text, rank, progress, stop)


def _train(
    options: PretrainOptions,
    base: PretrainedConfig,
    tokenizer: Any,
    corpus: Corpus,
    rank: int,
    progress: Any,
    stop: StopSignals,
) -> PretrainReport | None:
    folder = Path(options.output)
    records: dict[str, list[TrainingRecord]] = {}
    num_steps: int | None = None
    for name in options.twins:
        progress.message(f"training the {name} twin")
        wanted = options.wanted if name == "decoupled" else None
        twin = _Twin(base, wanted, options.seed, tokenizer, options.dtype, options.device)
        training = options.training(num_steps)
        trainer = twin.trainer(corpus, training, options.batch_tokens, folder / name, progress, stop)
        if options.resume:
            trainer.resume()
        trainer.run()
        records[name], num_steps = trainer.records, trainer.num_steps
        if rank == 0:
            twin.write(folder / name)
    if rank:
        return None
    asked = json.loads(json.dumps(asdict(options), default=str))
    report = _report(asked, corpus, records, [base, *(options.wanted.config(base) for _ in options.twins[1:])])
    atomic_write(folder / "report.json", to_json(report))
    return report


def _read_config(config: str | Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(str(config))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise IsthmusError(
            f"config: cannot read {config} ({reason}); wanted a Hugging Face config.json with a model_type"
        ) from error


def _is_causal(base: PretrainedConfig) -> bool:
    return base.model_type not in ("bert", "roberta")


def _read_text(
    config: PretrainedConfig, data: Sequence[str | Path], tokenizer: str | Path | None, seq_len: int, seed: int
) -> tuple[Any, Corpus]:
    """The tokenizer, trained on the text unless one is given, and windows of ``seq_len`` tokens."""
    if not data:
        raise IsthmusError("data: give --data FILE: text to train on")
    if tokenizer is not None:
        vocabulary = load_tokenizer(tokenizer)
    else:
        texts = (
            value
            for source in data
            for record in read_records(source)
            for value in record.fields.values()
            if isinstance(value, str)
        )
        vocabulary = train_tokenizer(texts, config.vocab_size)
    if len(vocabulary) > config.vocab_size:
        raise IsthmusError(
            f"tokenizer: has {len(vocabulary)} tokens, the configuration's vocab_size is {config.vocab_size}; raise it"
        )
    if not _is_causal(config) and vocabulary.mask_token_id is None:
        raise IsthmusError("tokenizer: has no mask token, which masked language modelling needs; add one")
    limit = min(seq_len, getattr(config, "max_position_embeddings", seq_len) - 2 * (config.model_type == "roberta"))
    return vocabulary, read_corpus(data, vocabulary, seq_len=limit, is_windows=True, seed=seed)


class _Twin:
    """One of the two: the model, its loss on a batch, and on text held out."""

    def __init__(
        self, base: PretrainedConfig, wanted: Wanted | None, seed: int, tokenizer: Any, dtype: str, device: str
    ) -> None:
        self._is_causal, self._tokenizer, self._dtype, self._seed = _is_causal(base), tokenizer, dtype, seed
        auto_class = AutoModelForCausalLM if self._is_causal else AutoModelForMaskedLM
        torch.manual_seed(seed)
        self.model: PreTrainedModel = auto_class.from_config(base, attn_implementation="sdpa")
        if wanted is not None:
            original, self.model = self.model, auto_class.from_config(wanted.config(base), attn_implementation="sdpa")
            copy_weights(original, self.model)  # both begin with the same
        self._device = device_of(device)
        self.model.to(self._device)  # type: ignore[arg-type]
        if self._device.type == "cpu":
            use_blocked_attention(self.model)

    def trainer(
        self,
        corpus: Corpus,
        training: TrainingOptions,
        batch_tokens: int,
        output: Path,
        progress: Any,
        stop: StopSignals,
    ) -> Trainer:
        padding = pad_token_id(self._tokenizer)
        rank, world_size = ranks()
        stream = BatchStream(
            corpus.texts,
            tokens_per_batch=batch_tokens,
            pad_token_id=padding,
            seed=self._seed,
            part=rank,
            num_parts=world_size,
        )
        torch.manual_seed(self._seed + rank)  # dropout and masks
        held_out = fixed_batches(corpus.held_out, EVALUATION_TOKENS, padding)
        return Trainer(
            self.model,
            self._loss,
            stream,
            lambda: self._evaluate(held_out),
            options=training,
            output=output,
            progress=progress,
            stop=stop,
        )

    def write(self, output: Path) -> None:
        self.model.set_attn_implementation("sdpa")
        with published(output) as aside:
            self.model.save_pretrained(aside)
            self._tokenizer.save_pretrained(aside)

    def _loss(self, batch: Batch) -> Tensor:
        self.model.train()
        return self._mean_loss(batch, self._targets(batch, None))

    def _targets(self, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """What is to be predicted where, (B, T); masks ``batch`` in place for masked language modelling."""
        input_ids, is_token = batch["input_ids"], batch["attention_mask"].bool()
        if self._is_causal:
            targets = F.pad(input_ids[:, 1:], (0, 1), value=IGNORED)
            return targets.masked_fill(~F.pad(is_token[:, 1:], (0, 1), value=False), IGNORED)
        tokenizer: Any = self._tokenizer
        return mask_tokens(batch, tokenizer.mask_token_id, tokenizer.all_special_ids, len(tokenizer), generator)

    def _mean_loss(self, batch: Batch, targets_BT: Tensor) -> Tensor:
        with autocast(self._device, self._dtype):
            options = {"use_cache": False} if self._is_causal else {}
            hidden = self.model.base_model(**batch, **options).last_hidden_state
            chosen = targets_BT != IGNORED
            # Only where something is to be predicted: the vocabulary's product is a large part of a small model.
            logits = self._head()(hidden[chosen])
        return F.cross_entropy(logits.float(), targets_BT[chosen])

    def _head(self) -> Callable[[Tensor], Tensor]:
        model: Any = self.model
        return next(getattr(model, name) for name in ("lm_head", "cls") if hasattr(model, name))

    @torch.no_grad()
    def _evaluate(self, held_out: Sequence[Batch]) -> HeldOutLoss:
        self.model.eval()
        generator = torch.Generator().manual_seed(self._seed)
        total, num_targets = 0.0, 0
        for batch in held_out:
            batch = {name: tensor.clone() for name, tensor in batch.items()}
            targets = self._targets(batch, generator).to(self._device)
            batch = {name: tensor.to(self._device) for name, tensor in batch.items()}
            count = int((targets != IGNORED).sum())
            if count:
                total += float(self._mean_loss(batch, targets)) * count
                num_targets += count
        return HeldOutLoss(loss=total / max(1, num_targets))


def mask_tokens(
    batch: Batch, mask_id: int, special_ids: Sequence[int], vocab_size: int, generator: torch.Generator | None
) -> Tensor:
    """BERT's masking, in place: of 15 % of the tokens that are not special 80 % are masked, 10 % replaced by any, 10 %
    left. Returns what they were, -100 elsewhere, (B, T) (Devlin et al. 2019, section 3.1)."""
    input_ids, device = batch["input_ids"], batch["input_ids"].device
    drawn, kind = (torch.rand(input_ids.shape, generator=generator).to(device) for _ in range(2))
    special = torch.isin(input_ids, torch.tensor(list(special_ids), device=device)) | (batch["attention_mask"] == 0)
    chosen = (drawn < MASKED_SHARE) & ~special
    targets = input_ids.masked_fill(~chosen, IGNORED)
    anything = torch.randint(0, vocab_size, input_ids.shape, generator=generator).to(device)
    input_ids[chosen & (kind < 0.8)] = mask_id
    input_ids[chosen & (kind >= 0.9)] = anything[chosen & (kind >= 0.9)]
    return targets


def _report(
    asked: dict[str, object], corpus: Corpus, records: dict[str, list[TrainingRecord]], configs: Sequence[Any]
) -> PretrainReport:
    twins = []
    for (name, points), config in zip(records.items(), configs, strict=True):
        curve = tuple(
            PretrainPoint(
                step=record.step,
                minutes=record.elapsed_s / 60,
                num_tokens=record.num_tokens,
                loss=float(record.evaluation["loss"] or 0.0),
            )
            for record in points
        )
        twins.append(
            Twin(
                name=name,
                num_sub_blocks=getattr(config, "num_sub_blocks", 1),
                original_layers=tuple(getattr(config, "original_layers", range(config.num_hidden_layers))),
                curve=curve,
            )
        )
    facts = {"num_texts": len(corpus.texts), "num_tokens": corpus.num_tokens, "num_held_out": len(corpus.held_out)}
    return PretrainReport(config=asked | facts, environment=environment(), twins=tuple(twins))
