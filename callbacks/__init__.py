"""Lightning hooks that call the library; no algorithm lives here."""

from callbacks.recorder import MLflowRecorder, recorder_of

__all__ = ["MLflowRecorder", "recorder_of"]
