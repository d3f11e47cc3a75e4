"""Batches from a stream: data too large to tokenize before the run.

Every rank reads and tokenizes the whole stream and keeps its share, so the ranks need no coordination and see the
same order for any number of ranks; the price is that reading is not divided among them. A resumed run reads again
what it had trained on and throws it away.
"""

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any

from datasets import IterableDataset

from comol_ds.data.collate import packed_batch, padded_batch
from comol_ds.data.packing import pack
from comol_ds.errors import UserError
from comol_ds.layout import BatchLayout

SHUFFLE_BUFFER = 5000  # records shuffled among each other
PACKING_WINDOW = 2000  # records packed at a time


class StreamingBatches:
    """The counterpart of `batches.TrainBatches` for a stream, with the same interface.

    Nobody knows the length of an epoch before the stream ends: `steps_per_epoch` is None, the run needs max_steps, and
    epoch 0 is endless. A stream that ends is read again in another order.

    Args:
        dataset: stream of `tokenization.TOKEN_FEATURES`.
        layout, dp_rank, seed, packing, max_length, pad_token_id: as in TrainBatches.
    """

    steps_per_epoch = None

    def __init__(
        self,
        dataset: IterableDataset,
        layout: BatchLayout,
        dp_rank: int,
        seed: int,
        packing: bool,
        max_length: int,
        pad_token_id: int,
    ):
        self.stream = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        self.layout = layout
        self.dp_rank = dp_rank
        self.packing = packing
        self.max_length = max_length
        self.pad_token_id = pad_token_id

    def locate(self, step: int) -> tuple[int, int]:
        """All steps are of epoch 0."""
        return 0, step

    def epoch(self, epoch: int = 0, start_step: int = 0) -> Iterator[list[dict[str, Any]]]:
        """Yield the micro-batches of this rank for every optimizer step from `start_step` on, without end.

        Raises:
            UserError: the stream has no usable record.
        """
        assert epoch == 0, "a stream has one endless epoch"
        units = islice(self._units(), start_step * self.layout.global_batch, None)
        while True:
            step = list(islice(units, self.layout.global_batch))
            yield [self._micro_batch(step, number) for number in range(self.layout.accumulation)]

    def _micro_batch(self, units: list[Sequence[dict]], number: int) -> dict[str, Any]:
        mine = self.layout.part(units, number, self.dp_rank)
        if self.packing:
            return packed_batch(mine, self.pad_token_id)
        return padded_batch([unit[0] for unit in mine], self.pad_token_id)

    def _units(self) -> Iterator[Sequence[dict[str, Any]]]:
        for reading in count():
            self.stream.set_epoch(reading)
            records = iter(self.stream)
            is_empty = True
            while window := list(islice(records, PACKING_WINDOW if self.packing else 1)):
                is_empty = False
                for numbers in pack([record["length"] for record in window], self.max_length):
                    yield [window[number] for number in numbers]
            if is_empty:
                raise UserError("the stream of training data has no usable record; give more data")
