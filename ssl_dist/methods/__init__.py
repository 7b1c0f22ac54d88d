"""Methods by name. A method is a file of this folder, or a plugin: its stem is the name that a config gives."""

import importlib
import pkgutil

from ssl_dist import config, plugins
from ssl_dist.config import Section
from ssl_dist.errors import UserError, did_you_mean, quoted
from ssl_dist.methods.base import SSLMethod

_EVALUATIONS = ("fine_tuning", "linear_probe")  # trained on top of a method's backbone to measure it


def names() -> list[str]:
    """Every method there is."""
    inside = _inside()
    return sorted(inside | plugins.found(plugins.METHODS, inside | {*_EVALUATIONS}).keys())


def _inside() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(__path__)} - {"base", *_EVALUATIONS}


def find(name: str) -> type[SSLMethod]:
    """The class of the method `name`, or of an evaluation that is trained, which `names` leaves out.

    Raises `UserError` with the nearest name when there is none.
    """
    inside = _inside() | {*_EVALUATIONS}
    outside = plugins.found(plugins.METHODS, inside)
    if name in inside:
        return importlib.import_module(f"{__name__}.{name}").Method
    if name not in outside:
        hint, known = did_you_mean(name, names()), f"methods: {', '.join(names())}; --plugins FILE adds your own"
        raise UserError(f"method.name = {quoted(name)}: no such method; {hint}{plugins.absent() or known}")
    method = outside[name].load()
    if not isinstance(method, type) or not issubclass(method, SSLMethod):
        raise UserError(f"{outside[name].source}: method {name} must be a subclass of ssl_dist.methods.base.SSLMethod")
    return method


def build_options(method: type[SSLMethod], options: dict, reset: str = "method.options={}") -> Section:
    """The method's typed options from the config's mapping. Raises `UserError` naming method.options.<key>. reset: the
    overrides that would make a config of another method one of this one."""
    foreign = [key for key in options if key not in method.Options.model_fields]
    owners = [name for name in names() if foreign and set(foreign) <= set(find(name).Options.model_fields)]
    if owners:
        own = next((name for name in names() if find(name) is method), method.__module__)
        values = ", ".join(f"{key} = {quoted(options[key])}" for key in foreign)
        raise UserError(
            f"method.options: {values}: of {' and '.join(owners)}, not of {own}; leave it out, or, on a config of "
            f"another method: method.name={own} {reset}"
        )
    return config.validate(method.Options, options, "method.options.")
