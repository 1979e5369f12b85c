"""`make submit`: train on a SLURM cluster, one task for each process; a job that SLURM stops continues where it was."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src import configuration, runs, train
from src.errors import UserError

STOP = signal.SIGUSR2  # SLURM sends it before the time limit, or before it preempts the job


def main(argv: Sequence[str]) -> int:
    cluster_words = [word for word in argv if word.startswith(("cluster=", "cluster."))]
    cluster = configuration.compose("submit", cluster_words).cluster
    config = train.compose([word for word in argv if word not in cluster_words])
    parameters = resources(config, cluster)
    run = runs.create(config)
    job = submit(run, cluster, parameters)
    print(f"job {job.job_id} trains {run.title}; its output is in {run.title}/cluster")
    return 0


def resources(config: DictConfig, cluster: DictConfig) -> dict[str, Any]:
    """Returns submitit's parameters: machines and tasks of ``config.trainer``, the rest of ``cluster``.

    Raises:
        UserError: the number of devices is not given.
    """
    devices = config.trainer.devices
    if not isinstance(devices, int) or devices < 1:
        raise UserError(f"set the number of processes on each machine of the cluster: DEVICES=8 (it is '{devices}')")
    on_gpus = config.trainer.accelerator != "cpu"
    parameters = {
        "name": f"{config.run.experiment}",
        "nodes": config.trainer.num_nodes,
        "tasks_per_node": devices,
        "gpus_per_node": devices if on_gpus else 0,
        "stderr_to_stdout": True,
    }
    settings = OmegaConf.to_container(cluster, resolve=True)
    assert isinstance(settings, dict)
    own = ("kind", "max_requeues")  # not submitit's
    return parameters | {str(key): value for key, value in settings.items() if key not in own and value is not None}


def submit(run: runs.Run, cluster: DictConfig, parameters: dict[str, Any]) -> Any:
    """Submits the run and returns the job, a `submitit.Job`.

    Raises:
        UserError: submitit is not installed, or this machine has no such cluster.
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
    """The work of each task: trains the run in ``folder``, from its last checkpoint if it has one."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self) -> None:
        run = runs.Run(Path(self.folder))
        runs.adopt(run)
        config = run.config()
        if config.callbacks.stop_on_signal:
            # caught before submitit does, so that the step is finished and a checkpoint written; not stored, because a
            # run resumed by hand gets no such signal
            OmegaConf.update(config, "callbacks.stop_on_signal.signals", [STOP.name], force_add=True)
        code = train.fit(config, run, resume=run.last if run.last.exists() else None)
        if code == 128 + STOP:
            signal.raise_signal(STOP)  # for submitit, which requeues the job
        elif code:
            raise RuntimeError(f"{run.title} ended with code {code}")

    def checkpoint(self) -> Any:
        """Returns what submitit requeues."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


if __name__ == "__main__":
    configuration.run_main(main)
