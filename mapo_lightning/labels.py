"""``python -m mapo_lightning.labels`` is another way to type ``mapo-labels``."""

import sys

from mapo_lightning.label_tools.parquet import main

if __name__ == "__main__":
    sys.exit(main())
