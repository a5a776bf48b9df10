"""Templates -> self-contained HTML pages, every text escaped. Imports no torch."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def figure(value: Any) -> Any:
    """A number, or an interval {value, low, high}, as it is shown; None as a dash; anything else as it is."""
    if value is None:
        return "–"
    if isinstance(value, dict) and {"value", "low", "high"} <= value.keys():
        ends = [value[name] for name in ("value", "low", "high")]
        largest = max(map(abs, ends))
        places = 3 if largest < 2 else 2 if largest < 10 else 1  # the same for all three
        return "{} ({} to {})".format(*(f"{end:.{places}f}" for end in ends))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return f"{value:,}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"


def render(name: str, **context: Any) -> str:
    """The page of templates/`name`.html.jinja."""
    environment = Environment(
        loader=PackageLoader("fitness_dpo"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["figure"] = figure
    return environment.get_template(f"{name}.html.jinja").render(**context) + "\n"
