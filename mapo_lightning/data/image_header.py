"""Reads the size of a PNG or JPEG image from its header: before anything of that size is made."""

from __future__ import annotations

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers that state a size
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length
_ENDS = frozenset({0xD9, 0xDA})  # the end, or the picture itself


def image_size(data: bytes) -> tuple[int, int] | None:
    """Width and height that an image says it has, in stored pixels.

    Args:
        data: Content of the file.

    Returns:
        None where it is neither PNG nor JPEG, or states no size.
    """
    if data.startswith(_PNG):
        size = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
        return size if data[12:16] == b"IHDR" and all(size) else None
    return _jpeg_size(data) if data.startswith(_JPEG) else None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Size in the first frame header (ITU T.81, B.2.2); bytes between segments are skipped."""
    at = len(_JPEG)
    while at + 9 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker in (0x00, 0xFF):
            at += 1
        elif marker in _BARE:
            at += 2
        elif marker in _ENDS:
            return None
        elif marker in _FRAMES:
            size = int.from_bytes(data[at + 7 : at + 9]), int.from_bytes(data[at + 5 : at + 7])
            return size if all(size) else None
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None
