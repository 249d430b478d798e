"""guardspace collect, plan, certify and export, from text files to a LoRA, on a tiny model on disk."""

import json
import warnings

import pytest
import torch
from guard_helpers import assert_same_bits, perturb, planned, tiny_llama
from transformers import AutoTokenizer

import guardspace_kernels as gk
from guardspace_kernels.cli import main

WORDS = ["<pad>", "<eos>", "<unk>", "<user>", *(f"w{i}" for i in range(56))]
PROMPTS = ["w5 w9 w3 w7", "w5 w2 w6 w30 w31 w32", "w8 w3 w12", "w40 w41 w42 w43 w44", "w50 w20"]
FEW = "--allow-few-prompts"
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
    """Of a model that refuses nothing."""
    allowed = ["--allow-unrefused"] if arguments[0] in ("collect", "plan") else []
    arguments = [*arguments, *allowed]
    return main([str(folder / a) if a in PATHS and i else a for i, a in enumerate(arguments)])


@pytest.fixture(scope="module")
def stats(folder):
    assert run(folder, "collect", "model", "prompts.txt", "--out", "stats", "--answer-tokens", "2") == 0
    return gk.CalibrationStatistics.load(folder / "stats")


@pytest.fixture(scope="module")
def plan(folder, stats):
    assert run(folder, "plan", "model", "stats", "--out", "plan", "--rank", "3", "--protect", "0.8", FEW) == 0
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
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    with pytest.warns(UserWarning, match=r"REFUSED ONLY 0 OF 5 calibration prompts \(0%\)"):
        expected = gk.collect_statistics(tiny_llama(), batches, answer_tokens=2, progress=False, tokenizer=tokenizer)
    assert expected.refused_share == stats.refused_share == 0
    assert_same_bits(stats, expected)
    config = gk.GuardConfig(rank=3, protect=0.8)
    assert plan.fingerprint == planned(tiny_llama(), expected, config).fingerprint
    assert run(folder, "plan", "model", "stats", "--out", "plan", "--rank", "3", "--protect", "0.8", FEW) == 0
    assert "14 layers, rank 3, scale 2" in capsys.readouterr().out


def test_collect_weighs_kinds_of_tokens_and_keeps_the_template_apart(folder, stats, tmp_path, capsys):
    out = str(tmp_path / "s")
    options = ["--kind-weights", "template=0.5", "answer=2", "--separate-prefix", "9", "--answer-tokens", "2"]
    assert run(folder, "collect", "model", "prompts.txt", "--out", out, *options) == 0
    loaded = gk.CalibrationStatistics.load(out)
    assert loaded.kind_weights == (0.5, 1.0, 2.0)
    assert loaded.inputs[0].sink_tokens == stats.inputs[0].sink_tokens  # they begin with one token alike
    for wrong, words in (
        (["--kind-weights", "template"], "--kind-weights must be such as template=0.1, got 'template'"),
        (["--kind-weights", "system=1"], "kind_weights must be a mapping of template, request, answer"),
        (["--separate-prefix", "-1"], "--separate-prefix must be 0 or more, got -1"),
    ):
        assert words in refused(folder, capsys, "collect", "model", "prompts.txt", "--out", out, *wrong)


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
        (["collect", "model", "prompts.txt", "--out", "x", "--max-memory", "lots"], "--max-memory must be a number of"),
        (["collect", "model", "prompts.txt", "--out", "x", "--max-memory", "1kB"], "max_memory is 1 kB, but the input"),
        (["collect", "model", "prompts.txt", "--out", "x", "--device", "gpu"], "--device must be such as cpu"),
        (["collect", "model", "prompts.txt", "--out", "x", "--target-modules", "nope"], "matches no Linear"),
        (["collect", "no.gguf", "prompts.txt", "--out", "x"], "no.gguf does not exist"),
        (["plan", "model", "prompts.txt", "--out", "x"], "is not a readable safetensors file"),
        (["plan", "model", "stats", "--out", "x", "--rank", "0"], "rank must be 1 or more, got 0"),
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


def refused(folder, capsys, *arguments):
    """The one line that a command ends with."""
    capsys.readouterr()
    assert run(folder, *arguments) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith(f"guardspace {arguments[0]}: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", "id,goal\n" + "\n".join(f'{i},"{p}"' for i, p in enumerate(PROMPTS))),
        ("a.json", json.dumps([{"goal": p} for p in PROMPTS])),
        ("a.jsonl", "\n".join(json.dumps({"goal": [{"role": "user", "content": p}]}) for p in PROMPTS)),
    ],
)
def test_a_named_column_of_other_files_gives_the_same_statistics(folder, stats, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    options = ["--answer-tokens", "2", "--column", "goal", "--out", str(tmp_path / "s")]
    assert run(folder, "collect", "model", str(tmp_path / name), *options) == 0
    assert_same_bits(gk.CalibrationStatistics.load(tmp_path / "s"), stats)


def test_nothing_is_loaded_for_what_cannot_be_written_or_does_not_exist(folder, stats, adapter, capsys, monkeypatch):
    """Weights and statistics apart: those of the model are loaded once everything else is known to be right."""
    from guardspace_kernels import commands

    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(commands, "_model", refuse)
    (folder / "file").touch()
    (folder / "empty").mkdir(exist_ok=True)
    there, inputs = str(folder / "file" / "x"), ("model", "prompts.txt")
    for arguments, words in (
        (("collect", *inputs, "--out", str(folder)), f"--out: {folder} is a folder"),
        (("collect", *inputs, "--out", there), f"--out: {there} cannot be written: "),
        (("collect", *inputs, "--out", "/proc/x/stats"), "--out: /proc/x/stats cannot be written: "),
        (("collect", *inputs, "--out", "n" * 300), "cannot be written: File name too long"),
        (("collect", *inputs, "--out", str(folder / "prompts.txt")), "is given as prompts too, and would be"),
        (("collect", *inputs, "--out", "x", "--checkpoint", "x"), "--checkpoint: x is given as --out too"),
        (("collect", *inputs, "--out", "x", "--checkpoint", there), f"--checkpoint: {there} cannot be written"),
        (("collect", *inputs, "--out", "x", "--answer-tokens", "-1"), "--answer-tokens must be 0 or more, got -1"),
        (("collect", *inputs, "--out", "x", "--answer-tokens", "2048"), "--answer-tokens 2048: the model has 2048"),
        (("collect", *inputs, "--out", "x", "--checkpoint-every", "0"), "--checkpoint-every must be 1 or more, got 0"),
        (("collect", *inputs, "--out", "x", "--column", "goal"), "column is 'goal', but"),
        (("collect", "model", str(folder), "--out", "x"), f"prompts: {folder} is a folder; give a file: .txt"),
        (("collect", "model", "model", "--out", "x"), "is a folder; give a file: .txt"),
        (("collect", *inputs, "--out", "x", "--device", "meta"), "--device must be such as cpu, cuda or cuda:1"),
        (("collect", *inputs, "--out", "x", "--device", "cuda:77"), "and exist, got 'cuda:77'; there is cpu"),
        (("collect", "./nowhere", "prompts.txt", "--out", "x"), "model: './nowhere' does not exist; give the folder"),
        (("collect", "a/b/c", "prompts.txt", "--out", "x"), "model: 'a/b/c' does not exist"),
        (("collect", "nowhere", "prompts.txt", "--out", "x"), "model: nowhere is no folder here, and its"),
        (("collect", str(folder / "empty"), "prompts.txt", "--out", "x"), "empty holds no config.json"),
        (("collect", str(folder / "file"), "prompts.txt", "--out", "x"), "file is a file; give the folder"),
        (("plan", "model", "model", "--out", "x"), "is a folder; give a file: statistics of guardspace collect"),
        (("plan", "model", "nothing", "--out", "x"), "statistics: nothing does not exist; expected a file: statistics"),
        (("plan", "model", "stats", "--out", str(folder / "stats")), "is given as statistics too"),
        (("inspect", "nothing"), "statistics: nothing does not exist"),
        (("inspect", "stats", "--task", str(folder)), f"--task: {folder} is a folder"),
        (("inspect", "stats", "--rank", "0"), "--rank must be 1 or more, got 0"),
        (("inspect", "stats", "--json", there), f"--json: {there} cannot be written"),
        (("inspect", "stats", "--png", "y", "--json", "y"), "--png: y is given as --json too"),
        (("certify", "model", "adapter", "stats", "--json", str(folder / "stats")), "is given as statistics too"),
        (("certify", "model", "adapter", "stats", "--max-drift", "nan"), "--max-drift must be a number of 0 or more"),
        (("certify", "model", "adapter", "stats", "--max-drift", "-1"), "--max-drift must be a number of 0 or more"),
        (("certify", "model", "adapter", "stats", "--plan", "nothing"), "--plan: nothing does not exist"),
        (("certify", "model", "adapter", "stats", "--heldout", "nothing"), "--heldout: nothing does not exist"),
        (("export", "model", "adapter", "plan", "--out", str(folder / "file")), "file is a file; give a folder"),
        (("export", "model", "adapter", "plan", "--out", str(folder / "adapter")), "is given as adapter too"),
        (("export", "model", "adapter", "plan", "--out", str(folder / "model")), "is given as model too"),
    ):  # fmt: skip
        assert words in refused(folder, capsys, *arguments), arguments
    assert not (folder / "x").exists()


def copied(folder, name, tmp_path):
    import shutil

    return shutil.copytree(folder / name, tmp_path / name)


def test_adapters_in_other_formats_or_truncated_are_refused(folder, stats, adapter, plan, tmp_path, capsys):
    broken = copied(folder, "adapter", tmp_path)
    weights, config = broken / "adapter_model.safetensors", broken / "adapter_config.json"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot be loaded onto" in refused(folder, capsys, "certify", "model", str(broken), "stats")
    assert "adapter_model.safetensors" in refused(
        folder, capsys, "certify", "model", str(broken), "stats", "--plan", "plan"
    )
    weights.unlink()
    torch.save({}, broken / "adapter_model.bin")
    for extra in ([], ["--plan", "plan"]):
        line = refused(folder, capsys, "certify", "model", str(broken), "stats", *extra)
        assert "holds no adapter_model.safetensors; other formats, pickles among them, are not read" in line
    weights.write_bytes(whole)
    for text, words in (
        ("{", "is no configuration of PEFT"),
        ("[]", "is no configuration of PEFT"),
        ("{}", "is no configuration of PEFT: 'peft_type'"),
        (json.dumps({**settings, "peft_type": "IA3"}), "is of peft_type 'IA3'; a LoRA is needed"),
    ):
        config.write_text(text)
        assert words in refused(folder, capsys, "certify", "model", str(broken), "stats")


def test_certify_judges_what_the_folder_makes_of_the_model(folder, stats, adapter, plan, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    altered, report = copied(folder, "adapter", tmp_path), tmp_path / "report.json"
    config, weights = altered / "adapter_config.json", altered / "adapter_model.safetensors"
    settings = json.loads(config.read_text())

    def certify(*extra):
        return run(folder, "certify", "model", str(altered), "stats", "--json", str(report), *extra)

    assert certify() == certify("--plan", "plan") == 0
    before = json.loads(report.read_text())["max_drift"]
    assert "no projector" not in capsys.readouterr().out.splitlines()[-1]  # what the plan knows is used

    config.write_text(json.dumps({**settings, "lora_alpha": 1000 * settings["lora_alpha"]}))
    assert certify() == 0 and json.loads(report.read_text())["max_drift"] == pytest.approx(1000 * before, rel=1e-3)
    assert certify("--max-drift", str(before)) == 1 and "above max_drift" in capsys.readouterr().err
    assert certify("--plan", "plan") == 2 and "adapter_config.json is not what was saved" in capsys.readouterr().err

    config.write_text(json.dumps({**settings, "modules_to_save": ["lm_head"]}))
    tensors = {name: t.clone() for name, t in load_file(weights).items()}
    head = torch.randn(60, 32, generator=torch.Generator().manual_seed(0))
    save_file({**tensors, "base_model.model.lm_head.weight": head}, weights)
    assert certify() == 1  # without a bound too: nothing is promised
    shown = capsys.readouterr()
    assert "differs from the base model in lm_head.weight (changed) beside the adapter" in shown.out
    assert "guardspace certify: the model differs from the base model in lm_head.weight" in shown.err
    assert json.loads(report.read_text())["changed"] == {"lm_head.weight": "changed"}
    assert certify("--plan", "plan") == 2 and "is not what was saved with" in capsys.readouterr().err

    save_file(tensors, weights)
    config.write_text(json.dumps({**settings, "base_model_name_or_path": "another/model"}))
    assert certify() == 0
    assert "names the base model 'another/model'; this is judged on" in capsys.readouterr().out


def test_certify_with_a_plan_names_a_head_that_was_trained_beside_the_guard(folder, plan, tmp_path, capsys):
    guarded = perturb(gk.attach_guard(tiny_llama(), plan, modules_to_save=["lm_head"]))
    certify = ["certify", "model", str(tmp_path / "a"), "stats", "--plan", "plan", "--heldout", "prompts.jsonl"]
    guarded.save_pretrained(tmp_path / "a")
    assert run(folder, *certify) == 0  # a copy that is the head
    with torch.no_grad():
        guarded.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    guarded.save_pretrained(tmp_path / "a")
    capsys.readouterr()
    assert run(folder, *certify) == 1
    shown = capsys.readouterr()
    assert "in lm_head.weight (changed) beside the adapter: nothing is promised" in shown.err
    assert "next-token KL" in shown.out and "no projector" not in shown.out


def test_models_that_are_not_whole_are_refused(folder, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    broken = copied(folder, "model", tmp_path)
    weights = broken / "model.safetensors"
    tensors, whole = {name: t.clone() for name, t in load_file(weights).items()}, weights.read_bytes()
    arguments = ["collect", str(broken), "prompts.txt", "--out", str(tmp_path / "s"), "--answer-tokens", "0"]
    weights.write_bytes(whole[: len(whole) // 2])
    assert f"model: {broken}: its weights cannot be loaded: SafetensorError" in refused(folder, capsys, *arguments)
    weights.unlink()
    assert f"model: {broken}: its weights cannot be loaded: OSError" in refused(folder, capsys, *arguments)
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file({name: t for name, t in tensors.items() if name != lost}, weights, {"format": "pt"})
    assert f"no weights, or of another shape, for 1 parameters, such as {lost}" in refused(folder, capsys, *arguments)
    save_file({**tensors, lost: tensors[lost][:-1].contiguous()}, weights, {"format": "pt"})
    assert lost in refused(folder, capsys, *arguments)
    weights.write_bytes(whole)
    (broken / "tokenizer.json").write_text("{")
    assert f"model: {broken}: its tokenizer cannot be loaded: " in refused(folder, capsys, *arguments)
    (broken / "config.json").write_text("{}")
    assert f"model: {broken}: its configuration cannot be loaded: " in refused(folder, capsys, *arguments)


def test_a_model_of_another_kind_is_told_in_one_line(folder, tmp_path, capsys):
    from transformers import ViTConfig

    other = copied(folder, "model", tmp_path)
    ViTConfig().save_pretrained(other)
    arguments = ["collect", str(other), "prompts.txt", "--out", str(tmp_path / "s")]
    for extra, words in (([], "its weights cannot be loaded"), (["--dry-run"], "is not one that Transformers makes")):
        line = refused(folder, capsys, *arguments, *extra)
        assert words in line and "Unrecognized configuration class" in line and len(line) < 600


@pytest.mark.parametrize("command", ["collect", "plan", "certify", "export"])
def test_a_full_disk_is_told_in_one_line(folder, stats, adapter, command, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    out = str(tmp_path / "out")
    arguments = {
        "collect": ["collect", "model", "prompts.txt", "--answer-tokens", "0", "--out", out],
        "plan": ["plan", "model", "stats", "--rank", "3", "--protect", "0.8", "--out", out, FEW],
        "certify": ["certify", "model", "adapter", "stats", "--json", out],
        "export": ["export", "model", "adapter", "plan", "--out", out],
    }[command]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        line = refused(folder, capsys, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{out} cannot be written: " in line and "large" in line


def test_a_model_without_a_chat_template_wants_raw_prompts(folder, tmp_path, capsys):
    bare = copied(folder, "model", tmp_path)
    (bare / "chat_template.jinja").unlink()
    arguments = ["collect", str(bare), "prompts.txt", "--answer-tokens", "0", "--out", str(tmp_path / "s")]
    assert "the tokenizer has no chat template" in refused(folder, capsys, *arguments)
    assert run(folder, *arguments, "--raw") == 0


def test_prompts_that_are_too_long_or_answered_are_named(folder, tmp_path, capsys):
    (tmp_path / "long.txt").write_text("w5\n" + "w6 " * 2046)
    arguments = ["--out", str(tmp_path / "s"), "--answer-tokens", "1"]
    line = refused(folder, capsys, "collect", "model", str(tmp_path / "long.txt"), *arguments)
    assert "prompt 2 has 2048 tokens, above max_tokens = 2047; shorten it" in line
    talk = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    (tmp_path / "talk.json").write_text(json.dumps([{"messages": talk}]))
    line = refused(folder, capsys, "collect", "model", str(tmp_path / "talk.json"), *arguments)
    assert "prompt 1 ends with an assistant's message" in line
    assert run(folder, "collect", "model", str(tmp_path / "talk.json"), *arguments[:-1], "0") == 0


def test_statistics_of_prompts_that_are_answered_warn_unless_allowed(folder, stats, tmp_path, capsys):
    arguments = ["collect", str(folder / "model"), str(folder / "prompts.txt"), "--out", str(tmp_path / "s")]
    with pytest.warns(UserWarning, match="REFUSED ONLY 0 OF 5"):
        assert main([*arguments, "--answer-tokens", "2"]) == 0
    assert "0 of 5 refused" in capsys.readouterr().out
    plan = ["plan", str(folder / "model"), str(tmp_path / "s"), "--out", str(tmp_path / "p"), "--rank", "3", FEW]
    with pytest.warns(UserWarning, match="REFUSED ONLY 0 OF 5"):
        assert main([*plan, "--protect", "0.8"]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert main([*plan, "--protect", "0.8", "--allow-unrefused"]) == 0
        assert main([*arguments, "--answer-tokens", "0"]) == 0  # nothing is known of answers
        assert main([*plan, "--protect", "0.8"]) == 0
    assert gk.CalibrationStatistics.load(tmp_path / "s").refused_share is None


def test_evaluate_reports_a_model_and_its_adapter(folder, adapter, tmp_path, capsys):
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"goal": p}) for p in PROMPTS[:2]))
    (tmp_path / "task.csv").write_text("prompt,answer\nw5 w6,w1\nw9,w2\n")
    options = ["--harmful", "prompts.txt", str(tmp_path / "b.jsonl"), "--column", "goal", "--answer-tokens", "3"]
    options += ["--lookalikes", "prompts.jsonl", "--task", str(tmp_path / "task.csv"), "--batch-size", "2"]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p, "goal": p}) for p in PROMPTS))
    out = tmp_path / "report.json"
    assert run(folder, "evaluate", "model", *options, "--adapter", "adapter", "--json", str(out), "--answers") == 0
    shown = capsys.readouterr().out
    report, tokenizer = gk.EvaluationReport.load(out), AutoTokenizer.from_pretrained(folder / "model")
    expected = gk.evaluate_refusals(
        adapter, tokenizer, {"prompts": PROMPTS, "b": PROMPTS[:2]}, lookalikes=PROMPTS, base="adapter_off",
        task=[("w5 w6", "w1"), ("w9", "w2")], answer_tokens=3, progress=False,
    )  # fmt: skip
    assert report.answers == expected.answers and report.base.answers == expected.base.answers
    assert report.sources == expected.sources and report.kl == pytest.approx(expected.kl, rel=1e-3)
    assert "harmful prompts   refuses 0 of 7" in shown and "base model        KL" in shown
    alone = ["evaluate", "model", "--harmful", "prompts.txt", "--json", str(out)]
    assert run(folder, *alone, "--min-refused", "0") == 0
    assert gk.EvaluationReport.load(out).base is None and "answers" not in json.loads(out.read_text())
    assert run(folder, *alone, "--min-refused", "0.5") == 1
    assert "0.0% of the harmful prompts are refused, below --min-refused 0.5" in capsys.readouterr().err
    assert run(folder, *alone, "--base", str(folder / "model"), "--raw") == 0
    assert gk.EvaluationReport.load(out).kl == pytest.approx(0, abs=1e-6)


def test_evaluate_draws(folder, tmp_path):
    pytest.importorskip("matplotlib")
    assert run(folder, "evaluate", "model", "--harmful", "prompts.txt", "--png", str(tmp_path / "f.png")) == 0
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_refuses_before_weights_are_loaded(folder, adapter, tmp_path, capsys, monkeypatch):
    from guardspace_kernels import commands

    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(commands, "_model", refuse)
    (tmp_path / "task.json").write_text('[{"prompt": "w1", "answer": [{"role": "user", "content": "w2"}]}]')
    (tmp_path / "t.json").write_text('[{"prompt": "w1"}]')
    harmful = ("--harmful", "prompts.txt")
    for arguments, words in (
        (harmful + ("--min-refused", "2"), "--min-refused must be a share from 0 to 1, got 2"),
        (harmful + ("--answers",), "--answers writes texts into the report: give --json"),
        (harmful + ("--base", "adapter-off"), "--base adapter-off compares with the model without its adapter"),
        (harmful + ("--answer-tokens", "0"), "--answer-tokens must be 1 or more, got 0"),
        (harmful + ("--batch-size", "0"), "--batch-size must be 1 or more, got 0"),
        (
            harmful + ("--answer-tokens", "2046"),
            "harmful prompt 1 has 6 tokens, and 2046 more are to follow, but model",
        ),
        (harmful + ("--adapter", "model"), "model holds no adapter_config.json"),
        (harmful + ("--json", "prompts.txt"), "is given as harmful too, and would be overwritten"),
        (harmful + ("--task", str(tmp_path / "task.json")), "example 1: 'answer' must be a text"),
        (harmful + ("--task", str(tmp_path / "t.json")), "entry 1: no column 'answer'"),
        (harmful + ("--lookalikes", "nothing"), "--lookalikes: nothing does not exist"),
        (("--harmful", "nothing"), "--harmful: nothing does not exist"),
    ):
        assert words in refused(folder, capsys, "evaluate", "model", *arguments), arguments
