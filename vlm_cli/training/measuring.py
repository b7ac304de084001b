"""How long a record is for a model, and how the model sees it: its tokens as texts, and what of them is learned."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from vlm_cli.data.record import Record
from vlm_cli.data.shown import Piece
from vlm_cli.data.summary import Measured
from vlm_cli.decoding import decode_after
from vlm_cli.media import MediaLoader
from vlm_cli.processor import VLMProcessor
from vlm_cli.prompt import Text
from vlm_cli.training.preparing import LearnedSequence, RecordPreparer

__all__ = ["RecordMeasure", "show_sequence"]


class RecordMeasure:
    """Measures records for one model.

    Args:
        preparer: for the model.
    """

    def __init__(self, preparer: RecordPreparer) -> None:
        self.preparer = preparer

    @property
    def notes(self) -> list[str]:
        """What the user should know of how the records so far were written."""
        return self.preparer.notes

    def __call__(self, record: Record, loader: MediaLoader) -> Measured:
        """Measure a record. No pixel is decoded.

        Raises:
            VLMError: if the model cannot learn it.
        """
        sequences = self.preparer.prepare(record, loader)
        longest = sequences[-1]
        return Measured(
            tokens=len(longest.ids),
            learned=sum(int(x.is_target.sum()) for x in sequences),
            positions=longest.positions,
            show=lambda: self._show(sequences),
        )

    def _show(self, sequences: Sequence[LearnedSequence]) -> list[Piece]:
        """Return the pieces of all sequences, with an empty line between two."""
        pieces = show_sequence(sequences[0], self.preparer.processor)
        for sequence in sequences[1:]:
            pieces += [Piece(Text("\n\n")), *show_sequence(sequence, self.preparer.processor)]
        return pieces


def show_sequence(sequence: LearnedSequence, processor: VLMProcessor) -> list[Piece]:
    """Return the texts of a sequence's tokens, special ones included, and its media."""
    ids, media = sequence.ids.tolist(), iter(sequence.media)
    kinds = [(token == processor.media_token_id, bool(x)) for token, x in zip(ids, sequence.is_target, strict=True)]
    pieces: list[Piece] = []
    start = 0
    for (is_medium, is_learned), run in groupby(kinds):
        end = start + len(list(run))
        if is_medium:
            pieces += [Piece(next(media)) for _ in range(start, end)]
        else:
            text = decode_after(processor.tokenizer, ids[:start], ids[start:end], skip_special_tokens=False)
            pieces.append(Piece(Text(text), is_learned))
        start = end
    return pieces
