"""Videos stored as numbered JPEG or PNG images.

A run of images is named by the path of one of them with the number written as ``%06d`` (six
digits) or ``%d`` (no leading zeros), and by its evenly spaced numbers.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np

from mapo_lightning.data.image_header import image_size
from mapo_lightning.data.video import Wanted, resize, rows_of
from mapo_lightning.data.video_info import (
    USUAL,
    Limits,
    Reason,
    VideoFileError,
    VideoInfo,
    inaccessible,
    middle_square,
    target_size,
)
from mapo_lightning.types import Frames

IMAGES = frozenset({".jpg", ".jpeg", ".png"})
"""File names that count as images, lower case."""

_BLOCK = 1 << 20  # bytes hashed at once
_MOST_BYTES = 8  # of one pixel in an image that is not compressed
_NUMBERED = re.compile(r"(.*?)(\d+)(\.\w+)")
# A JPEG can be decoded at a half, a quarter or an eighth of its size: averaged, and faster.
_REDUCED = {
    8: cv2.IMREAD_REDUCED_COLOR_8,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    2: cv2.IMREAD_REDUCED_COLOR_2,
}


def is_run(path: Path) -> bool:
    """Whether a path names images rather than a video file."""
    return path.suffix.lower() in IMAGES


def name_run(prefix: str, number: str, suffix: str) -> str:
    """Name of the run that the image ``prefix + number + suffix`` belongs to."""
    digits = f"%0{len(number)}d" if number.startswith("0") else "%d"
    return prefix.replace("%", "%%") + digits + suffix


def find_run(folder: Path) -> tuple[Path, tuple[int, ...]]:
    """Find the images of a folder that holds the frames of one video.

    Returns:
        Name of the run, and the numbers found, ascending.

    Raises:
        VideoFileError: There is no folder or no image, or there are several runs.
    """
    try:
        names = [entry.name for entry in os.scandir(folder) if is_run(Path(entry.name))]
    except OSError as error:
        reason: Reason = "missing" if isinstance(error, FileNotFoundError) else "inaccessible"
        raise VideoFileError(folder, reason, f"{error.strerror}") from error
    parts = sorted(found.groups() for name in names if (found := _NUMBERED.fullmatch(name)))
    runs = {(prefix, suffix) for prefix, _, suffix in parts}
    if len(runs) != 1:
        what = f"images of {len(runs)} runs" if runs else "no numbered images"
        raise VideoFileError(folder, "unreadable", f"its folder holds {what}, one is needed")
    # Numbers with leading zeros sort first, and one of them tells the number of digits.
    prefix, suffix = runs.pop()
    run = folder / name_run(prefix, parts[0][1], suffix)
    return run, tuple(sorted(int(number) for _, number, _ in parts))


def even_numbers(run: Path, numbers: Sequence[int]) -> range:
    """The numbers of a run as a range.

    Raises:
        VideoFileError: Images are missing in between.
    """
    if len(numbers) < 2:
        return range(numbers[0], numbers[0] + 1) if numbers else range(0)
    steps = np.diff(numbers)
    found, counts = np.unique(steps, return_counts=True)
    step = max(1, int(found[counts.argmax()]))
    odd = np.flatnonzero(steps != step)
    if len(odd):
        last, following = numbers[odd[0]], numbers[odd[0] + 1]
        detail = f"image {following} follows {last}, the others are {step} apart: some are missing"
        raise VideoFileError(run, "damaged", detail)
    return range(numbers[0], numbers[-1] + 1, step)


def state_of_run(run: Path, numbers: range) -> str:
    """Hash sizes and dates of all images.

    Raises:
        OSError: One cannot be looked at.
    """
    stats = (_place(run, number).stat() for number in numbers)
    seen = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    return hashlib.blake2b(f"{numbers} {seen}".encode(), digest_size=16).hexdigest()


def fingerprint_run(run: Path, numbers: range) -> str:
    """Hash the numbers and the content of all images.

    Raises:
        VideoFileError: There is no image, or one cannot be read.
    """
    if not numbers:
        raise VideoFileError(run, "empty", "there is no image")
    digest = hashlib.blake2b(f"{numbers}".encode(), digest_size=16)
    for number in numbers:
        with _opened(run, number) as file:
            digest.update(os.fstat(file.fileno()).st_size.to_bytes(8, "little"))
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def probe_run(run: Path, numbers: range, limits: Limits = USUAL) -> VideoInfo:
    """Look at the first image.

    Args:
        run: Name of the run.
        numbers: Of its images.
        limits: What their headers may promise.

    Raises:
        VideoFileError: It is missing, damaged or larger than ``limits``.
    """
    limits.check_length(run, len(numbers))
    name = fingerprint_run(run, numbers)
    height, width = _image(run, numbers[0], limits=limits).shape[:2]
    return VideoInfo(run, name, len(numbers), width, height, 0.0, numbers=numbers)


def check_run(info: VideoInfo) -> None:
    """Decode every image once.

    Raises:
        VideoFileError: One is missing, damaged, or has another size than the first.
    """
    limits = _of_its_first(info)
    for number in info.numbers or ():
        height, width = _image(info.path, number, limits=limits).shape[:2]
        if (height, width) != (info.height, info.width):
            wanted = f"the first has {info.width}x{info.height}"
            detail = f"image {number} has {width}x{height} pixels, {wanted}"
            raise VideoFileError(info.path, "damaged", detail)


def read_run(info: VideoInfo, wanted: Sequence[Wanted]) -> list[Frames]:
    """Decode images by number, each of them once; see `video.read_sizes`.

    Raises:
        VideoFileError: One is missing, damaged, or has another size than the first.
    """
    side = min(info.height, info.width)
    kept = (side, side) if info.square else (info.height, info.width)
    sizes = [target_size(kept, size) for _, size in wanted]
    height, width = (max(size[i] for size in sizes) for i in (0, 1))
    # Decoded at least twice as large as requested; the rest is averaged by area.
    fits = [f for f in _REDUCED if kept[0] >= 2 * f * height and kept[1] >= 2 * f * width]
    jpeg = info.path.suffix.lower() != ".png"  # of a PNG a reduced picture only drops pixels
    flag = _REDUCED[max(fits)] if fits and jpeg else cv2.IMREAD_COLOR
    frames: list[Frames] = []
    indices = sorted({number for numbers, _ in wanted for number in numbers})
    for number in indices:
        image = _image(info.path, number, flag, _of_its_first(info))
        if frames and image.shape != frames[0].shape:
            detail = f"image {number} has another size than those before it"
            raise VideoFileError(info.path, "damaged", detail)
        frames.append(image)
    whole = middle_square(np.stack(frames)) if info.square else np.stack(frames)
    cut = [
        resize(rows_of(whole, indices, numbers), size)
        for (numbers, _), size in zip(wanted, sizes, strict=True)
    ]
    return [np.ascontiguousarray(x[..., ::-1]) for x in cut]  # OpenCV's order is blue, green, red


def _place(run: Path, number: int) -> Path:
    return run.with_name(run.name % number)


def _of_its_first(info: VideoInfo) -> Limits:
    """Limits that only images of the first one's size meet, or smaller ones."""
    return USUAL._replace(pixels=info.height * info.width)


def _image(run: Path, number: int, flag: int = cv2.IMREAD_COLOR, limits: Limits = USUAL) -> Frames:
    """One image, (H, W, 3) uint8, blue first; its header is compared before it is decoded."""
    name = _place(run, number).name
    try:
        with _opened(run, number) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MOST_BYTES * limits.pixels + _BLOCK:
                detail = f"image '{name}' has {size} bytes, more than its pixels can take"
                raise VideoFileError(run, "too_large", detail)
            content = file.read()
    except OSError as error:
        raise inaccessible(run, error) from error
    shape = image_size(content)
    if shape is None:
        detail = f"image '{name}' is not the PNG or JPEG image that its name promises"
        raise VideoFileError(run, "damaged", f"{detail}, or is cut off")
    if shape[0] * shape[1] > limits.pixels:
        detail = f"image '{name}' has {shape[0]}x{shape[1]} pixels, {limits.pixels} are allowed"
        raise VideoFileError(run, "too_large", detail)
    image = cv2.imdecode(np.frombuffer(content, np.uint8), flag)
    if image is None:
        raise VideoFileError(run, "damaged", f"image '{name}' cannot be decoded")
    return image.astype(np.uint8, copy=False)


def _opened(run: Path, number: int) -> BinaryIO:
    path = _place(run, number)
    try:
        return path.open("rb")
    except OSError as error:
        reason: Reason = "missing" if isinstance(error, FileNotFoundError) else "inaccessible"
        detail = f"image '{path.name}' cannot be read: {error.strerror}"
        raise VideoFileError(run, reason, detail) from error
