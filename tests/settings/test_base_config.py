"""The configurations that transformers has by default are numbers that models have."""

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from comol_ds.base_config import read_base_config
from comol_ds.errors import UserError


def test_no_default_configuration_is_refused_for_its_numbers(tmp_path):
    read, refused = 0, []
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            CONFIG_MAPPING[kind]().save_pretrained(tmp_path / kind)
        except Exception:  # a class that has no defaults
            continue
        try:
            read_base_config(str(tmp_path / kind), False, kind)
            read += 1
        except UserError as error:
            refused.append(str(error))
    assert refused == [] and read > 100
