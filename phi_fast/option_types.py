"""Types of options that the command line and configuration files parse alike: mixtures, counts, names."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec


def parse_mixture(text: str) -> dict[str, int]:
    """Parse "docs=80,code=20" into {"docs": 80, "code": 20}. Raises ValueError for anything else."""
    mixture = {}
    for entry in text.split(","):
        name, equals, weight = entry.strip().partition("=")
        if not (name and equals and weight.isdecimal()):
            raise ValueError(f"mixture entry {entry!r} is not CORPUS=INTEGER, as in docs=80,code=20")
        if name in mixture:
            raise ValueError(f"mixture {text!r} names {name!r} twice")
        mixture[name] = int(weight)
    return mixture


Mixture = Annotated[
    dict[str, int],
    PrimitiveConstructorSpec[dict[str, int]](
        nargs=1,
        metavar="CORPUS=WEIGHT,…",
        instance_from_str=lambda words: parse_mixture(words[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda mixture: [",".join(f"{name}={weight}" for name, weight in mixture.items())],
    ),
]
"""Corpus -> integer weight; on the command line `docs=80,code=20`."""


def parse_stage(text: str) -> tuple[int, dict[str, int]]:
    """Parse "1000:docs=1" into (1000, {"docs": 1}). Raises ValueError for anything else."""
    step, colon, mixture = text.partition(":")
    if not (colon and step.isdecimal()):
        raise ValueError(f"mixture stage {text!r} is not STEP:CORPUS=INTEGER,…, as in 1000:docs=50,code=50")
    return int(step), parse_mixture(mixture)


Stages = Annotated[
    tuple[tuple[int, dict[str, int]], ...],
    PrimitiveConstructorSpec[tuple[tuple[int, dict[str, int]], ...]](
        nargs="*",
        metavar="STEP:CORPUS=WEIGHT,…",
        instance_from_str=lambda words: tuple(parse_stage(word) for word in words),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda stages: [
            f"{step}:{','.join(f'{name}={weight}' for name, weight in weights.items())}" for step, weights in stages
        ],
    ),
]
"""(first step, weights) in order of steps; on the command line `1000:docs=50,code=50 2000:code=1`."""


def parse_count(text: str) -> int:
    """Parse an integer such as "1e9", "1_000_000_000" or "1000000000". Raises ValueError for anything else."""
    try:
        value = Decimal(text)
    except InvalidOperation:
        value = Decimal("NaN")
    if not value.is_finite() or abs(value) >= 2**63 or value != int(value):
        raise ValueError(f"{text!r} is not a whole number, as 1000000 or 1e6")
    return int(value)


class _AsTyped:
    """Lets pydantic, which is imported only to read configuration files, parse a count as the command line does."""

    def __get_pydantic_core_schema__(self, kind: Any, handler: Any) -> Any:
        from pydantic_core.core_schema import no_info_before_validator_function

        return no_info_before_validator_function(lambda value: parse_count(str(value)), handler(kind))


Count = Annotated[
    int,
    PrimitiveConstructorSpec[int](
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: parse_count(words[0]),
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    ),
    _AsTyped(),
]
"""An integer, on the command line and in a configuration file also as 1e9."""

Names = Annotated[
    tuple[str, ...],
    PrimitiveConstructorSpec[tuple[str, ...]](
        nargs="*",
        metavar="NAME[,NAME...]",
        instance_from_str=lambda words: tuple(name for word in words for name in word.split(",") if name),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(name, str) for name in value),
        str_from_instance=lambda value: list(value),
    ),
]
"""Names separated by commas or spaces."""
