"""cluster.json: what is in it is checked, and every error says what and where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isthmus.spec.cluster import MAX_DEVICES, Cluster, ClusterDevice, read_cluster
from isthmus.spec.errors import IsthmusError

GOLDEN = Path(__file__).parent / "golden" / "cluster.json"
PI = {"name": "pi-1", "address": "192.168.1.10"}
OTHER = {"name": "pi-2", "address": "192.168.1.11"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"devices": [PI, PI | {"address": "192.168.1.12"}]}, "devices: name 'pi-1' is there twice"),
        ({"devices": [PI, OTHER | {"address": "192.168.1.10"}]}, "devices: address '192.168.1.10' is there twice"),
        ({"devices": [PI, OTHER], "leader": "pi-3"}, "no device is called 'pi-3', wanted one of pi-1, pi-2"),
        ({"devices": []}, f"devices: got 0, wanted 1 to {MAX_DEVICES}"),
        ({"devices": [PI | {"name": " pi"}]}, "got name ' pi', wanted some, without spaces"),
        ({"devices": [PI | {"address": ""}]}, "got address '', wanted some"),
        ({"devices": [PI | {"memory_bytes": 0}]}, "pi-1 has memory_bytes 0, wanted more than 0"),
        ({"devices": [PI | {"memory_bytes": "2GiB"}]}, r"memory_bytes: got '2GiB' \(str\), wanted int"),
        ({"devices": [PI | {"cpu": 4}]}, "unknown fields cpu"),
        ({"devices": [{"name": "pi-1"}]}, "missing fields address"),
        ({"devices": [PI], "links": []}, "unknown fields links"),
    ],
)
def test_what_is_no_cluster_is_refused_with_the_file_and_the_reason(
    content: dict, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({"schema_version": 1} | content))
    with pytest.raises(IsthmusError, match=f"cluster: .*cluster.json: .*{message}"):
        read_cluster(path)


def test_a_file_that_is_not_there_or_no_json_is_said(tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match=r"cluster: cannot read .*none.json: No such file"):
        read_cluster(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(IsthmusError, match=r"cluster: .*text.json: Cluster: the text is not JSON"):
        read_cluster(tmp_path / "text.json")


def test_the_leader_comes_first_and_the_others_in_the_files_order() -> None:
    cluster = read_cluster(GOLDEN)
    assert [device.name for device in cluster.select().devices] == ["pi-2", "pi-1"]
    assert [device.name for device in cluster.select(["pi-1"]).devices] == ["pi-1"]


def test_a_choice_of_devices_names_each_once_and_only_known_ones() -> None:
    cluster = Cluster(devices=(ClusterDevice(**PI), ClusterDevice(**OTHER)))  # pyright: ignore[reportArgumentType]
    with pytest.raises(IsthmusError, match="no device is called 'pi-9'"):
        cluster.select(["pi-1", "pi-9"])
    with pytest.raises(IsthmusError, match="got pi-1, pi-1, wanted each device once"):
        cluster.select(["pi-1", "pi-1"])
