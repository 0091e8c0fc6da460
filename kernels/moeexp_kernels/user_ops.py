"""Users' own implementations of an op, named `module:function` in a config: imported, checked, and identified by source.

A user's op is called like its op's reference, by keyword, with the same tensors; what it has to compute and which of its
arguments it has to update in place is in the reference's docstring. It may be plain torch (traced into the compiled
method), a `torch.library.triton_op`, or a `torch.library.custom_op` (a callback into Python).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType


def is_user_op(name: str) -> bool:
    return ":" in name


def load(op: str, name: str, ours: Iterable[Callable]) -> Callable:
    """The callable that `ops.<op>=<module>:<function>` names, from the installed packages or the working directory.

    `ValueError` (one line) if it cannot be imported, is not callable, or lacks a parameter that all of `ours` have (the
    implementations that the package has of the op), or asks for another."""
    where = f"ops.{op}={name}"
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")) or not attribute.isidentifier():
        raise ValueError(f"{where} is not of the form module:function, as in ops.{op}=mymodule:my_{op}")
    module = _import(where, module_name)
    if not hasattr(module, attribute):
        raise ValueError(f"{where}: {_origin(module)} has no {attribute!r}")
    function = getattr(module, attribute)
    if not callable(function):
        raise ValueError(f"{where} is a {type(function).__name__}, not a function")
    _check_parameters(where, function, ours)
    return function


def parameters(function: Callable) -> set[str] | None:
    """The names that `function` takes by keyword; None for any (`**arguments`)."""
    schema = getattr(getattr(function, "_opoverload", None), "_schema", None)  # an op of torch.library
    if schema is not None:
        return {argument.name for argument in schema.arguments}
    found = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in found):
        return None
    return {p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def sources(name: str) -> list[Path]:
    """The files that define a user op: its module's, and those of the modules beside it that it imports."""
    module = _import(name, name.partition(":")[0])
    root = _root(module)
    found: dict[Path, None] = {}
    waiting = [module]
    while waiting:
        path = _file(current := waiting.pop())
        if path is None or path in found or not path.is_relative_to(root):
            continue
        found[path] = None
        waiting += _modules_in(current)
    return sorted(found)


def digest(name: str) -> str:
    """SHA-256 over the names and contents of `sources`."""
    total = hashlib.sha256()
    for path in sources(name):
        total.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _import(where: str, module_name: str) -> ModuleType:
    # `python -m` looks in the working directory, a console script does not. Last, so that it shadows nothing.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{where}: there is no module {error.name!r} in {os.getcwd()} or among the installed packages; "
                "run from its folder, or add that to PYTHONPATH"
            ) from error
        raise ValueError(f"{where}: importing {module_name} failed: {error}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{where}: importing {module_name} failed: {type(error).__name__}: {error}") from error


def _check_parameters(where: str, function: Callable, ours: Iterable[Callable]) -> None:
    named = [names for names in map(parameters, ours) if names is not None]
    wanted, known = set.intersection(*named), set.union(*named)
    try:
        given = parameters(function)
        required = _required(function)
    except (TypeError, ValueError) as error:  # a built-in without a signature
        raise ValueError(f"{where}: its parameters cannot be read ({error}); wrap it in a Python function") from error
    lacks = sorted(wanted - given) if given is not None else []
    asks = sorted(required - known)
    if lacks or asks:
        problem = [f"lacks {', '.join(lacks)}"] * bool(lacks) + [f"asks for {', '.join(asks)}"] * bool(asks)
        raise ValueError(
            f"{where} {' and '.join(problem)}; it is called by keyword, as the reference is: " + ", ".join(sorted(wanted))
        )


def _required(function: Callable) -> set[str]:
    """Parameters without a default, whether or not they can be given by keyword."""
    schema = getattr(getattr(function, "_opoverload", None), "_schema", None)
    if schema is not None:
        return {argument.name for argument in schema.arguments if not argument.has_default_value()}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(function).parameters.values()
    return {p.name for p in found if p.default is p.empty and p.kind not in variadic}


def _origin(module: ModuleType) -> str:
    path = _file(module)
    return f"module {module.__name__}" + (f" ({path})" if path else "")


def _file(module: ModuleType) -> Path | None:
    """None for what has no source: built-in and namespace modules."""
    path = getattr(module, "__file__", None)
    return Path(path).resolve() if path and path.endswith(".py") else None


def _root(module: ModuleType) -> Path:
    """The folder of the module's top-level package, or the one that a lone module lies in."""
    top = sys.modules[module.__name__.partition(".")[0]]
    path = _file(top) or _file(module)
    return path.parent if path else Path(os.devnull)


def _modules_in(module: ModuleType) -> Iterator[ModuleType]:
    """The modules that the globals of `module` are, or come from."""
    for value in list(vars(module).values()):
        home = value if isinstance(value, ModuleType) else sys.modules.get(getattr(value, "__module__", None) or "")
        if home is not None and home is not module:
            yield home
