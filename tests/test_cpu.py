"""Threads of a training process on the CPU."""

import os

import pytest
import torch

from usv.cpu import use_all_cores


@pytest.fixture(autouse=True)
def as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("ranks, share", [("1", 1), ("2", 2), ("99", 99)])
def test_the_launchers_single_thread_becomes_the_share_of_the_cores(monkeypatch, ranks, share):
    for name, value in {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": ranks}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    assert use_all_cores() == torch.get_num_threads() == max(1, 4 // share)


def test_a_number_that_somebody_chose_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    torch.set_num_threads(3)
    assert use_all_cores() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")  # not launched
    assert use_all_cores() == 3
    assert use_all_cores(2) == torch.get_num_threads() == 2
