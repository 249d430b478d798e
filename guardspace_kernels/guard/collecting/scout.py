"""What a model's layers read, and between which of its blocks: seen in a forward before collecting."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from guardspace_kernels.guard.batches import Batch, evaluating, forward_batch, needs_decoder_ids
from guardspace_kernels.guard.collecting.collector import CollectedInput, Collector
from guardspace_kernels.guard.collecting.trial import Trial
from guardspace_kernels.guard.exclusive import version_of
from guardspace_kernels.guard.fingerprint import tensor_fingerprint
from guardspace_kernels.guard.layers import linear_weight
from guardspace_kernels.guard.passes import LayerInput, Replay, blocks_of, output_of
from guardspace_kernels.guard.routing import Routing, grouped_as_siblings
from guardspace_kernels.guard.sampling import Marks
from guardspace_kernels.guard.tokens import DECODER, PROMPTS, Tokens, tokens_of


class Scout(Collector):
    """Sees in one forward which layers read which tensor, and between which blocks; accumulates nothing."""

    def __init__(
        self, layers: Mapping[str, nn.Module], blocks: Sequence[nn.Module], routing: Routing, stream: Mapping[str, str]
    ) -> None:
        super().__init__(layers, layers, torch.float32, False, routing, stream)
        self.blocks = blocks
        self.begun: list[int] = []
        self.results: list[torch.Tensor | None] = []
        self.after: dict[str, int] = {}
        self.read: dict[str, str] = {}  # fingerprints, by the layers of the second half of the blocks

    @contextmanager
    def counting(self, streams: Mapping[str, Tokens], marks: Marks | None = None) -> Iterator[None]:
        handles = []
        for i, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(lambda _module, _args, i=i: self.begun.append(i)))
            handles.append(
                block.register_forward_hook(lambda _module, _args, result: self.results.append(output_of(result)))
            )
        try:
            with super().counting(streams, marks):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def see(self, name: str, x: torch.Tensor, tokens: Tokens | None) -> None:
        self.after.setdefault(name, len(self.results))
        if not x.is_meta and self.blocks and len(self.results) >= len(self.blocks) // 2:
            self.read[name] = tensor_fingerprint(x)
        super().see(name, x, tokens)

    def begin(self, x: torch.Tensor) -> CollectedInput:
        return CollectedInput(0, self.dtype, x.device, self.batch)

    def update(self, name: str, mine: CollectedInput, x: torch.Tensor, tokens: Tokens | None) -> None:
        mine.tensor, mine.version = weakref.ref(x), version_of(x)
        if tokens is None and not x.is_meta:
            self.routing.look(name, x)

    def layer_inputs(self) -> list[LayerInput]:
        """In the order of the model; layers that were not reached are at the end."""
        groups = [one.layers for one in self.inputs]
        lists = self.routing.containers | self.routing.flat
        groups += grouped_as_siblings([name for name in self.layers if name not in self.after], groups, lists)
        probes = self.sampler.probes
        return [
            LayerInput(
                tuple(group),
                linear_weight(self.layers[group[0]]).shape[1],
                self.after.get(group[0], 0),
                not probes.isdisjoint(group),
            )
            for group in groups
        ]


def distinct_inputs(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[LayerInput]:
    """Which of the layers read the same tensor, from a forward of a few tokens; of a model on the meta device too.

    TypeError if that one's forward does not run there, as where a router's choice of experts needs values.
    """
    scout = Scout(layers, blocks_of(model, list(layers)), Routing(model), {})
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())  # accelerate loads as the forward goes
    device = torch.device("cpu") if offloaded else next(model.parameters()).device
    sizes = {PROMPTS: 4, DECODER: 3} if needs_decoder_ids(model) else {PROMPTS: 4}
    streams = tokens_of({key: torch.ones(1, size).long() for key, size in sizes.items()}, 0)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(scout.counting(streams))
        if device.type == "meta":  # a forward may look at values, of masks for instance, that only fake tensors have
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        try:
            # Other tokens than the first, for other experts.
            forward_batch(model, {key: torch.arange(size, device=device)[None] for key, size in sizes.items()})
        except RuntimeError as error:
            if device.type != "meta":
                raise
            raise TypeError(
                f"this model's forward does not run on the meta device, without values ({error}): routed experts need "
                "them; load the model's weights for an estimate"
            ) from error
    return scout.layer_inputs()


def scouted(trial: Trial, batch: Batch) -> tuple[list[LayerInput], Replay | None, int, bool]:
    """(distinct inputs, replay, bytes of a block's output per token, whether a forward may be left early)."""
    model, layers, routing = trial.model, trial.layers, trial.routing
    blocks, streams = blocks_of(model, list(layers)), tokens_of(batch, 0)
    scout = Scout(layers, blocks, routing, trial.stream)
    replay = Replay(blocks)
    replay.begin(0, len(blocks) // 2)
    with scout.counting(streams), replay.run(0):
        trial.forward(batch, 0)
    once = scout.once(model)
    in_order = len(blocks) > 1 and scout.begun == list(range(len(blocks)))
    results = [result for result in scout.results if result is not None]
    if not (once and in_order and len(results) == len(blocks)):
        return scout.layer_inputs(), None, 0, once
    # What the second half of the blocks reads may depend on the first half through its output only. In between the
    # model sees the prompts reversed, so that whatever else the first half leaves behind is wrong.
    if "input_ids" in batch:
        trial.forward({**batch, "input_ids": batch["input_ids"].flip(1)}, 0)
    replay.begin(len(blocks) // 2, len(blocks) // 2)
    again = Scout(layers, blocks, routing, trial.stream)
    try:
        with again.counting(streams), replay.run(0):
            trial.forward(batch, 0)
        same = again.read == scout.read
    except Exception:  # what the first half hands to the second otherwise, such as keys and values, may be missing
        same = False
    per_token = results[0].nbytes // next(iter(streams.values())).mask.numel()
    return scout.layer_inputs(), Replay(blocks) if same else None, per_token, once
