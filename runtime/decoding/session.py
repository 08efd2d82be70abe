"""The interfaces of a session: what a backend does for the loop, and what measuring asks of it besides."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgeskip.runtime.bundle.weights import Rows
from edgeskip.runtime.decoding.rounds import Call, Round, View
from edgeskip.runtime.decoding.sampling import HostSampler
from edgeskip.runtime.grammar.masks import TokenMask
from edgeskip.runtime.sampling import Sampling

RowInputs = Mapping[str, npt.NDArray[Any]]
"""What a round's heads are told about each row besides its position: int64 arrays [rows] by buffer."""

NOTHING: RowInputs = {}


@dataclass(frozen=True)
class RoundResult:
    """What a round gave: the ids of the drafts that were made, the target ids, and the logits of the targets that were
    picked. `first_target` is the first target's row.
    """

    draft_ids: list[int]
    target_ids: list[int]
    target_logits: list[float]
    first_target: int = 0


def softmax_of(logits: npt.NDArray[Any], picked: float) -> float:
    """The probability of the token with the logit `picked` among logits [V] in fp32."""
    top = float(logits.max())
    return math.exp(picked - top) / float(np.exp(logits - top).sum())


class BoundRound(Protocol):
    """A round with its shapes and memory fixed, to be run many times; only one round runs at a time.

    A round may be started before the one before it has been waited for, if its rows have the same positions.
    """

    def start(self, position: int, row_inputs: RowInputs = NOTHING) -> None:
        """Hands the round to the device, with its first row at the given position.

        A device works on its own from then on; a CPU begins when somebody waits.
        """
        ...

    def wait(self) -> RoundResult:
        """Waits for the ids of the round that was started."""
        ...


class Session(ABC):
    """The graphs of one bundle on one device, with their caches and workspace: what the loop uses, and no more.

    A session owns its memory and frees it in `close`. It serves one sequence at a time: the caches hold whatever was
    last written, and rows at or past the current position are hidden by position. It is a context manager.
    """

    confidence_threshold = 0.0
    """A draft below this probability ends a round's drafting, unless the user asks otherwise, or K is chosen and the
    confidence of each draft weighed. 0 always drafts K, for devices that cannot end a round and should not wait for the
    host."""

    is_asynchronous = False
    """Whether a round that was started runs by itself, so that the host can do something else. Each kind of round is
    captured then when it comes again, so there should be few: none is shorter just because the text ends."""

    _bound: dict[Round, BoundRound]
    _sampler: HostSampler

    def ends_below(self, probability: float) -> bool:
        """Whether the session itself ends rounds that end early: from now on with the first draft less probable."""
        return False

    def prompt_rows(self, rows: int, position: int) -> int:
        """Rows of the call that does so many of a prompt best, from this position on; the caches have room for them."""
        return rows

    def bind(self, round_: Round) -> BoundRound:
        """Fixes shapes and memory of a round's calls; the same round is bound only once."""
        if round_ not in self._bound:
            self._bound[round_] = self._bind(round_)
        return self._bound[round_]

    @abstractmethod
    def _bind(self, round_: Round) -> BoundRound:
        """Binds a round that has not been bound before."""

    def make_current(self) -> None:
        """Lets the calling thread use the session, where only the one that made it could; on a CPU, any thread can."""
        return

    @abstractmethod
    def write(self, buffer: str, rows: Rows) -> None:
        """Puts rows [T,H] in the bundle's dtype, bf16 as 16-bit words, into the first T rows of a buffer of states."""

    @abstractmethod
    def sample(self, sampling: Sampling, prompt_ids: Sequence[int], mask: TokenMask | None = None) -> None:
        """Picks tokens like this from now on, where heads do not, in a text that begins with these ones. With penalties
        or a mask, its rounds are those whose picks depend on the history.
        """

    @abstractmethod
    def read_logits(self, rows: int) -> npt.NDArray[Any]:
        """The first `rows` rows of the latest target logits, [rows,V] in fp32."""

    @abstractmethod
    def read_draft_logits(self, rows: int) -> npt.NDArray[Any]:
        """The first `rows` rows of the latest draft logits, [rows,V] in fp32, of a head over all tokens."""

    @abstractmethod
    def carry(self, row: int) -> None:
        """Makes the token that target row `row` picked the next round's first input."""

    @abstractmethod
    def draft_confidence(self, row: int, vocabulary: int) -> float:
        """The probability that the exit gave to the token it drafted in this row, from a head with this many logits."""

    def picks_again(self, rows: int, vocabulary: int, position: int) -> Iterator[tuple[int, float]]:
        """What a host picks from the first rows of the latest draft logits, of a head with so many, for positions from
        this one on, and the probability of each: after the tokens that the text has there, which stay what they are.
        """
        for row, logits in enumerate(self.read_draft_logits(rows)[:, :vocabulary]):
            token = self._sampler.pick_again(logits, position + row)
            yield token, softmax_of(logits, float(logits[token]))

    @abstractmethod
    def read_caches(self, rows: int) -> dict[str, npt.NDArray[Any]]:
        """A copy in host memory of the first rows of every cache, as raw bytes [N, rows * bytes of a row], by its
        input's name (`past_key_values.0.key`).
        """

    @abstractmethod
    def write_caches(self, caches: Mapping[str, npt.NDArray[Any]]) -> None:
        """Puts back what `read_caches` returned."""

    @abstractmethod
    def clear(self) -> None:
        """Leaves nothing in caches and workspace that is not finite. Rows are hidden by position, but where attention
        multiplies hidden rows by 0, a NaN among them would reach every text to come. What the caches held is lost.
        """

    @abstractmethod
    def close(self) -> None:
        """Frees everything; the session is of no use afterwards."""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


@dataclass(frozen=True)
class Memory:
    """Bytes that a session holds, by kind; `other` is the backend's own, null where it cannot be told."""

    weights: int
    caches: int
    workspace: int
    other: int | None


class MeasuredSession(Session):
    """A session that can also be asked what it is, what it did, what it holds and how fast it is."""

    description: str
    """Backend, device and dialect, for people."""

    device: Literal["cpu", "cuda"]
    hardware: str
    """The chip's own name."""

    exact = False
    """Whether the logits of a verification are those of plain decoding, so that drafts change no token."""

    compute_capability: int | None = None
    """A GPU's SM, 87 for 8.7."""

    dialect = "standard"
    """The dialect of the graph files that it runs, or that its engines were built from."""

    @property
    @abstractmethod
    def stage_ns(self) -> Mapping[str, int] | None:
        """Time spent in each graph so far: a clock to read before and after. None where the device hides it."""

    @property
    def captured_rounds(self) -> int | None:
        """Rounds so far that the device replayed as one captured graph; None where there is no such thing."""
        return None

    @abstractmethod
    def read(self, view: View) -> npt.NDArray[Any]:
        """Rows of a workspace buffer, once all that was started is done: ids as they are, all else in fp32."""

    @abstractmethod
    def read_cache(self, name: str) -> npt.NDArray[Any]:
        """A whole cache, [N,C,D] in fp32, by its input's name (`past_key_values.0.key`)."""

    def read_logits(self, rows: int) -> npt.NDArray[Any]:
        """The first `rows` rows of the latest target logits, [rows,V] in fp32."""
        return self.read(View("target_logits", 0, rows))

    def read_draft_logits(self, rows: int) -> npt.NDArray[Any]:
        """The first `rows` rows of the latest draft logits, [rows,V] in fp32, of a head over all tokens."""
        return self.read(View("draft_logits", 0, rows))

    @abstractmethod
    def time_call_ms(self, call: Call, position: int, repeats: int) -> float:
        """Median time of one call by itself, its first row at `position`; overwrites cache rows from there on."""

    @abstractmethod
    def copy_bytes_per_second(self) -> float:
        """Rate of copies within the memory that holds the weights: bytes read plus bytes written."""

    @abstractmethod
    def memory(self) -> Memory:
        """What is held now."""

    def __enter__(self) -> MeasuredSession:
        return self
