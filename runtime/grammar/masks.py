"""Which tokens may follow in a text that keeps to a grammar, by llguidance.

A mask depends on the tokens before it alone. So draft and target, which pick under the same mask wherever they follow
the same tokens, pick alike where both find the same token best, and drafts change no text.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from edgeskip.runtime.errors import BackendError, RequestError
from edgeskip.runtime.grammar.grammar import MOST_CHARACTERS, Grammar
from edgeskip.runtime.packages import NEEDS, missing_modules

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Array = npt.NDArray[Any]
T = TypeVar("T")

_STACK_BYTES = 2048 * MOST_CHARACTERS
"""llguidance follows nested schemas, references and rules by recursion, the end of which would be that of the process.
Chains of all kinds take at most 420 bytes for each character, in version 1.9.
"""
_STACK_SIZE = threading.Lock()


@dataclass(frozen=True)
class TokenTable:
    """What a grammar must know of a model's tokens. It takes a second to make for a large vocabulary."""

    tokens: LLTokenizer
    eos_token_ids: tuple[int, ...]


def token_table(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> TokenTable:
    """The table of a tokenizer whose model has logits for `vocab_size` tokens.

    Raises:
        BackendError: llguidance is not installed.
        RequestError: no EOS token, or a tokenizer that llguidance does not take.
    """
    need = NEEDS["generate --json-schema"]
    if missing := missing_modules(need.modules):
        raise BackendError("grammar", f"{', '.join(missing)} not installed", fix=need.fix)
    from llguidance import LLTokenizer

    if not eos_token_ids:
        found, wanted = "the bundle has no EOS token", "one, which ends a text that is complete"
        raise RequestError("grammar", found, wanted=wanted, fix="export from a checkpoint that names its EOS token")
    size = max(vocab_size, tokenizer.get_vocab_size(with_added_tokens=True))
    try:
        tokens = LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=list(eos_token_ids))
    except ValueError as error:
        raise RequestError("grammar", f"llguidance does not take the bundle's tokenizer ({error})") from None
    return TokenTable(tokens, tuple(eos_token_ids))


class UnsoundError(RequestError):
    """A grammar that llguidance refuses."""


class TokenMask:
    """Which tokens may come next in one text, after whatever tokens are asked about.

    Args:
        grammar: what the text must be.
        table: the model's tokens.

    Raises:
        UnsoundError: a grammar that is malformed, fits no text, uses what llguidance does not know, or is too large.
    """

    def __init__(self, grammar: Grammar, table: TokenTable) -> None:
        self._eos = np.array(table.eos_token_ids)
        self._at_start = _with_stack(lambda: _matcher(grammar, table))
        self._restart()

    def _restart(self) -> None:
        self._matcher, self._taken = self._at_start.deep_copy(), np.zeros(0, np.int64)

    def allowed(self, token_ids: Array) -> Array | None:
        """Which tokens may follow the first ones [n] of a text: bool [V or more].

        It is None where nothing needs to follow: after EOS, or after what the grammar does not have. Among drafts,
        that is dropped.
        """
        if np.isin(token_ids, self._eos).any() or not self._follow(token_ids):
            return None
        mask = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        if self._matcher.is_error():  # it is too large from here on
            self._restart()
            return None
        return mask.view(np.bool_)

    def check(self, token_ids: Sequence[int]) -> None:
        """Checks that a text may begin with these tokens, and end with them if the last one is EOS.

        Raises:
            RequestError: it may not: where no token could follow, others were picked.
        """
        ends = token_ids[-1] in self._eos
        known = self._follow(np.array(token_ids[: len(token_ids) - ends], np.int64))
        if not known or (ends and not self._matcher.is_accepting()):
            found = f"no token can follow the first {len(self._taken)} of the text"
            fix = "give a grammar that is simpler, or all of whose characters the tokenizer has"
            raise RequestError("grammar", found, fix=fix)

    def _follow(self, token_ids: Array) -> bool:
        """Goes on, or back, to where these tokens lead; False if the grammar does not have them all."""
        shared = min(len(token_ids), len(self._taken))
        others = np.flatnonzero(token_ids[:shared] != self._taken[:shared])
        kept = int(others[0]) if len(others) else shared
        if kept < len(self._taken) and not self._matcher.rollback(len(self._taken) - kept):
            self._restart()
            kept = 0
        following = token_ids[kept:].tolist()
        known = self._matcher.validate_tokens(following) if following else 0
        if known and not self._matcher.consume_tokens(following[:known]):
            self._restart()
            return False
        self._taken = token_ids[: kept + known].copy()
        return kept + known == len(token_ids)


def _matcher(grammar: Grammar, table: TokenTable) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    sources: dict[str, Callable[[str], str]] = {
        "json_schema": LLMatcher.grammar_from_json_schema,
        "regex": LLMatcher.grammar_from_regex,
        "lark": LLMatcher.grammar_from_lark,
    }
    try:
        source = sources[grammar.kind](grammar.source)
    except ValueError as error:
        raise UnsoundError("grammar", f"not sound ({error})") from None
    made = LLMatcher(table.tokens, source, log_level=0, limits=LLParserLimits(verbose_errors=False))
    if made.is_error():
        raise UnsoundError("grammar", f"not sound ({' '.join(made.get_error().split())})")
    return made


def _with_stack(work: Callable[[], T]) -> T:
    """What `work` returns or raises, from a thread whose stack is large enough to compile any grammar in."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    with _STACK_SIZE:  # which is the process's
        before = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=run, daemon=True).start()
        finally:
            threading.stack_size(before)
    return result.result()
