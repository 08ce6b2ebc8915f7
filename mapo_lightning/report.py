"""``python -m mapo_lightning.report`` is another way to type ``mapo-report``."""

import sys

from mapo_lightning.run.report import main

if __name__ == "__main__":
    sys.exit(main())
