"""The comparison in docs/results.md: the grid of runs, what executes them, and the pages made from them.

python -m study.run
"""

import os

# Cells run side by side, one thread each; torch reads this when it is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
