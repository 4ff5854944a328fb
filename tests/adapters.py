"""All adapters that the common tables run over."""

from tests import franken_cases, model_cases

MODELS = {**model_cases.MODELS, "franken": franken_cases.CASE}
