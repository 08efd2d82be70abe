"""A loaded model, and generation as a stream of text."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, cast

from tokenizers import Tokenizer

from edgeskip.runtime.bundle.graphs import MAX_SPECULATIONS, Split, check_num_speculations
from edgeskip.runtime.bundle.manifest import Bundle
from edgeskip.runtime.bundle.weights import TokenRows, embedding_table, read_bytes
from edgeskip.runtime.decoding.decode import Decoding, Lookup, NotFiniteError, Step, decode, prefill, score
from edgeskip.runtime.decoding.held_rows import HeldRows
from edgeskip.runtime.decoding.rounds import MODES, Mode
from edgeskip.runtime.decoding.sampling import GREEDY, TokenLogprob, picks_of, token_logprob
from edgeskip.runtime.decoding.session import MeasuredSession
from edgeskip.runtime.decoding.statistics import Prefilled, RoundRecord, Statistics, summarize
from edgeskip.runtime.decoding.text import Prompt, Span, TextStream, encode_prompt, load_tokenizer
from edgeskip.runtime.drafting.drafters import DRAFTS, Draft, ExitChoice
from edgeskip.runtime.drafting.length import Pace, RoundCosts, slopes_of
from edgeskip.runtime.drafting.ngram import NgramIndex
from edgeskip.runtime.errors import BackendError, RequestError
from edgeskip.runtime.grammar.grammar import Grammar
from edgeskip.runtime.grammar.masks import TokenMask, TokenTable, token_table
from edgeskip.runtime.sampling import Sampling, SamplingSettings
from edgeskip.runtime.structure import plain

if TYPE_CHECKING:
    from typing import Unpack

StopReason = Literal["eos", "stop_string", "max_new_tokens", "capacity"]


_LOG = logging.getLogger(__name__)

MOST_LOGPROBS = 100
"""Of the most probable tokens that are given with each token."""


@dataclass(frozen=True)
class Generation:
    """A finished generation. `token_ids` includes an EOS token or the last token of a stop string; `text` does not.

    `sampling` is how tokens were picked, with the seed; `logprobs`, if asked for, has an entry for each token.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    stop_reason: StopReason
    statistics: Statistics
    sampling: Sampling
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class Piece:
    """Streamed text; `drafted` if it was an accepted draft. The last piece carries the whole generation.

    `logprobs`, if asked for, has an entry for each token that the text came with; of all pieces, for each token.
    """

    text: str
    drafted: bool = False
    generation: Generation | None = None
    logprobs: tuple[TokenLogprob, ...] = ()

    def __str__(self) -> str:
        return self.text


class FurtherSettings(SamplingSettings, total=False):
    """How tokens are picked, by sampling and a grammar that the text keeps to, what drafts them, and at which exit."""

    grammar: Grammar | None
    draft: Draft | None
    exit_layer: ExitChoice | None


class GenerationSettings(FurtherSettings, total=False):
    """The keyword arguments of `Model.generate`."""

    mode: Mode
    num_speculations: int | Literal["auto"] | None
    confidence_threshold: float | None
    max_new_tokens: int | None
    stop: Sequence[str]
    logprobs: int | None


class Model:
    """A bundle on a device, serving one sequence at a time; a context manager.

    `edgeskip.load` makes one. It remembers whose rows its caches hold: of a prompt that begins like the text before it,
    as each turn of a chat does, only the rest is computed. `forget` ends that for what comes next. With
    `held.most_saved_bytes` of host memory, it also keeps the rows of earlier texts.

    Attributes:
        bundle: what was loaded: its folder and its manifest.
        tokenizer: the bundle's `tokenizers.Tokenizer`, to count tokens or spell them; `encode` does more for a prompt.
        sampling: how tokens are picked where `generate` is not told.
        draft: what drafts where `generate` is not told.
        exit_layer: the exit that drafts where `generate` is told no other.
        split: the graphs that draft and those that verify at that exit, or the bundle's own.
        session: what runs it; its `description` says what was chosen, and why.
        held: whose rows the caches hold.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: MeasuredSession,
        exit_layer: ExitChoice | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        if not (isinstance(bundle, Bundle) and isinstance(session, MeasuredSession)):
            found = f"of a {type(bundle).__name__} and a {type(session).__name__}"
            raise RequestError("model", found, wanted="a bundle and a session", fix="edgeskip.load makes one")
        self.bundle, self.session = bundle, session
        self.sampling = bundle.manifest.sampling
        self.draft: Draft = "exit"
        exit_layer = plain(exit_layer)
        self.split = bundle.manifest.split(None if exit_layer == "auto" else exit_layer, GREEDY.name)
        self.exit_layer: ExitChoice = self.split.exit_layer if exit_layer is None else exit_layer
        self.tokenizer: Tokenizer = tokenizer or load_tokenizer(bundle)
        self.embeddings = embedding_table(bundle)
        self.held = HeldRows(session, (*bundle.manifest.exit_layers, bundle.manifest.architecture.num_layers))
        splits = [bundle.manifest.split(one, GREEDY.name) for one in bundle.manifest.exit_layers]
        self._splits = {split.exit_layer: split for split in (self.split, *splits)}
        costs = RoundCosts(slopes_of(self._splits.values(), read_bytes(bundle)))
        self._pace = Pace(costs, lambda: 1e3 * self._session_seconds())
        self._busy = self._closed = False
        self._steps_under_way: Generator[Step, None, None] | None = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the device's memory."""
        self._closed = True
        if self._steps_under_way is not None:  # it holds what the session must free
            self._steps_under_way.close()
        self.session.close()

    def forget(self) -> None:
        """Computes the next prompt from its beginning, whatever the caches hold: for whoever has used the session, or
        measures that time.
        """
        self.held.forget()

    def generate(
        self,
        prompt: Prompt,
        *,
        mode: Mode = "self-speculative",
        num_speculations: int | Literal["auto"] | None = None,
        confidence_threshold: float | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        **further: Unpack[FurtherSettings],
    ) -> Iterator[Piece]:
        """Continues a prompt, yielding text as soon as it is certain.

        Args:
            prompt: text, token ids, or chat messages.
            mode: `self-speculative` and `autoregressive` give the same tokens; `early-exit` stops at the exit layer,
                for every token or, with a threshold, for those that the exit is sure of.
            num_speculations: K, the most drafts per round; `auto` chooses it for each round, by how often drafts were
                right of late and what rounds take. By default the bundle's, and `auto` unless only the exit drafts.
            confidence_threshold: a draft less probable than this, 0 to 1, is the last of its round; 0 always drafts K.
                It changes the speed, never the tokens. By default, what suits the backend; on a CPU, rounds whose K is
                chosen end instead where one more draft is not worth its time, by how sure the exit is. With
                `early-exit`, tokens less probable than this are the whole model's, and 0, the default, leaves all to
                the exit.
            max_new_tokens: by default, until the caches are full.
            stop: texts that end the generation.
            logprobs: how many of the most probable tokens to give with each token, and their probabilities, in the
                generation; 0 gives that of the token alone, None nothing.
            further: `temperature`, `top_k`, `top_p`, `min_p`, `seed`, `repetition_penalty`, `presence_penalty` and
                `frequency_penalty`, which `edgeskip.Sampling` describes. What is not given is the bundle's own,
                `model.sampling`. The same seed gives the same text, drafts or not. `grammar`, an `edgeskip.Grammar`, is
                what the text must be. For penalties and a grammar, a GPU waits for the host at every token. `draft` is
                what drafts: `exit`; `ngram`, what followed earlier where the text went the same way; `auto`, that where
                there is any, else the exit. `exit_layer` is the exit, of those that the bundle has, or `auto`, which
                chooses it for each round, as well as up to K drafts; K is then `auto` by default. It changes the
                speed, and in mode `early-exit` the tokens.

        Raises:
            RequestError: at once, if this cannot be served; on the first piece, if another generator is running.
            BackendError: at once, if there is a grammar and its library is not installed.
        """
        if unknown := further.keys() - FurtherSettings.__annotations__.keys():
            wanted = f"one of {', '.join(GenerationSettings.__annotations__)}"
            raise RequestError("setting", f"{min(unknown)!r:.60}", wanted=wanted)
        how = self._drafting(
            mode, num_speculations, confidence_threshold, further.pop("draft", None), further.pop("exit_layer", None)
        )
        max_new_tokens, stop, logprobs = map(plain, (max_new_tokens, stop, logprobs))
        if not (max_new_tokens is None or (type(max_new_tokens) is int and max_new_tokens >= 1)):
            raise RequestError("max new tokens", f"{max_new_tokens!r:.60}", wanted="a whole number from 1")
        stops = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str | bytes) else (stop,)
        for text in stops:
            if not isinstance(text, str) or not text:
                found = "an empty text" if text == "" else f"{text!r:.60}"
                raise RequestError("stop", found, wanted="a text of at least one character")
        if logprobs is not None:
            _check_logprobs(logprobs)
        grammar = further.pop("grammar", None)
        if not isinstance(self.sampling, Sampling):
            raise RequestError("sampling", f"{self.sampling!r:.60}", wanted="an edgeskip.Sampling")
        picked = self.sampling.changed(**cast("SamplingSettings", further)).seeded()
        mask = None if grammar is None else self._mask(grammar)
        return self._generate(_Request(self._held(prompt), how, max_new_tokens, stops, picked, logprobs, mask))

    def check(self, **settings: Unpack[GenerationSettings]) -> None:
        """Checks settings of `generate`, for whoever has no prompt yet.

        Raises:
            RequestError: they cannot be served.
            BackendError: there is a grammar and its library is not installed.
        """
        self.generate([0], **settings)  # which begins when somebody asks for a piece

    def _drafting(
        self,
        mode: Mode,
        num_speculations: int | Literal["auto"] | None,
        confidence_threshold: float | None,
        draft: Draft | None,
        exit_layer: ExitChoice | None,
    ) -> _Drafting:
        """What `generate` was told of the mode and of drafts, checked."""
        mode, num_speculations, confidence_threshold = map(plain, (mode, num_speculations, confidence_threshold))
        draft, exit_layer = plain(draft), plain(exit_layer)
        if mode not in MODES:
            raise RequestError("mode", f"{mode!r:.60}", wanted=f"one of {', '.join(MODES)}")
        given: dict[str, Any] = {"draft": draft, "num speculations": num_speculations}
        if mode != "early-exit":
            given["confidence threshold"] = confidence_threshold
        for name, value in given.items():
            if mode != "self-speculative" and value is not None:
                found = f"{value!r:.60}, beside the mode {mode}, which drafts nothing"
                raise RequestError(name, found, fix="leave out one of them")
        draft = plain(self.draft) if draft is None else draft
        if draft not in DRAFTS:
            raise RequestError("draft", f"{draft!r:.60}", wanted=f"one of {', '.join(DRAFTS)}")
        if (mode, draft) == ("self-speculative", "ngram") and confidence_threshold is not None:
            found = f"{confidence_threshold!r:.60}, beside drafts of the text, which have no confidence"
            raise RequestError("confidence threshold", found, fix="leave out one of them")
        exit_layer = plain(self.exit_layer) if exit_layer is None else exit_layer
        if exit_layer == "auto":
            self._check_choice(mode, draft)
        split = self.split if exit_layer == "auto" else self._split(exit_layer)
        if num_speculations is None:
            fixed = draft == "exit" and exit_layer != "auto"
            num_speculations = self.bundle.manifest.num_speculations if fixed else "auto"
        paced = "auto" in (num_speculations, exit_layer) and mode == "self-speculative"
        others = tuple(one for one in self._splits.values() if one != split) if paced and exit_layer == "auto" else ()
        most = MAX_SPECULATIONS if num_speculations == "auto" else num_speculations
        if confidence_threshold is None and not (paced and self.session.confidence_threshold):
            confidence_threshold = 0.0 if mode == "early-exit" else self.session.confidence_threshold
        check_num_speculations(most, " or 'auto'")
        bounded = confidence_threshold is None or (
            isinstance(confidence_threshold, (int, float)) and 0 <= confidence_threshold <= 1
        )
        if not bounded:
            raise RequestError("confidence threshold", f"{confidence_threshold!r:.60}", wanted="0 to 1")
        trusted = MAX_SPECULATIONS if confidence_threshold else 0
        k = {"self-speculative": most, "autoregressive": 0, "early-exit": trusted}[mode]
        return _Drafting(mode, split, others, k, paced, draft, confidence_threshold)

    def complete(
        self,
        prompt: Prompt,
        *,
        mode: Mode = "self-speculative",
        num_speculations: int | Literal["auto"] | None = None,
        confidence_threshold: float | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        **further: Unpack[FurtherSettings],
    ) -> Generation:
        """Like `generate`, but returns everything at once."""
        *_, last = self.generate(
            prompt,
            mode=mode,
            num_speculations=num_speculations,
            confidence_threshold=confidence_threshold,
            max_new_tokens=max_new_tokens,
            stop=stop,
            logprobs=logprobs,
            **further,
        )
        assert last.generation is not None
        return last.generation

    async def agenerate(self, prompt: Prompt, **settings: Unpack[GenerationSettings]) -> AsyncGenerator[Piece, None]:
        """Like `generate`, for an event loop: it runs in a thread. Closing it ends the text at its next piece."""
        import asyncio
        from contextlib import aclosing

        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        pieces = await loop.run_in_executor(None, lambda: self.generate(prompt, **settings))
        try:
            async with aclosing(iterated(pieces, ended=ended.set)) as arriving:
                async for piece in arriving:
                    yield piece
        finally:
            await ended.wait()  # the model is free again

    def score(self, prompt: Prompt, *, logprobs: int = 0) -> tuple[TokenLogprob, ...]:
        """How probable the whole model finds each token of a prompt, but for the first, after those before it.

        Args:
            prompt: text, token ids, or chat messages.
            logprobs: how many of the most probable tokens to give with each.

        Raises:
            RequestError: this cannot be served, or a generator is running.
            BackendError: the model's logits are not finite.
        """
        logprobs = plain(logprobs)
        _check_logprobs(logprobs)
        ids = self._held(prompt)
        with self._in_use():
            self.forget()
            how, embeddings = Decoding(self.split), TokenRows(self.embeddings, ids)

            def scored() -> tuple[TokenLogprob, ...]:
                rows = score(self.session, how, embeddings, self.bundle.manifest.prefill_chunk)
                return tuple(token_logprob(row, token, logprobs) for row, token in zip(rows, ids[1:], strict=False))

            try:
                return scored()
            except NotFiniteError:  # which may come of what another text has left
                return scored()

    def encode(self, prompt: Prompt, *, most: int | None = None, tools: Sequence[Any] = ()) -> list[int]:
        """Token ids of a prompt; with `most`, the first so many of a text, which may then be of any length. `tools` are
        functions that the model may call, for messages: as OpenAI writes them, which is how chat templates take them.

        Raises:
            RequestError: a prompt that is malformed, or has far more tokens than the bundle holds.
        """
        most, tools = plain(most), plain(tools)
        if not (most is None or (type(most) is int and most >= 1)):
            raise RequestError("most", f"{most!r:.60}", wanted="a whole number from 1")
        return encode_prompt(self.tokenizer, prompt, self.bundle, most, tools)

    def _split(self, exit_layer: int) -> Split:
        """The graphs that draft from an exit, and those that verify."""
        known = type(exit_layer) is int and exit_layer in self._splits
        return self._splits[exit_layer] if known else self.bundle.manifest.split(exit_layer, GREEDY.name)

    def _check_choice(self, mode: Mode, draft: Draft) -> None:
        """Checks that there is something to choose exits by."""
        beside = (
            "the mode early-exit" if mode == "early-exit" else "drafts of the text alone" if draft == "ngram" else ""
        )
        if beside:
            wanted = " or ".join(map(str, self._splits))
            raise RequestError("exit layer", f"auto, beside {beside}, where nothing tells which is best", wanted=wanted)

    def _mask(self, grammar: Grammar) -> TokenMask:
        """What keeps a text to a grammar."""
        if not isinstance(grammar, Grammar):
            raise RequestError("grammar", f"a {type(grammar).__name__}", wanted="an edgeskip.Grammar")
        return TokenMask(grammar, self._token_table)

    @cached_property
    def _token_table(self) -> TokenTable:
        manifest = self.bundle.manifest
        return token_table(self.tokenizer, manifest.architecture.vocab_size, sorted(manifest.eos_token_ids))

    def _held(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt that the caches can hold."""
        manifest = self.bundle.manifest
        ids = self.encode(prompt)
        if len(ids) > manifest.max_length:
            raise RequestError(
                "prompt",
                f"{len(ids)} tokens",
                wanted=f"at most {manifest.max_length}, the bundle's capacity",
                fix="shorten it or export with a larger --max-length",
            )
        return ids

    def _generate(self, request: _Request) -> Iterator[Piece]:
        with self._in_use():
            yield from self._pieces(request)

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Holds the session, which serves one text at a time."""
        if self._closed:
            raise _closed_error()
        if self._busy:
            raise RequestError(
                "model", "is already generating", fix="finish or close() the first generator, or load a second model"
            )
        self._busy = True
        try:
            self.session.make_current()
            yield
        except BackendError:
            self.forget()  # the caches may hold anything
            raise
        finally:
            self._busy = False

    def _pieces(self, request: _Request) -> Iterator[Piece]:
        stream = TextStream(self.tokenizer, request.prompt_ids, request.stop)
        token_ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        untold: list[TokenLogprob] = []  # those that no piece has had
        spans: list[Span] = []
        records: list[RoundRecord] = []
        reason: StopReason | None = None
        depth = self._depth(request)
        start = perf_counter()
        cached = self.held.take(request.prompt_ids, depth)
        taking = perf_counter() - start
        steps = self._steps_under_way = self._steps(request, cached)
        while reason is None:
            if self._closed:
                raise _closed_error()
            start, device_start = perf_counter(), self._session_seconds()
            step = next(steps, None)
            if step is None:
                reason, released = "capacity", stream.finish()
            else:
                kept, released = 0, []
                while reason is None and kept < len(step.token_ids):
                    token_ids.append(step.token_ids[kept])
                    if token_ids[-1] not in self.bundle.manifest.eos_token_ids:  # EOS is no text, special or not
                        released += stream.push(token_ids[-1], drafted=kept < step.accepted)
                    kept += 1
                    reason = self._stop_reason(request, token_ids, stream)
                if reason:
                    released += stream.finish()
                    reason = "stop_string" if stream.stopped and reason != "eos" else reason
                # a device goes on working while the caller holds a piece: that time counts too
                seconds = max(perf_counter() - start, self._session_seconds() - device_start)
                if request.mask is not None:
                    request.mask.check(token_ids)
                records.append(_record(step, kept, seconds))
                logprobs += step.logprobs[:kept]
                untold += step.logprobs[:kept]
                if len(records) == 1:
                    clock, captured = self.session.stage_ns, self.session.captured_rounds
            if reason:  # what is held depends on the text alone, not on how many drafts the last round had
                self.held.cut(len(request.prompt_ids) + len(token_ids) - 1, depth)
            spans += released
            for span in released:
                untold, own = untold[span.tokens :], tuple(untold[: span.tokens])
                yield Piece(span.text, span.drafted, logprobs=own)
        first, *rounds = records
        stage_ms = _elapsed_ms(clock, self.session.stage_ns)
        replayed = self.session.captured_rounds
        statistics = summarize(
            request.drafting.mode,
            request.drafting.num_speculations,
            Prefilled(len(request.prompt_ids), cached, taking + first.seconds),
            rounds,
            stage_ms,
            None if replayed is None or captured is None else replayed - captured,
        )
        _LOG.debug("%d tokens after %d, ended by %s", len(token_ids), len(request.prompt_ids), reason)
        text = "".join(span.text for span in spans)
        told = None if request.logprobs is None else tuple(logprobs)
        generation = Generation(
            tuple(request.prompt_ids), tuple(token_ids), text, reason, statistics, request.sampling, told
        )
        yield Piece("", generation=generation, logprobs=tuple(untold))

    def _session_seconds(self) -> float:
        """Time spent in rounds so far, as far as the session tells it."""
        return sum((self.session.stage_ns or {}).values()) / 1e9

    def _stop_reason(self, request: _Request, token_ids: Sequence[int], stream: TextStream) -> StopReason | None:
        """Why the text ends with its last token, if it does."""
        if token_ids[-1] in self.bundle.manifest.eos_token_ids:
            return "eos"
        if stream.stopped:
            return "stop_string"
        return "max_new_tokens" if len(token_ids) == request.max_new_tokens else None

    def _depth(self, request: _Request) -> int:
        """The layers that a text runs through."""
        told = request.drafting
        return told.split.exit_layer if told.exits_always else self.bundle.manifest.architecture.num_layers

    def _steps(self, request: _Request, cached: int) -> Generator[Step, None, None]:
        """Steps of a prompt whose first `cached` rows are there.

        Where logits are not finite, that may come of what lies behind in the caches, from a wrong draft or another
        text: attention may multiply hidden rows by 0. So what there is of the text is run once more by itself, and its
        next token is no longer drafted.
        """
        ids, failed = list(request.prompt_ids), 0
        if picks_of(request.sampling, request.mask) != "heads":
            self.session.sample(request.sampling, request.prompt_ids, request.mask)
        while True:
            try:
                for step in self._rounds(request, tuple(ids), cached):
                    ids += step.token_ids
                    yield step
                return
            except NotFiniteError:
                if failed == len(ids):
                    raise
                failed, cached = len(ids), 0
                self.forget()

    def _rounds(self, request: _Request, ids: Sequence[int], cached: int) -> Iterator[Step]:
        """Steps after so much of a text, whose first `cached` rows are there."""
        manifest, new_tokens, before = self.bundle.manifest, request.max_new_tokens, len(ids)
        depth, told = self._depth(request), request.drafting
        embeddings, split, exits = TokenRows(self.embeddings, ids), told.split, told.mode == "early-exit"
        looks_up = told.draft != "exit" and told.mode == "self-speculative"
        how = Decoding(
            replace(split, draft_head=split.head) if exits else split,  # what is not tested comes from all tokens
            told.num_speculations,
            told.confidence_threshold,
            early_exit=told.exits_always,
            trusts_exit=exits,
            picks=picks_of(request.sampling, request.mask),
            logprobs=request.logprobs,
            draft="exit" if exits else told.draft,
            lookup=Lookup(NgramIndex(), self.embeddings) if looks_up else None,
            pace=self._pace if told.paced else None,
            others=told.others,
        )
        step = prefill(self.session, how, embeddings, manifest.prefill_chunk, cached)
        self.held.add(ids[cached:], depth)
        yield step
        if how.lookup is not None:  # not before the first token, which would wait for it
            how.lookup.text.add((*ids, *step.token_ids))
        end = None if new_tokens is None else len(request.prompt_ids) + new_tokens - 1
        for following in decode(self.session, how, before, manifest.max_length, end=end):
            # the rows of a round are those of the token that it began with, and of the drafts that it accepted
            self.held.add((step.token_ids[-1], *following.token_ids[:-1]), depth)
            step = following
            yield step


async def iterated(
    pieces: Iterator[Piece], executor: Executor | None = None, ended: Callable[[], None] = lambda: None
) -> AsyncGenerator[Piece, None]:
    """The pieces of a generator that runs in a thread, for an event loop. It waits for nobody, and where this one is
    closed, it ends at its next piece.

    Args:
        pieces: a generator.
        executor: has the thread; by default the event loop's own.
        ended: called in the event loop once the thread is done with it, however that came.

    Raises:
        Exception: what the generator raises.
    """
    import asyncio  # of no use to others

    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Piece | None] = asyncio.Queue()
    left = threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            for piece in pieces:
                loop.call_soon_threadsafe(arrived.put_nowait, piece)
                if left.is_set():
                    break
        except BaseException as error:
            failed.append(error)
        finally:
            pieces.close()  # type: ignore[attr-defined]
        loop.call_soon_threadsafe(arrived.put_nowait, None)

    loop.run_in_executor(executor, run).add_done_callback(lambda _: ended())
    try:
        while (piece := await arrived.get()) is not None:
            yield piece
    finally:
        left.set()
    if failed:
        raise failed[0]


@dataclass(frozen=True)
class _Drafting:
    """How a text is to be decoded; K is 0 where nothing is drafted."""

    mode: Mode
    split: Split
    others: tuple[Split, ...]
    num_speculations: int
    paced: bool
    draft: Draft
    confidence_threshold: float | None

    @property
    def exits_always(self) -> bool:
        """Whether the layers after the exit do nothing, not even for the prompt."""
        return self.mode == "early-exit" and not self.num_speculations


@dataclass(frozen=True)
class _Request:
    """What was asked for, checked."""

    prompt_ids: Sequence[int]
    drafting: _Drafting
    max_new_tokens: int | None
    stop: tuple[str, ...]
    sampling: Sampling
    logprobs: int | None
    mask: TokenMask | None


def _check_logprobs(count: int) -> None:
    if not (type(count) is int and 0 <= count <= MOST_LOGPROBS):
        raise RequestError("logprobs", f"{count!r:.60}", wanted=f"0 to {MOST_LOGPROBS}")


def _closed_error() -> RequestError:
    return RequestError("model", "is closed", fix="generate within its `with` block")


def _record(step: Step, kept: int, seconds: float) -> RoundRecord:
    """A round cut to its first `kept` tokens, as if the drafts that a stop dropped had never been made."""
    if kept < len(step.token_ids):
        return RoundRecord(kept, kept, kept, seconds, step.drafter, min(step.trusted, kept), step.exit_layer)
    return RoundRecord(kept, step.drafted, step.accepted, seconds, step.drafter, step.trusted, step.exit_layer)


def _elapsed_ms(before: Mapping[str, int] | None, after: Mapping[str, int] | None) -> dict[str, float] | None:
    """Time in each graph between two readings of a session's clock."""
    return {graph: (after[graph] - before[graph]) / 1e6 for graph in after} if before and after else None
