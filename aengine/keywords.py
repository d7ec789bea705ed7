"""Keywords: a call with one that is wrong says which is meant."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from aengine.guesses import KEYWORDS, OF_ATTACH, near_word

T = TypeVar("T")


def explain_wrong_call(thing: T) -> T:
    """Decorate a function, or a class for its constructor and `attach`: wrong arguments are answered by what is meant.

    Its signature and type stay what they are, an async function stays one, and no frame of this module remains in the
    traceback of what it raises. A call takes some 0.1 µs longer.
    """
    if isinstance(thing, type):
        for name in {"__init__", "attach"} & vars(thing).keys():
            setattr(thing, name, _explained(vars(thing)[name]))
        return thing
    return cast(T, _explained(cast(Callable[..., Any], thing)))


def _explained(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            _revise(error, function, args, kwargs)
            raise

    @wraps(function)
    async def call_async(*args: Any, **kwargs: Any) -> Any:
        try:
            return await function(*args, **kwargs)
        except BaseException as error:
            _revise(error, function, args, kwargs)
            raise

    return call_async if inspect.iscoroutinefunction(function) else call


def _revise(error: BaseException, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Take the frame of the wrapper out of the traceback; where the call itself has failed, say why in better words."""
    if error.__traceback__ is None:
        return
    error.__traceback__ = inside = error.__traceback__.tb_next  # a bare `raise` does not put the frame back
    if inside is None and isinstance(error, TypeError):
        better = _advice(function, args, kwargs)
        if better is not None:
            error.args = (better,)


def _advice(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Return what is wrong with a call and what to write instead; None where Python's own message says all there is."""
    parameters = list(inspect.signature(function).parameters.values())
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    named = [one for one in named if one.name != "self"]
    filled = {one.name for one in positional[: len(args)]}
    # A function that hands on keywords of any name may mean them: only an argument that it lacks is looked for in them.
    free = [one.name for one in named if one.name not in filled | kwargs.keys()]
    lacking = [one.name for one in named if one.name in free and one.default is one.empty]
    call = function.__qualname__.removesuffix(".__init__")
    is_attached = function.__name__ == "__init__" and bool(args) and hasattr(args[0], "attach")
    known = {one.name for one in named}
    wrong = [word for word in kwargs if word not in known]
    meant = {word: _meant(word, lacking if takes_any else free) for word in wrong}
    if is_attached:
        meant |= {word: f"write {call}(...).attach({OF_ATTACH[word]})" for word in wrong if word in OF_ATTACH}
    answers = [f"no {word}=: {answer}" for word, answer in meant.items() if answer]
    if answers:
        return f"{call}() has {', '.join(answers)}"
    if wrong and not takes_any:
        return f"{call}() has no {wrong[0]}=; it takes {', '.join(f'{one.name}=' for one in named) or 'nothing'}"
    keyword_only = [one.name for one in named if one.kind is one.KEYWORD_ONLY]
    takes_more = any(one.kind is one.VAR_POSITIONAL for one in parameters)
    if len(args) > len(positional) and not takes_more and keyword_only:
        first = " and ".join(one.name for one in positional if one.name != "self") or "nothing"
        others = ", ".join(f"{one}=" for one in keyword_only)
        attach = f"; the engine and the event are for {call}(...).attach()" if is_attached else ""
        if positional and positional[0].name == "self" and function.__name__ not in {"__init__", "attach"}:
            attach = "; its engine is the one that it is attached to" if hasattr(args[0], "attach") else ""
        return f"{call}() takes {first} by position, and by keyword {others}{attach}"
    return None


def _meant(word: str, names: list[str]) -> str | None:
    meant = KEYWORDS.get(word, "")
    if meant in names:
        return f"write {meant}="
    if meant.startswith("write "):
        return meant
    near = near_word(word, names)
    return near and f"{near}=?"
