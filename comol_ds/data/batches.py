"""Which records go into which batch of which rank.

A unit is what fills one row: a record, or a packed bin of records. The order of the units depends on (seed, epoch)
and on the global batch, never on how many ranks or accumulation steps share it: optimizer step s of an epoch trains
on the same records on 1 x 4 as on 4 x 1.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from comol_ds.data.collate import packed_batch, padded_batch, prompt_batch
from comol_ds.data.packing import pack
from comol_ds.errors import UserError
from comol_ds.layout import BatchLayout

# Records of one pool that is sorted by length, in global batches. Wider pools pad less and shuffle less.
GROUPING_POOL = 50


class TrainBatches:
    """The training batches of one data-parallel rank, from data held as a whole.

    Args:
        dataset: columns of `tokenization.TOKEN_FEATURES`.
        layout: how a global batch is spread over ranks and micro-batches.
        dp_rank: this rank among the data-parallel ranks.
        seed: with the epoch, decides the order.
        packing: rows are bins of records up to max_length tokens. The forward needs use_cache=False (see packing.py).
        group_by_length: a global batch holds records of similar length.
        max_length: tokens of a packed row.
        pad_token_id: fills rows to the longest of the micro-batch.

    Attributes:
        steps_per_epoch: optimizer steps of one epoch.
        left_out_per_epoch: units (records or bins) of an epoch that do not fill a global batch; others every epoch.
        units_per_epoch: records, or bins if packing.

    Raises:
        UserError: there are fewer units than one global batch, or packing and group_by_length are both wanted.
    """

    def __init__(
        self,
        dataset: Dataset,
        layout: BatchLayout,
        dp_rank: int,
        seed: int,
        packing: bool,
        group_by_length: bool,
        max_length: int,
        pad_token_id: int,
    ):
        if packing and group_by_length:
            raise UserError("packing and group_by_length are both set; packed rows are equally long, drop one of them")
        self.dataset = dataset
        self.layout = layout
        self.dp_rank = dp_rank
        self.seed = seed
        self.packing = packing
        self.group_by_length = group_by_length
        self.max_length = max_length
        self.pad_token_id = pad_token_id
        self.lengths = np.asarray(dataset["length"][:], dtype=np.int64)
        # How many bins there are depends on the lengths alone, so every epoch has as many.
        self.units_per_epoch = len(pack(self.lengths, max_length)) if packing else len(dataset)
        self.steps_per_epoch = self.units_per_epoch // self.layout.global_batch
        self.left_out_per_epoch = self.units_per_epoch % self.layout.global_batch
        if self.steps_per_epoch == 0:
            packed = f" in {self.units_per_epoch} packed rows" if packing else ""
            raise UserError(
                f"{len(dataset)} training records{packed} do not fill one global batch ({layout}); "
                "lower --global_batch_size or --per_device_train_batch_size, or give more data"
            )

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[dict[str, Any]]]:
        """Yield the micro-batches of this rank for every optimizer step of an epoch, from `start_step` on.

        Each step is a list of `accumulation` micro-batches as `collate.padded_batch` (or `packed_batch`) makes them.
        """
        steps = self._step_units(epoch)
        for units in steps[start_step:]:
            yield [self._micro_batch(units, number) for number in range(self.layout.accumulation)]

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch, and step in it, of the batch that follows `step` optimizer steps."""
        return divmod(step, self.steps_per_epoch)

    def _micro_batch(self, units: list[Sequence[int]], number: int) -> dict[str, Any]:
        mine = self.layout.part(units, number, self.dp_rank)
        if not self.packing:
            return padded_batch(_rows(self.dataset, [unit[0] for unit in mine]), self.pad_token_id)
        return packed_batch([_rows(self.dataset, unit) for unit in mine], self.pad_token_id)

    def _step_units(self, epoch: int) -> list[list[Sequence[int]]]:
        """The units of every step of an epoch; a unit is a list of row numbers."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.dataset))
        if self.packing:
            # Packing the shuffled records gives records of equal length new neighbours in every epoch.
            bins = pack(self.lengths[order], self.max_length)
            units = [order[bins[number]].tolist() for number in rng.permutation(len(bins))]
        else:
            units = order[:, None].tolist()
        kept = self.steps_per_epoch * self.layout.global_batch
        if self.group_by_length:
            return self._grouped(order[:kept], rng)
        return [units[i : i + self.layout.global_batch] for i in range(0, kept, self.layout.global_batch)]

    def _grouped(self, order: np.ndarray, rng: np.random.Generator) -> list[list[Sequence[int]]]:
        pool_size = GROUPING_POOL * self.layout.global_batch
        pools = [order[i : i + pool_size] for i in range(0, len(order), pool_size)]
        by_length = np.concatenate([pool[np.argsort(-self.lengths[pool], kind="stable")] for pool in pools])
        steps = by_length.reshape(self.steps_per_epoch, self.layout.global_batch, 1)
        return steps[rng.permutation(self.steps_per_epoch)].tolist()


class EvalBatches:
    """Every record once over all ranks, longest first, in the same number of batches on every rank.

    Ranks that have no record left get dummy rows without labels, because under ZeRO-3 a forward pass is a collective:
    all ranks must call it equally often. Iterating yields batches as `collate.padded_batch` makes them; sums over
    labels that are not IGNORED are exact, and dummy rows have record id None.

    Args:
        dataset: columns of `tokenization.TOKEN_FEATURES`.
        batch_size: rows per rank and forward pass.
        dp_rank, dp_world: this rank's place among the data-parallel ranks.
        pad_token_id: fills rows to the longest of the batch.
    """

    def __init__(self, dataset: Dataset, batch_size: int, dp_rank: int, dp_world: int, pad_token_id: int):
        self.dataset = dataset
        self.pad_token_id = pad_token_id
        lengths = np.asarray(dataset["length"][:], dtype=np.int64)
        order = np.argsort(-lengths, kind="stable").tolist()
        self.chunks = _share(order, batch_size, dp_rank, dp_world)

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for chunk in self.chunks:
            yield padded_batch(_rows(self.dataset, chunk), self.pad_token_id)


def generation_batches(
    dataset: Dataset,
    batch_size: int,
    dp_rank: int,
    dp_world: int,
    pad_token_id: int,
    max_records: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Left-padded prompts with their reference answers, each once over all ranks, equally many batches on every rank.

    Which records are asked, `asked_records` says.

    Args:
        dataset: columns of `tokenization.TOKEN_FEATURES`.
        batch_size: prompts per rank and call of generate.
        dp_rank, dp_world: this rank's place among the data-parallel ranks.
        pad_token_id: fills prompts on the left.
        max_records: over all ranks; None: all.

    Yields:
        what `collate.prompt_batch` makes.
    """
    chosen = asked_records(dataset, max_records)
    for chunk in _share(chosen, batch_size, dp_rank, dp_world):
        yield prompt_batch(_rows(dataset, chunk), pad_token_id)


def asked_records(dataset: Dataset, max_records: int | None) -> list[int]:
    """Numbers of the records that `generation_batches` asks, those with the longest prompts first.

    Records without an answer, or whose answer was cut away as a whole, are left out. Of more than `max_records` the
    first of every task are taken, in turn, so that small tasks are measured too.
    """
    prompts = np.asarray(dataset["prompt_length"][:], dtype=np.int64)
    lengths = np.asarray(dataset["length"][:], dtype=np.int64)
    has_answer = np.array([bool(reference.strip()) for reference in dataset["reference"][:]], dtype=bool)
    usable = np.flatnonzero((prompts < lengths) & (prompts > 0) & has_answer).tolist()
    chosen = _in_turn(usable, dataset["task"][:])[:max_records]
    return sorted(chosen, key=lambda record: -prompts[record])


def _in_turn(records: list[int], tasks: Sequence[str]) -> list[int]:
    """The records reordered: the first of every task, then the second of every task, ..."""
    seen: dict[str, int] = {}
    turns = []
    for record in records:
        turns.append(seen.get(tasks[record], 0))
        seen[tasks[record]] = turns[-1] + 1
    return [record for _, record in sorted(zip(turns, records, strict=True))]


def _share(order: list[int], batch_size: int, dp_rank: int, dp_world: int) -> list[list[int | None]]:
    """This rank's batches of row numbers, filled up with None; batch after batch is dealt to the ranks in turn."""
    over_all = batch_size * dp_world
    filled: list[int | None] = [*order, *[None] * (-len(order) % over_all)]
    return [filled[i : i + batch_size] for i in range(dp_rank * batch_size, len(filled), over_all)]


def _rows(dataset: Dataset, numbers: Sequence[int | None]) -> list[dict[str, Any] | None]:
    """Rows of a data set as dictionaries, None where the number is None."""
    real = [number for number in numbers if number is not None]
    columns = dataset[real] if real else {}
    rows = iter([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])
    return [None if number is None else next(rows) for number in numbers]
