"""``python -m mapo_lightning.quality`` is another way to type ``mapo-quality``."""

import sys

from mapo_lightning.run.quality import main

if __name__ == "__main__":
    sys.exit(main())
