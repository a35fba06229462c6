"""Calibration states in files read as those in memory do, and outlive the process that wrote them."""

import pytest
import torch

from gqa.convert.states import States, StatesFile, Store, head, tail

N, T, D = 7, 5, 3


@pytest.fixture(params=["memory", "files"])
def store(request, tmp_path):
    return Store(None if request.param == "memory" else tmp_path / "states")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_what_is_kept_is_read_back(store, dtype, batch):
    expected = torch.randn(N, T, D, dtype=dtype)
    states: States = store.keep("x", expected.split(batch), N)
    assert states.shape == expected.shape
    assert len(states) == N
    assert [part.tolist() for part in states.split(4)] == [part.tolist() for part in expected.split(4)]
    for some in (slice(0, 2), slice(5, 99), slice(3, 3), torch.tensor([6, 0, 6])):
        assert torch.equal(states[some], expected[some])
        assert states[some].dtype == dtype
    first = head(states, 2)
    assert len(first) == 2
    assert torch.equal(torch.cat(list(first.split(1))), expected[:2])
    assert len(head(states, 99)) == N
    assert torch.equal(torch.cat(list(tail(states, 3).split(2))), expected[4:])
    assert torch.equal(head(tail(states, 5), 2)[:9], expected[2:4])
    assert torch.equal(tail(head(states, 5), 2)[:9], expected[3:5])


def test_a_name_is_used_again(store):
    store.keep("x", torch.ones(N, T, D).split(2), N)
    states = store.keep("x", torch.zeros(2, T, D).split(2), 2)
    assert torch.equal(states[:9], torch.zeros(2, T, D))


def test_states_before_a_layer_are_found_by_the_next_process(tmp_path):
    parent, child = torch.randn(N, T, D), torch.randn(N, T, D)
    store = Store(tmp_path / "states")
    shape = torch.Size((N, T, D))
    for layer in (0, 1, 2):
        store.keep_before(layer, {"parent": (parent + layer).split(2), "child": child.split(2)}, N)
    store.forget_before(1)
    again = Store(tmp_path / "states")
    assert again.before(1, ("parent", "child"), shape, torch.float32) == ()
    found = again.before(2, ("parent", "child"), shape, torch.float32)
    assert [torch.equal(one[:N], wanted) for one, wanted in zip(found, (parent + 2, child), strict=True)] == [True] * 2
    (tmp_path / "states" / "before-0002-child").write_bytes(b"short")
    assert again.before(2, ("parent", "child"), shape, torch.float32) == ()
    assert Store(None).before(2, ("parent", "child"), shape, torch.float32) == ()


def test_a_kill_while_writing_leaves_the_old_states(tmp_path):
    store = Store(tmp_path / "states")
    store.keep_before(1, {"parent": [torch.zeros(N, T, D)]}, N)

    def dying():
        yield torch.ones(3, T, D)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.keep_before(1, {"parent": dying()}, N)
    (found,) = store.before(1, ("parent",), torch.Size((N, T, D)), torch.float32)
    assert torch.equal(found[:N], torch.zeros(N, T, D))


def test_a_file_that_has_shrunk_is_an_error(tmp_path):
    states = Store(tmp_path).keep("x", [torch.ones(N, T, D)], N)
    assert isinstance(states, StatesFile)
    with states.path.open("r+b") as stream:
        stream.truncate(10)
    with pytest.raises(OSError, match="shorter"):
        states[:1]
