"""A cluster's file: what is read, and what contradicts itself is refused with the field's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isthmus.spec.errors import IsthmusError
from isthmus.spec.profile import Curve
from isthmus.spec.serialization import from_json, to_json
from isthmus.spec.tune_cluster import MeasuredExperts, TuneCluster, read_tune_cluster

GOLDEN = """\
{
  "experts": {
    "h8-i16-mlp": {
      "cpu_forward": {
        "num_tokens": [
          1,
          64
        ],
        "seconds": [
          0.001,
          0.01
        ]
      },
      "dense_load_s": null,
      "load_s": 0.002,
      "num_cores": 8
    }
  },
  "hosts": [
    {
      "accelerator": {
        "copy_s": 1e-05,
        "d2h_bytes_per_s": 10000000000.0,
        "expert_s": 3e-05,
        "flops_per_s": {
          "fp32": 10000000000000.0
        },
        "h2d_bytes_per_s": 10000000000.0,
        "memory_bytes": 17179869184,
        "memory_bytes_per_s": 900000000000.0,
        "name": "card"
      },
      "accelerators_per_root": 2,
      "core_flops_per_s": {
        "fp32": 50000000000.0
      },
      "count": 2,
      "memory_bytes": 137438953472,
      "memory_bytes_per_s": 100000000000.0,
      "name": "node",
      "network_bytes_per_s": 1000000000.0,
      "network_s": 5e-05,
      "num_accelerators": 4,
      "num_cores": 16,
      "root_bytes_per_s": 12000000000.0
    }
  ],
  "name": "lab",
  "schema_version": 1,
  "source": ""
}
"""


def write(folder: Path, change: Callable[[dict[str, Any]], object] = lambda cluster: None) -> Path:
    cluster = json.loads(GOLDEN)
    change(cluster)
    path = folder / "cluster.json"
    path.write_text(json.dumps(cluster))
    return path


def test_the_file_reads_back_to_itself(tmp_path: Path) -> None:
    cluster = read_tune_cluster(write(tmp_path))
    assert to_json(cluster) == GOLDEN and from_json(TuneCluster, GOLDEN) == cluster
    assert cluster.num_accelerators == 8
    curve = Curve(num_tokens=(1, 64), seconds=(1e-3, 1e-2))
    assert cluster.experts == {"h8-i16-mlp": MeasuredExperts(cpu_forward=curve, num_cores=8, load_s=2e-3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["hosts"][0].update(num_cores=3), "hosts.num_cores: node has 3 for 4 accelerators"),
        (lambda c: c["hosts"][0].update(accelerators_per_root=3), "accelerators_per_root: node has 3 for 4 accel"),
        (lambda c: c["hosts"][0].update(count=0), "hosts.count: node has 0, wanted 1 or more"),
        (lambda c: c["hosts"][0].update(root_bytes_per_s=0), "hosts.root_bytes_per_s: got 0"),
        (lambda c: c["hosts"][0].update(root_bytes_per_s=1e9), "root_bytes_per_s: node has 1e.09, less than accel"),
        (lambda c: c["hosts"][0].update(memory_bytes_per_s=1e9), "memory_bytes_per_s: node has 1e.09, less than accel"),
        (lambda c: c["hosts"][0]["accelerator"].update(h2d_bytes_per_s=-1), "accelerator.h2d_bytes_per_s: got -1"),
        (lambda c: c["hosts"][0]["accelerator"].update(copy_s=-1), "accelerator.copy_s: got -1"),
        (lambda c: c["hosts"][0]["accelerator"].update(flops_per_s={"fp8": 1}), "flops_per_s: got fp8, wanted some of"),
        (lambda c: c["hosts"][0].update(core_flops_per_s={}), "core_flops_per_s: got none, wanted some of fp32"),
        (lambda c: c["hosts"][0].pop("num_cores"), r"hosts\[0\]: missing fields num_cores"),
        (lambda c: c["hosts"][0].update(cores=2), r"hosts\[0\]: unknown fields cores"),
        (lambda c: c.update(hosts=[]), "hosts: got 0 accelerators, wanted 1 to 1024"),
        (lambda c: c.update(schema_version=2), "schema_version: got 2, wanted 1"),
        (lambda c: c["experts"]["h8-i16-mlp"].update(num_cores=0), "experts.num_cores: got 0"),
        (lambda c: c["experts"]["h8-i16-mlp"].update(load_s=0), "experts.load_s: got 0"),
        (
            lambda c: c["experts"]["h8-i16-mlp"]["cpu_forward"].update(seconds=[1.0]),
            "experts.cpu_forward: got 2 token counts and 1 seconds",
        ),
        (
            lambda c: c["experts"]["h8-i16-mlp"]["cpu_forward"].update(num_tokens=[100, 1]),
            "experts.cpu_forward.num_tokens: got 1 after 100, wanted every one above the one before",
        ),
    ],
)
def test_a_cluster_that_contradicts_itself_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(IsthmusError, match=f"cluster: .*cluster.json: .*{message}"):
        read_tune_cluster(write(tmp_path, change))


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match=r"cluster: cannot read .*No such file.*wanted a JSON file or a known name"):
        read_tune_cluster(tmp_path / "cluster.json")
