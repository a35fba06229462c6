"""No attack may hang: what waits for a pipe, or counts for ever, is stopped."""

import signal

import pytest

SECONDS = 30


@pytest.fixture(autouse=True)
def in_good_time():
    def stop(*_):
        raise AssertionError(f"still at it after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
