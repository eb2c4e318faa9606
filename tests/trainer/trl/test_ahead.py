"""The order of prompts when some are read ahead: the loader's own, each batch once."""

import itertools

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sapo_trl.trainer.trl.ahead import BatchesAhead


class Loader:
    """Epochs of numbered batches, which notes each batch that is read."""

    def __init__(self, lengths):
        self.lengths = lengths
        self.read = []

    def epoch(self, number, skip=0):
        length = self.lengths[number] if number < len(self.lengths) else 0
        for index in range(skip, length):
            self.read.append((number, index))
            yield [{"prompt": (number, index)}]


def names(batches):
    return [batch[0]["prompt"] for batch in batches]


@settings(max_examples=200, deadline=None, phases=[Phase.generate])
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    skip=st.integers(0, 6),
    counts=st.lists(st.integers(1, 3), min_size=40, max_size=40),
    distances=st.lists(st.integers(0, 5) | st.none(), min_size=40, max_size=40),
)
def test_peeking_changes_neither_order_nor_number(lengths, skip, counts, distances):
    """As the trainer does: epoch by epoch, the first after a skip, with a look ahead now and then."""
    loader = Loader(lengths)
    ahead = BatchesAhead(loader.epoch)
    skip = min(skip, lengths[0] - 1)
    expected = [(n, i) for n, length in enumerate(lengths) for i in range(skip if n == 0 else 0, length)]
    taken, moves = [], iter(zip(counts, distances, strict=True))
    for number in range(len(lengths)):
        iterator = loader.epoch(number, skip if number == 0 else 0)
        of_epoch = [name for name in expected if name[0] == number]
        while of_epoch:
            count, distance = next(moves, (1, None))
            batches = names(ahead.take(iterator, number, count))
            assert batches == of_epoch[:count]
            taken, of_epoch = taken + batches, of_epoch[count:]
            if distance is not None:
                rest = expected[len(taken) :]
                found = ahead.peek(distance)
                assert (found and names([found])[0]) == (rest[distance] if distance < len(rest) else None)
        assert ahead.take(iterator, number, 1) == []  # the next epoch's batches wait for the trainer to begin it
    assert taken == expected
    assert len(loader.read) == len(set(loader.read))


def test_the_batch_that_was_looked_at_is_the_one_that_comes():
    """Not a copy: the trainer recognises the rows whose responses it has requested."""
    loader = Loader([2, 2])
    ahead = BatchesAhead(loader.epoch)
    ahead.take(loader.epoch(0), 0, 2)
    seen = ahead.peek(1)
    (first, second) = ahead.take(loader.epoch(1), 1, 2)
    assert second is seen and first is not seen


def test_an_epoch_that_ends_early_leaves_nothing_behind():
    """A callback may end an epoch: the next one begins at its own first batch."""
    loader = Loader([4, 4])
    ahead = BatchesAhead(loader.epoch)
    ahead.take(loader.epoch(0), 0, 1)
    ahead.peek(1)
    assert names(ahead.take(loader.epoch(1), 1, 2)) == [(1, 0), (1, 1)]


def test_epochs_without_a_batch_end_the_search():
    starts = []

    def start(epoch):
        starts.append(epoch)
        return iter(())

    ahead = BatchesAhead(start)
    assert ahead.take(iter([[{"prompt": "only"}]]), 3, 1) == [[{"prompt": "only"}]]
    assert ahead.peek(0) is None and ahead.peek(5) is None
    assert starts == list(itertools.islice(itertools.count(4), 1))
