"""The image networks of both kinds, small: what a test says of models holds with either."""

from __future__ import annotations

NETWORKS = ("published", "tiny")


def image(networks: str, method: str = "mapo") -> str:
    """The word that chooses image networks.

    Args:
        networks: ``published``: those of the method's paper at 64 pixels, with few channels;
            ``tiny``: the plain CNN at 32 pixels, as size=tiny has it.
        method: A name of conf/method.
    """
    if networks == "tiny":
        return "world_model.image={kind: cnn, size: 32, channels: [4]}"
    kind = "cnn" if method == "dreamerv2" else "resnet"
    return f"world_model.image={{kind: {kind}, size: 64, channels: [4, 8, 16], layers: 1}}"
