"""A packed directory as a transformers model: the torch backend's arithmetic, batch first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import ModelOutput

from rnn2bin import pack
from rnn2bin.cells.network import Network, State
from rnn2bin.cells.weights import Cell
from rnn2bin.errors import UsageError
from rnn2bin.hub.config import Rnn2binConfig
from rnn2bin.spec import LayerSpec


@dataclass
class Rnn2binOutput(ModelOutput):
    """`logits` (B,T,O), or (B,O) where the network reads out one value a sequence: after the head's last activation, as the torch backend
    gives it. `state`: [layer][direction] of (h,) or (h, c), each (B,·)."""

    logits: Tensor | None = None
    state: Any = None
    loss: Tensor | None = None

    @property
    def y(self) -> Tensor | None:
        """`logits` under the name that rnn2bin's own model uses."""
        return self.logits


class Rnn2binModel(PreTrainedModel):
    """Weights are fp16 on disk and computed with in fp32, as the torch backend does, so the two agree."""

    config_class = Rnn2binConfig
    main_input_name = "input_ids"

    def __init__(self, config: Rnn2binConfig) -> None:
        if getattr(config, "kind", None) == "module":
            raise UsageError("made from an nn.Module, whose code is not packed; load it with rnn2bin.load(path, module=the float module)")
        super().__init__(config)
        network = pack.build({"spec": config.spec, "gates": config.gates, "levels": config.levels})
        # The sections stand directly under the model: tensors bear the packed file's names, with no prefix.
        for name, section in network.named_children():
            self.add_module(name, section)
        self.__dict__["network"] = network
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Buffers that are not in the file; loading leaves them empty. Their values follow from the kind of cell alone."""
        if isinstance(module, Cell) and any(module.binary):
            with torch.device("cpu"):
                like = Cell(LayerSpec(module.layer.cell, 1, 1), module.binary, levels="learned" if module.learned else "strict")
            for name, values in like.named_buffers(recurse=False):
                module.get_buffer(name).copy_(values)

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any):
        """As in transformers, in float32 unless `dtype` names another: "auto", which pipelines ask for, would be that of the file, in which
        nothing is computed."""
        if options.get("dtype") in (None, "auto"):
            options["dtype"] = torch.float32
        return super().from_pretrained(*args, **options)

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:  # type: ignore[override]
        """As in transformers, rounded to fp16: what was loaded from fp16 is written back exactly, and rnn2bin.load reads it too."""
        state = options.pop("state_dict", None) or self.state_dict()
        super().save_pretrained(save_directory, state_dict={name: t.to(torch.float16) for name, t in state.items()}, **options)
        self.config.dtype = torch.float16
        self.config.save_pretrained(Path(save_directory))

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        state: State | None = None,
        return_dict: bool | None = None,
    ) -> Rnn2binOutput | tuple[Any, ...]:
        """input_ids (B,T) tokens, or inputs (B,T,I) floats. `lengths` (B,) or attention_mask (B,T) with pads on the right: the real steps.

        An encoder–decoder needs decoder_input_ids (B,U). Raises UsageError where the input does not fit the network.
        """
        given: dict[str, Any] = {
            "inputs": inputs,
            "attention_mask": attention_mask,
            "lengths": lengths,
            "decoder_input_ids": decoder_input_ids,
        }
        out = self.run(input_ids, state=state, **given)
        return out if return_dict is not False else (out.logits, out.state)

    def run(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        state: State | None = None,
        logits: bool = False,
    ) -> Rnn2binOutput:
        """What `forward` does; with `logits` the outputs before the head's last activation."""
        from rnn2bin.runtime.torch_backend import check_input

        given = [x for x in (input_ids, inputs) if x is not None]
        if len(given) != 1:
            raise UsageError("give input_ids (B,T) or inputs (B,T,I), one of them")
        x = given[0].transpose(0, 1)
        check_input(x, self.network.spec)
        decoder = None if decoder_input_ids is None else decoder_input_ids.transpose(0, 1)
        if self.network.spec.decode and decoder is None:
            raise UsageError("an encoder–decoder needs decoder_input_ids (B,U); rnn2bin.load(path) runs it free")
        lengths = _lengths(attention_mask) if lengths is None and attention_mask is not None else lengths
        out = self.network(x, state, lengths=lengths, decoder_input=decoder, logits=logits)
        y = out.y.transpose(0, 1) if out.y.ndim == 3 else out.y
        return Rnn2binOutput(logits=y, state=out.state)

    network: Network


def _lengths(mask: Tensor) -> Tensor:
    """(B,T) -> (B,); UsageError where a pad stands before a real step: a recurrent network cannot look past it."""
    real = mask.bool()
    if bool((real[:, 1:] & ~real[:, :-1]).any()):
        raise UsageError("attention_mask: pads must be on the right, after the real steps of each sequence")
    return real.sum(1)
