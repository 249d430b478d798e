"""The task and class that exports name, and that attach_guard chooses."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from guard_helpers import PlainModel, batch_of, perturb, plan_for
from torch import nn

import guardspace_kernels as gk
from guardspace_kernels.guard.fingerprint import ModelFingerprint
from guardspace_kernels.guard.peft_description import task_type
from guardspace_kernels.guard.statistics import InputStatistics

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:(torch|peft|transformers)")

SMALL = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "pad_token_id": 0,
      "decoder_start_token_id": 0}  # fmt: skip
WHISPER = {
    "vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8,
    "max_source_positions": 8, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
CONFIGS = {
    "Llama": lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    "GPT2": lambda: transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=64),
    "Bert": lambda: transformers.BertConfig(**SMALL),
    "T5": lambda: transformers.T5Config(**T5),
    "Whisper": lambda: transformers.WhisperConfig(**WHISPER),
    "ViT": lambda: transformers.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    ),
}
TASKS = [
    ("Llama", "LlamaForCausalLM", "CAUSAL_LM"),
    ("Llama", "LlamaForSequenceClassification", "SEQ_CLS"),
    ("Llama", "LlamaModel", "FEATURE_EXTRACTION"),
    ("GPT2", "GPT2LMHeadModel", "CAUSAL_LM"),
    ("GPT2", "GPT2DoubleHeadsModel", "CAUSAL_LM"),
    ("Bert", "BertForSequenceClassification", "SEQ_CLS"),
    ("Bert", "BertForTokenClassification", "TOKEN_CLS"),
    ("Bert", "BertForQuestionAnswering", "QUESTION_ANS"),
    ("Bert", "BertModel", "FEATURE_EXTRACTION"),
    ("Bert", "BertForMaskedLM", None),
    ("T5", "T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ("T5", "T5EncoderModel", None),
    ("Whisper", "WhisperForConditionalGeneration", None),
    ("Whisper", "WhisperForAudioClassification", None),
    ("ViT", "ViTForImageClassification", None),
]


def model_of(kind, name):
    torch.manual_seed(0)
    return getattr(transformers, name)(CONFIGS[kind]()).eval()


@pytest.mark.parametrize("kind, name, task", TASKS)
def test_tasks(kind, name, task):
    assert task_type(model_of(kind, name)) == task


def test_a_subclass_has_the_task_of_its_parent_and_a_plain_module_none():
    class Reward(transformers.LlamaForSequenceClassification):
        pass

    assert task_type(Reward(CONFIGS["Llama"]())) == "SEQ_CLS"
    assert task_type(PlainModel()) is None


def speech():
    generator = torch.Generator().manual_seed(1)
    return {
        "input_features": torch.randn(2, 8, 16, generator=generator),
        "decoder_input_ids": torch.tensor([[1, 5, 9], [1, 7, 3]]),
    }


AUTO = [
    ("Llama", "LlamaForCausalLM", peft.AutoPeftModelForCausalLM, "all-linear"),
    ("Bert", "BertForSequenceClassification", peft.AutoPeftModelForSequenceClassification, ["query", "value"]),
    ("Bert", "BertForTokenClassification", peft.AutoPeftModelForTokenClassification, ["query", "value"]),
    ("Bert", "BertForQuestionAnswering", peft.AutoPeftModelForQuestionAnswering, ["query", "value"]),
    ("Bert", "BertModel", peft.AutoPeftModelForFeatureExtraction, ["query", "value"]),
    ("Bert", "BertForMaskedLM", peft.AutoPeftModel, ["query", "value"]),
    ("T5", "T5ForConditionalGeneration", peft.AutoPeftModelForSeq2SeqLM, r"encoder\..*SelfAttention\.(q|v)"),
]


def answer(model, batch):
    with torch.no_grad():
        out = model.eval()(**batch)
    return torch.cat([t.flatten() for t in out.values() if isinstance(t, torch.Tensor)])


@pytest.mark.parametrize("kind, name, auto, target", AUTO)
def test_peft_builds_the_class_of_an_export_and_gives_its_outputs(kind, name, auto, target, tmp_path):
    model_of(kind, name).save_pretrained(tmp_path / "base")
    base = getattr(transformers, name).from_pretrained(tmp_path / "base")
    batch = batch_of()
    if kind == "T5":
        batch["decoder_input_ids"] = torch.tensor([[0, 5, 9]] * 5)
    stats = gk.collect_statistics(base, [batch], target_modules=target, progress=False)
    model = gk.attach_guard(base, plan_for(base, stats, rank=2, protect=0.5))
    assert task_type(base) == model.peft_config["default"].task_type
    perturb(model)
    for p in model.parameters():  # a head, too
        if p.requires_grad and p.dim() == 2 and p.shape[0] < 4:
            nn.init.normal_(p)
    untouched = answer(getattr(transformers, name).from_pretrained(tmp_path / "base"), batch)
    expected = answer(model, batch)
    assert (expected - untouched).abs().max() > 1e-2
    gk.export_lora(model, tmp_path / "adapter")
    loaded = auto.from_pretrained(str(tmp_path / "adapter"))
    torch.testing.assert_close(answer(loaded, batch), expected, rtol=1e-4, atol=1e-4)
    assert type(model).__name__ == f"Guarded{type(loaded).__name__}"


def test_a_speech_model_is_called_as_it_is(tmp_path):
    """Its decoder makes it generate, but it takes no input_ids."""
    model_of("Whisper", "WhisperForConditionalGeneration").save_pretrained(tmp_path / "base")
    base = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "base")
    config = gk.GuardConfig(rank=2, protect=0.5)
    names = ["model.decoder.layers.0.self_attn.q_proj", "model.decoder.layers.0.fc1"]
    batch = speech()
    stats = speech_statistics(base, names, batch)
    model = gk.attach_guard(base, gk.plan_guard(base, stats, config, progress=False, allow_few_prompts=True))
    assert isinstance(model, peft.PeftModel) and not isinstance(model, peft.PeftModelForCausalLM)
    perturb(model)
    expected = answer(model, batch)
    gk.export_lora(model, tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["task_type"] is None
    assert written["auto_mapping"]["base_model_class"] == "WhisperForConditionalGeneration"
    loaded = peft.AutoPeftModel.from_pretrained(str(tmp_path / "adapter"))
    torch.testing.assert_close(answer(loaded, batch), expected, rtol=1e-4, atol=1e-4)


def speech_statistics(model, names, batch):
    """Collecting takes models of text: these come from what the decoder's layers read, as of one prompt a row."""
    rows = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: rows.update({name: args[0]}))
        for name in names
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    inputs = []
    for name, x in rows.items():
        x = x.double()
        rest = x[:, 1:].reshape(-1, x.shape[-1])
        inputs.append(InputStatistics([name], rest.T @ rest, len(rest), x[:, 0].contiguous(), len(x)))
    fingerprint = ModelFingerprint.of(model, names)
    return gk.CalibrationStatistics(inputs=inputs, fingerprint=fingerprint, prompts=len(batch["decoder_input_ids"]))
