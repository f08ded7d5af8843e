"""How a checkpoint of sentence-transformers wants its tokens' vectors made into one: the files beside the weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FLAG = "pooling_mode_"
_FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True, kw_only=True)
class SentencePooling:
    """``pooling`` is ``mean``, ``cls``, or the name of one that is not computed here."""

    pooling: str = "mean"
    normalize: bool = False


def read_pooling(directory: Path) -> SentencePooling:
    """What ``modules.json`` says; the mean where there is none."""
    modules = _read(directory / "modules.json") or []
    kinds = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules}
    if "Pooling" not in kinds:
        return SentencePooling(normalize="Normalize" in kinds)
    config = _read(directory / kinds["Pooling"] / "config.json") or {}
    if "pooling_mode" in config:
        asked = {str(config["pooling_mode"])}
    else:
        asked = {
            str(_FLAGS.get(name, name)) for name, value in config.items() if name.startswith(_FLAG) and value is True
        }
    return SentencePooling(pooling=" and ".join(sorted(asked)) or "none", normalize="Normalize" in kinds)


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def copy_pooling(source: Path, target: Path) -> None:
    """Copies the files beside the weights, where there are any; the model below ``target`` pools as that of
    ``source``."""
    modules = _read(source / "modules.json")
    if modules is None:
        return
    for module in modules:
        config = source / str(module["path"]) / "config.json"
        if module["path"] and config.is_file():
            (target / str(module["path"])).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(config, target / str(module["path"]) / "config.json")
    names = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
