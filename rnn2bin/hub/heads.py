"""The packed network under transformers' names for tasks: AutoModelForSequenceClassification, …TokenClassification, …CausalLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.generation.utils import GenerationMixin

from rnn2bin.errors import UsageError
from rnn2bin.hub.config import Rnn2binConfig
from rnn2bin.hub.model import Rnn2binModel, Rnn2binOutput

IGNORE = -100


class _Head(Rnn2binModel):
    """A network of one task. `logits` of its outputs are pre-activation, as losses and pipelines want them."""

    per_step: bool
    wanted: str

    def __init__(self, config: Rnn2binConfig) -> None:
        super().__init__(config)
        main = self.network.spec.sections.get("main")
        if main is None or main.per_step != self.per_step:
            raise UsageError(f"{type(self).__name__}: the network does not give {self.wanted}; AutoModel loads any packed network")

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        labels: Tensor | None = None,
        state: Any = None,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> Rnn2binOutput | tuple[Any, ...]:
        """As Rnn2binModel; `labels` give `loss`, −100 not counted. Of a pipeline's other arguments (use_cache, token_type_ids) a recurrent
        network reads none."""
        given: dict[str, Any] = {"inputs": inputs, "attention_mask": attention_mask, "lengths": lengths, "state": state}
        out = self.run(input_ids, logits=True, **given)
        out.loss = None if labels is None or out.logits is None else self.loss_of(out.logits, labels)
        if return_dict is False:
            return tuple(value for value in (out.loss, out.logits, out.state) if value is not None)
        return out

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of logits (…,O) against classes (…); of one output the binary one."""
        if logits.shape[-1] > 1:
            return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE)
        counted = labels != IGNORE
        return functional.binary_cross_entropy_with_logits(logits[..., 0][counted], labels[counted].to(logits.dtype))


class Rnn2binForSequenceClassification(_Head):
    """logits (B,O) of one class a sequence."""

    per_step, wanted = False, "one output a sequence"


class Rnn2binForTokenClassification(_Head):
    """logits (B,T,O) of one class a step."""

    per_step, wanted = True, "one output a step"


class Rnn2binForCausalLM(_Head, GenerationMixin):
    """logits (B,T,V) of the next token; `generate` carries the state, so that every new token costs one step.

    Greedy search and sampling. Prompts of one batch have the same length: a recurrent network cannot look past pads on the left.
    """

    per_step, wanted = True, "one output a step"
    _is_stateful = True  # its state cannot be cut back to an earlier token
    main_input_name = "input_ids"

    def __init__(self, config: Rnn2binConfig) -> None:
        super().__init__(config)
        main = self.network.spec.main
        if main.embedding is None or main.embedding.num_embeddings != main.output_size or not main.windowed:
            raise UsageError("Rnn2binForCausalLM: the network does not read the tokens it gives; AutoModel loads any packed network")

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`labels` are the inputs: they are shifted here, as in every causal model of transformers."""
        return super().loss_of(logits[:, :-1], labels[:, 1:])

    def generate(self, inputs: Tensor | None = None, **options: Any) -> Any:
        """As in transformers. Raises UsageError for beams, whose states this model does not reorder."""
        chosen = options.get("generation_config") or self.generation_config
        if options.get("num_beams", getattr(chosen, "num_beams", None)) not in (None, 1):
            raise UsageError("generate: beam search is not supported; leave num_beams at 1")
        prompt = inputs if inputs is not None else options.get("input_ids")
        if options.get("attention_mask") is None and prompt is not None:
            options["attention_mask"] = torch.ones_like(prompt)  # transformers would take every token that is the pad's number for a pad
        return super().generate(inputs, **{"use_cache": False, **options})

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, state: Any = None, attention_mask: Any = None, **options: Any
    ) -> dict[str, Any]:
        """The last token alone once there is a state."""
        if state is not None:
            return {"input_ids": input_ids[:, -1:], "state": state}
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            raise UsageError("generate: prompts of one batch must have the same length; generate them one by one")
        return {"input_ids": input_ids, "state": None}

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **options: Any) -> dict[str, Any]:
        changed = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **options)
        changed = model_kwargs if changed is None else changed
        changed["state"] = outputs.state
        return changed


HEADS: dict[str, type[_Head]] = {
    "AutoModelForSequenceClassification": Rnn2binForSequenceClassification,
    "AutoModelForTokenClassification": Rnn2binForTokenClassification,
    "AutoModelForCausalLM": Rnn2binForCausalLM,
}
