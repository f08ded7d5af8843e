"""What sentence-transformers' files beside the weights say is what is computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isthmus.models.sentence import SentencePooling, read_pooling


def write(directory: Path, pooling: dict, *more: str) -> Path:
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), *((name, f"2_{name}") for name in more)]
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    listed = [{"type": f"sentence_transformers.models.{name}", "path": path} for name, path in modules]
    (directory / "modules.json").write_text(json.dumps(listed))
    return directory


@pytest.mark.parametrize(
    ("config", "more", "wanted"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, (), SentencePooling()),
        (
            {"word_embedding_dimension": 8, "pooling_mode_cls_token": True},
            ("Normalize",),
            SentencePooling(pooling="cls", normalize=True),
        ),
        ({"pooling_mode": "mean"}, ("Normalize",), SentencePooling(normalize=True)),
    ],
)
def test_the_pooling_that_is_asked_for(
    config: dict, more: tuple[str, ...], wanted: SentencePooling, tmp_path: Path
) -> None:
    assert read_pooling(write(tmp_path, config, *more)) == wanted


def test_a_plain_checkpoint_gets_the_mean(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) == SentencePooling()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls and mean"),
        ({}, "none"),
    ],
)
def test_another_pooling_is_named(config: dict, name: str, tmp_path: Path) -> None:
    assert read_pooling(write(tmp_path, config)).pooling == name
