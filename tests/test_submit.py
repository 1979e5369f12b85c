"""Jobs on a cluster: what is asked for, and what refuses to ask."""

from pathlib import Path

import pytest

from src import configuration, submit
from src.errors import UserError
from src.train import compose


def cluster(*words: str) -> configuration.DictConfig:
    return configuration.compose("submit", words).cluster


def test_machines_and_processes_are_those_of_the_recipe():
    config = compose(["experiment=dino_vitb", "trainer.devices=8", "trainer.num_nodes=4"])
    assert submit.resources(config, cluster("cluster.slurm_partition=gpu", "cluster.timeout_min=60")) == {
        "name": "dino_vitb",
        "nodes": 4,
        "tasks_per_node": 8,
        "gpus_per_node": 8,
        "cpus_per_task": 8,
        "timeout_min": 60,
        "stderr_to_stdout": True,
        "slurm_partition": "gpu",
        "slurm_signal_delay_s": 300,
    }
    on_cpus = compose(["experiment=dino_vitb", "trainer.devices=8", "trainer.accelerator=cpu"])
    assert submit.resources(on_cpus, cluster())["gpus_per_node"] == 0


def test_sbatch_is_given_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """SLURM's commands are stand-ins: this sbatch keeps the script that it is given."""
    for name, text in {"srun": "", "sbatch": f'cp "$1" {tmp_path}/script\necho "Submitted batch job 4711"\n'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    words = ["experiment=mae_tiny", "trainer.devices=2", "trainer.num_nodes=3", f"paths.runs={tmp_path}/runs"]
    words += ["run.name=far", "cluster.slurm_partition=gpu", "cluster.slurm_setup=[module load cuda]"]
    assert submit.main(words) == 0
    assert "job 4711 trains" in capsys.readouterr().out
    script = (tmp_path / "script").read_text()
    for line in ("nodes=3", "ntasks-per-node=2", "gpus-per-node=2", "time=1440", "partition=gpu", "signal=USR2@300"):
        assert f"#SBATCH --{line}\n" in script
    assert "module load cuda\n" in script
    assert (tmp_path / "runs/mae_tiny/far/config.yaml").exists()


def test_what_cannot_be_asked_for_is_answered_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"DEVICES=8 \(it is 'auto'\)"):
        submit.main(["experiment=mae_tiny", f"paths.runs={tmp_path}"])
    assert not (tmp_path / "mae_tiny").exists()
    with pytest.raises(UserError, match=r"'cluster.slurm_partitions'.*did you mean"):
        cluster("cluster.slurm_partitions=gpu")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"cluster: Could not detect .srun."):
        submit.main(["experiment=mae_tiny", "trainer.devices=1", f"paths.runs={tmp_path}"])
