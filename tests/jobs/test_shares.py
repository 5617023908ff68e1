"""Cores and GPUs shared out among trainings at once."""

import pytest

from lori_manager.jobs.shares import Share, cores, share


@pytest.fixture(autouse=True)
def no_threads_told(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize(
    ("at_once", "cpus", "gpus", "largest", "expected"),
    [
        (2, 2, 0, None, Share(1, 1.0, 0.0)),
        (2, 8, 0, None, Share(4, 4.0, 0.0)),
        (3, 8, 0, None, Share(2, 2.0, 0.0)),
        (3, 2, 0, None, Share(1, 2 / 3, 0.0)),  # more trainings than cores
        (2, 64, 0, 16, Share(16, 16.0, 0.0)),  # no share is larger than a machine
        (4, 32, 4, None, Share(8, 8.0, 1.0)),
        (2, 32, 8, None, Share(16, 16.0, 1.0)),  # a training uses one GPU
        (4, 16, 1, None, Share(4, 4.0, 0.25)),
        (3, 16, 2, None, Share(5, 5.0, 0.5)),  # two on one, one on the other
    ],
)
def test_shares_are_equal_and_fit_what_there_is(at_once, cpus, gpus, largest, expected):
    assert share(at_once, cpus, gpus, largest) == expected


def test_the_threads_that_the_user_tells_are_taken(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert share(2, 16, 0) == Share(3, 3.0, 0.0)
    assert share(2, 2, 0) == Share(3, 1.0, 0.0)  # its cores are those that there are


def test_there_is_a_core_to_run_this():
    assert cores() >= 1
