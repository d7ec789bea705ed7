"""What the decorators of an engine take and return, for type checkers.

They return the function as it was. A type cannot say that and what it must take as well; so it says what it takes.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, TypeVarTuple, overload

from aengine.events import Event
from aengine.type_variables import Output, Snapshot

if TYPE_CHECKING:
    from aengine.engine import Engine

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


Caller = TypeVar("Caller", contravariant=True)  # noqa: PLC0105 -- private to the package


class WithDefault(Protocol[Caller]):
    """A handler with an argument of its own: `lambda engine, name=name: ...`, which mypy takes for nothing else."""

    def __call__(self, engine: Caller, own: Any = None, /) -> Any:
        """Handle the event."""
        ...


class InlineDecorator(Protocol[*Arguments]):
    """What `engine.on(event, *arguments)` returns."""

    @overload
    def __call__(
        self, handler: "Callable[[Engine[Any, Any], *Arguments], Result]", /
    ) -> "Callable[[Engine[Any, Any], *Arguments], Result]": ...
    @overload
    def __call__(self, handler: Callable[[*Arguments], Result], /) -> Callable[[*Arguments], Result]: ...
    @overload
    def __call__(
        self, handler: "Callable[[Engine[Any, Any], Any, *Arguments], Result]", /
    ) -> "Callable[[Engine[Any, Any], Any, *Arguments], Result]": ...
    @overload
    def __call__(
        self, handler: Callable[[BaseException, *Arguments], Result], /
    ) -> Callable[[BaseException, *Arguments], Result]: ...


class SubscriberDecorator(Protocol[Output, Snapshot]):
    """What `engine.subscribe(event)` returns."""

    def __call__(self, handler: Callable[[Event[Output, Snapshot]], Result], /) -> Callable[[Event[Any, Any]], Result]:
        """Add the handler."""
        ...
