"""Progress and cancellation, by themselves."""

import multiprocessing
import threading

import pytest

from vitapack.runtime.errors import UserError
from vitapack.runtime.progress import Cancelled, Control, Progress


def test_steps_are_reported_until_cancelled():
    seen = []
    control = Control(seen.append)
    control.step("denoise", 0, 2)
    control.step("denoise", 1, 2)
    control.cancel()
    with pytest.raises(Cancelled):
        control.step("denoise", 2, 2)
    assert seen == [Progress("denoise", 0, 2), Progress("denoise", 1, 2)]
    control.report("denoise", 2, 2)  # finished work is reported whatever was cancelled meanwhile
    assert seen[-1] == Progress("denoise", 2, 2)


def test_nobody_needs_to_watch():
    control = Control()
    control.step("compress", 0, 1)
    assert not control.cancelled
    control.check()


def test_another_thread_cancels():
    control = Control()
    thread = threading.Thread(target=control.cancel)
    thread.start()
    thread.join()
    assert control.cancelled
    with pytest.raises(Cancelled):
        control.check()


def test_a_flag_is_shared_with_processes():
    flag = multiprocessing.get_context("spawn").Event()
    mine, others = Control(flag=flag), Control(flag=flag)
    mine.cancel()
    assert others.cancelled


def test_cancelling_is_nobodys_mistake():
    assert not issubclass(Cancelled, UserError)
