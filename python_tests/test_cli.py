"""The guardspace command and its environment report."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import guardspace_kernels as gk
from guardspace_kernels import build_info, dispatch, env_report
from guardspace_kernels.cli import main


def backend_rows(report):
    """(op, backend) -> the words after them."""
    rows = (line.split(maxsplit=3) for line in report.splitlines())
    return {(row[0], row[1]): row[2:] for row in rows if len(row) > 3 and row[0] in dispatch.OPS}


@pytest.fixture
def reference_only(monkeypatch):
    references = {key: value for key, value in dispatch._registry.items() if key[1] == "reference"}
    monkeypatch.setattr(dispatch, "_registry", references)


def test_env_prints_one_page_of_versions_features_and_backends(capsys):
    assert main(["env"]) == 0
    report = capsys.readouterr().out
    assert len(report.splitlines()) < 60
    lines = {line[:20].rstrip(): line[21:] for line in report.splitlines()}
    assert lines["guardspace_kernels"] == gk.__version__
    assert lines["torch"].startswith(f"{torch.__version__}, CUDA")
    assert lines["GUARDSPACE_BACKEND"] == "not set (automatic)"
    assert {"python", "cpu", "torch cpu level", "peft", "transformers", "triton"} <= set(lines)
    assert set(backend_rows(report)) == {(op, backend) for op in dispatch.OPS for backend in dispatch.BACKENDS}


def test_env_says_why_a_backend_is_not_used(reference_only):
    rows = backend_rows(env_report.environment_report())
    for op in dispatch.OPS:
        assert rows[op, "reference"] == ["used", "registered"]
        assert rows[op, "triton"] == ["-", f"this build has no triton implementation of {op}"]


def test_env_tells_a_preferred_backend_from_a_requested_one(reference_only):
    dispatch.register("covariance", "cpu")
    rows = backend_rows(env_report.environment_report())
    assert rows["covariance", "cpu"][0] == "used"
    assert rows["covariance", "reference"] == ["-", "registered, but cpu is preferred or requested"]
    assert rows["null_projection", "reference"][0] == "used"
    with gk.use_backend("reference"):
        rows = backend_rows(env_report.environment_report())
    assert rows["covariance", "reference"][0] == "used"
    assert rows["covariance", "cpu"] == ["-", "registered, but reference is preferred or requested"]


def test_env_still_reports_when_the_requested_backend_does_not_exist(monkeypatch):
    monkeypatch.setenv("GUARDSPACE_BACKEND", "tpu")
    report = env_report.environment_report()
    assert "GUARDSPACE_BACKEND must be 'auto' or one of" in report and "got 'tpu'" in report


CONFIG = {
    "version": "0.1.0",
    "compiler": "c++ 12",
    "flags": "-O3 -fopenmp",
    "isas": ["baseline", "avx2"],
    "openmp": True,
    "notes": ["without avx512_bf16: unknown option"],
    "cuda": {"nvcc": "release 13.0", "chips": ["sm_80", "sm_90"]},
}


@pytest.fixture
def extension(monkeypatch):
    """A compiled extension whose answers can be chosen, built as ``CONFIG`` says."""
    module = ModuleType("_cpu")
    module.isa, module.openmp = lambda: "avx2", lambda: True
    monkeypatch.setitem(sys.modules, "guardspace_kernels._cpu", module)
    monkeypatch.setattr(env_report, "build_config", lambda: CONFIG)
    monkeypatch.delenv("GUARDSPACE_ISA", raising=False)
    return module


def test_env_tells_how_the_cpu_extension_was_built_and_what_it_uses(extension, monkeypatch):
    assert env_report.cpu_extension() == [
        ("cpu extension", "avx2 in use; built: baseline, avx2; OpenMP"),
        ("cpu extension built", "c++ 12: -O3 -fopenmp"),
        ("cpu extension note", "without avx512_bf16: unknown option"),
        ("GUARDSPACE_ISA", "not set (automatic)"),
    ]
    extension.openmp = lambda: False
    monkeypatch.setenv("GUARDSPACE_ISA", "avx2")
    rows = env_report.cpu_extension()
    assert rows[0][1].endswith("without OpenMP") and rows[-1] == ("GUARDSPACE_ISA", "avx2")


def test_env_reports_an_instruction_set_that_cannot_be_used(extension):
    def refuse():
        raise ValueError("GUARDSPACE_ISA must be one of avx2, baseline on this CPU, got avx9")

    extension.isa = refuse
    assert env_report.cpu_extension()[0][1].startswith("GUARDSPACE_ISA must be one of avx2, baseline on this CPU, got")


def test_env_says_why_there_is_no_cpu_extension(extension, monkeypatch):
    monkeypatch.setitem(sys.modules, "guardspace_kernels._cpu", None)
    [(name, text)] = env_report.cpu_extension()
    assert name == "cpu extension" and re.fullmatch(
        r"does not load: .*guardspace_kernels\._cpu.*; install guardspace_kernels again", text
    )
    monkeypatch.setattr(env_report, "build_config", lambda: {"not_built": "no C++ compiler was found; install one"})
    assert env_report.cpu_extension() == [
        (
            "cpu extension",
            "not built: no C++ compiler was found; install one; then install guardspace_kernels again",
        )
    ]


def test_env_tells_how_the_cuda_kernels_were_built_or_why_not(extension, monkeypatch):
    assert env_report.cuda_kernels() == ("cuda kernels", "built for sm_80, sm_90 by nvcc, release 13.0")
    for config in ({**CONFIG, "cuda": {"not_built": "no nvcc; install it"}}, {"not_built": "no nvcc; install it"}):
        monkeypatch.setattr(env_report, "build_config", lambda config=config: config)
        text = "not built: no nvcc; install it; then install guardspace_kernels again"
        assert env_report.cuda_kernels() == ("cuda kernels", text)


@pytest.mark.parametrize("text", [None, "not json"])
def test_without_a_record_of_the_build_it_was_not_installed(text, tmp_path, monkeypatch):
    monkeypatch.setattr(build_info, "_FILE", tmp_path / "_build_info.json")
    if text is not None:
        build_info._FILE.write_text(text)
    assert re.search("was never installed, .* run pip install", build_info.build_config()["not_built"])
    build_info._FILE.write_text(json.dumps(CONFIG))
    assert build_info.build_config() == CONFIG


def test_env_reports_packages_that_are_missing(monkeypatch):
    monkeypatch.setattr(env_report, "_PACKAGES", ("no-such-package",))
    assert "no-such-package      not installed" in env_report.environment_report()


def test_cpu_flags_come_from_the_kernel_or_are_unknown(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise FileNotFoundError

    assert set(env_report.cpu_flags()) <= set(env_report._CPU_FLAGS)
    monkeypatch.setattr("builtins.open", refuse)
    assert env_report.cpu_flags() == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--help"], ["guardspace", "env", "inspect", "demo", "exit status: 0"]),
        (["certify", "--help"], ["--max-drift", "--column", "1 if a bound is exceeded", "2 if an argument"]),
        (["inspect", "--help"], ["statistics", "--json", "protect"]),
        (["demo", "--help"], ["--quick", "--out", "--seed", "--check", "PyPI"]),
    ],
)
def test_help_names_every_command_and_option(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    out = capsys.readouterr().out
    assert exit.value.code == 0 and all(word in out for word in words)


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out.strip() == gk.__version__


@pytest.mark.parametrize("arguments", [[], ["train"], ["demo", "--seed", "many"]], ids=str)
def test_bad_arguments_end_with_usage_and_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and "usage: guardspace" in capsys.readouterr().err


def _without(monkeypatch, dependency):
    """Makes the import of the demo fail as if ``dependency`` were not installed."""

    def find_spec(name, _path=None, _target=None):
        if name == "guardspace_kernels.demo.experiment":
            raise ModuleNotFoundError(f"No module named {dependency!r}", name=dependency)

    monkeypatch.delitem(sys.modules, "guardspace_kernels.demo.experiment", raising=False)
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=find_spec), *sys.meta_path])


@pytest.mark.parametrize("dependency", ["matplotlib", "yaml"])
def test_demo_without_its_extra_says_what_to_install(dependency, monkeypatch, capsys):
    _without(monkeypatch, dependency)
    assert main(["demo"]) == 2
    assert (
        capsys.readouterr().err
        == f"guardspace demo: needs {dependency}: install the extra with pip install 'guardspace-kernels[demo]'\n"
    )


def test_demo_does_not_blame_the_extra_for_a_broken_installation(monkeypatch, capsys):
    _without(monkeypatch, "guardspace_kernels.demo.lost")
    assert main(["demo"]) == 3
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "No module named 'guardspace_kernels.demo.lost'" in shown


@pytest.mark.parametrize("claims, check, status", [([], True, 0), (["lost"], True, 1), (["lost"], False, 0)])
def test_demo_passes_its_options_on_and_checks_the_claims(claims, check, status, monkeypatch, capsys):
    calls = []
    experiment, report = ModuleType("experiment"), ModuleType("report")
    experiment.run_demo = lambda out, *, quick, seed: calls.append((out, quick, seed)) or "result"
    report.failed_claims = lambda result: claims if result == "result" else ["wrong result"]
    monkeypatch.setitem(sys.modules, "guardspace_kernels.demo.experiment", experiment)
    monkeypatch.setitem(sys.modules, "guardspace_kernels.demo.report", report)
    assert main(["demo", "--quick", "--out", "there", "--seed", "3", *(["--check"] if check else [])]) == status
    assert calls == [("there", True, 3)]
    assert capsys.readouterr().err == "".join(f"failed: {claim}\n" for claim in claims)


def _refuse(_options):
    raise ValueError("x must be 1, got 2")


def _foreign(_options):
    int("no number")


def _missing(_options):
    Path("/nowhere/at/all").read_text()


def _no_key(_options):
    return {}["lost"]


def _impossible(_options):
    raise AssertionError("cannot be")


def _no_memory(_options):
    raise torch.OutOfMemoryError("CUDA out of memory")


def _interrupted(_options):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "body, status, line",
    [
        (_refuse, 2, "guardspace plan: x must be 1, got 2"),
        (_missing, 2, "guardspace plan: [Errno 2] No such file or directory: '/nowhere/at/all'"),
        (_foreign, 3, "ValueError: invalid literal for int() with base 10: 'no number'"),
        (_no_key, 3, "KeyError: 'lost'"),
        (_impossible, 3, "AssertionError: cannot be"),
        (_no_memory, 2, "guardspace plan: CUDA out of memory; try a smaller --batch-size or --max-memory"),
        (_interrupted, 130, "guardspace plan: interrupted"),
    ],
)
def test_refusals_are_one_line_and_bugs_keep_their_traceback(body, status, line, monkeypatch, capsys):
    from guardspace_kernels import commands

    ours = {**vars(commands), "body": body}
    code = compile("def plan(options):\n    return body(options)\n", commands.__file__, "exec")
    exec(code, ours)
    # As if the function stood in the package.
    body.__code__ = body.__code__.replace(co_filename=commands.__file__)
    monkeypatch.setattr(commands, "plan", ours["plan"])
    assert main(["plan", "model", "stats", "--out", "plan"]) == status
    lines = capsys.readouterr().err.splitlines()
    assert line in lines
    assert (len(lines) == 1) == (status != 3) and ("please report it" in lines[-1]) == (status == 3)
