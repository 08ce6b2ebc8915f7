"""Trains MAPO and its baselines; the installed program ``mapo-train`` is the same.

python train.py                                    the demo: pre-train, fine-tune, evaluate
python train.py env=toy                            a small world that needs no renderer
python train.py stage=pretrain data=folder data.root=DIR
python train.py stage=finetune env=dmc/walker_run init_from=runs/NAME/pretrain/last.ckpt
python train.py stage=evaluate checkpoint=runs/NAME/finetune/last.ckpt
python train.py env=toy method=mapo,apv seed=0..4  ten runs, and a table that compares them
python train.py resume=runs/NAME                   go on where a run was interrupted
python train.py --help                             every group, file and field
python train.py ... --show                         print the resolved run and stop
"""

import sys

from mapo_lightning.run.main import main

if __name__ == "__main__":
    sys.exit(main())
