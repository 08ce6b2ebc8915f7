"""Ceilings that only ever go down: kernels and host syncs of one step, at size=tiny."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measures import Operations, Work, operations

# Kernels of one step, a few to spare. A change that needs more says why: on a CPU, the plain CNN's
# transposed convolutions are products and shuffled convolutions; the norm of the loudest phrase is
# two; four of every update notice what is no finite number.
CEILING = {
    ("pretrain tiny", "residual"): 1215,
    ("finetune tiny", "residual"): 2361,
    ("pretrain tiny", "plain"): 948,
    ("finetune tiny", "plain"): 2153,
}
IMAGE = {"residual": [], "plain": ["world_model.image={kind: cnn, size: 32, channels: [8]}"]}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "networks"), CEILING)
def test_a_step_starts_few_kernels_and_never_waits_for_the_device(case: str, networks: str) -> None:
    torch.set_num_threads(1)
    counted = operations(Work(case, words=IMAGE[networks]).ours)
    assert not counted.syncs, f"the host waits for the device: {dict(counted.syncs)}"
    assert counted.kernels.total() <= CEILING[case, networks], (
        f"{counted.kernels.total()}: {counted.kernels.most_common(12)}"
    )


def test_the_counter_sees_syncs_kernels_and_views() -> None:
    x = torch.ones(3)
    with Operations() as counted:
        assert float((x + 1.0)[:2].sum()) == 4.0
    assert counted.kernels == {"add": 1, "sum": 1}
    assert counted.syncs.total() == 1
