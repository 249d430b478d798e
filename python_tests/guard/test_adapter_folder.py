"""The folder of a saved adapter: whatever a kill leaves in it, and who else writes or alters it."""

import os
import shutil
import stat
import threading
import warnings

import peft
import pytest
import torch
from guard_helpers import PlainModel, batch_of, collect, perturb, plan_for, rewrite
from safetensors.torch import load_file

import guardspace_kernels as gk
from guardspace_kernels.guard.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, GUARD_FILE

NAMES = sorted([ADAPTER_CONFIG, ADAPTER_WEIGHTS, GUARD_FILE])


@pytest.fixture(scope="module")
def plans():
    model = PlainModel()
    stats = collect(model)
    return {rank: plan_for(model, stats, rank=rank) for rank in (2, 3)}


def trained(plan, seed):
    return perturb(gk.attach_guard(PlainModel(), plan), seed=seed)


def factors(model):
    return {
        name: (layer.A.detach().clone(), layer.B.detach().clone()) for name, layer in model.guarded_layers().items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, y) for n in a for x, y in zip(a[n], b[n], strict=True))


def killed_at(step, work):
    """Runs ``work`` in a process that dies before its ``step``-th call that the file system sees; whether it died."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            left = step

            def dying(function):
                def call(*args, **kwargs):
                    nonlocal left
                    left -= 1
                    if left == 0:
                        os._exit(9)
                    return function(*args, **kwargs)

                return call

            for name in ("open", "fsync", "replace", "unlink"):
                setattr(os, name, dying(getattr(os, name)))
            work()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def loaded(plan, folder, model=None):
    """The factors that a model of the plan loads; the text of a refusal."""
    model = model or gk.attach_guard(PlainModel(), plan)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model.load_adapter(folder)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return factors(model)


def plain_logits(folder):
    model = peft.PeftModel.from_pretrained(PlainModel(), str(folder)).eval()
    with torch.no_grad():
        return model(**batch_of())


@pytest.mark.parametrize("ranks", [(2, 2), (2, 3), (None, 2)], ids=str)
def test_after_a_kill_at_any_point_the_old_or_the_new_adapter_loads(plans, tmp_path, ranks):
    new = trained(plans[ranks[1]], seed=2)
    old = trained(plans[ranks[0]], seed=1) if ranks[0] else None
    for folder, model in (("old", old), ("new", new)):
        (tmp_path / folder).mkdir()
        if model is not None:
            model.save_pretrained(tmp_path / folder)
            (tmp_path / folder / "optimizer.pt").write_text("of others")
    readers = {rank: gk.attach_guard(PlainModel(), plan) for rank, plan in plans.items()}
    outcomes, logits = [], {name: plain_logits(tmp_path / name) for name in ("old", "new") if name == "new" or old}
    for step in range(1, 100):
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "old", folder)
        died = killed_at(step, lambda folder=folder: new.save_pretrained(folder))
        found = loaded(None, folder, readers[ranks[1]])
        if isinstance(found, dict) and same(found, factors(new)):
            outcomes.append("new")
        else:
            outcomes.append("old")
            if old is None:
                assert "has no guardspace.safetensors" in found or "adapter_model.safetensors does not exist" in found
            else:
                assert same(loaded(None, folder, readers[ranks[0]]), factors(old)), found
        if (folder / ADAPTER_CONFIG).exists():
            assert any(torch.equal(plain_logits(folder), wanted) for wanted in logits.values())
        else:
            assert ranks[0] != ranks[1]
            with pytest.raises(ValueError, match=r"adapter_config\.json"):
                plain_logits(folder)
        if old is not None:
            assert (folder / "optimizer.pt").read_text() == "of others"
        new.save_pretrained(folder)  # what was left behind goes
        assert [name for name in sorted(os.listdir(folder)) if name != "optimizer.pt"] == NAMES
        assert same(loaded(None, folder, readers[ranks[1]]), factors(new))
        if not died:
            break
    assert outcomes[-1] == "new" and outcomes == sorted(outcomes, reverse=True) and step > 15
    assert outcomes.count("old") > 5 and (outcomes.count("new") > 3 or old is None)


def test_an_interrupted_save_is_said(plans, tmp_path):
    old, new = trained(plans[2], 1), trained(plans[2], 2)
    old.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    new.save_pretrained(tmp_path / "a")
    shutil.copy(tmp_path / "b" / ADAPTER_WEIGHTS, tmp_path / "a")  # as before the second rename
    model = gk.attach_guard(PlainModel(), plans[2])
    with pytest.warns(
        UserWarning,
        match=r"saving to .*/a was interrupted: guardspace\.safetensors is complete and is loaded, adapter_m",
    ):
        model.load_adapter(tmp_path / "a")
    assert same(factors(model), factors(new))


@pytest.mark.parametrize("name", [ADAPTER_WEIGHTS, ADAPTER_CONFIG])
def test_an_altered_file_is_named(plans, tmp_path, name):
    trained(plans[2], 1).save_pretrained(tmp_path)
    if name == ADAPTER_CONFIG:
        path = tmp_path / name
        path.write_text(path.read_text().replace('"lora_alpha": 4', '"lora_alpha": 4000'))
    else:  # its numbers move by less than rounding
        raw = bytearray((tmp_path / name).read_bytes())
        raw[-4] ^= 1
        (tmp_path / name).write_bytes(raw)
    assert f"{name} is not what was saved with guardspace.safetensors; it was altered, or another" in loaded(
        plans[2], tmp_path
    )
    (tmp_path / name).unlink()
    if name == ADAPTER_WEIGHTS:
        assert "adapter_model.safetensors does not exist (a file with the adapter's weights was expected)" in loaded(
            plans[2], tmp_path
        )


def test_an_export_over_a_saved_adapter_is_said(plans, tmp_path):
    trained(plans[2], 1).save_pretrained(tmp_path)
    gk.export_lora(trained(plans[2], 2), tmp_path)
    assert "disagree" in loaded(plans[2], tmp_path)


def test_a_forged_file_for_resuming_is_refused(plans, tmp_path):
    model = trained(plans[2], 1)
    for change, match in (
        (lambda tensors, _: tensors.update(extra=torch.ones(1)), "holds extra, which this model's plan has not"),
        (lambda _, header: header.update(plan=1), r"header\.plan must be a text, got 1"),
        (lambda _, header: header.update(files={}), r"header\.files lacks adapter_model\.safetensors"),
        (lambda _, header: header["files"].update({ADAPTER_CONFIG: "0"}), "must be a list of 2 entries"),
        (lambda _, header: header.update(more=1), "header has an unknown entry 'more'"),
    ):
        model.save_pretrained(tmp_path)
        rewrite(tmp_path / GUARD_FILE, change)
        before = factors(fresh := gk.attach_guard(PlainModel(), plans[2]))
        with pytest.raises(ValueError, match=match):
            fresh.load_adapter(tmp_path)
        assert same(factors(fresh), before)


def test_folders_of_earlier_versions_are_read(plans, tmp_path):
    model = trained(plans[2], 1)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path / GUARD_FILE, lambda _, header: header.pop("files"), earlier=True)
    fresh = gk.attach_guard(PlainModel(), plans[2])
    with pytest.warns(UserWarning, match="holds no hashes"):
        fresh.load_adapter(tmp_path)
    assert same(factors(fresh), factors(model))


def test_the_same_configuration_has_the_same_bytes(plans, tmp_path):
    for seed in (1, 2):
        trained(plans[2], seed).save_pretrained(tmp_path / str(seed))
    assert (tmp_path / "1" / ADAPTER_CONFIG).read_bytes() == (tmp_path / "2" / ADAPTER_CONFIG).read_bytes()


def test_all_files_have_the_mode_of_any_new_file(plans, tmp_path):
    before = os.umask(0o027)
    try:
        trained(plans[2], 1).save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_of_several_savers_one_whole_result_wins(plans, tmp_path):
    """And every reader meanwhile finds a whole one."""
    models = [trained(plans[2], seed) for seed in range(3)]
    wanted, failures, found = [factors(m) for m in models], [], []
    readers = [gk.attach_guard(PlainModel(), plans[2]) for _ in range(2)]
    models[0].save_pretrained(tmp_path)

    def save(model):
        for _ in range(8):
            model.save_pretrained(tmp_path)

    def read(model):
        for _ in range(12):
            model.load_adapter(tmp_path)
            found.append(factors(model))

    def run(work, model):
        try:
            work(model)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(save, m)) for m in models]
    threads += [threading.Thread(target=run, args=(read, m)) for m in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and sorted(os.listdir(tmp_path)) == NAMES
    assert len(found) == 24 and all(any(same(one, ours) for ours in wanted) for one in found)
    exported = load_file(tmp_path / ADAPTER_WEIGHTS)
    final = loaded(plans[2], tmp_path)
    winner = next(m for m, ours in zip(models, wanted, strict=True) if same(final, ours))
    winner.save_pretrained(tmp_path / "again")
    assert all(torch.equal(t, exported[n]) for n, t in load_file(tmp_path / "again" / ADAPTER_WEIGHTS).items())
