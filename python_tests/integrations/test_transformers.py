"""The Hugging Face Trainer and TRL with a guarded model."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import guardspace_kernels as gk

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def trainer(tiny, model, folder, callbacks=(), cls=Trainer, **arguments):
    data = [{k: v[0] for k, v in tiny.batch(seed=200 + i).items()} for i in range(16)]
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **arguments,
    }
    made = cls(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=list(callbacks),
    )
    made.pop_callback("PrinterCallback")
    return made


def losses(done):
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_trains_within_the_null_space(tiny, tmp_path):
    model = tiny.guarded()
    run = trainer(tiny, model, tmp_path)
    run.train()
    assert type(run.optimizer.optimizer if hasattr(run.optimizer, "optimizer") else run.optimizer).__name__ == "AdamW"
    assert len(losses(run)) == 6 and losses(run)[-1] < losses(run)[0]
    protected, free = tiny.drift(model.eval())
    assert protected < 1e-6 < 5e-3 < free


@pytest.mark.parametrize("arguments", [{}, {"optim": "sgd", "learning_rate": 0.3}], ids=["adamw", "sgd"])
def test_callback_gives_the_same_losses(tiny, tmp_path, arguments):
    runs = {}
    for name, callbacks in (("forward", []), ("step", [gk.GuardCallback()])):
        model = tiny.guarded(dtype=torch.float64)
        seen = []

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, model, seen=seen, **kwargs):
                seen.append(next(iter(model.guarded_layers().values())).step_mode)

        run = trainer(tiny, model, tmp_path / name, [*callbacks, Watch()], **arguments)
        run.train()
        assert seen == [name == "step"] * 6
        assert not any(layer.step_mode for layer in model.guarded_layers().values())
        runs[name] = (losses(run), tiny.logits(model.eval()))
    assert runs["forward"][0] == pytest.approx(runs["step"][0], rel=1e-9)
    assert (runs["forward"][1] - runs["step"][1]).abs().max() < 1e-9


def test_callback_refuses_other_optimizers(tiny, tmp_path):
    run = trainer(tiny, tiny.guarded(), tmp_path, [gk.GuardCallback()], optim="adafactor")
    with pytest.raises(TypeError, match="not exact with Adafactor"):
        run.train()


def test_callback_after_an_interrupted_run(tiny, tmp_path):
    run = trainer(tiny, tiny.guarded(), tmp_path, [gk.GuardCallback(), Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.pop_callback(Interrupt)
    run.train()
    assert not any(layer.step_mode for layer in run.model.guarded_layers().values())


@pytest.mark.parametrize("step_mode", [False, True])
def test_resumes_as_if_never_interrupted(tiny, tmp_path, step_mode):
    def start(folder, *callbacks):
        callbacks = [*callbacks, *([gk.GuardCallback()] if step_mode else [])]
        model = tiny.guarded(dropout=0.2)
        return trainer(tiny, model, tmp_path / folder, callbacks, save_strategy="steps", save_steps=3)

    whole = start("whole")
    whole.train()
    broken = start("broken", Interrupt())
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = start("broken")
    resumed.train(resume_from_checkpoint=True)
    assert len(losses(whole)) == len(losses(resumed)) == 6
    if step_mode:  # projecting what was projected already rounds once more
        assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)
    else:
        assert losses(resumed) == losses(whole)
        assert same(weights(resumed.model), weights(whole.model))


def test_resume_refuses_an_altered_checkpoint(tiny, tmp_path):
    trainer(tiny, tiny.guarded(), tmp_path, save_strategy="steps", save_steps=3).train()
    other = trainer(tiny, tiny.guarded(protect=0.8), tmp_path, save_strategy="steps", save_steps=3)
    with pytest.raises(ValueError, match="another plan"):
        other.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-6" / "guardspace.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="not a folder saved by a guarded model"):
        trainer(tiny, tiny.guarded(), tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("step_mode", [False, True])
@pytest.mark.parametrize("save_only_model", [False, True])
def test_loads_the_best_checkpoint_at_the_end(tiny, tmp_path, save_only_model, step_mode):
    model = tiny.guarded()
    run = trainer(
        tiny, model, tmp_path, [gk.GuardCallback()] if step_mode else [], save_strategy="steps", save_steps=2,
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, save_only_model=save_only_model,
        metric_for_best_model="eval_loss", greater_is_better=True,  # so that the best is not the last
    )  # fmt: skip
    run.train()
    best = run.state.best_model_checkpoint
    assert best.endswith("checkpoint-2")
    fresh = tiny.guarded()
    fresh.load_adapter(best)
    assert (tiny.logits(model) - tiny.logits(fresh)).abs().max() < 1e-6
    if not step_mode:
        assert same(weights(model), weights(fresh))
    plain = peft.PeftModel.from_pretrained(tiny.base(), best).eval()
    assert (tiny.logits(plain) - tiny.logits(model)).abs().max() < 1e-5
    last = tiny.guarded()
    last.load_adapter(tmp_path / "checkpoint-6")
    assert (tiny.logits(last) - tiny.logits(model)).abs().max() > 1e-3


def test_saved_model_loads_in_plain_peft(tiny, tmp_path):
    model = tiny.guarded("gpt2")
    run = trainer(tiny, model, tmp_path, gradient_checkpointing=True)
    run.train()
    run.save_model(tmp_path / "final")
    plain = peft.PeftModel.from_pretrained(tiny.base("gpt2"), str(tmp_path / "final")).eval()
    difference = tiny.logits(plain, "gpt2") - tiny.logits(model.eval(), "gpt2")
    assert difference.abs().max() < 1e-5
    assert tiny.drift(model)[0] < 1e-6


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 64)}}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>")


def test_trl_trains_a_guarded_model(tiny, tmp_path, tokenizer):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = tiny.guarded()
    rows = [{"text": " ".join(f"w{t}" for t in row)} for row in tiny.batch()["input_ids"].tolist()]
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, bf16=False, max_length=16, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    run = trl.SFTTrainer(
        model, arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
        callbacks=[gk.GuardCallback()],
    )  # fmt: skip
    before = weights(model)
    run.train()
    assert len(losses(run)) == 2 and not same(weights(model), before)
    assert tiny.drift(model.eval())[0] < 1e-6
    plain = peft.PeftModel.from_pretrained(tiny.base(), str(tmp_path / "checkpoint-2")).eval()
    assert (tiny.logits(plain) - tiny.logits(model)).abs().max() < 1e-5
    with pytest.raises(ValueError, match="PeftModel"):
        trl.SFTTrainer(
            model, arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
            peft_config=peft.LoraConfig(),
        )  # fmt: skip


def test_trl_preference_trainer_takes_a_reference_model(tiny, tmp_path, tokenizer):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": "w3 w4 w5", "chosen": "w6 w7", "rejected": "w8 w9"}] * 4)
    arguments = trl.DPOConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, bf16=False, save_strategy="no",
    )  # fmt: skip
    model = tiny.guarded()
    with pytest.raises(ValueError, match=r"no second adapter \('ref'\).*ref_model=.*beta=0"):
        trl.DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    run = trl.DPOTrainer(model, tiny.base(), args=arguments, train_dataset=rows, processing_class=tokenizer)
    run.train()
    assert losses(run)[0] == pytest.approx(0.6931, abs=1e-4)  # it starts as its reference
    protected, free = tiny.drift(model.eval())
    assert protected < 1e-6 < 1e-4 < free
