"""A user's reward and prompt functions: loaded from 'module:function', and described in messages."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def load_function(option: str, spec: str) -> Callable[..., Any]:
    """The function, or the object that can be called, that `spec` ('module:function') names.

    Raises `ValueError` naming `option` and what is missing, also for a class.
    """
    function = load_callable(option, spec)
    require_function(f"{option} {spec!r}", function)
    return function


def load_callable(option: str, spec: str) -> Callable[..., Any]:
    """The function or class that `spec` ('module:name') names; modules of the working directory are found too.

    Raises `ValueError` naming `option` and what is missing.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ValueError(f"{option} is {spec!r} but must be a name from the list or 'module:function'")
    if module_name.endswith(".py"):
        raise ValueError(f"{option} is {spec!r}, a file: {_how_to_write(module_name, name)}")
    module = _imported(option, spec, module_name)
    function = getattr(module, name, None)
    if function is None or not callable(function):
        raise ValueError(
            f"{option} is {spec!r}, but module {module_name} has no function {name!r}{_hint(module, name)}"
        )
    return function


def require_function(what: str, function: Any) -> None:
    """Raises `ValueError` for a value that cannot be called, and for a class, whose call would only make an object."""
    if not callable(function):
        raise ValueError(f"{what} is {describe_value(function)} but must be a function")
    if inspect.isclass(function):
        raise ValueError(f"{what} is a class: give a function, or an object of the class that has __call__")


def _imported(option: str, spec: str, module_name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # `error.name` is the module itself or a package it is in, else something that the module imports
        if error.name and not f"{module_name}.".startswith(f"{error.name}."):
            reason = f"it needs {error.name!r}, which is not installed ({where_raised(error)})"
        else:
            reason = (
                f"there is no module {error.name or module_name!r} in {os.getcwd()} nor among the installed packages"
            )
    # a module that calls `sys.exit` would end the command without a message
    except (Exception, SystemExit) as error:
        # the message of a SyntaxError has the file and the line already
        reason = error_line(error) if isinstance(error, SyntaxError) else f"{error_line(error)} ({where_raised(error)})"
    raise ValueError(f"{option} is {spec!r}, and importing {module_name} failed: {reason}")


def _how_to_write(file: str, name: str) -> str:
    """The 'module:function' of a file, as advice."""
    path = Path(file)
    parts = path.with_suffix("").parts
    if path.is_absolute() or ".." in parts:
        return f"start from its folder and write '{path.stem}:{name}'"
    return f"write '{'.'.join(parts)}:{name}'"


def _hint(module: ModuleType, name: str) -> str:
    """Why a function may be missing in the module: another module was imported, or a spelling mistake."""
    here, found = Path(f"{module.__name__.split('.')[0]}.py").absolute(), getattr(module, "__file__", None)
    if here.exists() and (found is None or Path(found).absolute() != here):
        return f" (another module has the name of your file {here.name}: rename that)"
    close = difflib.get_close_matches(name, [n for n, value in vars(module).items() if callable(value)], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# parts of messages, each on one line


def function_name(function: Any) -> str:
    """'module.name' of a function; of an object that has `__call__`, its class's."""
    named = _named(function)
    return f"{named.__module__}.{named.__qualname__}"


def where_raised(error: BaseException, function: Any = None) -> str:
    """The line that raised: the last one in the file of `function` if there is one, else the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    if function is None:
        return f"line {frames[-1].lineno} of {Path(frames[-1].filename).name}"
    file = getattr(sys.modules.get(_named(function).__module__), "__file__", None)
    own = [frame for frame in frames if frame.filename == file] or frames
    return f"{function_name(function)}, line {own[-1].lineno} of {Path(own[-1].filename).name}"


def _named(function: Any) -> Any:
    """The object whose name is shown: the function inside of `functools.partial`, or else an object's class."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if hasattr(function, "__qualname__") else type(function)


def error_line(error: BaseException) -> str:
    """An error's class and message on one line of at most 500 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.500}" if text else type(error).__name__


def describe_value(value: Any) -> str:
    """A value's `repr`, cut to 80 characters, and its type; a coroutine or a generator with what to do about it."""
    # closed, or Python would warn that it was never awaited
    if inspect.iscoroutine(value):
        value.close()
        return "a coroutine (make it a plain function that calls asyncio.run)"
    if inspect.isgenerator(value):
        return "a generator (make it return, not yield)"
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 80 else f'{text:.77}...'} (of type {type(value).__name__})"
