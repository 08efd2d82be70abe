"""Tiny models of every family, made here; their bundles; and transformers as the independent judge."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from edgeskip.exporter.bundle import ExportSettings, export_bundle
from edgeskip.exporter.checkpoint import open_checkpoint
from edgeskip.recipes.tune import tune
from edgeskip.runtime import terminal
from edgeskip.runtime.backends import ort
from edgeskip.runtime.backends.device import CudaDevice
from edgeskip.runtime.bench import validity
from edgeskip.runtime.bundle.manifest import SEAL, Bundle, sealed
from edgeskip.runtime.decoding.model import Model
from edgeskip.runtime.decoding.rounds import Round
from edgeskip.runtime.decoding.session import RoundResult, Session
from edgeskip.runtime.errors import BackendError
from edgeskip.runtime.load import load
from tests.standin import make_device, standin_model

VOCAB = 300
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.25,  # wide enough that greedy texts do not loop at once
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("llama", {"head_dim": 32}),
    "llama-odd-head-dim": ("llama", {"head_dim": 24}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 96}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}


@dataclass(frozen=True)
class Backend:
    """A session to run the same tests on; two logits that lie closer than `tie` may change places with rounding."""

    device: str
    dialect: str
    dtype: str
    tie: float

    def load(self, bundle: Bundle) -> Model:
        """Loads a bundle of this dtype."""
        assert bundle.manifest.dtype == self.dtype
        if self.dialect == "engines":
            copy = bundle.folder.with_name(f"{bundle.folder.name}-{self.device}")
            return standin_model(bundle, copy, make_device(self.device))
        return load(bundle.folder, device=self.device, dialect=self.dialect)

    def __str__(self) -> str:
        return f"{self.device}-{self.dialect}-{self.dtype}"


BACKENDS = [
    Backend("cpu", "cpu", "fp32", 1e-4),
    Backend("host", "engines", "fp32", 1e-4),  # TensorRT's session with stand-ins
    *(
        pytest.param(backend, marks=pytest.mark.gpu)
        for backend in (
            Backend("cuda", "ort", "fp16", 0.1),
            Backend("cuda", "ort", "bf16", 0.8),
            Backend("cuda", "standard", "fp16", 0.1),
            Backend("cuda", "standard", "fp32", 1e-4),
            Backend("cuda", "engines", "fp16", 0.1),
            Backend("cuda", "engines", "fp32", 1e-4),
        )
    ),
]


def make_tokenizer() -> Tokenizer:
    """Bytes as tokens, BOS and EOS before them: any text has a round trip."""
    vocab = {"<s>": 0, "</s>": 1}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def make_model(variant: str, seed: int = 0, **changes: Any) -> Any:
    """A transformers model with random weights; biases and norms too, which transformers starts at 0 and 1."""
    model_type, config = VARIANTS[variant]
    torch.manual_seed(seed)
    made = transformers.AutoConfig.for_model(model_type, **(BASE | config | changes))
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def save_checkpoint(model: Any, folder: Path, **settings: Any) -> Path:
    """Writes a model and the tokenizer of these tests as a checkpoint."""
    model.save_pretrained(folder, **settings)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def run_round(session: Session, round_: Round, position: int) -> RoundResult:
    """Runs a round, its first row at `position`."""
    bound = session.bind(round_)
    bound.start(position)
    return bound.wait()


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a JSON file in place; a record with its own hash is hashed anew, as whoever means the change would."""
    data = json.loads(path.read_text())
    seal = data.pop(SEAL, None) if isinstance(data, dict) else None
    change(data)
    path.write_text(sealed(data) if seal else json.dumps(data))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a CUDA device where there is none, and says why."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    try:
        if marked:
            with CudaDevice():
                pass
    except BackendError as error:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=str(error)))


@pytest.fixture(scope="session", params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend of this machine in turn."""
    made: Backend = request.param
    return made


@pytest.fixture(scope="session", autouse=True)
def _quiet(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """No bars, no hub, one thread, and a cache folder of its own."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort, "usable_cores", lambda: 1)  # a pool's threads spin, and crawl beside other programs
        patch.setattr(terminal, "INTERVAL_S", math.inf)
        patch.setattr(tune, "BUSY", math.inf)  # no test depends on how busy the machine is
        for limit in ("FROM_MEMORY", "FROM_CACHES", "SPREAD", "OTHERS"):
            patch.setattr(validity, limit, math.inf)
        patch.setenv("HF_HUB_OFFLINE", "1")
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield cache


@pytest.fixture(autouse=True)
def _no_engines_of_other_tests(_quiet: Path) -> Any:
    """Engines serve any bundle of their structure, so none may stay."""
    yield
    shutil.rmtree(_quiet / "edgeskip" / "engines", ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _signals_of_the_foreground() -> None:
    """What nohup and a shell's background ignore is ignored by a handler, which processes do not inherit."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with the variant's checkpoint, made once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def get(variant: str) -> Path:
        if not (folder / variant).exists():
            save_checkpoint(make_model(variant), folder / variant)
        return folder / variant

    return get


@pytest.fixture(scope="session")
def bundles(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """A bundle of the variant, exported once for each setting."""
    folder = tmp_path_factory.mktemp("bundles")

    def get(variant: str, **settings: Any) -> Bundle:
        settings = {"exit_layer": 2, "prefill_chunk": 8} | settings
        path = folder / "-".join([variant, *(f"{k}={v}" for k, v in sorted(settings.items()))])
        if not path.exists():
            export_bundle(open_checkpoint(str(checkpoints(variant))), path, ExportSettings(**settings))
        from edgeskip.runtime.bundle.manifest import read_bundle

        return read_bundle(path)

    return get


CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="session")
def chat_bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Bundle]:
    """A bundle with a chat template, room for so many tokens and no EOS, so that texts are long; made once."""
    folder = tmp_path_factory.mktemp("chats")

    def get(capacity: int) -> Bundle:
        from edgeskip.runtime.bundle.manifest import read_bundle

        path = folder / f"{capacity}"
        if not path.exists():
            model = make_model("llama-gqa", max_position_embeddings=capacity, eos_token_id=None)
            checkpoint = save_checkpoint(model, folder / f"{capacity}-checkpoint")
            (checkpoint / "chat_template.jinja").write_text(CHAT_TEMPLATE)
            settings = ExportSettings(exit_layer=2, prefill_chunk=32)
            export_bundle(open_checkpoint(str(checkpoint)), path, settings)
        return read_bundle(path)

    return get


@pytest.fixture(scope="session")
def reference(checkpoints: Callable[[str], Path]) -> Callable[[str], Any]:
    """The variant's model in transformers, read back from its checkpoint."""
    models: dict[str, Any] = {}

    def get(variant: str) -> Any:
        if variant not in models:
            models[variant] = transformers.AutoModelForCausalLM.from_pretrained(checkpoints(variant)).eval()
        return models[variant]

    return get
