"""The spool: bounded, in order, and nothing unaccounted for, whatever is done to it."""

import math

from hypothesis import given, strategies as st

from aengine.loggers.buffer import Spool

ACTIONS = st.lists(
    st.one_of(st.sampled_from(["iteration", "epoch", "done", "put back"]), st.integers(1, 5)), max_size=60
)


@given(actions=ACTIONS, size=st.integers(1, 6))
def test_whatever_is_done_all_is_accounted_for_and_in_order(actions: list[str | int], size: int) -> None:
    spool: Spool[int] = Spool(size)
    written: list[int] = []
    in_hand: list[int] = []
    for action in actions:
        match action:
            case "iteration" | "epoch":
                spool.put(spool.taken, is_passing=action == "iteration")
            case "done":
                written += in_hand
                in_hand = []
                spool.done()
            case "put back":
                in_hand = []
                spool.put_back()
            case int(most) if not in_hand:
                in_hand = spool.take(most)
                assert len(in_hand) <= most
            case _:
                pass
        assert len(spool) <= size
        assert spool.taken == spool.written + spool.dropped + spool.waiting
        assert spool.waiting == len(spool) + len(in_hand)
        assert in_hand == sorted(in_hand)
        all_waiting = [number for number in range(1, spool.taken + 1) if spool.oldest <= number]
        assert len(all_waiting) >= spool.waiting
        assert (spool.oldest == math.inf) == (spool.waiting == 0)
        assert not in_hand or spool.oldest <= in_hand[0] + 1
    assert len(written) == len(set(written)) == spool.written


@given(kinds=st.lists(st.booleans(), max_size=40), size=st.integers(1, 6))
def test_what_stays_is_the_newest_epochs_and_then_the_newest_iterations(kinds: list[bool], size: int) -> None:
    spool: Spool[int] = Spool(size)
    for number, is_passing in enumerate(kinds):
        spool.put(number, is_passing=is_passing)
    epochs = [number for number, is_passing in enumerate(kinds) if not is_passing][-size:]
    iterations = [number for number, is_passing in enumerate(kinds) if is_passing]
    left = spool.take(size)
    assert left == sorted(left)
    assert set(epochs) <= set(left)
    assert set(left) <= {*epochs, *iterations}
    # An iteration may have been dropped for an epoch that was then dropped itself: only what stays is the newest.
    stayed = [number for number in left if kinds[number]]
    assert stayed == iterations[len(iterations) - len(stayed) :]
