import copy

import pytest
import torch
from guard_helpers import PlainModel, tiny_llama, weight_of

from guardspace_kernels.guard.fingerprint import ModelFingerprint, tensor_fingerprint
from guardspace_kernels.guard.layers import find_layers, linear_weight

LLAMA_LAYERS = list(find_layers(tiny_llama()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensor_fingerprint_depends_on_the_bits_only(dtype):
    t = torch.randn(70, 90).to(dtype)
    mark = tensor_fingerprint(t)
    assert mark == tensor_fingerprint(t.clone())
    assert mark == tensor_fingerprint(t.T.contiguous().T)  # other strides
    buffer = torch.zeros(t.numel() + 1, dtype=dtype)
    buffer[1:] = t.reshape(-1)
    assert mark == tensor_fingerprint(buffer[1:].view(70, 90))  # unaligned, as in a flat buffer
    for position in ((0, 0), (69, 89), (35, 1)):
        changed = t.clone()
        changed[position] = torch.nextafter(changed[position], changed.new_tensor(9.0))
        assert mark != tensor_fingerprint(changed)
    assert mark != tensor_fingerprint(t.flip(0)) and mark != tensor_fingerprint(t.flip(1))
    assert mark != tensor_fingerprint(t.reshape(90, 70))
    swapped = t.clone()
    swapped[0, :2] = t[0, :2].flip(0)
    assert mark != tensor_fingerprint(swapped)


def test_tensor_fingerprint_of_odd_tensors():
    kinds = [torch.zeros(()), torch.zeros(0), torch.zeros(0, 3), torch.zeros(3), torch.zeros(3).half()]
    assert len({tensor_fingerprint(t) for t in kinds}) == len(kinds)
    assert tensor_fingerprint(torch.tensor([1.0, 2.0])) != tensor_fingerprint(torch.tensor([2.0, 1.0]))
    with pytest.raises(ValueError, match="on the meta device: load the model first"):
        tensor_fingerprint(torch.zeros(2, device="meta"))


def test_model_fingerprint_of_a_copy_and_of_changed_models():
    model = tiny_llama(tied=True)
    mine = ModelFingerprint.of(model, LLAMA_LAYERS)
    mine.check(ModelFingerprint.of(copy.deepcopy(model), LLAMA_LAYERS), "the statistics")
    mine.check(ModelFingerprint.of(tiny_llama(tied=True), LLAMA_LAYERS[3:5]), "the statistics")  # a subset

    for part, where in [
        ("model.layers.1.mlp.up_proj", r"layer model\.layers\.1\.mlp\.up_proj differs\. They"),
        ("model.embed_tokens", "a weight outside the guarded layers differs"),
        ("model.norm", "a weight outside the guarded layers differs"),
    ]:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_submodule(part).weight.view(-1)[7] += 1e-3
        with pytest.raises(ValueError, match=f"the statistics belong to another model: {where}"):
            mine.check(ModelFingerprint.of(other, LLAMA_LAYERS), "the statistics")
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.q_proj differs \(and 13 more\)"):
        mine.check(ModelFingerprint.of(tiny_llama(seed=1, tied=True), LLAMA_LAYERS), "the statistics")


def test_fingerprint_of_tied_layers():
    model = PlainModel(d=8)
    model.k.weight = model.q.weight
    mine = ModelFingerprint.of(model, ["q", "k"])
    assert mine.layers["q"] == mine.layers["k"]
    assert torch.equal(weight_of(model, "k"), linear_weight(model.k).double())
