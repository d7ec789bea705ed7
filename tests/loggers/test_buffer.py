"""The buffer: bounded, in order, and nothing unaccounted for, whatever is done to it."""

import math

from hypothesis import given, strategies as st

from aengine.loggers.buffer import RecordBuffer

ACTIONS = st.lists(
    st.one_of(st.sampled_from(["iteration", "epoch", "done", "put back"]), st.integers(1, 5)), max_size=60
)


@given(actions=ACTIONS, size=st.integers(1, 6))
def test_whatever_is_done_all_is_accounted_for_and_in_order(actions: list[str | int], size: int) -> None:
    buffer: RecordBuffer[int] = RecordBuffer(size)
    written: list[int] = []
    in_hand: list[int] = []
    for action in actions:
        match action:
            case "iteration" | "epoch":
                buffer.put(buffer.taken, is_iteration=action == "iteration")
            case "done":
                written += in_hand
                in_hand = []
                buffer.mark_written()
            case "put back":
                in_hand = []
                buffer.put_back()
            case int(most) if not in_hand:
                in_hand = buffer.take(most)
                assert len(in_hand) <= most
            case _:
                pass
        assert len(buffer) <= size
        assert buffer.taken == buffer.written + buffer.dropped + buffer.waiting
        assert buffer.waiting == len(buffer) + len(in_hand)
        assert in_hand == sorted(in_hand)
        all_waiting = [number for number in range(1, buffer.taken + 1) if buffer.oldest <= number]
        assert len(all_waiting) >= buffer.waiting
        assert (buffer.oldest == math.inf) == (buffer.waiting == 0)
        assert not in_hand or buffer.oldest <= in_hand[0] + 1
    assert len(written) == len(set(written)) == buffer.written


@given(kinds=st.lists(st.booleans(), max_size=40), size=st.integers(1, 6))
def test_what_stays_is_the_newest_epochs_and_then_the_newest_iterations(kinds: list[bool], size: int) -> None:
    buffer: RecordBuffer[int] = RecordBuffer(size)
    for number, is_iteration in enumerate(kinds):
        buffer.put(number, is_iteration=is_iteration)
    epochs = [number for number, is_iteration in enumerate(kinds) if not is_iteration][-size:]
    iterations = [number for number, is_iteration in enumerate(kinds) if is_iteration]
    left = buffer.take(size)
    assert left == sorted(left)
    assert set(epochs) <= set(left)
    assert set(left) <= {*epochs, *iterations}
    # An iteration may have been dropped for an epoch that was then dropped itself: only what stays is the newest.
    stayed = [number for number in left if kinds[number]]
    assert stayed == iterations[len(iterations) - len(stayed) :]
