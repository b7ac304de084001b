"""Data sets of a hub by `hf:ORG/NAME[:CONFIG][:SPLIT]`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet

from tests.support import ROOT
from tests.support.hub_server import serving
from tests.support.shards import rows_of

pytestmark = pytest.mark.matrix  # a process that imports `datasets`: seconds

README = """---
configs:
- config_name: one
  data_files:
  - {split: train, path: one/*.jsonl}
- config_name: two
  data_files: two/b.jsonl
---
"""
SCRIPT = """
import json, sys
from vlm_cli.data.sources import open_source
from vlm_cli.errors import VLMError
found = {}
for name in sys.argv[1:]:
    try:
        source = open_source(name)
        before = [source.files.is_here(i) for i in range(len(source.shards))]
        rows = [row.data["prompt"] for row in source.all_rows()]
        found[name] = [source.kind, source.detail, list(source.shards), rows, before]
    except VLMError as error:
        found[name] = str(error)
print(json.dumps(found))
"""
SETS = ("hf:org/set", "hf:org/set:test", "hf:org/set:default:test", "hf:org/many:one", "hf:org/many:two:train")
BAD = {
    "hf:org/set:none": "has no split 'none'. Known: train, test.",
    "hf:org/many": "has several configurations: one, two. Give one: hf:org/many:CONFIG",
    "hf:org/many:tow": "has no configuration 'tow'. Did you mean 'two'? Known: one, two.",
    "hf:org/gone": "cannot read the data set 'org/gone' of the hub: ",
    "hf:org/code": "cannot read the data set 'org/code' of the hub: ",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What a process finds, in a data set of Parquet, one of two configurations, and one that is a script."""
    folder = tmp_path_factory.mktemp("hub")
    plain, many, code = folder / "plain", folder / "many", folder / "code"
    for path in (plain / "data", many / "one", many / "two", code):
        path.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows_of(4))
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        parquet.write_table(table, plain / f"data/{name}.parquet")
    (many / "README.md").write_text(README)
    for name in ("one/a.jsonl", "two/b.jsonl"):
        (many / name).write_text(json.dumps({"prompt": name, "completion": "x"}))
    (code / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    own = {"HOME": str(folder), "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    own["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with serving() as hub:
        for name, made in (("set", plain), ("many", many), ("code", code)):
            hub.add(f"org/{name}", made)
        command = [sys.executable, "-c", SCRIPT, *SETS, *BAD]
        environment = {**os.environ, **own, "HF_ENDPOINT": hub.address}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    return SimpleNamespace(folder=folder, sets=json.loads(done.stdout.splitlines()[-1]))


def test_a_data_set_gives_the_split_to_learn(found: SimpleNamespace) -> None:
    kind, detail, shards, prompts, before = found.sets["hf:org/set"]
    assert kind == "Parquet" and detail.startswith("configuration default, split train, commit ")
    assert shards == [f"data/train-0000{i}-of-00002.parquet" for i in range(2)]
    assert len(prompts) == 8 and before == [True, False]  # the second shard is downloaded when it is read
    assert found.sets["hf:org/set:test"] == found.sets["hf:org/set:default:test"]
    assert found.sets["hf:org/set:test"][2] == ["data/test-00000-of-00001.parquet"]


def test_a_configuration_is_chosen(found: SimpleNamespace) -> None:
    assert found.sets["hf:org/many:one"][3] == ["one/a.jsonl"]
    assert found.sets["hf:org/many:two:train"][3] == ["two/b.jsonl"]


@pytest.mark.parametrize("name", BAD)
def test_what_the_hub_does_not_have_is_told(found: SimpleNamespace, name: str) -> None:
    assert BAD[name] in found.sets[name]
    assert not (found.folder / "ran").exists()
