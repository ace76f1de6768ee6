"""Fixtures that several files of tests use, and one thread a process: the tests run beside one another."""

import gc
import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")
IN_MEMORY = "/dev/shm"
if os.path.isdir(IN_MEMORY) and shutil.disk_usage(IN_MEMORY).free > 4 * 2**30:
    # Everything that is written whole waits for the disk, which is most of the time of a tiny run.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", IN_MEMORY)

import pytest  # noqa: E402
from hub_server import hub  # noqa: E402
from hypothesis import settings  # noqa: E402

__all__ = ["hub"]

settings.register_profile("loaded machine", deadline=None)  # no test asserts how long something takes
settings.load_profile("loaded machine")


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # what has been imported stays: it is not gone through over and over


def _forget_accelerators():
    # With torch, which the process that hands out the tests does not need.
    import torch
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)  # a run that takes itself for launched has taken all cores


@pytest.fixture(scope="module", autouse=True)
def files_do_not_share_accelerate_state():
    _forget_accelerators()


@pytest.fixture
def own_accelerate_state():
    """The test makes the first Accelerator, as a run does: accelerate keeps its device and precision for all others."""
    _forget_accelerators()
    yield
    _forget_accelerators()
