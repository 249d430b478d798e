"""Which rows of a layer's input are real tokens, and which begin a prompt."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from guardspace_kernels.guard.batches import Batch, checked_mask, first_tokens
from guardspace_kernels.guard.exclusive import version_of

PROMPTS, DECODER = "input_ids", "decoder_input_ids"
#: Entries that tell a model where packed prompts begin.
PACKING = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class Tokens:
    """The tokens (rows, places) of a batch that a layer reads.

    Attributes:
        mask, first: of each place, whether a real token is there, and whether a prompt begins with it.
        apart: of each place, whether it is one of the first tokens of a prompt, as many as are kept apart.
        real: indices of the real tokens among all places, None if there is no padding.
        starts, later: among the real tokens, indices of those to keep apart, and a mask of the others.
    """

    def __init__(self, mask: torch.Tensor, first: torch.Tensor | None = None, apart: int = 1) -> None:
        self.mask = mask
        self.first = first_tokens(mask) if first is None else first
        flat, begins = mask.flatten(), self.first[mask]
        self.real = None if flat.all() else flat.nonzero().flatten()
        places = torch.arange(len(begins), device=mask.device)
        starts = places - torch.where(begins, places, 0).cummax(dim=0).values < apart
        self.starts, self.later = starts.nonzero().flatten(), ~starts
        self.apart = torch.zeros_like(mask)
        self.apart[mask] = starts
        self._latest: tuple[torch.Tensor, int, torch.Tensor] | None = None  # an input, its version, its real rows

    def fits(self, x: torch.Tensor) -> bool:
        """Whether x is (rows, places, d), up to dimensions of one, as in multi-head latent attention."""
        return x.dim() > 2 and [n for n in x.shape[:-1] if n > 1] == [n for n in self.mask.shape if n > 1]

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """The real tokens (T, d) of an input that fits, in the mask's order."""
        flat = x.reshape(-1, x.shape[-1])
        if self.real is None:
            return flat
        if self._latest is None or self._latest[0] is not x or self._latest[1] != version_of(x):
            self._latest = x, version_of(x), flat.index_select(0, self.real.to(x.device))
        return self._latest[2]

    def source(self, rows: torch.Tensor) -> torch.Tensor | None:
        """The input that was last asked for its rows, if these are they."""
        return self._latest[0] if self._latest is not None and self._latest[2] is rows else None


def tokens_of(batch: Batch, index: int, apart: int = 1) -> dict[str, Tokens]:
    """What a batch gives a model to read: the tokens of its prompts and, of encoder-decoder models, the decoder's.

    Packed prompts begin where ``position_ids`` start again. ``apart``: of each prompt, so many tokens.

    ValueError if a batch packs prompts and does not say where.
    """
    found = {}
    decodes = isinstance(batch, Mapping) and DECODER in batch
    if not decodes or {"input_ids", "attention_mask"} & set(batch):
        mask, positions = checked_mask(batch, index), batch.get("position_ids")
        packing = [name for name in PACKING if name in batch]
        if packing and positions is None:
            raise ValueError(f"batch {index} has {packing[0]}, as packed prompts do, but no position_ids; give both")
        found[PROMPTS] = Tokens(mask, None if positions is None else _starts(mask, positions), apart)
    if decodes:
        decoder = {"input_ids": batch[DECODER], "attention_mask": batch.get("decoder_attention_mask")}
        mask = checked_mask({name: value for name, value in decoder.items() if value is not None}, index)
        found[DECODER] = Tokens(mask)
    return found


def _starts(mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A mask of the real tokens whose position does not follow that of the one before. Equal ones are of one image,
    unless they are the row's lowest."""
    first = first_tokens(mask)
    text = positions if positions.dim() == 2 else positions[0]
    for row, (real, places) in enumerate(zip(mask, text.expand(mask.shape), strict=True)):
        at = places[real]
        again = (at[1:] < at[:-1]) | ((at[1:] == at[:-1]) & (at[1:] == at.min()))
        first[row, real.nonzero().flatten()[1:][again]] = True
    return first


def misfit(name: str, x: torch.Tensor, streams: Mapping[str, Tokens]) -> str:
    """Why the rows of a layer's input cannot be told apart."""
    masks = [tuple(tokens.mask.shape) for tokens in streams.values()]
    rows = x.shape[:-1].numel()
    if rows in [shape[0] for shape in masks]:
        what = "it reads one row of each prompt, as a pooler or a classifier does"
    elif x.dim() == 2:
        what = (
            "its rows are not those of an enclosing module's input: experts whose router scales or pads what they "
            "read, or a layer that picks some tokens"
        )
    else:
        what = (
            "it does not read the prompts' tokens in their order: an image or audio tower, learned queries, or the like"
        )
    return (
        f"layer {name}: input of shape {tuple(x.shape)} does not match the attention mask "
        f"{' or '.join(map(str, masks))}: {what}; such layers cannot be collected: leave them out of target_modules"
    )
