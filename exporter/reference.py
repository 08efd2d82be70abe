"""The golden reference: the same weights in transformers, rebuilt from a bundle."""

from __future__ import annotations

import inspect
from time import perf_counter
from typing import Any, Literal

import numpy as np

from edgeskip.runtime.bench.measure import Contestant, Run
from edgeskip.runtime.bundle.dtypes import NUMBER_TYPES, DType
from edgeskip.runtime.bundle.manifest import Bundle
from edgeskip.runtime.bundle.weights import StoredTensor, stored_arrays
from edgeskip.runtime.errors import BackendError


def reference_model(bundle: Bundle, dtype: DType = "fp32", device: str = "cpu") -> Any:
    """A transformers model with the bundle's weights, its packed tensors split again."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch_dtype = getattr(torch, NUMBER_TYPES[dtype].torch)
    stored = getattr(torch, NUMBER_TYPES[bundle.manifest.dtype].torch)
    config = AutoConfig.from_pretrained(bundle.path("config.json"))
    state: dict[str, Any] = {}
    arrays = stored_arrays(bundle)
    for record in bundle.manifest.tensors.values():
        if record.sources:
            rows = torch.from_numpy(np.array(StoredTensor(bundle, record, arrays)[:]))
            whole = rows.view(stored).to(device, torch_dtype)
            parts: Any = torch.split(whole, [count for _, count in record.sources])
            state.update(zip((source for source, _ in record.sources), parts, strict=True))
    config.tie_word_embeddings = bundle.manifest.architecture.tie_word_embeddings  # the weights may say otherwise
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype)  # type: ignore[no-untyped-call]
    model.load_state_dict(state, strict=True, assign=True)
    model = _with_buffers(model, config)
    model.generation_config.eos_token_id = list(bundle.manifest.eos_token_ids) or None
    model.generation_config.pad_token_id = next(iter(bundle.manifest.eos_token_ids), 0)
    return model.eval().to(device)


def transformers_contestants(
    bundle: Bundle, device: Literal["cpu", "cuda"] = "cpu", threads: int = 0
) -> tuple[Contestant, ...]:
    """Transformers' `generate`, for a bench: plain, and with the exit layer drafting (`assistant_early_exit`).

    It runs in the bundle's dtype on a GPU, and in fp32 on a CPU.

    Raises:
        BackendError: this torch has no CUDA.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError("torch", f"{torch.__version__} sees no GPU", fix="install a CUDA build of torch")
    if threads:
        torch.set_num_threads(threads)
    model = reference_model(bundle, bundle.manifest.dtype if device == "cuda" else "fp32", device)
    early = {"assistant_early_exit": bundle.manifest.exit_layer}
    return (
        Contestant("transformers", 0, lambda ids, n: _generate(model, ids, n, {})),
        Contestant("transformers early exit", 0, lambda ids, n: _generate(model, ids, n, early)),
    )


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """A KV cache as the keyword argument that this release's models take: `past_key_values` until transformers 5.24,
    `cache` from then on.
    """
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def _with_buffers(model: Any, config: Any) -> Any:
    """RoPE's frequencies are not weights, so a model made on the meta device lacks them."""
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model


def _generate(model: Any, prompt_ids: list[int], max_new_tokens: int, settings: dict[str, Any]) -> Run:
    import torch

    clock = _Clock()
    ids = torch.tensor([prompt_ids], device=model.device)
    start = perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=clock,
        **settings,
    )
    end = perf_counter()
    first = clock.first_token or end
    return Run(tuple(out[0, len(prompt_ids) :].tolist()), first - start, end - first)


class _Clock:
    """A streamer that only notes when the first new token came; the prompt is put first."""

    def __init__(self) -> None:
        self.puts = 0
        self.first_token: float | None = None

    def put(self, _: Any) -> None:
        self.puts += 1
        if self.puts == 2:
            self.first_token = perf_counter()

    def end(self) -> None:
        pass
