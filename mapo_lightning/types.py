"""Terms that the whole package shares: arrays, batches, time alignment, errors.

Time alignment, used everywhere (files, replay, batches, model)::

    index t        0      1      2      3
    obs            o0     o1     o2     o3
    action         0      a0     a1     a2     the action that led to obs[t]
    reward         0      r1     r2     r3     received on reaching obs[t]
    is_first       1      0      0      0
    is_last        0      0      0      1      nothing follows obs[t] in this episode
    is_terminal    0      0      0      0/1    ... because the task ended, not the clock
    semantic       null   s1     s2     s3     what happened in the frames up to and including t
    position       0      1      2      3      index of the sine-cosine position code

So an episode of N agent steps has N + 1 entries. The phrase at index t drives the step from t - 1
to t, as the action does (O3).

Keys of a batch that models read, all with leading axes (B, T):

===============  ==================  =====================================================
key              trailing, dtype     meaning
===============  ==================  =====================================================
``obs``          (H, W, 3) uint8     RGB frame as the simulator or the decoder gave it
``semantic``     (V,) float32        embedded phrase, zero where ``has_semantic`` is false
``has_semantic`` () bool             false: no significant action, or none known
``position``     () int64            index of the position code, in [0, 25)
``is_first``     () bool             the latent state starts afresh here
``action``       (A,) float32        in [-1, 1]; fine-tuning only
``reward``       () float32          in units of the environment; fine-tuning only
``is_terminal``  () bool             the task ended here; fine-tuning only
``is_last``      () bool             the episode ended or was cut here; fine-tuning only
``episode``      () int64            number of the episode within the chunk, from 0; only in a
                                     batch with chunks that short episodes were joined to
===============  ==================  =====================================================

Keys of a pre-training batch that models do not read, int64 with one leading axis (B,):

==================  ========================================================================
key                 meaning
==================  ========================================================================
``video``           index of the clip's video in its data set
``vlm_windows``     windows of the clip
``vlm_asked``       ... that the describer was queried about for this clip
``vlm_hits``        ... whose label was stored before, or came from another process
``vlm_null``        ... in which nothing significant happens, or whose label is unreadable,
                    rejected or missing
``vlm_rejected``    ... whose label a person has rejected
``vlm_corrected``   ... whose label a person has corrected
``vlm_unanswered``  ... that have no label, because the describer gave no answer
``videos_dropped``  videos that this loader's worker can no longer read
==================  ========================================================================

``pending`` is a list of the windows that still need a label. It is on its way from the loader's
workers to the training process, which removes it before the batch reaches the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # the processes of environments do without torch, which takes seconds to import
    from torch import Tensor

Frames = NDArray[np.uint8]
"""RGB frames, (T, H, W, 3), uint8."""

Batch: TypeAlias = "dict[str, Tensor]"
"""Named tensors; see the tables above."""

POSITIONS = 25
"""Number of distinct position codes: the length of a pre-training clip (facts O9)."""


SEEDS = 2**32
"""Seeds lie in [0, 2**32): the range that numpy, torch and all simulators accept."""


class MapoError(Exception):
    """A failure the user can fix: says what was requested, what was found and what to do."""


class ConfigError(MapoError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another."""


class VideoError(MapoError):
    """A video cannot be read, or a folder holds no readable one."""


class DescriberError(MapoError):
    """A describer or its label store failed."""


class EnvironmentSetupError(MapoError):
    """An environment cannot be built or rendered."""


class DivergedError(MapoError):
    """A loss or a gradient is no finite number any more; raised on all ranks at the same update."""


class CheckpointError(MapoError):
    """A checkpoint is missing, damaged, or belongs to another model."""


def check_at_least(section: object, **least: int) -> None:
    """See that settings of a section are not too small; those that are None are not looked at.

    Raises:
        ConfigError: Names the first that is.
    """
    for name, low in least.items():
        value = getattr(section, name)
        if value is not None and value < low:
            raise ConfigError(f"{name} must be at least {low}, got {value}")
