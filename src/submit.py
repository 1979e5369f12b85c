"""`make submit`: train on a cluster under SLURM, one task for each process; what SLURM stops goes on where it was."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src import configuration, runs, train
from src.errors import UserError

STOP = signal.SIGUSR2  # how the cluster says that time is up, or that another job comes first


def main(argv: Sequence[str]) -> int:
    mine = [word for word in argv if word.startswith(("cluster=", "cluster."))]
    cluster = configuration.compose("submit", mine).cluster
    config = train.compose([word for word in argv if word not in mine])
    parameters = resources(config, cluster)
    run = runs.create(config)
    job = submit(run, cluster, parameters)
    print(f"job {job.job_id} trains {run.title}; its output is in {run.title}/cluster")
    return 0


def resources(config: DictConfig, cluster: DictConfig) -> dict[str, Any]:
    """What to ask the cluster for, in submitit's words: machines and tasks as ``config.trainer`` has them, the rest as
    ``cluster`` says.

    Raises:
        UserError: the number of devices is left to the machine that the command runs on.
    """
    devices = config.trainer.devices
    if not isinstance(devices, int) or devices < 1:
        raise UserError(f"say how many processes a machine of the cluster is to run: DEVICES=8 (it is '{devices}')")
    on_gpus = config.trainer.accelerator != "cpu"
    asked = {
        "name": f"{config.run.experiment}",
        "nodes": config.trainer.num_nodes,
        "tasks_per_node": devices,
        "gpus_per_node": devices if on_gpus else 0,
        "stderr_to_stdout": True,
    }
    settings = OmegaConf.to_container(cluster, resolve=True)
    assert isinstance(settings, dict)
    given = {str(key): value for key, value in settings.items() if key not in ("kind", "max_requeues")}
    return asked | {key: value for key, value in given.items() if value is not None}


def submit(run: runs.Run, cluster: DictConfig, parameters: dict[str, Any]) -> Any:
    """The job, a `submitit.Job`.

    Raises:
        UserError: submitit is not installed, or there is no such cluster here.
    """
    if importlib.util.find_spec("submitit") is None:
        raise UserError("make submit needs the package submitit: .venv/bin/pip install -e '.[slurm]'")
    import submitit

    try:
        executor = submitit.AutoExecutor(run.dir / "cluster", cluster.kind, slurm_max_num_timeout=cluster.max_requeues)
        executor.update_parameters(**parameters)
    except (RuntimeError, ValueError, NameError) as problem:
        raise UserError(f"cluster: {problem}") from problem
    return executor.submit(Training(str(run.dir)))


class Training:
    """What each task runs: the run in ``folder``, from its last checkpoint where it has one."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self) -> None:
        run = runs.Run(Path(self.folder))
        runs.adopt(run)
        config = run.config()
        if config.callbacks.stop_on_signal:
            # caught before submitit catches it, so that a step is finished and a checkpoint written; not stored: who
            # resumes the run by hand has no cluster that would send it
            OmegaConf.update(config, "callbacks.stop_on_signal.signals", [STOP.name], force_add=True)
        code = train.fit(config, run, resume=run.last if run.last.exists() else None)
        if code == train.PREEMPTED:
            signal.raise_signal(STOP)  # now to submitit, which puts the job back into the queue
        elif code:
            raise RuntimeError(f"{run.title} ended with code {code}")

    def checkpoint(self) -> Any:
        """What submitit puts back into the queue."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


if __name__ == "__main__":
    configuration.run_main(main)
