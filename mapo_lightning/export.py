"""``python -m mapo_lightning.export`` is another way to type ``mapo-export``."""

import sys

from mapo_lightning.run.export import main

if __name__ == "__main__":
    sys.exit(main())
