"""Environments: pixels out, normalised actions in, the same interface for every suite."""

from mapo_lightning.envs.factory import make_env, make_vector_env
from mapo_lightning.envs.settings import EnvConfig

__all__ = ["EnvConfig", "make_env", "make_vector_env"]
