"""The stream of rows: its order, the weights of its sources, and that it continues exactly where it was left."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.support.shards import write_tar
from vlm_cli.data.sources import Row, Source, open_source
from vlm_cli.data.stream import ReadAhead, RowStream
from vlm_cli.errors import DataError


class Counted(Source):
    """Shards of so many rows, in memory; it counts what is read. Every third number is missing, as of blank lines."""

    kind = "counted"

    def __init__(self, name: str, sizes: Sequence[int]) -> None:
        self.name, self.sizes, self.folder = name, sizes, Path()
        self.shards = [f"{name}{i}" for i in range(len(sizes))]
        self.num_read = 0

    def rows(self, shard: int, start: int = 0, known: tuple[int, int] | None = None) -> Iterator[Row]:
        for i in range(self.sizes[shard]):
            number = i + i // 2 + 1
            if number > start:
                self.num_read += 1
                yield Row(self.shards[shard], number, {"id": f"{self.shards[shard]}/{number}"})

    def digest(self) -> str:
        return self.name


def sources() -> list[Counted]:
    return [Counted("a", [30, 0, 50, 7]), Counted("b", [11])]


def open_stream(state: dict[str, Any] | None = None, seed: int = 3, buffer: int = 64) -> ReadAhead:
    return ReadAhead(sources(), [3, 1], buffer=buffer, seed=seed, state=state)


def take(stream: ReadAhead, count: int) -> list[tuple[int, Any]]:
    return [(drawn.number, drawn.row.data["id"]) for drawn in islice(stream, count)]


def test_sources_are_drawn_by_weight_and_each_row_comes_once_in_a_pass() -> None:
    rows = take(open_stream(), 8_000)
    assert [number for number, _ in rows] == list(range(8_000))
    share = sum(name.startswith("a") for _, name in rows) / len(rows)
    assert share == pytest.approx(0.75, abs=0.02)
    counts = Counter(name for _, name in rows if name.startswith("a"))  # 87 rows, and some passes of them
    passes = 8_000 * share / 87
    assert len(counts) == 87 and max(counts.values()) - min(counts.values()) <= 3  # the buffer mixes passes
    assert passes - 3 < min(counts.values()) < passes + 3


def test_without_weights_a_pass_shows_each_row_once() -> None:
    stream = RowStream(sources(), None, buffer=1, seed=0)
    passes = [[drawn.row.data["id"] for drawn in islice(stream, 98)] for _ in range(3)]
    for rows in passes:
        assert len(set(rows)) == 98
        assert max(i for i, name in enumerate(rows) if name.startswith("b")) < 60  # mixed, while both have rows
    assert passes[0] != passes[1]
    rest = ReadAhead(sources(), None, buffer=9, seed=0)
    undisturbed = take(rest, 400)
    assert take(ReadAhead(sources(), None, buffer=9, seed=0, state=rest.state(300)), 100) == undisturbed[300:]


def test_shards_and_rows_are_shuffled_by_the_seed() -> None:
    first, again, other = (take(open_stream(seed=seed), 300) for seed in (3, 3, 4))
    assert first == again and first != other
    one = Counted("a", [500])
    order = [drawn.place.row for drawn in islice(RowStream([one], [1], buffer=100, seed=0), 200)]
    assert order != sorted(order) and max(order) <= 450  # of the first 300 rows
    assert one.num_read == 299  # no row is read before it is needed
    unshuffled = [drawn.place.row for drawn in islice(RowStream([one], [1], buffer=1, seed=0), 200)]
    assert unshuffled == sorted(unshuffled)


@pytest.mark.parametrize(("used", "ahead"), [(0, 0), (1, 5), (100, 200), (257, 1), (1_000, 300)])
def test_a_stream_continues_where_it_was_left(used: int, ahead: int) -> None:
    """However far it was read ahead, and also when it was left a second time."""
    undisturbed = take(open_stream(), 2_000)
    stream = open_stream()
    take(stream, used + ahead)
    state = json.loads(json.dumps(stream.state(used)))
    second = open_stream(state)
    assert take(second, 300) == undisturbed[used : used + 300]
    third = open_stream(json.loads(json.dumps(second.state(used + 270))))
    assert take(third, 400) == undisturbed[used + 270 : used + 670]


def test_a_state_that_forgets_the_buffer_is_another_stream() -> None:
    stream = open_stream()
    before = take(stream, 300)
    state = stream.state(300)
    complete = take(open_stream(state), 300)
    state["stream"]["buffer"] = []
    assert before + complete == take(open_stream(), 600)
    assert take(open_stream(state), 300) != complete


def test_rows_that_wait_come_again() -> None:
    undisturbed = take(open_stream(), 700)
    stream = open_stream()
    take(stream, 650)
    state = stream.state(600, waiting=[340, 598])
    assert take(open_stream(state), 3) == [undisturbed[340], undisturbed[598], undisturbed[600]]


def test_to_continue_reads_few_rows() -> None:
    """A state is small, however far the stream has come, and no shard is read from its start."""

    def large() -> Counted:
        return Counted("large", [40_000])

    stream = ReadAhead([large()], [1], buffer=100, seed=0)
    take(stream, 20_000)
    state = stream.state(20_000)
    assert len(json.dumps(state)) < 5_000
    source = large()
    take(ReadAhead([source], [1], buffer=100, seed=0, state=state), 1)
    assert source.num_read < 3_000


def write_lines(path: Path, count: int) -> None:
    lines = [f'{{"id": "ü{i}", "text": "{"x" * (i % 7)}"}}' for i in range(count)]
    path.write_text("".join(f"{line}\n{chr(10) if i % 3 else ''}" for i, line in enumerate(lines)), encoding="utf-8")


def write_array(path: Path, count: int) -> None:
    path.write_text(
        "\ufeff" + json.dumps([{"id": f"ü{i}", "text": "ü" * 20} for i in range(count)], ensure_ascii=False), "utf-8"
    )


def write_samples(path: Path, count: int) -> None:
    long = "a" * 120  # a name for which tar writes two headers
    write_tar(path, [(f"{long}{i}.json", json.dumps({"id": f"ü{i}"}).encode()) for i in range(count)])


@pytest.mark.parametrize(
    ("name", "write"), [("a.jsonl", write_lines), ("a.json", write_array), ("a.tar", write_samples)]
)
def test_to_continue_reads_no_byte_before_the_rows_that_are_needed(
    tmp_path: Path, name: str, write: Callable[[Path, int], None]
) -> None:
    path, count = tmp_path / name, 1_500
    write(path, count)

    def open_again(state: dict[str, Any] | None = None) -> ReadAhead:
        return ReadAhead([open_source(str(path))], None, buffer=20, seed=0, state=state)

    stream = open_again()
    undisturbed = take(stream, 1_200)
    state = json.loads(json.dumps(stream.state(1_000)))
    begins = [place[4] for place in state["stream"]["buffer"]] + [state["stream"]["readers"][0][3]]
    spoilt = b"\xff" * (min(begins) - 8_192)  # the first bytes tell what the file is
    assert len(spoilt) > path.stat().st_size // 4
    with path.open("r+b") as file:
        file.seek(8_192)
        file.write(spoilt)
    assert take(open_again(state), 200) == undisturbed[1_000:]
    for place in state["stream"]["buffer"]:
        del place[4]  # as of an earlier version, which finds rows by their numbers
    with pytest.raises((DataError, KeyError)):
        take(open_again(state), 200)
    write(path, count)
    assert take(open_again(state), 200) == undisturbed[1_000:]


def test_no_more_rows_are_in_memory_than_the_buffer_holds() -> None:
    alive = 0
    most = 0

    class Watched(dict[str, Any]):
        def __init__(self, data: dict[str, Any]) -> None:
            nonlocal alive, most
            super().__init__(data)
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    class WatchedSource(Counted):
        def rows(self, shard: int, start: int = 0, known: tuple[int, int] | None = None) -> Iterator[Row]:
            for row in super().rows(shard, start):
                yield Row(row.shard, row.number, Watched(row.data))

    stream = ReadAhead([WatchedSource("a", [5_000])], [1], buffer=50, seed=0)
    for _ in range(3_000):
        next(stream)
    assert 50 <= most <= 53  # the row that was drawn, and those under way in the readers


def test_sources_that_are_empty_or_lose_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'none' holds no rows"):
        next(RowStream([Counted("none", [0, 0])], [1], buffer=4, seed=0))
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"id": {i}}}\n' for i in range(400)))
    stream = ReadAhead([open_source(str(path))], [1], buffer=8, seed=0)
    state = [next(stream) for _ in range(300)] and stream.state(300)
    path.write_text('{"id": 0}\n')
    with pytest.raises(DataError, match=r"row \d+ of 'a.jsonl' in '.*' is gone, which the run had read"):
        ReadAhead([open_source(str(path))], [1], buffer=8, seed=0, state=state)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl"):
        list(stream)  # the next pass opens the file again
