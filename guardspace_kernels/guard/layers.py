"""The linear layers of a model: which ones, and their weights."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd

from guardspace_kernels.arguments import instance, iterable

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# ``self.name.weight`` as a whole, but for assignments and questions about it. Slices of it are tensor parallelism
# simulated on request (Bloom), where the layer is not called and collection says so.
_WEIGHT_READ = re.compile(
    r"(?<!isinstance\()\bself\.(\w+)\.weight\b(?!\s*=[^=])(?!\[)(?!\.(?:data\.)?(?:dtype|device|shape|size|ndim|dim|is_|_is_|requires_))"
)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's Conv1D: a linear layer whose weight is stored as (d_in, d_out)."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


# Class -> the child that it wraps. By name, since importing torch's compiler takes seconds.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """What ``torch.compile``, DistributedDataParallel and PyTorch's other wrappers hold; any other model itself."""
    children = (_WRAPPERS.get(c.__name__) for c in type(model).__mro__ if c.__module__.startswith("torch."))
    child = next(filter(None, children), None)
    return model if child is None else unwrapped(model.get_submodule(child))


def peft_model(model: nn.Module) -> nn.Module:
    """The PeftModel in ``model``, however it is wrapped or held; without one, the model unwrapped."""
    model = unwrapped(model)
    return next((m for m in model.modules() if callable(getattr(type(m), "get_base_model", None))), model)


def adapted_base(model: nn.Module) -> nn.Module:
    """The base model whose layers carry adapters, however it is wrapped or held; without PEFT, the model unwrapped.

    Raises:
        ValueError: the model holds several, whose layers one file of adapters cannot tell apart.
    """
    marked = [m for m in model.modules() if "peft_config" in vars(m)]  # PEFT marks the base model, and what is above it
    found = [m for m in marked if not any(n is not m and n in marked for n in m.modules())]
    if len(found) > 1:
        kinds = ", ".join(type(m).__name__ for m in found)
        raise ValueError(f"{type(model).__name__} holds {len(found)} models with adapters ({kinds}); give one of them")
    return unwrapped(found[0] if found else model)


def named_submodules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As ``model.named_modules()``, but what is wrapped inside has the name that it had before."""
    seen: set[nn.Module] = set()

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = unwrapped(module)
        if module in seen:
            return
        seen.add(module)
        yield prefix, module
        for name, child in module.named_children():
            yield from walk(f"{prefix}.{name}" if prefix else name, child)

    return walk("", model)


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` divided its parameters among processes, so that a forward needs all of them."""
    return any(hasattr(module, "unshard") for module in model.modules())


def sharding(model: nn.Module) -> str:
    """What divided its parameters among processes; empty where each process has them whole."""
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            return "FullyShardedDataParallel"
        if hasattr(type(module), "unshard"):
            return "fully_shard"
        for parameter in module._parameters.values():
            if hasattr(parameter, "ds_id"):
                return "DeepSpeed ZeRO-3"
            if hasattr(parameter, "full_tensor"):
                return "a device mesh"
    return ""


def base_model(model: nn.Module) -> nn.Module:
    """The model under a PeftModel; any other model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def linear_weight(module: nn.Module) -> torch.Tensor:
    """The layer's weight as (d_out, d_in): a view, whatever the storage."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if is_conv1d(module) else weight


def layer_weight(model: nn.Module, name: str) -> torch.Tensor:
    """Layer ``name``'s weight as (d_out, d_in), with its values wherever they are."""
    module = model.get_submodule(name)
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    weight = parameter_values(model, f"{name}.weight", weight)
    return weight.T if is_conv1d(module) else weight


def parameter_values(model: nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """The parameter itself, a sharded one gathered, and for one that accelerate offloaded what it would load."""
    gather = getattr(parameter, "full_tensor", None)
    if callable(gather):
        return gather()
    if not parameter.is_meta:
        return parameter
    path = name.split(".")
    for split in reversed(range(len(path))):
        hook = getattr(model.get_submodule(".".join(path[:split])), "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            with suppress(KeyError):
                stored = (getattr(one, "weights_map", None) or {})[".".join(path[split:])]
                return stored.to(parameter.dtype)
    raise ValueError(f"parameter {name} is on the meta device and offloaded nowhere: load the model first")


def check_bare(model: nn.Module) -> None:
    """TypeError unless it is a model without adapters."""
    instance("model", model, nn.Module, "a torch.nn.Module")
    adapted = [name for name, _ in model.named_modules() if ".base_layer" in name or "lora_" in name]
    if adapted:
        raise TypeError(
            f"model already carries adapters (found {adapted[0]}); pass the base model, before attach_guard or PEFT"
        )


def find_layers(model: nn.Module, target_modules: str | Sequence[str] = "all-linear") -> dict[str, nn.Module]:
    """Name -> module of the linear layers to guard, in the model's order.

    Args:
        target_modules: "all-linear" (every Linear or Conv1D, but no head: not the output embedding, nothing outside the
            model's ``base_model``, nothing with one output; nor a layer whose weight its parent reads without calling
            it), a regular expression that must match the whole name, or a list of names or name endings, all as in
            PEFT.

    Raises:
        TypeError: the model carries adapters, is a FullyShardedDataParallel or holds another wrapper, a layer does not
            compute ``x Wᵀ + b`` of a floating-point matrix of its own (quantised, parametrised), its parent reads its
            weight without calling it, or the target includes experts in one parameter (E, ...).
        ValueError: nothing matches, or an entry of the list matches nothing.
    """
    check_bare(model)
    if not isinstance(target_modules, str):
        form = 'a text such as "all-linear", or a list of names'
        iterable("target_modules", target_modules, form)
        target_modules = list(target_modules)
        for one in target_modules:
            instance("target_modules", one, str, f"{form}, each a text")
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)
    }
    wrapped = [(name, module) for name, module in model.named_modules() if unwrapped(module) is not module]
    if wrapped:
        name, module = wrapped[0]
        raise TypeError(
            f"module {name!r} is wrapped in {type(module).__name__}, under which its layers have other names than in "
            "the base model; wrap it after attach_guard"
        )
    flat = [name for name, module in model.named_modules() if type(module).__name__ == "FullyShardedDataParallel"]
    if flat:
        raise TypeError(
            f"FullyShardedDataParallel (module {flat[0]!r}) hides the weights of its layers; shard the model with "
            "torch.distributed.fsdp.fully_shard, or give it unsharded"
        )
    if isinstance(target_modules, str):
        try:
            re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"target_modules={target_modules!r} is no regular expression: {error}") from error
    for name, parameter in _fused_experts(model):
        if _names(target_modules, name, linear):
            raise TypeError(
                f"target_modules={target_modules!r} includes {name}, the weights of all experts as one parameter of "
                f"shape {tuple(parameter.shape)}, which cannot be guarded; name the other layers in target_modules, in "
                "a list or an expression that leaves it out: the experts then stay frozen, as every weight without an "
                "adapter"
            )
    if target_modules == "all-linear":
        heads = _heads(model, linear)
        found = {name: m for name, m in linear.items() if name not in heads and not is_bypassed(model, name)}
    elif isinstance(target_modules, str):
        found = {name: m for name, m in linear.items() if re.fullmatch(target_modules, name)}
    else:
        wanted = set(target_modules)
        found = {name: m for name, m in linear.items() if name in wanted}
        if len(found) < len(wanted):
            matches = {entry: [n for n in linear if n == entry or n.endswith("." + entry)] for entry in wanted}
            idle = sorted(entry for entry, names in matches.items() if not names)
            if idle and len(idle) < len(wanted):
                raise ValueError(f"target_modules entry {idle[0]!r} matches no Linear or Conv1D layer")
            chosen = {name for names in matches.values() for name in names}
            found = {name: m for name, m in linear.items() if name in chosen}
    if not found:
        raise ValueError(
            f"target_modules={target_modules!r} matches no Linear or Conv1D layer; the model has "
            f"{sorted({name.rsplit('.', 1)[-1] for name in linear})}"
        )
    for name, module in found.items():
        check_linear(model, name, module)
        if is_bypassed(model, name):
            raise TypeError(
                f"layer {name}: {type(model.get_submodule(name.rpartition('.')[0])).__name__} reads its weight without "
                "calling it, in a fused kernel for instance, so that an adapter would be passed by; leave it out of "
                "target_modules"
            )
    return found


def output_embedding(model: nn.Module) -> nn.Module | None:
    get_output = getattr(base_model(model), "get_output_embeddings", None)
    return get_output() if callable(get_output) else None


def _heads(model: nn.Module, linear: Mapping[str, nn.Module]) -> set[str]:
    """The output embedding, what is outside the backbone of a Transformers model, and layers of one output: new ones,
    made for a task, of which no rank is free."""
    backbone, head = getattr(model, "base_model", None), output_embedding(model)
    inside = set(backbone.modules()) if isinstance(backbone, nn.Module) else set()
    if not inside & set(linear.values()):
        inside = set(linear.values())
    return {
        name
        for name, module in linear.items()
        if module is head or module not in inside or name.endswith("lm_head") or _outputs(module) == 1
    }


def _outputs(module: nn.Module) -> int:
    return int(module.nf if is_conv1d(module) else module.out_features)  # type: ignore[arg-type]


def is_bypassed(model: nn.Module, name: str) -> bool:
    """Whether the code of the module around a layer reads the layer's weight as a value: Mamba's kernels do."""
    parent, _, leaf = name.rpartition(".")
    return leaf in _read_weights(type(model.get_submodule(parent)))  # type: ignore[arg-type]


@cache
def _read_weights(kind: type) -> frozenset[str]:
    """Names of the submodules whose ``weight`` a class reads, other than to set it up or to ask for its dtype."""
    found: set[str] = set()
    for one in kind.__mro__:
        if one is nn.Module:
            break
        for name, method in vars(one).items():
            if not isinstance(method, FunctionType) or re.search("init|reset|tie", name):
                continue
            with suppress(OSError, TypeError):  # made without a file of source
                found.update(_WEIGHT_READ.findall(inspect.getsource(method)))
    return frozenset(found)


def check_linear(model: nn.Module, name: str, module: nn.Module) -> None:
    """TypeError unless a layer computes ``x Wᵀ + b`` of its own weight, a floating-point matrix.

    A forward of its own, of a subclass or an instance, is called on four random rows.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        raise TypeError(
            f"layer {name}: it has no parameter weight of its own ({type(module).__name__}: parametrised, or packed); "
            "only floating-point matrices can be guarded: remove the parametrisation, or load the model without "
            "quantisation"
        )
    plain = type(weight) is nn.Parameter or hasattr(weight, "full_tensor")
    if not plain or weight.dim() != 2 or weight.dtype not in _DTYPES:
        kind = "" if plain else f" is a {type(weight).__name__} and"
        raise TypeError(
            f"layer {name}: weight{kind} has dtype {weight.dtype} and shape {_shape(weight)}; only floating-point "
            "matrices can be guarded (load the model without quantisation)"
        )
    if _is_plain(module):
        return
    try:
        W = layer_weight(model, name)
    except ValueError:  # a model on the meta device computes nothing
        return
    x = torch.randn(1, 4, W.shape[1], generator=torch.Generator().manual_seed(0)).to(W)
    training = [one for one in module.modules() if one.training]
    module.eval()
    try:
        with torch.no_grad():
            y = module.forward(x.clone())
    except Exception as error:
        raise TypeError(
            f"layer {name}: {type(module).__name__} has a forward of its own, which fails on rows {_shape(x)}: {error}"
        ) from error
    finally:
        for one in training:
            one.training = True
    bias = module._parameters.get("bias")
    check_output(name, y, F.linear(x, W, None if bias is None else parameter_values(model, f"{name}.bias", bias)))


def _is_plain(module: nn.Module) -> bool:
    """Whether the forward is that of Linear or Conv1D. accelerate wraps it, to load what it offloaded."""
    forward = vars(module).get("_old_forward" if hasattr(module, "_hf_hook") else "forward", module.forward)
    kind = sys.modules["transformers.pytorch_utils"].Conv1D if is_conv1d(module) else nn.Linear
    return getattr(forward, "__func__", None) is kind.forward and getattr(forward, "__self__", None) is module


def check_output(name: str, y: object, wanted: torch.Tensor) -> None:
    """TypeError unless y, what layer ``name`` made of some rows, is x Wᵀ + b up to the rounding of the dtype."""
    wanted = wanted.detach()
    if not wanted.isfinite().all():
        return  # then so are the statistics, which are refused
    error = math.inf  # two ways to round one product differ by a third of eps
    if isinstance(y, torch.Tensor) and y.shape == wanted.shape:
        error = float((y.detach().to(wanted) - wanted).float().norm() / wanted.float().norm().clamp_min(1e-30))
    if not error <= max(torch.finfo(wanted.dtype).eps / 2, 1e-5):
        raise TypeError(
            f"layer {name}: its output is not x Wᵀ + b of its weight (they differ by {error:.2g}): a forward of its "
            "own, as of quantised layers, or a hook changes it, and statistics are of that product; leave the layer "
            "out of target_modules, or load the model without quantisation and take its hooks off"
        )


def _shape(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of three dimensions that belong to experts, by their name or their module's class."""
    for prefix, module in model.named_modules():
        if isinstance(module, _ConvNd):
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            about = f"{name} {type(module).__name__}".lower()
            if parameter.dim() == 3 and ("expert" in about or "moe" in about):
                yield name, parameter


def _names(target_modules: str | Sequence[str], parameter: str, linear: Collection[str]) -> bool:
    """Whether a target is meant for this parameter or the module that holds it."""
    owner = parameter.rpartition(".")[0]
    if isinstance(target_modules, str):
        expression = ".*" if target_modules == "all-linear" else target_modules
        return any(re.fullmatch(expression, name) for name in (parameter, owner))
    return any(f".{name}".endswith(f".{e}") for e in target_modules if e not in linear for name in (parameter, owner))
