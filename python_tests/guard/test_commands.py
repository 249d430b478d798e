"""guardspace collect, plan, certify and export, from text files to a LoRA, on a tiny model on disk."""

import json

import pytest
import torch
from guard_helpers import assert_same_bits, perturb, tiny_llama

import guardspace_kernels as gk
from guardspace_kernels.cli import main

WORDS = ["<pad>", "<eos>", "<unk>", "<user>", *(f"w{i}" for i in range(56))]
PROMPTS = ["w5 w9 w3 w7", "w5 w2 w6 w30 w31 w32", "w8 w3 w12", "w40 w41 w42 w43 w44", "w50 w20"]
PATHS = {"model", "prompts.txt", "prompts.jsonl", "stats", "plan", "adapter", "lora", "report.json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its tokenizer, and two files of prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("commands")
    tiny_llama().save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = "{% for m in messages %}<user> {{ m.content }} <eos>{% endfor %}"
    fast.save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in PROMPTS))
    return folder


def run(folder, *arguments):
    return main([str(folder / a) if a in PATHS and i else a for i, a in enumerate(arguments)])


@pytest.fixture(scope="module")
def stats(folder):
    assert run(folder, "collect", "model", "prompts.txt", "--out", "stats", "--answer-tokens", "2") == 0
    return gk.CalibrationStatistics.load(folder / "stats")


@pytest.fixture(scope="module")
def plan(folder, stats):
    assert run(folder, "plan", "model", "stats", "--out", "plan", "--rank", "3", "--protect", "0.8") == 0
    return gk.GuardPlan.load(folder / "plan")


@pytest.fixture(scope="module")
def adapter(folder, plan):
    guarded = perturb(gk.attach_guard(tiny_llama(), plan))
    guarded.save_pretrained(folder / "adapter")
    return guarded


def test_collect_goes_through_the_chat_template_and_plan_uses_it(folder, stats, plan, capsys):
    ids = [[3, *(WORDS.index(w) for w in p.split()), 1] for p in PROMPTS]
    width = max(map(len, ids))
    rows = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    batches = [{"input_ids": rows, "attention_mask": mask}]
    expected = gk.collect_statistics(tiny_llama(), batches, answer_tokens=2, progress=False)
    assert_same_bits(stats, expected)
    config = gk.GuardConfig(rank=3, protect=0.8)
    assert plan.fingerprint == gk.plan_guard(tiny_llama(), expected, config, progress=False).fingerprint
    assert run(folder, "plan", "model", "stats", "--out", "plan", "--rank", "3", "--protect", "0.8") == 0
    assert "14 layers, rank 3, scale 2" in capsys.readouterr().out


def test_raw_prompts_a_budget_and_a_checkpoint(folder, tmp_path, capsys):
    out, state = str(tmp_path / "s"), str(tmp_path / "c")
    options = ["--out", out, "--raw", "--batch-size", "2", "--answer-tokens", "0", "--max-memory", "30kB"]
    assert run(folder, "collect", "model", "prompts.jsonl", *options, "--checkpoint", state) == 0
    assert "passes instead of" in capsys.readouterr().err
    loaded = gk.CalibrationStatistics.load(out)
    assert loaded.prompts == 5 and loaded.inputs[0].tokens == sum(len(p.split()) - 1 for p in PROMPTS)
    assert run(folder, "collect", "model", "prompts.jsonl", *options, "--checkpoint", state) == 0
    assert_same_bits(gk.CalibrationStatistics.load(out), loaded)


def test_certify_and_export(folder, stats, adapter, capsys):
    assert run(folder, "certify", "model", "adapter", "stats", "--plan", "plan", "--json", "report.json") == 0
    report = json.loads((folder / "report.json").read_text())
    expected = gk.certify(adapter, stats)
    assert report["max_drift"] == pytest.approx(expected.max_drift, rel=1e-4)
    assert "drift on" in capsys.readouterr().out
    limit = str(expected.max_drift / 2)
    assert run(folder, "certify", "model", "adapter", "stats", "--plan", "plan", "--max-drift", limit) == 1
    assert "above max_drift" in capsys.readouterr().err
    assert run(folder, "export", "model", "adapter", "plan", "--out", "lora", "--factors", "bfloat16") == 0
    assert "rank-6 LoRA in bfloat16" in capsys.readouterr().out
    # What was exported is judged as a plain LoRA on the untouched base model.
    assert run(folder, "certify", "model", "lora", "stats", "--heldout", "prompts.jsonl", "--json", "report.json") == 0
    assert json.loads((folder / "report.json").read_text())["max_drift"] == pytest.approx(expected.max_drift, rel=0.05)
    assert "no projector" in capsys.readouterr().out


def test_a_dry_run_estimates_and_loads_no_weights(folder, capsys, monkeypatch):
    import transformers

    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    out = folder / "nothing"
    assert run(folder, "collect", "model", "prompts.txt", "--out", str(out), "--dry-run") == 0
    shown = capsys.readouterr().out
    assert not out.exists() and "8 distinct inputs" in shown and "plan  " in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["collect", "model", "missing.txt", "--out", "x"], "missing.txt"),
        (["collect", "model", "prompts.txt", "--out", "x", "--batch-size", "0"], "--batch-size must be 1 or more"),
        (["collect", "model", "prompts.txt", "--out", "x", "--max-memory", "lots"], "max_memory must be a number of"),
        (["collect", "model", "prompts.txt", "--out", "x", "--max-memory", "1kB"], "max_memory is 1 kB, but the input"),
        (["collect", "model", "prompts.txt", "--out", "x", "--device", "gpu"], "--device must be such as cpu"),
        (["collect", "model", "prompts.txt", "--out", "x", "--target-modules", "nope"], "matches no Linear"),
        (["collect", "no.gguf", "prompts.txt", "--out", "x"], "no.gguf does not exist"),
        (["plan", "model", "prompts.txt", "--out", "x"], "is not a readable safetensors file"),
        (["plan", "model", "stats", "--out", "x", "--rank", "0"], "rank must be a positive integer"),
        (["plan", "model", "stats", "--out", "x", "--protect", "99"], "protect must be a share in"),
        (["certify", "model", "prompts.txt", "stats"], "holds no adapter_config.json"),
        (["certify", "model", "lora", "stats", "--plan", "plan"], "not a folder saved by a guarded model"),
        (["export", "model", "adapter", "stats", "--out", "x"], "is not a guard plan file"),
    ],
)
def test_wrong_arguments_are_one_line(folder, stats, adapter, arguments, message, capsys):
    if "lora" in arguments:
        gk.export_lora(adapter, folder / "lora")
    capsys.readouterr()
    assert run(folder, *arguments) == 2
    shown = capsys.readouterr().err
    lines = [line for line in shown.splitlines() if line.startswith(f"guardspace {arguments[0]}: ")]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in shown


@pytest.mark.parametrize("line", ["no json", "[1]", '{"text": "w1"}', '{"prompt": 3}', '{"prompt": " "}'])
def test_lines_that_are_no_prompt_are_named(folder, tmp_path, line, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "w1"}\n' + line)
    assert run(folder, "collect", "model", str(path), "--out", "x") == 2
    assert f"{path}, line 2: " in capsys.readouterr().err


def test_an_empty_file_holds_no_prompt(folder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("\n \n")
    assert run(folder, "collect", "model", str(tmp_path / "p.txt"), "--out", "x") == 2
    assert "holds no prompt" in capsys.readouterr().err
