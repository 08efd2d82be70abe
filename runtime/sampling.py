"""How tokens are drawn: what a user asks for, checked. runtime/decoding/sampling.py draws them."""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, cast, get_args, get_type_hints

from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.structure import Range, plain

if TYPE_CHECKING:
    from typing import Unpack

LEAST_TEMPERATURE = 1e-3
"""Below it, nothing is drawn: noise could not change what is picked but among equals."""

Seed = Annotated[int, Range(0, (1 << 64) - 1)]


class SamplingSettings(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments; None stands for what the bundle has."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None


@dataclass(frozen=True)
class Sampling:
    """How a token is picked from its logits, in this order, which is that of transformers.

    Args:
        repetition_penalty: divides the logits above 0 of tokens that the prompt or the new text has, and multiplies
            those below (Keskar et al. 2019); 1 changes nothing.
        presence_penalty: subtracted from the logit of each token that the new text has.
        frequency_penalty: subtracted from it once for each time.
        temperature: divides the logits; 0 picks the most probable token, and nothing is drawn.
        top_k: keeps this many most probable tokens, and any as probable as the last of them; 0 keeps all.
        top_p: keeps a token while those more probable than it have less than this much of the probability that top_k
            left (Holtzman et al. 2020).
        min_p: keeps tokens with at least this share of the most probable one's probability (Nguyen et al. 2024).
        seed: the same seed draws the same text; None lets `seeded` draw one.

    Raises:
        RequestError: a value that is out of bounds.
    """

    temperature: Annotated[float, Range(0, 100)] = 0.0
    top_k: Annotated[int, Range(0, 1 << 30)] = 0
    top_p: Annotated[float, Range(0, 1)] = 1.0
    min_p: Annotated[float, Range(0, 1)] = 0.0
    seed: Seed | None = None
    repetition_penalty: Annotated[float, Range(0.01, 100)] = 1.0
    presence_penalty: Annotated[float, Range(-100, 100)] = 0.0
    frequency_penalty: Annotated[float, Range(-100, 100)] = 0.0

    def __post_init__(self) -> None:
        for name, (kind, bounds) in _BOUNDS.items():
            value = plain(getattr(self, name))
            object.__setattr__(self, name, value)
            if value is None and name == "seed":
                continue
            kinds = (int,) if kind is int else (int, float)
            if not isinstance(value, kinds) or isinstance(value, bool) or value not in bounds:
                wanted = f"{'a whole number, ' if kind is int else ''}{bounds}"
                raise RequestError(name.replace("_", " "), f"{value!r:.60}", wanted=wanted)

    @property
    def is_drawn(self) -> bool:
        """Whether tokens are drawn by chance."""
        return self.temperature >= LEAST_TEMPERATURE

    @property
    def has_filters(self) -> bool:
        """Whether some tokens are never drawn."""
        return (self.top_k, self.top_p, self.min_p) != (0, 1, 0)

    @property
    def has_penalties(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def is_greedy(self) -> bool:
        """Whether the token with the largest logit is picked, as heads do it themselves."""
        return not (self.is_drawn or self.has_penalties)

    @property
    def settings(self) -> SamplingSettings:
        """As keyword arguments."""
        return cast("SamplingSettings", asdict(self))

    def __str__(self) -> str:
        """What it has of its own, for people: `temperature 0.8, top_p 0.95, seed 7`."""
        if self.is_greedy:
            return "greedy"
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return ", ".join(f"{name} {value}" for name, value in own.items() if value != getattr(GREEDY, name))

    def changed(self, **given: Unpack[SamplingSettings]) -> Sampling:
        """With what is given and not None. Whoever asks a greedy model for a filter or a seed and no temperature wants
        draws: they have the temperature 1.

        Raises:
            RequestError: an unknown field, or a value that is out of bounds.
        """
        if unknown := given.keys() - _BOUNDS.keys():
            raise RequestError("sampling", f"{min(unknown)!r:.60}", wanted=f"one of {', '.join(_BOUNDS)}")
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        draws = changes.keys() & {"top_k", "top_p", "min_p", "seed"}
        if draws and not self.is_drawn:
            changes = {"temperature": 1.0} | changes
        return replace(self, **changes)

    def seeded(self) -> Sampling:
        """With a seed of its own where it draws and none was given: 48 bits, which a person can copy."""
        return replace(self, seed=secrets.randbits(48)) if self.is_drawn and self.seed is None else self


def _bounds_of(hint: Any) -> tuple[type, Range]:
    kind, bounds = get_args(hint)
    return _bounds_of(kind) if bounds is type(None) else (kind, bounds)


_BOUNDS = {name: _bounds_of(hint) for name, hint in get_type_hints(Sampling, include_extras=True).items()}
"""Type and bounds of each field."""

GREEDY = Sampling()
