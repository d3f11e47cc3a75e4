"""Random weights from a configuration alone, in one process."""

import pytest
import torch

from comol_ds.config import AdapterSettings, ModelSettings, RunConfig
from comol_ds.errors import UserError
from comol_ds.parallel import groups
from comol_ds.parallel.assemble import build_model
from tests.tiny_models import FAMILIES, VOCABULARY

STAGE_0 = {"zero_optimization": {"stage": 0}}


def build(folder, family: str, seed: int = 0) -> torch.nn.Module:
    """A model whose folder holds a config.json and nothing else."""
    FAMILIES[family].save_pretrained(folder)
    config = RunConfig(
        model=ModelSettings(model_name_or_path=str(folder), init_random=True), adapter=AdapterSettings(r=4)
    )
    config.run.seed = seed
    return build_model(config, str(folder), STAGE_0, bf16=False, mesh=groups.mesh())[0].get_base_model()


@pytest.mark.parametrize("family", ["llama_bias", "qwen3", "gemma3"])
def test_values_are_those_that_the_family_starts_with(family, tmp_path):
    model = build(tmp_path, family)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and not any(p.is_meta for p in model.parameters())
    for name, parameter in frozen.items():
        if "norm" in name:
            # gemma scales by 1 + weight
            assert torch.equal(parameter, torch.full_like(parameter, 0.0 if family == "gemma3" else 1.0)), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(parameter.mean().item()) < 0.005, name


def test_no_two_matrices_are_alike(tmp_path):
    weights = [p.flatten()[:100] for p in build(tmp_path, "llama").parameters() if p.dim() == 2 and not p.requires_grad]
    assert len({tuple(values.tolist()) for values in weights}) == len(weights)


def test_the_seed_decides(tmp_path):
    first, again, other = (build(tmp_path, "llama", seed).get_input_embeddings().weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_tied_embeddings_stay_tied(tmp_path):
    model = build(tmp_path, "llama_tied")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY


def test_a_second_copy_within_a_node_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(STAGE_0["zero_optimization"], "zero_hpz_partition_size", 2)
    with pytest.raises(UserError, match="--init_random: each rank draws its own part, which zero_hpz_partition_size"):
        build(tmp_path, "llama")
