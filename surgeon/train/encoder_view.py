"""The forward pass of an encoder-decoder, over rows that are one record each, as those of a decoder are.

A row is what the encoder reads and then the answer. Its first trained token is the last that the encoder reads: in its
place the decoder sees the token that starts it, and from there on the answer. So labels, losses and teachers are those
of a decoder, token by token.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253

from surgeon.gist.masks import Condition, cross_mask, document_numbers, encoder_mask, gist_phases
from surgeon.train.gist_view import Side
from surgeon.train.halves import Halves
from surgeon.train.view import View


@dataclass(frozen=True)
class EncoderDecoder(View):
    """The encoder reads up to the answer, the decoder writes it. `ids` are those of gist tokens.

    Of a prompt neither what follows its gist in the encoder sees anything, nor the decoder.
    """

    has_encoder: ClassVar[bool] = True
    ids: tuple[int, ...]
    condition: Condition = "gist"

    def states(
        self, halves: Halves, input_ids: Tensor, position_ids: Tensor | None, chosen: Tensor, **options: Any
    ) -> Tensor:
        """Return the decoder's states, shape (B, S, D); they are zeros in front of the answer."""
        assert position_ids is not None, "positions tell padding from a document"
        is_ours = document_numbers(position_ids) == 1
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        # A row that lost its answer trains nothing: the decoder starts at its end.
        last = torch.where(chosen.any(1), chosen.long().argmax(1), is_ours.sum(1) - 1)[:, None]
        read = Side(input_ids, position_ids, is_ours & (place <= last))
        is_written = is_ours & (place >= last)
        start = halves.model.config.decoder_start_token_id
        written = Side(input_ids.masked_fill(place == last, start), position_ids, is_written)
        encoded, seen = self._encoded(halves.model, read)
        states = halves.states(
            written.ids,
            attention_mask=written.mask,
            encoder_hidden_states=encoded,
            encoder_attention_mask=seen,
            **options,
        )
        whole = states.new_zeros((*input_ids.shape, states.shape[-1]))
        return whole.index_put(torch.where(is_written), states[written.mask.bool()])

    def _encoded(self, model: Any, read: Side) -> tuple[Tensor, Tensor]:
        """Return the encoder's states of each row, shape (B, T, D), and which of them the decoder sees, (B, T)."""
        phases = gist_phases(read.ids, self.ids, documents=read.mask)
        mask = encoder_mask(model.config, phases, condition=self.condition, padding=read.mask, dtype=model.dtype)
        states: Tensor = model.get_encoder()(input_ids=read.ids, attention_mask=mask)[0]
        return states, cross_mask(phases, condition=self.condition, padding=read.mask)
