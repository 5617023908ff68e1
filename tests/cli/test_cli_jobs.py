"""`lori train --jobs`: what it refuses. What it does is in tests/jobs."""

from lori_manager import extras


def test_jobs_refuse_a_sequence(lori):
    told = lori.refuses("train", "colour", "shape", "--sequence", "s", "--jobs", 2, code=2)
    assert told == (
        "lori: --jobs trains tasks at once, and the stages of a --sequence go on from one "
        "another: leave one of them out"
    )


def test_jobs_without_ray_name_the_extra(lori, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    told = lori.refuses("train", "colour", "shape", "--jobs", 2, code=2)
    assert told == (
        'lori: --jobs needs the library ray: install it with `pip install "lori-manager[ray]"`'
    )
    monkeypatch.undo()
    assert lori.json("train", "colour")[0]["adapter"]["ref"] == "colour@1"  # nothing is held


def test_a_task_that_is_not_there_is_told_before_ray_starts(lori):
    assert "no task is called 'mass'" in lori.refuses(
        "train", "colour", "mass", "--jobs", 2, code=4
    )
