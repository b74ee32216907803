"""What scoring, tuning and their formulas cost, measured on ZeRO-3 ranks; RESULTS.md keeps what was printed, and where.

python -m benchmarks.esi (tune, system_time, reference_procedure, moe, scaling, storage)
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))  # builders.py makes random masks for the tests and for these
