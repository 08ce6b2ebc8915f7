"""Words that every room of the package shares: arrays, batches, time alignment, errors.

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

Keys of a batch, all with leading axes (B, T):

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
``is_terminal``  () bool             fine-tuning only
===============  ==================  =====================================================
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
"""Named tensors with leading axes (B, T); see the table above."""

POSITIONS = 25
"""Number of distinct position codes: the length of a pre-training clip (facts O9)."""


class MapoError(Exception):
    """A failure the user can mend: says what was asked, what was found and what to do."""


class ConfigError(MapoError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another."""


class VideoError(MapoError):
    """A video cannot be read, or a folder holds none that can."""


class DescriberError(MapoError):
    """A describer or its label store cannot answer."""


class EnvironmentSetupError(MapoError):
    """An environment cannot be built or rendered."""


class CheckpointError(MapoError):
    """A checkpoint is missing, damaged, or belongs to another model."""
