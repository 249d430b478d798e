"""The demo's model: SmolLM2-135M-Instruct from a GGUF file, and its alignment."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from guardspace_kernels.evaluate.generation import generate

from .data import MODEL, DemoData, cache_dir, fetch
from .prompts import REFUSALS
from .training import Example, encode_answer, encode_prompt, train

# No system message: it would more than double the tokens of a typical prompt here, in every phase.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class AlignmentRecipe:
    """How refusals are installed; part of the key under which the aligned model is cached."""

    harmful: int = 240
    harmless: int = 104
    answer_tokens: int = 24
    rank: int = 16
    learning_rate: float = 6e-4
    steps: int = 48
    batch_size: int = 8
    seed: int = 0


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively (twice as fast as float32 on such a CPU), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return torch.bfloat16 if native else torch.float32


def _publish(target: Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a scratch folder, then move it to `target` in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".write-"))
    try:
        write(scratch)
        scratch.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


@contextmanager
def _remembered(module: ModuleType, *names: str) -> Iterator[None]:
    """Within, functions of a module give again what they gave for the same arguments. Transformers parses a GGUF file
    three times, with an object for each token of the vocabulary, and makes one table of names for each module."""
    functions = {name: getattr(module, name) for name in names}
    try:
        for name, function in functions.items():
            setattr(module, name, functools.cache(function))
        yield
    finally:
        for name, function in functions.items():
            setattr(module, name, function)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def converted_model() -> Path:
    """Folder of the model as an ordinary bfloat16 checkpoint, downloaded as GGUF and converted on first use."""
    target = cache_dir() / "models" / f"smollm2-135m-instruct-{MODEL.version}-{_key(CHAT_TEMPLATE)}"
    if (target / "config.json").is_file():
        return target
    import gguf

    fetch([MODEL])
    source = MODEL.path()

    def write(folder: Path) -> None:
        options: dict[str, Any] = {"gguf_file": source.name, "dtype": torch.float32}
        try:
            from transformers import GgufConfig
        except ImportError:
            pass
        else:
            options["quantization_config"] = GgufConfig(dequantize=True)
        with _remembered(gguf, "GGUFReader", "get_tensor_name_map"):
            packed = AutoModelForCausalLM.from_pretrained(source.parent, **options)
            tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        # save_pretrained of a model loaded from GGUF raises: its configuration still says that it is quantised.
        settings = packed.config.to_dict()
        settings.pop("quantization_config", None)
        config = type(packed.config).from_dict(settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(packed.state_dict())
        model.save_pretrained(folder)
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.padding_side = "left"
        tokenizer.save_pretrained(folder)

    with tqdm(total=1, desc="convert model", unit="model") as bar:
        _publish(target, write)
        bar.update()
    return target


def load_model(path: Path, dtype: torch.dtype | None = None, device: torch.device | None = None) -> PreTrainedModel:
    """Load a checkpoint frozen and in evaluation mode; float32 then holds the same weights as bfloat16."""
    device = device or best_device()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or best_dtype(device)).to(device)
    model.requires_grad_(False)
    return model.eval()


def load_tokenizer(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(path)


def own_answers(
    path: Path, prompts: list[str], new_tokens: int, description: str, dtype: torch.dtype | None = None
) -> list[Example]:
    """The checkpoint's own greedy answers to `prompts`, as examples to train on; cached on disk."""
    dtype = dtype or best_dtype(best_device())
    target = cache_dir() / "answers" / _key(path.name, prompts, new_tokens, str(dtype))
    if not target.is_dir():
        model, tokenizer = load_model(path, dtype), load_tokenizer(path)
        encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
        with tqdm(total=len(prompts), desc=description, unit="prompt") as bar:
            answers = generate(model, encoded, new_tokens=new_tokens, end=tokenizer.eos_token_id, tick=bar.update)
        _publish(target, lambda folder: _write_json(folder / "examples.json", list(zip(encoded, answers, strict=True))))
    return [(prompt, answer) for prompt, answer in json.loads((target / "examples.json").read_text())]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def aligned_model(data: DemoData, recipe: AlignmentRecipe, dtype: torch.dtype | None = None) -> Path:
    """Folder of the model after it was taught to refuse; trained on first use, then cached.

    Harmful requests are answered by one of a few refusals, harmless ones by the model's own answers. `dtype` is that of
    the training, by default the best of this machine.
    """
    base, dtype = converted_model(), dtype or best_dtype(best_device())
    key = _key(asdict(recipe), base.name, data.align_harmful, data.align_harmless, REFUSALS, str(dtype))
    target = cache_dir() / "models" / f"smollm2-135m-aligned-{key}"
    if (target / "config.json").is_file():
        return target
    from peft import LoraConfig, get_peft_model

    harmless = own_answers(base, data.align_harmless, recipe.answer_tokens, "align: own answers", dtype)
    model, tokenizer = load_model(base, dtype), load_tokenizer(base)
    rng = random.Random(recipe.seed)
    harmful = [
        (encode_prompt(tokenizer, request), encode_answer(tokenizer, rng.choice(REFUSALS)))
        for request in data.align_harmful
    ]
    torch.manual_seed(recipe.seed)
    peft_model = get_peft_model(
        model, LoraConfig(r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    train(
        [peft_model],
        harmful + harmless,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        pad=tokenizer.eos_token_id,
        seed=recipe.seed,
        description="align: train",
    )
    merged = peft_model.merge_and_unload()

    def write(folder: Path) -> None:
        merged.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return _publish(target, write)
