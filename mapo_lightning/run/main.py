"""``mapo-train``: reads the words, checks that the run can be made, and makes it."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import mapo_lightning
from mapo_lightning.run import job
from mapo_lightning.stopping import REQUEUE, Stopped, watched
from mapo_lightning.types import ConfigError, DivergedError, MapoError

if TYPE_CHECKING:
    from mapo_lightning.run.sweep.plan import Sweep


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit code.

    0: done. 2: a failure that the message explains. After a signal, the codes of
    `mapo_lightning.stopping`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with watched():
            job.end_with_launcher()
            run(sys.argv[1:] if argv is None else argv)
    except DivergedError as error:
        if job.rank() == 0:
            sys.stderr.write(f"error: {error}\n")
        return _of_all(2)
    except MapoError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except Stopped as stopped:
        if job.rank() == 0:
            sys.stderr.write(f"{stopped}\n")
        return _of_all(stopped.code) if stopped.agreed else stopped.code
    except KeyboardInterrupt:
        return 130
    return 0


def _of_all(code: int) -> int:
    """Exit code of this process where all end at the same point.

    A launcher may kill the others once one process has ended with a code. So the first process
    speaks for all: it has MLflow to close.
    """
    return 0 if job.rank() > 0 else code


def run(words: Sequence[str]) -> None:
    """Compose a run, check it, and play its stage.

    Raises:
        MapoError: The run cannot be made, or fails in a way that its user can repair.
    """
    check_callbacks()
    from mapo_lightning.config.command_line import CommandLine
    from mapo_lightning.run.config import conf_folder
    from mapo_lightning.run.from_checkpoint import configure
    from mapo_lightning.run.sweep.plan import read_sweep

    sweep = read_sweep(words)
    if sweep is not None:
        _several(sweep, words)
        return
    composed = configure(words, conf_folder())
    if composed.text is not None:
        sys.stdout.write(composed.text + "\n")
        return
    # These import torch and Lightning, which takes seconds: the words above are checked without.
    from mapo_lightning.run.preflight import check_run
    from mapo_lightning.run.session import continued, opened
    from mapo_lightning.run.stages import STAGES

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it has set it to INFO
    if job.restarted():
        composed = configure(continued(words, composed.config), conf_folder())
    check_run(composed.config)
    if CommandLine.parse(words).preflight:
        from mapo_lightning.run.estimate import preflight

        sys.stdout.write(preflight(composed.config))
        return
    try:
        with opened(composed) as session:
            STAGES[session.cfg.stage](session)
    except Stopped as stopped:
        if composed.config.trainer.requeue and stopped.code == REQUEUE and job.rank() == 0:
            job.requeue()
        raise


def _several(sweep: Sweep, words: Sequence[str]) -> None:
    """Show a sweep, or run it."""
    if sweep.text is not None:
        sys.stdout.write(sweep.text + "\n")
        return
    from mapo_lightning.run.sweep.program import run_sweep

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    run_sweep(sweep, words)


def check_callbacks() -> None:
    """Refuse a package named ``callbacks`` that is not ours; the name is a common one.

    Raises:
        ConfigError: It does not lie beside this package.
    """
    wanted = Path(mapo_lightning.__file__).resolve().parents[1] / "callbacks"
    spec = importlib.util.find_spec("callbacks")
    places = list(spec.submodule_search_locations or [spec.origin or ""]) if spec else []
    if wanted not in [Path(place).resolve() for place in places]:
        raise ConfigError(
            f"the package 'callbacks' must be the one in '{wanted}', but Python finds "
            f"{', '.join(map(repr, places)) or 'none'}: uninstall the other package of that name, "
            "or take its folder off PYTHONPATH"
        )


if __name__ == "__main__":
    sys.exit(main())
