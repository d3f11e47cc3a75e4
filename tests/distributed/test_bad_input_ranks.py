"""Bad input under a real launcher: one rank tells, all stop, the launcher's exit code says it."""

import pytest

from tests.data.data_helpers import write_jsonl
from tests.distributed.launching import REPOSITORY, run_deepspeed
from tests.tiny_models import save_tiny_model


@pytest.mark.distributed
def test_one_line_and_exit_code_2(tmp_path, extensions, monkeypatch):
    # a broken record is found when the data are read, after the ranks have met: the latest of all refusals
    model, data = save_tiny_model(tmp_path / "model"), tmp_path / "records.jsonl"
    write_jsonl(data, [{"prompt": "a", "completion": "b"}] * 20)
    with data.open("a") as file:
        file.write('{"prompt": "a", "completion"\n')
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets_cache"))
    flags = {
        "ds_config": REPOSITORY / "ds_configs" / "zero3.json",
        "model_name_or_path": model,
        "dataset": data,
        "output_dir": tmp_path / "out",
        "max_steps": 1,
    }
    arguments = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    run = run_deepspeed(2, REPOSITORY / "launch" / "train.py", arguments, extensions)
    assert run.returncode == 2, run.stderr[-3000:]
    told = [line for line in (run.stdout + run.stderr).splitlines() if "train.py: error:" in line]
    assert len(told) == 1 and told[0].startswith(f"train.py: error: {data} line 21: broken JSON"), told
    assert "Traceback" not in run.stdout + run.stderr
    assert not (tmp_path / "out").exists()
