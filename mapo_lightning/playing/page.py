"""The page of a play: one document, with its own style and script, that loads nothing else.

Its content policy names both by their hashes. All that the scene says arrives later and is shown as
text.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_PAGES = Path(__file__).parent / "pages"


class Page(NamedTuple):
    """A document and what it may do."""

    html: str
    policy: str
    """Value of the header Content-Security-Policy."""


def page(socket: str) -> Page:
    """Write the page.

    Args:
        socket: The only address that it may connect to, such as ``ws://127.0.0.1:8000``.
    """
    style, script = ((_PAGES / name).read_text("utf-8") for name in ("play.css", "play.js"))
    templates = Environment(
        loader=FileSystemLoader(_PAGES), autoescape=True, undefined=StrictUndefined
    )
    html = templates.get_template("play.html.j2").render(style=Markup(style), script=Markup(script))
    policy = (
        f"default-src 'none'; style-src 'sha256-{_digest(style)}'; "
        f"script-src 'sha256-{_digest(script)}'; connect-src {socket}; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
    return Page(html, policy)


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
