"""The scripts of docs/cluster.md, run by a SLURM that really starts processes (tests/slurm.py)."""

from __future__ import annotations

import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from program import SMALL, TRAIN
from slurm import Slurm, fake_slurm

from mapo_lightning.training.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow


def scripts(root: Path) -> dict[str, str]:
    """The batch files of the guide, by the name of their job."""
    page = (root / "docs/cluster.md").read_text(encoding="utf-8")
    found = [b for b in re.findall(r"```bash\n(.*?)```", page, re.S) if "#SBATCH" in b]
    return {re.findall(r"--job-name=(\S+)", text)[0]: text for text in found}


def here(slurm: Slurm, root: Path) -> None:
    """Make `mapo-train` a command of the cluster."""
    slurm.environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    slurm.add("mapo-train", f'exec {sys.executable} {TRAIN} "$@"')


def wait_for_checkpoint(slurm: Slurm, job: int, path: Path, newer_than: int = 0) -> None:
    deadline = time.monotonic() + 300
    while not path.exists() or path.stat().st_mtime_ns <= newer_than:
        assert "code" not in slurm.about(job), "the job ended before"
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.01)


def points(store: Path) -> dict[str, list[int]]:
    """Steps of every curve, in the order in which they came."""
    found: dict[str, list[int]] = {}
    rows = sqlite3.connect(store).execute("select key, step from metrics order by rowid")
    for key, step in rows:
        found.setdefault(key, []).append(step)
    return found


def test_a_requeued_job_goes_on_in_its_folder_and_in_its_mlflow_runs(
    root: Path, tmp_path: Path
) -> None:
    (tmp_path / "train.sbatch").write_text(scripts(root)["mapo"])
    words = [*SMALL, "stage=finetune", "tracking.enabled=true", "callbacks.rollout_every=1000"]
    words += ["finetune.agent_steps=350", "callbacks.checkpoint_every=7"]
    with fake_slurm(tmp_path / "slurm") as slurm:
        here(slurm, root)
        (job,) = slurm.submit(tmp_path, "--array=3", "train.sbatch", *words)
        folder = tmp_path / f"runs/job{job}_3-mapo-disc-seed3"
        wait_for_checkpoint(slurm, job, folder / "finetune/last.ckpt")
        slurm.signal(job, signal.SIGUSR1)
        code = slurm.wait(job)
        said = (tmp_path / f"mapo-{job}_3.out").read_text()
        assert (code, slurm.about(job)["restarts"]) == (0, 1), said
    assert re.search(r"stopped by SIGUSR1 after update \d+ of fine-tuning; resume=/\S+ goes", said)
    assert f"this job was started again: the run in '{folder}' goes on" in said
    assert [path.name for path in (tmp_path / "runs").glob("job*")] == [folder.name]
    assert read_checkpoint(folder / "finetune/last.ckpt")["global_step"] == 2 + (350 - 110) // 5
    store = tmp_path / "runs/mlflow.db"
    runs = sorted(sqlite3.connect(store).execute("select name, status from runs"))
    assert runs == [(folder.name, "FINISHED"), (f"{folder.name}/finetune", "FINISHED")]
    curves = points(store)
    steps = curves["train/actor"]
    assert len(steps) >= 45
    assert steps == sorted(steps)
    assert len(set(steps)) == len(steps)


def test_the_other_scripts_are_whole_and_the_vlm_server_says_where_it_is(
    root: Path, tmp_path: Path
) -> None:
    found = scripts(root)
    assert set(found) == {"mapo", "mapo-ddp", "vlm"}
    for name, text in found.items():
        (tmp_path / f"{name}.sbatch").write_text(text)
        subprocess.run(["bash", "-n", f"{name}.sbatch"], cwd=tmp_path, check=True)
    with fake_slurm(tmp_path / "slurm") as slurm:
        slurm.add("vllm", 'echo "$VLLM_API_KEY $@" > served')
        slurm.add("mapo-train", 'echo "$SLURM_PROCID $@" >> trained; exit 75')
        slurm.add("scontrol", 'echo "$@" > requeued')
        slurm.environment["MAPO_VLM_API_KEY"] = "word"
        (server,) = slurm.submit(tmp_path, "vlm.sbatch")
        assert slurm.wait(server) == 0
        url = (tmp_path / "vlm.url").read_text().strip()
        assert (tmp_path / "served").read_text().startswith("word serve Qwen/Qwen2.5-VL-7B")
        port = url.split(":")[2].removesuffix("/v1")
        assert f"--port {port}" in (tmp_path / "served").read_text()
        (job,) = slurm.submit(tmp_path, "--array=2", "mapo.sbatch", "env=toy")
        assert slurm.wait(job) == 75
        trained = tmp_path / "trained"
        assert trained.read_text() == f"0 seed=2 env=toy vlm.server.base_url={url}\n"
        assert (tmp_path / "requeued").read_text() == f"requeue {job}_2\n"
        trained.unlink()
        # As the program does: the first process ends last, and its code is that of all.
        pids = '"$FAKE_SLURM/$SLURM_JOB_ID"/step-0-[123].pid'
        others = f'until [ "$(awk 1 {pids} 2>/dev/null | wc -l)" = 3 ]; do sleep 0.05; done; '
        runs = 'grep -q "^State:.[RSD]" /proc/$pid/status 2>/dev/null'
        others += f"for pid in $(awk 1 {pids}); do while {runs}; do sleep 0.05; done; done"
        leave = f'if [ "$SLURM_PROCID" = 0 ]; then {others}; exit 75; fi'
        slurm.add("mapo-train", f'echo "$SLURM_PROCID $@" >> trained; {leave}')
        (job,) = slurm.submit(tmp_path, "mapo-ddp.sbatch", "env=toy")
        assert slurm.wait(job) == 75
        words = "trainer=ddp trainer.devices=4 trainer.num_nodes=1 env=toy"
        assert (tmp_path / "requeued").read_text() == f"requeue {job}\n"
        assert set(trained.read_text().splitlines()) <= {f"{rank} {words}" for rank in range(4)}
