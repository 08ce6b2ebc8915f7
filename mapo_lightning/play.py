"""``python -m mapo_lightning.play`` is another way to type ``mapo-play``."""

import sys

from mapo_lightning.run.play import main

if __name__ == "__main__":
    sys.exit(main())
