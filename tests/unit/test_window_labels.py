from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_prefetch import dataset, write_videos
from tiny_models import save_qwen
from torch.utils.data import DataLoader

from mapo_lightning.data.video import VideoInfo
from mapo_lightning.data.window_labels import (
    WindowGrid,
    collate_clips,
    count_labels,
    hold_labels,
    label_pending,
)
from mapo_lightning.semantics.factory import build_labeler
from mapo_lightning.semantics.labeler import Label

NULL = Label(np.zeros(2, np.float32), False, "null", "null", None)
KNOWN = Label(np.array([3.0, 4.0], np.float32), True, "[x]", "slots", None)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[VideoInfo]:
    return write_videos(tmp_path_factory.mktemp("videos"))


def test_the_grid_of_the_documentation() -> None:
    grid = WindowGrid(frames=4, stride=4)
    assert list(grid.ends(12)) == [3, 7, 11]
    assert list(grid.window(7)) == [4, 5, 6, 7]
    assert [grid.end_for(frame) for frame in range(9)] == [None] * 3 + [3] * 4 + [7] * 2


@pytest.mark.parametrize("frames", [2, 4, 5])
@pytest.mark.parametrize("stride", [1, 3, 4])
@pytest.mark.parametrize("offset", [0, 1, 6])
@pytest.mark.parametrize("step", [1, 3])
def test_all_views_of_a_grid_agree(frames: int, stride: int, offset: int, step: int) -> None:
    grid, length = WindowGrid(frames, stride, offset, step), 90
    ends = list(grid.ends(length))
    assert ends == [frame for frame in range(length) if grid.is_end(frame)]
    for end in ends:
        window = grid.window(end)
        assert (len(window), window[-1], end - window[0]) == (frames, end, grid.reach)
        assert window[0] >= 0
        first = grid.first_labelled(end)
        assert grid.end_for(first) == end
        assert grid.end_for(first - 1) != end
    for frame in range(length):
        due = [end for end in ends if grid.first_labelled(end) <= frame]
        assert grid.end_for(frame) == (due[-1] if due else None)
        begun = [end for end in grid.ends(2 * length) if grid.window(end)[0] <= frame]
        assert grid.end_from(frame) == begun[-1]


def test_labels_are_held_until_the_next_window() -> None:
    semantic, known = hold_labels([None, 3, 3, 7, 7, 11], {3: KNOWN, 7: NULL}, 2)
    assert known.tolist() == [False, True, True, False, False, False]
    np.testing.assert_array_equal(semantic, np.outer(known, [3.0, 4.0]))


def test_labels_are_counted_by_what_became_of_their_windows() -> None:
    labels = [
        KNOWN._replace(asked=True),
        KNOWN,
        NULL._replace(asked=True, answered=False),
        NULL._replace(rejected=True),
        KNOWN._replace(corrected=True),
    ]
    assert count_labels(labels) == {
        "vlm_asked": 2,
        "vlm_hits": 3,
        "vlm_null": 2,
        "vlm_rejected": 1,
        "vlm_corrected": 1,
        "vlm_unanswered": 1,
    }
    assert set(count_labels([]).values()) == {0}


@pytest.mark.slow
def test_model_in_the_training_process_labels_whole_batches(
    videos: list[VideoInfo], tmp_path: Path
) -> None:
    model = str(save_qwen(tmp_path / "model"))
    words = {"kind": "transformers", "model": model, "max_new_tokens": 8}
    source = dataset(videos, tmp_path, **words)
    loader = DataLoader(source, batch_size=4, num_workers=1, collate_fn=collate_clips)
    batch = next(iter(loader))
    assert len(batch["pending"]) > 4
    assert not batch["has_semantic"].any()
    labeler = build_labeler(source.vlm, tmp_path, "main")
    settled = label_pending(batch, labeler)
    assert "pending" not in settled
    assert int(settled["vlm_asked"].sum()) == labeler.stats.asked > 0
    assert torch.equal(settled["vlm_asked"] + settled["vlm_hits"], settled["vlm_windows"])
    # The same clips drawn again, now that everything is known, are the same batch.
    again = next(iter(loader))
    assert again.pop("pending") == []
    for key in ("obs", "semantic", "has_semantic", "position"):
        assert torch.equal(again[key], settled[key]), key
    assert again["has_semantic"].any()
    offline = dataset(videos, tmp_path, **words, cached_only=True)
    assert "pending" not in next(iter(offline))
