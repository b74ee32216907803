"""The YAML of an experiment, strictly typed (docs/design.md §5). Imports no torch: a bad config fails at once.

Every key has one owner and a sentence. An unknown key, a wrong type or a value out of range is a ``UserError`` that
names the key in full.
"""

from esi_ds.config.data import Control, LossData, ModelEndpoint, Prompts, Rows, RowSource
from esi_ds.config.evaluation import Eval, EvalModel, Task, label
from esi_ds.config.judges import (
    ENDPOINT_ROUNDS,
    ClassifierModel,
    EsiClassifier,
    EsiGuard,
    EvalClassifier,
    EvalGuard,
    EvalJudge,
    EvalRubric,
    EvalWords,
    EvalYesNo,
    GuardModel,
    JudgeModel,
)
from esi_ds.config.loading import (
    Config,
    Model,
    begun_config,
    differences,
    load_config,
    model_name,
    resolved_yaml,
    validate,
)
from esi_ds.config.scoring import Criterion, Esi, Select
from esi_ds.config.tuning import BenignMix, Perturb, Tune
