"""The files of examples/scale start a run on several machines; here, a program in the place of Slurm's starts them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.training import losses

ROOT = Path(__file__).parents[2]
STEPS = ("--max-steps", 3, "--seed", 3, "--learning-rate", 3e-3, "--schedule", "constant", "--warmup-steps", 0)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """`srun` starts its command twice, as on two machines; `scontrol` names them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "srun": '#!/bin/bash\n[ "$1" = --kill-on-bad-exit=1 ] && shift\n"$@" & "$@" & wait -n && wait -n\n',
        "scontrol": "#!/bin/bash\nprintf 'localhost\\nlocalhost\\n'\n",
        "python": f'#!/bin/bash\nexec {sys.executable} "$@"\n',
    }
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    return folder


@pytest.mark.matrix
def test_slurm(vlm: Any, folder: Path, cross_attention: Path, tmp_path: Path, programs: Path) -> None:
    words = ("train", cross_attention, "--data", folder / "train.jsonl", *STEPS)
    whole = vlm(*words, "-b", 6, "--output", tmp_path / "one")
    assert whole.exit_code == 0, whole.stderr
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": str(os.getpid()),
        "PROCESSES_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    script = [str(ROOT / "examples/scale/slurm.sh"), *map(str, words[1:]), "-b", "3", "--output", str(tmp_path / "two")]
    run = subprocess.run(["bash", *script], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    # A step of half as many records is another one.
    half = vlm(*words, "-b", 3, "--output", tmp_path / "half")
    assert half.exit_code == 0 and losses(tmp_path / "half") != pytest.approx(losses(tmp_path / "one"), abs=1e-3)


def test_kubernetes() -> None:
    """The pods find the first of them by the names that Kubernetes gives to an indexed job behind a service."""
    service, job = yaml.safe_load_all((ROOT / "examples/scale/kubernetes.yaml").read_text())
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    assert (service["spec"]["clusterIP"], service["spec"]["selector"]) == ("None", {"job-name": name})
    assert pod["subdomain"] == service["metadata"]["name"] and spec["completionMode"] == "Indexed"
    assert f"--rdzv-endpoint={name}-0.{pod['subdomain']}:29400" in container["command"]
    assert spec["completions"] == spec["parallelism"] == 2 and "--nnodes=2" in container["command"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--nproc-per-node={gpus}" in container["command"]
    assert {x["name"] for x in container["volumeMounts"]} == {x["name"] for x in pod["volumes"]}
    assert container["command"][-3:] == ["-m", "vlm_cli", "train"] and all(
        isinstance(x, str) for x in container["args"]
    )
