"""Bad input under a real launcher: one rank tells, all stop, the launcher's exit code says it."""

import pytest

from tests.data.data_helpers import write_jsonl
from tests.distributed.refused_runs import refused_run
from tests.tiny_models import save_tiny_model


@pytest.mark.distributed
def test_one_line_and_exit_code_2(tmp_path, extensions, monkeypatch):
    # a broken record is found when the data are read, after the ranks have met: the latest of all refusals
    model, data = save_tiny_model(tmp_path / "model"), tmp_path / "records.jsonl"
    write_jsonl(data, [{"prompt": "a", "completion": "b"}] * 20)
    with data.open("a") as file:
        file.write('{"prompt": "a", "completion"\n')
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets_cache"))
    run, told = refused_run(model, data, tmp_path / "out", extensions)
    assert len(told) == 1 and told[0].startswith(f"train.py: error: {data} line 21: broken JSON"), told
    assert "Traceback" not in run.stdout + run.stderr
    assert not (tmp_path / "out").exists()
