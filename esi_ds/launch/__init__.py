"""The stages as modules, for launchers and without a checkout: ``deepspeed --module esi_ds.launch.esi --config ...``,
``torchrun -m esi_ds.launch.esi ...``, ``srun python -m esi_ds.launch.esi ...``. Scripts of a checkout: ``launch/``."""
