"""Decoded frames on disk, mapped into memory: each video is decoded once for all runs.

One file per video, named by what its frames depend on: content, size, decoders. Files are written
whole, so workers, ranks and machines may share the folder; two that need the same video at the same
moment both decode it, and the later file, which is equal, takes the place of the other.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mapo_lightning.data.frame_cache import read_all
from mapo_lightning.data.video import DECODERS, SCALER
from mapo_lightning.data.video_info import VideoInfo
from mapo_lightning.files import atomic_write
from mapo_lightning.types import ConfigError, Frames

log = logging.getLogger(__name__)

FOLDER = "frames"
"""Of the cache, in the folder that runs on the same videos share."""
_MAGIC = b"mapo frames 1\n\0\0"
_HEADER = 64  # bytes: magic, digest, and the frames' shape
_OPEN = 1024  # files mapped by a process at once
_SPARE = 0.05  # share of the disk that stays free


class DecodedCache:
    """Reads frames of one size from files that it makes where they are missing.

    Args:
        folder: Of the files.
        size: (height, width) of the frames, in pixels.
        beside: See `reader.read`.
    """

    keeps = True

    def __init__(self, folder: Path, size: tuple[int, int], beside: int | None = None) -> None:
        self.folder, self.size, self.beside = folder, size, beside
        self._open: OrderedDict[Path, Frames] = OrderedDict()
        self._whole: dict[Path, tuple[int, int]] = {}
        """Size and time of the files whose digest this process has seen to be right."""

    def read(self, info: VideoInfo, indices: Sequence[int]) -> Frames:
        """As `FrameCache.read`.

        Raises:
            ConfigError: The folder cannot be written.
        """
        path = self.path(info)
        frames = self._open.get(path)
        if frames is None:
            frames = self._mapped(path, (info.frames, *self.size, 3))
        if frames is None:
            self._make(path, info)
            frames = self._mapped(path, (info.frames, *self.size, 3))
            if frames is None:
                raise ConfigError(
                    f"data.cache=decoded: '{path}' was written and cannot be read back whole: look "
                    "at the disk, or take data.cache=memory"
                )
        self._open[path] = frames
        self._open.move_to_end(path)
        if len(self._open) > _OPEN:
            self._open.popitem(last=False)
        return np.asarray(frames[list(indices)])

    def path(self, info: VideoInfo) -> Path:
        """The file of a video's frames."""
        made = f"{DECODERS}, {SCALER}"
        said = f"{info.fingerprint} {info.frames} {self.size} beside {self.beside} {made}"
        name = hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name}.frames"

    def bytes_missing(self, videos: Sequence[VideoInfo]) -> tuple[int, int]:
        """Bytes of the files of some videos, and of those of them that are not there yet."""
        sizes = {self.path(info): self._bytes(info) for info in videos}
        return sum(sizes.values()), sum(n for path, n in sizes.items() if not path.is_file())

    def _bytes(self, info: VideoInfo) -> int:
        return _HEADER + info.frames * self.size[0] * self.size[1] * 3

    def check_room(self, videos: Sequence[VideoInfo]) -> None:
        """Say how large the cache will be, before anything is written.

        Raises:
            ConfigError: It would fill the disk.
        """
        whole, missing = self.bytes_missing(videos)
        self.folder.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(self.folder)
        left = disk.free - missing - int(_SPARE * disk.total)
        if missing and left < 0:
            raise ConfigError(
                f"data.cache=decoded needs {missing / 1e9:.1f} GB more for {len(videos):,} videos, "
                f"and {disk.free / 1e9:.1f} GB are free at '{self.folder}', where a twentieth of "
                "the disk stays free; give another disk with work_dir=DIR, or data.cache=memory"
            )
        log.info(
            "decoded frames take %.2f GB at '%s', of which %.2f GB are there already",
            whole / 1e9, self.folder, (whole - missing) / 1e9,
        )  # fmt: skip

    def _make(self, path: Path, info: VideoInfo) -> None:
        frames = read_all(info, self.size, self.beside)
        head = _MAGIC + _digest(frames) + np.array(frames.shape, "<i8").tobytes()[:32]
        try:
            with atomic_write(path) as draft, draft.open("wb") as file:
                file.write(head.ljust(_HEADER, b"\0"))
                file.write(frames.data)
        except OSError as error:
            raise ConfigError(
                f"data.cache=decoded cannot write '{path}' ({error.strerror}); make room, give "
                "another disk with work_dir=DIR, or take data.cache=memory"
            ) from error

    def _mapped(self, path: Path, shape: tuple[int, ...]) -> Frames | None:
        """Frames of a file, mapped; None if there is none, or it is not what was written."""
        try:
            with path.open("rb") as file:
                head, stat = file.read(_HEADER), os.fstat(file.fileno())
            if stat.st_size != _HEADER + int(np.prod(shape)) or head[:16] != _MAGIC:
                raise ValueError("another size")
            if head[32:64] != np.array(shape, "<i8").tobytes():
                raise ValueError("another shape")
            frames: Frames = np.memmap(path, np.uint8, "r", _HEADER, shape)
            # A digest reads all frames: once for a file, and not each time that it is opened.
            now = stat.st_size, stat.st_mtime_ns
            if self._whole.get(path) != now:
                if _digest(frames) != head[16:32]:
                    raise ValueError("another content")
                self._whole[path] = now
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("'%s' is damaged (%s) and is made again", path, error)
            return None
        return frames


def _digest(frames: Frames) -> bytes:
    return hashlib.blake2b(frames.data, digest_size=16).digest()
