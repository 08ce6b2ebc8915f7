"""The gradients of an update as one CUDA graph: thousands of launches become one.

What a graph needs is what the step has anyway: static shapes, state that changes in place, and no
moment at which the host waits for the device (docs/performance.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mapo_lightning.types import Batch, ConfigError

log = logging.getLogger(__name__)
Work = Callable[[], None]
WARM = 3
"""Updates before the recording: libraries choose their kernels, the codebook its first codes."""


class Recorder(Protocol):
    """Writes down what a device is told to do."""

    def warm(self, work: Work) -> None:
        """Run ``work`` as it is, on the way to a recording."""

    def record(self, work: Work) -> Work:
        """Write down what ``work`` launches; returns what launches it again."""


class CudaRecorder:
    """CUDA graphs. Nobody has run this on a device yet (docs/performance.md)."""

    def warm(self, work: Work) -> None:
        """Run ``work`` on a stream of its own, as torch asks for before a capture."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)

    def record(self, work: Work) -> Work:
        """Capture ``work``, which is not carried out by that."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay  # type: ignore[no-any-return,unused-ignore]


def cuda_recorder(accelerator: str, processes: int) -> CudaRecorder:
    """What records updates on this machine, for ``processes`` of Lightning's ``accelerator``.

    Raises:
        ConfigError: This is not one process with a GPU.
    """
    if processes > 1 or accelerator == "cpu" or not torch.cuda.is_available():
        raise ConfigError(
            "trainer.capture=true records the work of one GPU; this run has "
            f"trainer.accelerator={accelerator} and {processes} processes, this machine "
            f"{torch.cuda.device_count()} GPUs; leave it false"
        )
    return CudaRecorder()


class Captured:
    """Calls ``work`` on the first batches, and afterwards a recording of it.

    Where recording fails, ``work`` runs as it is from then on, with a warning.

    Args:
        work: Leaves gradients behind and returns named scalars; all its state changes in place.
        recorder: Of the device at hand.
    """

    def __init__(self, work: Callable[[Batch], dict[str, Tensor]], recorder: Recorder) -> None:
        self.work, self.recorder = work, recorder
        self.calls = 0
        self.held: Batch = {}
        self.found: dict[str, Tensor] = {}
        self.replay: Work | None = None

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Named scalars of one batch; their memory is that of the next call's.

        Raises:
            ValueError: The batch has other shapes than the recorded ones.
            ConfigError: It has other keys: only batches with joined chunks hold ``episode``.
        """
        self.calls += 1
        if self.calls <= WARM:
            self.held = batch
            self.recorder.warm(self._run)
            return self.found
        if self.calls == WARM + 1:
            self.held = {key: value.clone() for key, value in batch.items()}
            self._record()
        if self.replay is None:
            self.held = batch
            self._run()
            return self.found
        if batch.keys() != self.held.keys():
            raise ConfigError(
                f"trainer.capture recorded a batch of {', '.join(self.held)}, this one holds "
                f"{', '.join(batch)}; use chunks that one episode fills, or capture=false"
            )
        for key, held in self.held.items():
            if batch[key].shape != held.shape:
                raise ValueError(
                    f"trainer.capture recorded '{key}' of shape {tuple(held.shape)}, this batch "
                    f"has {tuple(batch[key].shape)}; use batches of one shape or capture=false"
                )
            held.copy_(batch[key], non_blocking=True)
        self.replay()
        return self.found

    def _run(self) -> None:
        self.found = self.work(self.held)

    def _record(self) -> None:
        try:
            self.replay = self.recorder.record(self._run)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            log.warning("the update cannot be captured and runs as it is: %s", reason)
