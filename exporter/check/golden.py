"""The golden runner: what transformers computes in fp32, state by state, and the text that it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.exporter.reference import cache_argument, reference_model
from edgeskip.exporter.vocabulary.renumbering import order_of
from edgeskip.runtime.bundle.manifest import Bundle
from edgeskip.runtime.decoding.text import load_tokenizer
from edgeskip.runtime.errors import CheckpointError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Trace:
    """One text through the model: every array in fp32 on the host, one row per position.

    `states` [T,H], by the number of layers that they have passed: 0 for the embeddings, each exit layer, and L for what
    the last norm reads; `attention` and `mlp`, what each layer adds to the residual stream, [T,H]; `caches`, by the
    graphs' input names, [T, N*D].
    """

    token_ids: tuple[int, ...]
    states: dict[int, Array]
    attention: dict[int, Array]
    mlp: dict[int, Array]
    caches: dict[str, Array]


@dataclass(frozen=True)
class GoldenText:
    """A greedy continuation, and the logits [V] from which each of its tokens was picked."""

    token_ids: tuple[int, ...]
    logits: tuple[Array, ...]


class Golden:
    """A transformers model as the judge, in fp32.

    Args:
        bundle: its weights are taken, and its exit layers and EOS ids.
        checkpoint: a folder or hub id to take the weights from instead, so that a wrong export shows too.
        device: `cpu`, or `cuda` where torch has one with room for the model.
        threads: CPU threads; 0 leaves the number to torch.

    Raises:
        CheckpointError: the checkpoint cannot be read or comes quantized, or its architecture is not the bundle's.
    """

    def __init__(self, bundle: Bundle, checkpoint: str | None = None, device: str = "cpu", threads: int = 0) -> None:
        import torch

        if threads:
            torch.set_num_threads(threads)
        manifest = bundle.manifest
        self.source = "the bundle's own weights" if checkpoint is None else checkpoint
        self._exit_layers, self._eos = manifest.exit_layers, list(manifest.eos_token_ids)
        self._model = reference_model(bundle) if checkpoint is None else _loaded(bundle, checkpoint)
        self._device = device if device == "cuda" and _has_room(self._model) else "cpu"
        self._model.to(self._device)

    def trace(self, token_ids: Sequence[int], *, layers: bool = False) -> Trace:
        """Runs a whole text at once: as attention is causal, its states are those of any split into calls.

        What each layer adds is kept if `layers` asks for it.
        """
        import torch
        from transformers import DynamicCache

        modules = list(enumerate(self._model.model.layers))
        attention: dict[int, Array] = {}
        mlp: dict[int, Array] = {}
        states: dict[int, Array] = {}

        def keep(kept: dict[int, Array], i: int) -> Callable[[Any, Any, Any], None]:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                kept[i] = (output[0] if isinstance(output, tuple) else output)[0].cpu().numpy()

            return hook

        cuts = (*self._exit_layers, len(modules))
        watched = [(states, passed, modules[passed - 1][1]) for passed in cuts]
        if layers:
            watched += [(attention, i, layer.self_attn) for i, layer in modules]
            watched += [(mlp, i, layer.mlp) for i, layer in modules]
        hooks = [module.register_forward_hook(keep(kept, i)) for kept, i, module in watched]
        cache: Any = DynamicCache()  # without a config: Mistral's would drop rows outside its window
        ids = torch.tensor([list(token_ids)], device=self._device)
        try:
            with torch.inference_mode():
                self._model.model(input_ids=ids, use_cache=True, **cache_argument(self._model.model, cache))
        finally:
            for hook in hooks:
                hook.remove()
        caches = {
            f"past_key_values.{i}.{part}": _by_position(values[0].cpu().numpy())
            for i, layer in enumerate(cache.layers)
            for part, values in (("key", layer.keys), ("value", layer.values))
        }
        return Trace(tuple(token_ids), {0: self.embeddings(token_ids)} | states, attention, mlp, caches)

    def embeddings(self, token_ids: Sequence[int] | Array) -> Array:
        """Rows of the embedding table, [T,H]."""
        import torch

        ids = torch.tensor(np.asarray(token_ids), device=self._device)
        rows: Array = self._model.get_input_embeddings()(ids).detach().cpu().numpy()
        return rows

    def parameter(self, name: str) -> Array:
        """A tensor of the checkpoint by its name, in fp32."""
        values: Array = self._model.get_parameter(name).detach().cpu().numpy()
        return values

    def norm(self, states: Array) -> Array:
        """The last norm of states [T,H]."""
        return self._applied(self._model.model.norm, states)

    def logits(self, states: Array) -> Array:
        """The head's logits [T,V] of states [T,H]."""
        return self._applied(self._model.lm_head, self.norm(states))

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int) -> GoldenText:
        """Continues a prompt greedily, up to EOS."""
        import torch

        ids = torch.tensor([list(prompt_ids)], device=self._device)
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self._eos or None,
            pad_token_id=self._eos[0] if self._eos else 0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return GoldenText(
            tuple(out.sequences[0, len(prompt_ids) :].tolist()), tuple(step[0].cpu().numpy() for step in out.logits)
        )

    def _applied(self, module: Any, states: Array) -> Array:
        import torch

        with torch.inference_mode():
            out: Array = module(torch.from_numpy(states).to(self._device)).cpu().numpy()
        return out


def _loaded(bundle: Bundle, source: str) -> Any:
    """The checkpoint's model, checked to have the bundle's architecture."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    checkpoint = open_checkpoint(source)
    if checkpoint.quantized_by is not None:
        fix = "give the checkpoint that it was made from, or none to compare with the bundle's own weights"
        raise CheckpointError(
            source, f"comes quantized by {checkpoint.quantized_by}", wanted="one that is not quantized", fix=fix
        )
    wanted, found = bundle.manifest.architecture, checkpoint.architecture
    for field in wanted.__dataclass_fields__:
        if getattr(found, field) != getattr(wanted, field):
            raise CheckpointError(
                source,
                f"{field} is {getattr(found, field)}",
                wanted=f"{getattr(wanted, field)}, as in {bundle.folder}",
                fix="give the checkpoint that the bundle was exported from",
            )
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    if bundle.manifest.renumbered:
        _renumber(model, order_of(load_tokenizer(bundle), checkpoint.tokenizer.tokenizer, wanted.vocab_size))
    return model.eval()


def _renumber(model: Any, order: Array) -> None:
    """Puts the tables of tokens in the order of a bundle's ids."""
    import torch

    with torch.no_grad():
        for table in {id(one): one for one in (model.get_input_embeddings().weight, model.lm_head.weight)}.values():
            table.copy_(table[torch.from_numpy(order)])


def _has_room(model: Any) -> bool:
    """Whether torch sees a GPU with room for the model and half as much again."""
    import torch

    size = sum(parameter.nbytes for parameter in model.parameters())
    return bool(torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.5 * size)


def _by_position(cache: Array) -> Array:
    """[N,T,D] -> [T, N*D]."""
    return cache.transpose(1, 0, 2).reshape(cache.shape[1], -1)
