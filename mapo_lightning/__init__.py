"""World models pre-trained on plain videos with semantic actions, for control in imagination."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from mapo_lightning.run.agent import Agent, load_agent

__all__ = ["Agent", "__version__", "load_agent"]


def __getattr__(name: str) -> Any:
    """Import what the package offers at its first use: importing the package alone stays light."""
    if name == "__version__":
        from mapo_lightning.tracking.versions import package_version

        return package_version()
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from mapo_lightning.run import agent

    return getattr(agent, name)
