"""``python -m mapo_lightning.dreams`` is another way to type ``mapo-dreams``."""

import sys

from mapo_lightning.run.dreams import main

if __name__ == "__main__":
    sys.exit(main())
