"""Shared by all tests: one thread, no network, no MLflow telemetry, a folder of one's own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch, numpy and mlflow are imported: tiny models are many times faster on one thread.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# For the key that signs settings: of this process and of those that it starts.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="mapo-state-")

import pytest
import torch
from hypothesis import settings
from label_servers import Running, running

from mapo_lightning.tracking.logger import open_store
from mapo_lightning.tracking.settings import TrackingConfig

torch.set_num_threads(1)
settings.register_profile("mapo", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("mapo")

ROOT = Path(__file__).resolve().parents[1]


def pytest_sessionfinish() -> None:
    """Remove the folder of this process's key."""
    shutil.rmtree(os.environ["XDG_STATE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the checkout."""
    return ROOT


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder: for code whose defaults write beside the user."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    """One MLflow store for the tests of a file: making its tables takes seconds."""
    place = tmp_path_factory.mktemp("store")
    cfg = TrackingConfig(uri=f"sqlite:///{place}/mlflow.db", artifacts=str(place / "artifacts"))
    open_store(cfg)
    return cfg


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Running]:
    """Run one label server for the tests of a file."""
    with running(schema="ignored") as server:
        yield server


@pytest.fixture
def server(shared_server: Running) -> Running:
    """Return the label server of the file, well again whatever it was told before."""
    shared_server.break_next()
    return shared_server
