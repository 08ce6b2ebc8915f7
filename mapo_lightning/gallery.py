"""``python -m mapo_lightning.gallery`` is another way to type ``mapo-gallery``."""

import sys

from mapo_lightning.label_tools.gallery import main

if __name__ == "__main__":
    sys.exit(main())
