"""Memory of the process, and parts of a model that are compiled."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mapo_lightning.models.rssm_world.decoder import CNNDecoder
from mapo_lightning.models.rssm_world.settings import ImageConfig
from mapo_lightning.training.compile import compile_parts

FAULTS = """
import resource, sys, torch
from mapo_lightning.training.process import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def update():
    x = torch.ones(12_000_000)
    return float((x + x)[0])
for _ in range(10):
    update()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    update()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    words = [sys.executable, "-c", FAULTS, mode]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_freed_blocks_are_used_again_without_page_faults() -> None:
    assert faults("keep") < faults("give back") / 4


@pytest.mark.slow
@pytest.mark.parametrize("works", [True, False])
def test_a_part_that_cannot_be_compiled_runs_as_it_is(works: bool) -> None:
    tried = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        tried.append(len(inputs))
        if not works:
            raise RuntimeError("no compiler here")
        return graph.forward

    torch.manual_seed(0)
    layer, x = CNNDecoder(ImageConfig(kind="cnn", channels=[4, 8, 16]), 3), torch.randn(2, 3)
    expected = layer(x, {})
    names = list(layer.state_dict())
    compile_parts({"decoder": layer}, backend)
    torch.testing.assert_close(layer(x, {}), expected)
    assert tried
    assert list(layer.state_dict()) == names  # checkpoints do not know
