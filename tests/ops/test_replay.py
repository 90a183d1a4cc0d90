"""Recordings: whatever is replayed is what the function computes, or is not replayed."""

from __future__ import annotations

import logging

import pytest
import torch

from fourdfy.ops import replay
from fourdfy.ops.replay import MOST, WARM_UP, Replay, beside
from tests.recordings import FakeGraphs


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    graphs = FakeGraphs() if request.param == "cpu" else replay.Graphs(torch.device("cuda", 0))
    record, graphs.memories = graphs.record, []

    def noted(work, memory):
        graphs.memories.append(memory)
        return record(work, memory)

    graphs.record = noted
    monkeypatch.setattr(replay, "graphs_of", lambda device: graphs)
    replay._warn_once.cache_clear()
    request.node.graphs = graphs
    return request.param


@pytest.fixture
def memories(request, device):
    """The memory of each recording so far."""
    return request.node.graphs.memories


@pytest.fixture
def weight(device):
    return torch.linspace(-1, 1, 12, device=device).reshape(3, 4)


def some(*shape, device, learns=False, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)
    return x.requires_grad_(learns)


def test_a_replay_gives_what_the_function_gives(device, weight, memories):
    def function(x, shift):
        return (x @ weight).tanh() + shift, x.sum()

    replayed = Replay(function, "it")
    for call in range(WARM_UP + 3):
        x, shift = some(5, 3, device=device, seed=call), some(1, device=device, seed=100 + call)
        for got, expected in zip(replayed(x, shift), function(x, shift), strict=True):
            torch.testing.assert_close(got, expected)
        assert len(memories) == (call >= WARM_UP)


def test_a_replay_sees_the_weights_of_now_and_leaves_earlier_results_alone(device, weight):
    replayed = Replay(lambda x: x @ weight, "it")
    x = some(5, 3, device=device)
    for _ in range(WARM_UP + 1):
        before = replayed(x)
    expected = before.clone()
    weight.mul_(2)
    after = replayed(x)
    torch.testing.assert_close(before, expected)
    torch.testing.assert_close(after, 2 * expected)


def test_arguments_may_be_absent_or_strided(device, weight):
    def function(x, shift, y):
        return x @ weight + y if shift is None else x @ weight + y + shift

    replayed = Replay(function, "it")
    row = some(4, device=device).expand(5, -1)
    for call in range(WARM_UP + 3):
        x = some(3, 5, device=device, seed=call).T
        torch.testing.assert_close(replayed(x, None, row), function(x, None, row))


def test_recordings_that_are_released_are_made_anew(device, weight, memories):
    replayed, x = Replay(lambda x: x @ weight, "it"), some(5, 3, device=device)
    for _ in range(2):
        for _ in range(WARM_UP + 1):
            torch.testing.assert_close(replayed(x), x @ weight)
        replay.release_recordings()
    assert len(memories) == 2


@pytest.mark.parametrize("learning", [(True, False), (False, True), (True, True)])
def test_gradients_are_those_of_the_function(device, weight, learning, memories):
    def function(x, y):
        return (x @ weight).tanh() * y, (x * x).sum()

    replayed = Replay(function, "it")
    for call in range(WARM_UP + 3):
        x, y = (
            some(5, n, device=device, learns=on, seed=call) for n, on in zip((3, 4), learning, strict=True)
        )
        found = []
        for f in (replayed, function):
            a, b = f(x, y)
            assert (a.requires_grad, b.requires_grad) == (True, learning[0])
            loss = (a**2).sum() + 3 * b if b.requires_grad else (a**2).sum()
            found.append(torch.autograd.grad(loss, [t for t in (x, y) if t.requires_grad]))
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected)
    assert len(memories) == 2


def test_a_second_call_before_the_first_one_s_backward_pass_changes_neither(device, weight, memories):
    def function(x):
        return (x @ weight).sin().exp()

    replayed = Replay(function, "it")
    for call in range(WARM_UP + 2):
        inputs = [some(5, 3, device=device, learns=True, seed=10 * call + k) for k in range(3)]
        results = [replayed(x) for x in inputs]
        for x, result in reversed([*zip(inputs, results, strict=True)]):
            (expected,) = torch.autograd.grad(function(x).sum(), x)
            torch.testing.assert_close(torch.autograd.grad(result.sum(), x)[0], expected)
    assert len(memories) == 2


def test_a_call_that_is_dropped_makes_room_for_the_next(device, weight):
    replayed = Replay(lambda x: x @ weight, "it")
    for _ in range(WARM_UP + 1):
        replayed(some(5, 3, device=device, learns=True))
    recording = next(iter(replayed._recordings.values()))
    assert not recording.busy
    result = replayed(some(5, 3, device=device, learns=True))
    assert recording.busy
    del result
    assert not recording.busy


def test_one_backward_pass_for_each_call_and_none_of_it(device, weight):
    replayed = Replay(lambda x: (x @ weight).exp(), "it")
    x = some(5, 3, device=device, learns=True)
    for _ in range(WARM_UP + 1):
        result = replayed(x).sum()
    result.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        result.backward()
    (grad,) = torch.autograd.grad(replayed(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_each_kind_of_call_has_its_recording(device, weight, memories):
    on = {"factor": 1.0}
    replayed = Replay(lambda x: on["factor"] * (x.to(weight.dtype) @ weight), "it")

    def calls(x, variant=None, expected=None):
        for _ in range(WARM_UP + 2):
            got = replayed(x, variant=variant)
        torch.testing.assert_close(got, on["factor"] * (x.to(weight.dtype) @ weight))
        return len(memories)

    assert calls(some(5, 3, device=device)) == 1
    assert calls(some(6, 3, device=device)) == 2
    assert calls(some(5, 3, device=device).double()) == 3
    on["factor"] = 2.0
    assert calls(some(5, 3, device=device), variant="doubled") == 4
    on["factor"] = 1.0
    assert calls(some(5, 3, device=device)) == 4
    assert calls(some(5, 3, device=device, learns=True)) == 6
    with torch.no_grad():
        assert calls(some(5, 3, device=device, learns=True)) == 7


def test_autocast_is_part_of_the_kind(device, weight, memories):
    replayed = Replay(lambda x: x @ weight, "it")
    x = some(5, 3, device=device)
    for _ in range(WARM_UP + 2):
        plain = replayed(x)
        with torch.autocast(device, dtype=torch.bfloat16):
            lower = replayed(x)
    assert (plain.dtype, lower.dtype, len(memories)) == (torch.float32, torch.bfloat16, 2)


def test_nothing_is_compiled_in_a_recording(device, weight):
    """torch.compile makes code for each state of autocast and autograd, which a recording can't do."""
    states = []
    function = torch.compile(lambda x: x @ weight, backend=lambda graph, _: states.append(1) or graph)
    replayed = Replay(function, "it")
    for learns in (False, True):
        for call in range(WARM_UP + 2):
            with torch.autocast(device, enabled=False):
                replayed(some(5, 3, device=device, learns=learns).mT.contiguous().mT)
            compiled = compiled if call else len(states)
        assert len(states) == compiled == 1 + learns


def test_only_recordings_without_gradients_share_their_memory(device, weight, memories, request):
    plain, learning = Replay(lambda x: x @ weight, "one"), Replay(lambda x: (x @ weight).exp(), "another")
    for _ in range(WARM_UP + 1):
        plain(some(5, 3, device=device))
        learning(some(5, 3, device=device))
        for rows in (5, 6):
            learning(some(rows, 3, device=device, learns=True)).sum().backward()
    shared = request.node.graphs.shared_memory()
    assert sum(memory == shared for memory in memories) == 2
    assert len({id(memory) if device == "cpu" else memory for memory in memories if memory != shared}) == 2


def test_what_runs_beside_others_shares_no_memory_with_them(device, weight, memories, request):
    apart, sharing = (
        Replay(lambda x: (x @ weight).exp(), "one", alone=True),
        Replay(lambda x: x.T @ x, "another"),
    )
    for call in range(WARM_UP + 3):
        x, y = some(400, 3, device=device, seed=call), some(300, 200, device=device, seed=call)
        wait = beside(apart, x)
        expected = y.T @ y
        for _ in range(20):
            torch.testing.assert_close(sharing(y), expected)
        kept, x = x.clone(), None  # its memory is free only once it has been waited for
        some(400, 3, device=device).zero_()
        torch.testing.assert_close(wait(), (kept @ weight).exp())
    shared = request.node.graphs.shared_memory()
    assert sorted(memory == shared for memory in memories) == [False, True]


def test_shared_memory_can_be_given_up_and_shared_again(device, weight, caplog):
    for _ in range(2):
        replayed = Replay(lambda x: x @ weight, "it")
        x = some(5, 3, device=device)
        for _ in range(WARM_UP + 2):
            torch.testing.assert_close(replayed(x), x @ weight)
        del replayed
    assert not caplog.records


def refuses(caplog, reason):
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    return reason in record.message and "it can't be replayed" in record.message


def test_what_can_t_be_recorded_is_computed_and_told_once(device, weight, caplog, request, monkeypatch):
    def function(x):
        return x * float(weight.sum())  # reads the device

    if device == "cpu":
        monkeypatch.setattr(request.node.graphs, "record", fail)
    replayed = Replay(function, "it")
    for call in range(WARM_UP + 3):
        x = some(5, 3, device=device, seed=call)
        torch.testing.assert_close(replayed(x), function(x))
    assert refuses(caplog, "Error")
    # The device goes on to work, its random numbers and new recordings too.
    torch.randn(3, device=device)
    assert (torch.ones(4, device=device) * 2).sum().item() == 8
    other = Replay(lambda x: x @ weight, "another")
    for _ in range(WARM_UP + 2):
        other(some(5, 3, device=device))


def fail(work, memory):
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")


def test_gradients_to_other_tensors_are_not_lost(device, weight, caplog, memories):
    weight.requires_grad_(True)
    replayed = Replay(lambda x: x @ weight, "it")
    for _ in range(WARM_UP + 2):
        assert replayed(some(5, 3, device=device)).requires_grad
    assert refuses(caplog, "gradients reach more than its arguments") and not memories


def test_the_number_of_recordings_is_bounded(device, weight, caplog, memories):
    replayed = Replay(lambda x: x @ weight, "it")
    for rows in range(1, MOST + 4):
        x = some(rows, 3, device=device)
        for _ in range(WARM_UP + 1):
            torch.testing.assert_close(replayed(x), x @ weight)
    assert len(memories) == MOST
    assert refuses(caplog, f"{MOST} recordings")


def test_without_graphs_the_function_is_called():
    inputs = []
    replayed = Replay(lambda *given: inputs.append(given), "it")
    x = torch.ones(3)
    for _ in range(WARM_UP + 2):
        replayed(x, None)
    assert all(given[0] is x for given in inputs) and len(inputs) == WARM_UP + 2
