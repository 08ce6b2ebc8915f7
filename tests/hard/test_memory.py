"""Test 10 in full: 20,000 clips read by one worker of a loader."""

from __future__ import annotations

from pathlib import Path

import pytest
from loader_memory import growth

pytestmark = pytest.mark.hard


def test_twenty_thousand_clips_cost_a_worker_at_most_fifty_megabytes(
    root: Path, tmp_path: Path
) -> None:
    grown = growth(root, tmp_path, 20_000, 1000)
    print(f"grown by {grown:.1f} MB")
    assert grown <= 50, f"{grown:.1f} MB"
