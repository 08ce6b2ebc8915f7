"""How the runs of a sweep are started."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mapo_lightning.types import ConfigError, check_at_least


@dataclass
class SlurmConfig:
    """What each task of a SLURM array asks for."""

    partition: str = ""
    """Partition; empty: the cluster's own choice."""

    time: int = 720
    """Minutes that a task may take before it is warned, saves, and is queued again."""

    warning: int = 300
    """Seconds between the warning (SIGUSR2) and the end of the time."""

    gpus_per_node: int | None = None
    """GPUs; null: trainer.devices where trainer.accelerator is gpu or cuda, none otherwise."""

    cpus_per_task: int = 8
    """Processor cores of each process."""

    mem_gb: float = 32.0
    """Main memory of a node, in GB."""

    array_parallelism: int = 256
    """Tasks of the array that may run at once."""

    setup: list[str] = field(default_factory=list)
    """Lines of shell before each task, such as ``module load cuda``."""

    additional: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch by their long names, such as ``{account: me}``."""

    def __post_init__(self) -> None:
        check_at_least(self, time=1, warning=1, gpus_per_node=0, cpus_per_task=1)
        check_at_least(self, array_parallelism=1)
        if self.mem_gb <= 0:
            raise ConfigError(f"mem_gb must be above 0, got {self.mem_gb}")


@dataclass
class LaunchConfig:
    """How the runs of a sweep are started; a single run does not read this."""

    kind: Literal["local", "slurm"] = "local"
    """local: on this machine; slurm: as an array of SLURM, through submitit."""

    jobs: int = 0
    """Runs side by side on this machine; 0: one per GPU that the runs can use, one without."""

    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """What each task of a SLURM array asks for."""

    def __post_init__(self) -> None:
        check_at_least(self, jobs=0)
