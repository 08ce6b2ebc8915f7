"""``python -m mapo_lightning.told`` is another way to type ``mapo-told``."""

import sys

from mapo_lightning.run.told import main

if __name__ == "__main__":
    sys.exit(main())
