"""A model that something else runs, trains or compiles while it is collected from."""

import copy
import threading

import pytest
import torch
import transformers
from guard_helpers import PROMPTS, PlainModel, assert_same_bits, batch_of, collect, perturb, plan_for, tiny_llama

import guardspace_kernels as gk
from guardspace_kernels.guard.batches import evaluating

BATCHES = [batch_of(PROMPTS[:3]), batch_of(PROMPTS[3:])]


def in_a_thread(run):
    """What it raises in another thread, as text."""
    raised = []

    def work():
        try:
            run()
        except Exception as error:
            raised.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return raised


class Disturbed(PlainModel):
    """In the middle of every forward of the thread that made it, something else happens."""

    def __init__(self, happens):
        super().__init__()
        self.happens, self.owner, self.raised = happens, threading.get_ident(), []

    def forward(self, input_ids, attention_mask=None):
        if threading.get_ident() == self.owner:
            self.raised.append(in_a_thread(lambda: self.happens(self)))
        return super().forward(input_ids)


@pytest.mark.parametrize("options", [{}, {"max_memory": 650}], ids=str)
def test_another_threads_forward_is_refused_and_counts_for_nothing(options):
    model = Disturbed(lambda model: model(**batch_of([[9, 9, 9]])))
    assert_same_bits(collect(model, BATCHES, **options), collect(PlainModel(), BATCHES))
    told = (
        "RuntimeError: this model is running under collect_statistics or certify in another thread, whose hooks would"
    )
    assert model.raised and all(len(one) == 1 and one[0].startswith(told) for one in model.raised)
    model(**batch_of())
    assert model.raised[-1] == []  # as long as it is collected from only


@pytest.mark.parametrize("part", [lambda model: model, torch.nn.ModuleList([]).append], ids=["itself", "in another"])
def test_another_threads_collection_is_refused_and_counts_for_nothing(part):
    model = Disturbed(lambda model: evaluating(part(model)).__enter__())
    assert_same_bits(collect(model, BATCHES), collect(PlainModel(), BATCHES))
    assert all(
        len(one) == 1 and "is in use by collect_statistics or certify in another" in one[0] for one in model.raised
    )
    assert in_a_thread(lambda: collect(model, BATCHES)) == []


def test_two_collections_that_begin_at_once():
    """Both wait for each other in the iterable of batches: one of them is refused, and the other right."""
    model, barrier, made, raised = PlainModel(), threading.Barrier(2, timeout=20), [], []

    def batches():
        barrier.wait()
        yield from BATCHES

    def work():
        try:
            made.append(collect(model, batches()))
        except RuntimeError as error:
            raised.append(str(error))
            barrier.wait()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(raised) == 1 and "PlainModel is in use by collect_statistics or certify in another thread" in raised[0]
    assert_same_bits(made[0], collect(PlainModel(), BATCHES))


def test_copies_are_collected_at_once_and_one_thread_may_nest():
    copies = Disturbed(lambda model: collect(other, BATCHES))
    other = PlainModel()
    assert_same_bits(collect(copies, BATCHES), collect(PlainModel(), BATCHES))
    assert copies.raised and not any(copies.raised)
    model = PlainModel()

    def nested():
        for batch in BATCHES:
            collect(model, [batch])
            yield batch

    assert_same_bits(collect(model, nested()), collect(PlainModel(), BATCHES))


def test_certify_is_exclusive_too():
    base = tiny_llama()
    stats = collect(base)
    guarded = perturb(gk.attach_guard(base, plan_for(base, stats)))
    raised = []
    guarded.register_forward_pre_hook(lambda *_: raised.extend(in_a_thread(lambda: evaluating(base).__enter__())))
    assert gk.certify(guarded, stats, heldout=[batch_of()], answer_tokens=2).heldout and raised
    assert all("LlamaForCausalLM is in use by collect_statistics or certify" in one for one in raised)


@pytest.mark.parametrize("change", ["mode", "in place", "data"])
def test_a_model_that_is_trained_meanwhile_is_refused(change):
    model = PlainModel()

    def meddling():
        yield BATCHES[0]
        if change == "mode":
            model.k.train()
        elif change == "in place":
            with torch.no_grad():
                model.k.weight.mul_(1.5)
        else:
            model.k.weight.data = 1.5 * model.k.weight.data
        yield BATCHES[1]

    what = "module k was put into training mode" if change == "mode" else "parameter k.weight was changed"
    with pytest.raises(RuntimeError, match=f"{what} while statistics were collected, by another thread, the iter"):
        collect(model, meddling())
    assert len(collect(model, BATCHES).layers) == 3


def test_a_model_that_changes_its_own_weights_is_refused():
    """RWKV divides them before its first forward in eval mode."""
    config = transformers.RwkvConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, rescale_every=1)
    with pytest.raises(
        RuntimeError, match=r"parameter rwkv\.blocks\.\d\.\S+ was changed .*the model's own forward: they"
    ):
        collect(transformers.RwkvForCausalLM(config))


@pytest.mark.parametrize("how", ["in place", "a block in place", "around"])
def test_compiled_models_run_as_they_are(how):
    ran = []

    def backend(graph, _inputs):
        ran.append(1)
        return graph.forward

    model, base = tiny_llama(), tiny_llama()
    if how == "around":
        model = torch.compile(model, backend=backend)
    else:
        (model if how == "in place" else model.model.layers[1]).compile(backend=backend)
    calls = [module._compiled_call_impl for module in model.modules()]
    stats = collect(model, BATCHES)
    assert_same_bits(stats, collect(base, BATCHES))
    assert plan_for(model, stats).fingerprint == plan_for(base, stats).fingerprint
    assert not ran and [module._compiled_call_impl for module in model.modules()] == calls
    if how == "around":
        return
    guarded = gk.attach_guard(model, plan_for(model, stats))
    assert torch.allclose(guarded(**batch_of()).logits, base(**batch_of()).logits, atol=1e-4)


def test_bfloat16_without_instructions_for_it_is_warned_of(monkeypatch, recwarn):
    model = tiny_llama(dtype=torch.bfloat16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    collect(model)
    assert not [one for one in recwarn if "bfloat16" in str(one.message)]
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    collect(copy.deepcopy(model).float())
    assert not [one for one in recwarn if "bfloat16" in str(one.message)]
    with pytest.warns(
        UserWarning, match=r"q_proj is bfloat16, which this CPU has no instructions for.*model\.float\(\)"
    ):
        collect(model)
    monkeypatch.setattr(torch.ops, "mkldnn", None)  # a build without it
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    collect(model)
