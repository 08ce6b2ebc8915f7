"""Environments: pixels out, normalised actions in, the same interface for every suite."""

from mapo_lightning.envs.spec import EnvConfig, make_env, make_vector_env

__all__ = ["EnvConfig", "make_env", "make_vector_env"]
