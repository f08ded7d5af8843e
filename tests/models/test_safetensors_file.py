from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from isthmus.models import safetensors_file
from isthmus.models.safetensors_file import SafetensorsReader, TensorToWrite, write_safetensors

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(SHAPES, DTYPES), min_size=1, max_size=4), chunk_bytes=st.sampled_from([8, 24, 1 << 20])
)
def test_files_are_what_the_library_reads_and_writes(shapes, chunk_bytes):
    tensors = {f"t{i}": torch.randn(shape).to(dtype) for i, (shape, dtype) in enumerate(shapes)}
    to_write = [TensorToWrite(key=key, shape=tuple(t.shape), dtype=t.dtype) for key, t in tensors.items()]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(safetensors_file, "CHUNK_BYTES", chunk_bytes)
        ours, theirs = Path(directory, "ours"), Path(directory, "theirs")
        write_safetensors(ours, to_write, (iter([tensor.double()]) for tensor in tensors.values()))
        loaded = load_file(ours)
        assert loaded.keys() == tensors.keys()
        assert all(
            torch.equal(loaded[key], tensors[key]) and loaded[key].dtype == tensors[key].dtype for key in tensors
        )
        save_file(tensors, theirs)
        with SafetensorsReader(theirs) as reader:
            for key, tensor in tensors.items():
                got = torch.empty(tensor.shape, dtype=torch.float32)
                reader.read_into(key, got)
                assert reader.tensors[key].shape == tensor.shape and torch.equal(got, tensor.float())


def test_part_of_a_tensor_is_read_from_its_first_element(tmp_path):
    save_file({"t": torch.arange(12.0).view(4, 3)}, tmp_path / "f")
    with SafetensorsReader(tmp_path / "f") as reader:
        rows = torch.empty(2, 3, dtype=torch.bfloat16)
        reader.read_into("t", rows, first_element=3)
    assert rows.flatten().tolist() == [3, 4, 5, 6, 7, 8]


def test_every_cut_is_noticed_and_names_the_file(tmp_path):
    save_file({"t": torch.zeros(8)}, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for num_bytes in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:num_bytes])
        with pytest.raises(ValueError, match=r"cut .*(truncated|not a safetensors file)"):
            SafetensorsReader(tmp_path / "cut")


@pytest.mark.parametrize("content", [b"x" * 100, (20).to_bytes(8, "little") + b"[1, 2, 3] not json  ", b""])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint: .*/f .*is not a safetensors file"):
        SafetensorsReader(tmp_path / "f")


def test_quantised_tensors_are_refused(tmp_path):
    save_file({"t": torch.zeros(8, dtype=torch.uint8)}, tmp_path / "f")
    with (
        SafetensorsReader(tmp_path / "f") as reader,
        pytest.raises(ValueError, match=r"t in .* is stored as U8, wanted"),
    ):
        reader.read_into("t", torch.zeros(8))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint: .*/none is missing"):
        SafetensorsReader(tmp_path / "none")
