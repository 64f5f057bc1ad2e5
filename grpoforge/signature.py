"""A component's signature as its contract: positional parameters are data, keyword-only ones are options."""

from __future__ import annotations

import inspect
import os
import re
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Any

import pydantic
import pydantic_core

from grpoforge.errors import PluginError

POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, slots=True)
class DataParameter:
    """Data that a component asks for, by name."""

    name: str
    required: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionParameter:
    """An option as a person reads it: in ``grpoforge plugins``, in hints, in the reference."""

    name: str
    type: str
    required: bool
    default: Any
    """None as well when ``required``."""
    help: str


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a function or class asks for."""

    data: tuple[DataParameter, ...]
    accepts_any_data: bool
    options: type[pydantic.BaseModel]
    """Strict; extra keys are forbidden."""


def read_signature(factory: Callable[..., Any], label: str, *, called: bool, any_data: bool) -> Signature:
    """What ``factory``, a function or a class, asks for.

    Args:
        factory: the component.
        label: how errors name it, e.g., "reward `politeness:politeness`".
        called: whether a class gets its data in ``__call__`` (else in ``__init__``).
        any_data: whether ``**kwargs`` beside ``completions`` is accepted, the signature of a TRL reward.

    Raises:
        PluginError: a parameter is neither data nor an option, or an option has no usable type.
    """
    if not inspect.isclass(factory):
        parameters = _parameters(factory)
        takes_any = _takes_any_data(parameters, label, any_data)
        # All parameters of a TRL reward are data: its trainer passes everything by keyword.
        options = () if takes_any else _keyword_only(parameters)
        data = parameters if takes_any else _positional(parameters)
        return Signature(
            data=_data(data, label, called),
            accepts_any_data=takes_any,
            options=_model(factory, options, label),
        )
    init = find_method(factory, "__init__")
    build = _parameters(init)[1:] if init else []
    _takes_any_data(build, label, any_data=False)
    if not called:
        return Signature(
            data=_data(_positional(build), label, called),
            accepts_any_data=False,
            options=_model(init, _keyword_only(build), label),
        )
    call = _parameters(find_method(factory, "__call__"))[1:]
    takes_any = _takes_any_data(call, label, any_data)
    _check_called_class(build, [] if takes_any else call, label)
    return Signature(
        data=_data(call, label, called),
        accepts_any_data=takes_any,
        options=_model(init, _keyword_only(build), label),
    )


def find_method(owner: type, name: str) -> Callable[..., Any] | None:
    """The method ``name`` that ``owner`` defines or inherits, or None.

    ``object`` and protocols do not count: they declare methods that nobody wrote. A metaclass does not
    either, which plain ``getattr(owner, "__call__")`` would find.
    """
    for base in owner.__mro__:
        if name in vars(base) and base is not object and not getattr(base, "_is_protocol", False):
            return typing.cast(Callable[..., Any], vars(base)[name])
    return None


def option_parameters(model: type[pydantic.BaseModel]) -> tuple[OptionParameter, ...]:
    """The options of ``model`` in the order of the signature."""
    return tuple(
        OptionParameter(
            name=name,
            type=type_name(field.annotation),
            required=field.is_required(),
            default=None if field.is_required() else field.default,
            help=field.description or "",
        )
        for name, field in model.model_fields.items()
    )


def validate_options(model: type[pydantic.BaseModel], options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` and the defaults of those left out.

    JSON's strict rules are the right ones for YAML: a list may become a tuple, a string a Path or an Enum, an
    integer a float; a bool is no number, ``"3"`` is no integer.

    Raises:
        pydantic.ValidationError: a value is missing or of the wrong type.
        pydantic_core.PydanticSerializationError: a value that JSON and YAML cannot express.
    """
    document = pydantic_core.to_json(dict(options), inf_nan_mode="constants")
    return dict(model.model_validate_json(document))


def type_name(annotation: Any) -> str:
    """An annotation as one would write it."""
    if annotation is Any:
        return "any"
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return re.sub(r"\b(typing|collections\.abc|pathlib(\._local)?)\.(?=[A-Z])", "", str(annotation))


def locate(factory: Callable[..., Any]) -> str:
    """Where ``factory`` is written, as ``file:line``; its module when there is no file."""
    target = inspect.unwrap(factory)
    try:
        if code := getattr(target, "__code__", None):
            return f"{show_path(Path(code.co_filename))}:{code.co_firstlineno}"
        return f"{show_path(Path(inspect.getfile(target)))}:{inspect.getsourcelines(target)[1]}"
    except (OSError, TypeError):
        return str(target.__module__)


def show_path(path: Path) -> str:
    """``path`` as a person would write it: short when it is below the working directory or installed."""
    path = Path(os.path.abspath(path))
    if "site-packages" in path.parts:
        return ".../site-packages/" + path.as_posix().rpartition("/site-packages/")[2]
    if path.is_relative_to(Path.cwd()):
        return f"./{path.relative_to(Path.cwd()).as_posix()}"
    return str(path)


def _parameters(function: Callable[..., Any] | None) -> list[Parameter]:
    return list(inspect.signature(function).parameters.values()) if function else []


def _positional(parameters: Sequence[Parameter]) -> list[Parameter]:
    return [parameter for parameter in parameters if parameter.kind in POSITIONAL]


def _keyword_only(parameters: Sequence[Parameter]) -> list[Parameter]:
    return [parameter for parameter in parameters if parameter.kind is Parameter.KEYWORD_ONLY]


def _takes_any_data(parameters: Sequence[Parameter], label: str, any_data: bool) -> bool:
    """Whether there is a ``**kwargs`` that is allowed."""
    for parameter in parameters:
        if parameter.kind is Parameter.VAR_POSITIONAL:
            raise PluginError(f"{label} takes `*{parameter.name}`", "name each parameter: positional ones are data")
        if parameter.kind is Parameter.VAR_KEYWORD:
            if any_data and any(other.name == "completions" for other in parameters):
                return True
            raise PluginError(
                f"{label} takes `**{parameter.name}`, which would hide a misspelled option",
                "name each option as a keyword-only parameter",
            )
    return False


def _check_called_class(build: Sequence[Parameter], call: Sequence[Parameter], label: str) -> None:
    for parameter in _positional(build):
        raise PluginError(
            f"`__init__` of {label} takes `{parameter.name}` positionally, and has no data when it is built",
            "make it an option (keyword-only), or take it in `__call__`",
        )
    for parameter in _keyword_only(call):
        raise PluginError(
            f"`__call__` of {label} takes the keyword-only `{parameter.name}`",
            "options of a class are keyword-only parameters of its `__init__`",
        )


def _data(parameters: Sequence[Parameter], label: str, called: bool) -> tuple[DataParameter, ...]:
    named = [parameter for parameter in parameters if parameter.kind is not Parameter.VAR_KEYWORD]
    for parameter in named:
        if called and parameter.kind is Parameter.POSITIONAL_ONLY:
            raise PluginError(
                f"{label} takes `{parameter.name}` before a `/`, and data is bound by name", "remove the `/`"
            )
    return tuple(DataParameter(parameter.name, parameter.default is Parameter.empty) for parameter in named)


def _model(
    function: Callable[..., Any] | None, parameters: Sequence[Parameter], label: str
) -> type[pydantic.BaseModel]:
    """A strict model with one field per parameter of ``function``."""
    annotations = _annotations(function, parameters, label)
    fields: dict[str, Any] = {}
    for parameter in parameters:
        annotation = annotations.get(parameter.name, Any)
        texts = [text for text in getattr(annotation, "__metadata__", ()) if isinstance(text, str)]
        default: Any = ... if parameter.default is Parameter.empty else parameter.default
        # An explicit None would erase the description of `Annotated[int, Field(description=...)]`.
        described: Any = {"description": texts[0]} if texts else {}
        fields[parameter.name] = (annotation, pydantic.Field(default, **described))
    try:
        with warnings.catch_warnings():
            # `schema` or `copy` are good names for an option; the model is never used through attributes.
            warnings.simplefilter("ignore", UserWarning)
            model: type[pydantic.BaseModel] = pydantic.create_model(
                "Options", __config__=pydantic.ConfigDict(extra="forbid", strict=True), **fields
            )
    except (pydantic.errors.PydanticUserError, NameError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise PluginError(
            f"the options of {label} cannot be checked: {reason}",
            "options are what YAML can hold: numbers, strings, booleans, lists, tuples, mappings, None",
        ) from None
    _check_defaults(model, label)
    return model


def _annotations(function: Callable[..., Any] | None, parameters: Sequence[Parameter], label: str) -> dict[str, Any]:
    """The resolved annotations of ``parameters`` only: those of data may name types that are not imported."""
    wanted = {one.name: one.annotation for one in parameters if one.annotation is not Parameter.empty}
    if not wanted or function is None:
        return {}
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        return typing.get_type_hints(types.SimpleNamespace(__annotations__=wanted), globalns=scope, include_extras=True)
    except (NameError, TypeError, SyntaxError, AttributeError) as error:
        raise PluginError(
            f"the types of the options of {label} cannot be read: {error}",
            "import the types of options at module level, not only under TYPE_CHECKING",
        ) from None


def _check_defaults(model: type[pydantic.BaseModel], label: str) -> None:
    """Refuse a default that the user could not write: a stored configuration names it, and is read again."""
    for option in option_parameters(model):
        if option.required:
            continue
        try:
            validate_options(model, {option.name: option.default})
        except pydantic_core.PydanticSerializationError:
            problem = "YAML cannot hold it"
        except pydantic.ValidationError as error:
            wrong = [one for one in error.errors() if one["loc"][0] == option.name]
            if not wrong:
                continue
            problem = f"it is not `{option.type}`"
        else:
            continue
        raise PluginError(
            f"the default of option `{option.name}` of {label} is `{option.default!r}`, and {problem}",
            "annotate the option with a type that allows its default",
        )
