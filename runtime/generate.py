"""A loaded model, and generation as a stream of text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Literal, get_args

import numpy as np
from tokenizers import Tokenizer

from edgeskip.runtime.decode import Step, decode, prefill
from edgeskip.runtime.errors import RequestError
from edgeskip.runtime.graphs import MAX_SPECULATIONS
from edgeskip.runtime.manifest import WEIGHTS, Bundle, Progress, read_bundle, verify_hashes
from edgeskip.runtime.ort_session import OrtCpuSession
from edgeskip.runtime.session import Session
from edgeskip.runtime.statistics import RoundRecord, Statistics, summarize
from edgeskip.runtime.text import Prompt, TextStream, encode_prompt, load_tokenizer

Mode = Literal["self-speculative", "autoregressive", "early-exit"]
MODES: tuple[Mode, ...] = get_args(Mode)
StopReason = Literal["eos", "stop_string", "max_new_tokens", "capacity"]


@dataclass(frozen=True)
class Generation:
    """A finished generation. `token_ids` holds the EOS token or the last token of a stop string; `text` does not."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    stop_reason: StopReason
    statistics: Statistics


@dataclass(frozen=True)
class Piece:
    """Streamed text; `drafted` where an early exit proposed it. The last piece carries the whole generation."""

    text: str
    drafted: bool = False
    generation: Generation | None = None

    def __str__(self) -> str:
        return self.text


class Model:
    """A bundle on a device, serving one sequence at a time; a context manager.

    Get one from `edgeskip.load`.
    """

    def __init__(self, bundle: Bundle, session: Session) -> None:
        self.bundle, self.session = bundle, session
        self.tokenizer: Tokenizer = load_tokenizer(bundle)
        self.embeddings = embedding_table(bundle)
        self._busy = False

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the device's memory."""
        self.session.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        mode: Mode = "self-speculative",
        num_speculations: int | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[Piece]:
        """Continues a prompt greedily, yielding text as it is certain.

        Args:
            prompt: text, token ids, or chat messages.
            mode: `self-speculative` and `autoregressive` give the same tokens; `early-exit` stops at the exit layer.
            num_speculations: K, drafts a round; the bundle's default if not given.
            max_new_tokens: by default, until the caches are full.
            stop: texts that end the generation.

        Raises:
            RequestError: at once, if this cannot be served; on the first piece, if another generator is running.
        """
        manifest = self.bundle.manifest
        if mode not in MODES:
            raise RequestError("mode", f"{mode!r}", wanted=f"one of {', '.join(MODES)}")
        if num_speculations is None:
            num_speculations = manifest.num_speculations
        if not 1 <= num_speculations <= MAX_SPECULATIONS:
            raise RequestError("num speculations", f"{num_speculations}", wanted=f"1 to {MAX_SPECULATIONS}")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise RequestError("max new tokens", f"{max_new_tokens}", wanted="at least 1")
        if isinstance(stop, str):
            stop = (stop,)
        if not all(stop):
            raise RequestError("stop", "an empty text", wanted="at least one character")
        template = self.bundle.path("chat_template.jinja")
        ids = encode_prompt(self.tokenizer, prompt, template, manifest.architecture.vocab_size)
        if len(ids) > manifest.max_length:
            raise RequestError(
                "prompt",
                f"{len(ids)} tokens",
                wanted=f"at most {manifest.max_length}, the bundle's capacity",
                fix="shorten it or export with a larger --max-length",
            )
        return self._generate(ids, mode, num_speculations if mode == "self-speculative" else 0, max_new_tokens, stop)

    def complete(self, prompt: Prompt, **settings: object) -> Generation:
        """As `generate`, in one piece."""
        *_, last = self.generate(prompt, **settings)  # type: ignore[arg-type]
        assert last.generation is not None
        return last.generation

    def _generate(
        self,
        prompt_ids: list[int],
        mode: Mode,
        num_speculations: int,
        max_new_tokens: int | None,
        stop: Sequence[str],
    ) -> Iterator[Piece]:
        if self._busy:
            raise RequestError(
                "model",
                "is already generating",
                fix="finish or close() the first generator, or load a second model",
            )
        self._busy = True
        try:
            eos = frozenset(self.bundle.manifest.eos_token_ids)
            limit = math.inf if max_new_tokens is None else max_new_tokens
            stream = TextStream(self.tokenizer, prompt_ids, stop)
            token_ids: list[int] = []
            texts: list[str] = []
            records: list[RoundRecord] = []
            reason: StopReason | None = None
            steps = self._steps(prompt_ids, mode, num_speculations)
            while reason is None:
                start = perf_counter()
                step = next(steps, None)
                if step is None:
                    reason = "capacity"
                    break
                spans, kept = [], 0
                for kept, token_id in enumerate(step.token_ids, 1):
                    token_ids.append(token_id)
                    spans += stream.push(token_id, drafted=kept <= step.accepted)
                    if token_id in eos:
                        reason = "eos"
                    elif stream.stopped:
                        reason = "stop_string"
                    elif len(token_ids) >= limit:
                        reason = "max_new_tokens"
                    if reason:
                        break
                records.append(_record(step, kept, perf_counter() - start))
                texts += [span.text for span in spans]
                yield from (Piece(span.text, span.drafted) for span in spans)
            rest = stream.finish()
            texts += [span.text for span in rest]
            yield from (Piece(span.text, span.drafted) for span in rest)
            first, *rounds = records
            statistics = summarize(mode, num_speculations, len(prompt_ids), first.seconds, rounds)
            yield Piece(
                "",
                generation=Generation(tuple(prompt_ids), tuple(token_ids), "".join(texts), reason, statistics),
            )
        finally:
            self._busy = False

    def _steps(self, prompt_ids: list[int], mode: Mode, num_speculations: int) -> Iterator[Step]:
        manifest, early_exit = self.bundle.manifest, mode == "early-exit"

        def first() -> Iterator[Step]:
            embeddings = self.embeddings[prompt_ids]
            yield prefill(self.session, embeddings, manifest.prefill_chunk, early_exit=early_exit)

        rounds = decode(self.session, len(prompt_ids), manifest.max_length, num_speculations, early_exit=early_exit)
        return chain(first(), rounds)


def load(bundle: str | Path, *, threads: int = 0, progress: Progress = lambda *_: None) -> Model:
    """Loads a bundle: reads and checks it, and takes the memory it needs.

    Args:
        bundle: the folder that `edgeskip export` wrote.
        threads: of the CPU; 0 means one a core.
        progress: called while the files are checked.

    Raises:
        BundleError: the bundle is damaged, foreign or not there.
        BackendError: no backend can run it here.
    """
    opened = read_bundle(bundle)
    verify_hashes(opened, progress)
    session = OrtCpuSession(opened, threads=threads)
    try:
        return Model(opened, session)
    except BaseException:
        session.close()
        raise


def embedding_table(bundle: Bundle) -> np.ndarray:
    """The token embeddings [V,H], mapped from the weights file; bf16 as raw 16-bit words."""
    path = bundle.path(WEIGHTS)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))["model.embed_tokens.weight"]
    dtype = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[entry["dtype"]]
    return np.memmap(path, dtype, "r", offset=8 + size + entry["data_offsets"][0], shape=tuple(entry["shape"]))


def _record(step: Step, kept: int, seconds: float) -> RoundRecord:
    """A round cut to its first `kept` tokens: the drafts that a stop dropped were never made."""
    stage_ns = None if step.stage_ns is None else dict(step.stage_ns)
    if kept < len(step.token_ids):
        return RoundRecord(kept, kept, kept, seconds, stage_ns)
    return RoundRecord(kept, step.drafted, step.accepted, seconds, stage_ns)
