"""Who owns a run folder."""

import os
import socket

import pytest

from comol_ds.training import generation
from comol_ds.training.generation import Overtaken, claim_generation, newest_generation


def test_every_claim_has_the_next_number(tmp_path):
    folder = tmp_path / "out" / "generations"
    claims = [claim_generation(folder) for _ in range(12)]
    assert [claim.number for claim in claims] == list(range(1, 13))
    claims[-1].check()


def test_the_claim_before_is_told_who_took_over(tmp_path):
    first, second = claim_generation(tmp_path / "generations"), claim_generation(tmp_path / "generations")
    with pytest.raises(Overtaken) as error:
        first.check()
    start = f"{tmp_path} was taken over by process {os.getpid()} on {socket.gethostname()} at 20"
    assert str(error.value).startswith(start)
    assert str(error.value).endswith(" with claim 2; this process holds claim 1, writes nothing more there and stops")
    second.check()


def test_other_files_are_no_claims(tmp_path):
    for name in ("²", "3.bak", "-4", "notes"):
        (tmp_path / name).write_text("")
    assert claim_generation(tmp_path).number == 1


def test_a_claim_that_was_cut_short_counts(tmp_path):
    first = claim_generation(tmp_path)
    (tmp_path / "2").write_text("")
    with pytest.raises(Overtaken, match="was taken over by another process with claim 2"):
        first.check()
    assert claim_generation(tmp_path).number == 3


def test_a_claim_that_was_deleted_is_lost(tmp_path):
    first = claim_generation(tmp_path)
    (tmp_path / "1").unlink()
    with pytest.raises(Overtaken, match="no longer holds this run's claim, number 1; the run stops"):
        first.check()


def test_of_two_runs_that_start_at_once_each_gets_a_number_of_its_own(tmp_path, monkeypatch):
    other = []

    def look_then_lose(folder):
        newest = newest_generation(folder)
        if not other:
            other.append(claim_generation_of_other(folder, newest + 1))
        return newest

    def claim_generation_of_other(folder, number):
        (folder / str(number)).write_text("")
        return number

    monkeypatch.setattr(generation, "newest_generation", look_then_lose)
    assert generation.claim_generation(tmp_path).number == 2
    assert other == [1]
