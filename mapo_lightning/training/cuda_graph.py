"""The gradients of an update as one CUDA graph: thousands of launches become one.

What a graph needs is what the step has anyway: static shapes, state that changes in place, and no
moment at which the host waits for the device (docs/performance.md).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mapo_lightning.types import Batch, ConfigError

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
    """CUDA graphs. Nobody has run this on a device yet (docs/performance.md).

    Warm-up and capture share one stream: what torch keeps per stream (workspaces of cuBLAS, the
    nodes that accumulate gradients) then exists before the capture, and belongs to it. The capture
    is ``thread_local``: what other threads ask of CUDA meanwhile cannot break it. Random numbers
    come from CUDA's default generator, which torch registers with every graph; whoever draws from
    another has to register that (``CUDAGraph.register_generator_state``).
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    @property
    def stream(self) -> torch.cuda.Stream:
        """The stream of warm-up and capture, on the device that is current at its first use."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        return self._stream

    def warm(self, work: Work) -> None:
        """Run ``work`` on a stream of its own, as torch asks for before a capture."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, work: Work) -> Work:
        """Capture ``work``, which is not carried out by that.

        Raises:
            OutOfMemoryError: The device is full.
            RuntimeError: It does what a graph cannot hold. The message is the first complaint:
                ending a capture that was broken raises another.
        """
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        gc.collect()  # and none meanwhile: it may free what belongs to another graph
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # torch leaves the capture's stream only if it succeeds
            first = _first(error)
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            raise RuntimeError(str(first)) from error
        finally:
            if collecting:
                gc.enable()
        return graph.replay


def _first(error: BaseException) -> BaseException:
    """What was raised before all that was raised while it was handled."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def cuda_recorder(accelerator: str, processes: int, strategy: str = "auto") -> CudaRecorder:
    """What records updates on this machine, for ``processes`` of Lightning's ``accelerator``.

    Raises:
        ConfigError: This is not one process with a GPU, or Lightning wraps it for several.
    """
    if processes > 1 or strategy == "ddp":
        raise ConfigError(
            "trainer.capture=true records the work of one GPU, and not how several processes (DDP) "
            f"exchange gradients; this run has {processes} processes and trainer.strategy="
            f"{strategy}; leave it false"
        )
    if accelerator == "cpu" or not torch.cuda.is_available():
        raise ConfigError(
            "trainer.capture=true records the work of one GPU; this run has "
            f"trainer.accelerator={accelerator}, this machine {torch.cuda.device_count()} GPUs; "
            "leave it false"
        )
    return CudaRecorder()


class Captured:
    """Calls ``work`` on the first batches, and afterwards a recording of it.

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
            ConfigError: It has other keys: only batches with joined chunks hold ``episode``. Or
                ``work`` cannot be recorded, and nothing is trained in another way than asked for.
        """
        self.calls += 1
        if self.calls <= WARM:
            self.held = batch
            self.recorder.warm(self._run)
            return self.found
        if self.calls == WARM + 1:
            self.held = {key: value.clone() for key, value in batch.items()}
            self._record()
        assert self.replay is not None
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

    @property
    def state(self) -> str:
        """How far it is: what the next call will do."""
        if self.replay is not None:
            return "recorded: one graph is replayed"
        return f"warming up: {min(self.calls, WARM)} of {WARM} updates ran as they are"

    def _record(self) -> None:
        try:
            self.replay = self.recorder.record(self._run)
        except torch.OutOfMemoryError:
            raise  # the update can be recorded, where there is room
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"trainer.capture=true, but this update cannot be recorded as a CUDA graph: "
                f"{reason}; leave it false, and report what mapo-gpu-check says"
            ) from error
