"""A call with a wrong keyword says which is meant; one that is right is as it was."""

import asyncio
import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

import aengine.keywords
from aengine.keywords import explain_wrong_call


@explain_wrong_call
class Thing:
    """What a thing is."""

    def __init__(self, step: Any, metric: Any = None, *, grace: float = 30.0, is_quick: bool = False) -> None:
        self.given = (step, metric, grace, is_quick)
        if step == "fail":
            raise TypeError("of its own")

    def attach(self, engine: Any, event: Any = None, *, evaluator: Any = None) -> Any:
        return engine

    def listen(self, event: Any) -> None: ...


@explain_wrong_call
@dataclass(frozen=True, slots=True)
class Kept:
    last: int = 1
    best: int = 0


@explain_wrong_call
def add(event: Any, handler: Any, *args: Any, **kwargs: Any) -> Any:
    return event, handler, args, kwargs


@explain_wrong_call
async def run(data: Any = None, max_epochs: int | None = None, *, prefetch: int = 0) -> int:
    """Run."""
    await asyncio.sleep(0)
    if data == "fail":
        raise TypeError("of its own")
    return prefetch


@explain_wrong_call
def nothing() -> None: ...


# What is called wrongly, out of sight of type checkers.
any_thing: Any = Thing
any_kept: Any = Kept
any_add: Any = add
any_nothing: Any = nothing


def await_run(*args: Any, **kwargs: Any) -> int:
    return asyncio.run(run(*args, **kwargs))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: any_thing(process_function=1), "Thing() has no process_function=: write step="),
        (lambda: any_thing(1, score_function=1), "Thing() has no score_function=: write metric="),
        (lambda: any_thing(1, gracee=1), "Thing() has no gracee=: grace=?"),
        (lambda: any_thing(1, quick=True), "Thing() has no quick=: is_quick=?"),
        (lambda: any_thing(1, trainer=2), "Thing() has no trainer=: write Thing(...).attach(trainer)"),
        (
            lambda: any_thing(process_function=1, gracee=2, xyz=3),
            "Thing() has no process_function=: write step=, no gracee=: grace=?",
        ),
        (lambda: any_thing(1, xyz=2), "Thing() has no xyz=; it takes step=, metric=, grace=, is_quick="),
        (lambda: any_thing(1, event=2), "Thing() has no event=: write Thing(...).attach(engine, event)"),
        (
            lambda: any_thing(1, 2, 3),
            (
                "Thing() takes step and metric by position, and by keyword grace=, is_quick=; the engine and the event"
                " are for Thing(...).attach()"
            ),
        ),
        (lambda: any_thing(1).attach(2, event_name=3), "Thing.attach() has no event_name=: write event="),
        (lambda: any_kept(lst=3), "Kept() has no lst=: last=?"),
        (lambda: any_add(event_name=1, handler=2), "add() has no event_name=: write event="),
        (lambda: any_add(1, handlr=2), "add() has no handlr=: handler=?"),
        (lambda: await_run(epochs=3), "run() has no epochs=: max_epochs=?"),
        (lambda: await_run([1], loader=3), "run() has no loader=; it takes data=, max_epochs=, prefetch="),
        (lambda: await_run([1], 2, 3), "run() takes data and max_epochs by position, and by keyword prefetch="),
        (lambda: any_nothing(xyz=1), "nothing() has no xyz=; it takes nothing"),
    ],
)
def test_wrong_call_says_what_is_meant(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError) as raised:
        call()
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (any_thing, "Thing.__init__() missing 1 required positional argument: 'step'"),
        (lambda: any_thing(1, step=2), "Thing.__init__() got multiple values for argument 'step'"),
        (lambda: any_kept(1, 2, 3), "Kept.__init__() takes from 1 to 3 positional arguments but 4 were given"),
        (lambda: any_add(1, xyz=2), "add() missing 1 required positional argument: 'handler'"),
        (lambda: any_thing("fail"), "of its own"),
        (lambda: await_run("fail"), "of its own"),
    ],
)  # fmt: skip
def test_what_python_says_well_stands(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError) as raised:
        call()
    assert str(raised.value) == message


def test_keyword_of_the_handler_may_have_any_name() -> None:
    assert add(1, 2, event_name=3) == (1, 2, (), {"event_name": 3})


@pytest.mark.parametrize("call", [lambda: Thing("fail"), lambda: any_thing(1, xyz=2), lambda: await_run("fail")])
def test_traceback_shows_no_frame_in_between(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError) as raised:
        call()
    assert aengine.keywords.__file__ not in [
        frame.filename for frame in traceback.extract_tb(raised.value.__traceback__)
    ]
    assert raised.value.__cause__ is raised.value.__context__ is None


def test_error_from_inside_is_the_very_object() -> None:
    error = TypeError("got an unexpected keyword argument 'process_function'")

    @explain_wrong_call
    def fail(step: Any = None) -> None:
        raise error

    with pytest.raises(TypeError) as raised:
        fail()
    assert raised.value is error
    assert str(error) == "got an unexpected keyword argument 'process_function'"


def test_decorated_function_looks_as_it_did() -> None:
    assert (
        str(inspect.signature(Thing))
        == "(step: Any, metric: Any = None, *, grace: float = 30.0, is_quick: bool = False) -> None"
    )
    assert str(inspect.signature(Kept)) == "(last: int = 1, best: int = 0) -> None"
    assert list(inspect.signature(Thing.attach).parameters) == ["self", "engine", "event", "evaluator"]
    assert Thing.__doc__ == "What a thing is."
    assert (run.__name__, run.__doc__) == ("run", "Run.")
    assert inspect.iscoroutinefunction(run)
    assert not inspect.iscoroutinefunction(add)
    assert not hasattr(Thing.listen, "__wrapped__")


def test_subclass_inherits_it() -> None:
    class Special(Thing):
        def __init__(self) -> None:
            super().__init__(1, grace=2)

    assert Special().given == (1, None, 2, False)

    class Other(Thing): ...

    with pytest.raises(TypeError, match=r"Thing\(\) has no gracee=: grace=\?"):
        Other(1, gracee=2)  # type: ignore[call-arg]  # that is what is tested


def test_result_is_handed_on() -> None:
    assert Thing(1).attach(2) == 2
    assert await_run(prefetch=3) == 3


def test_call_without_an_object_gets_pythons_own_answer() -> None:
    make: Any = Thing.__init__
    with pytest.raises(TypeError, match="missing 2 required positional arguments: 'self' and 'step'"):
        make()
