from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stages.core.artifact import KEYS, Shard
from stages.core.errors import InputError
from stages.core.shard import ShardWriter, read_shard
from stages.train import draws
from stages.train.data import READ_AHEAD, Batch, ReadAhead, Shelf, TextEmbeddings, TrainingData, read_entries
from stages.train.order import Order
from tests.train.conftest import T5, listed

CPU = torch.device("cpu")


def data_of(made: Any, held_out: set[str] | None = None, dtype: torch.dtype = torch.float32) -> TrainingData:
    entries = read_entries(made.store, made.inputs.all("download"), made.inputs.all("latents"))
    text = TextEmbeddings(made.store, made.inputs.one("embeds"), T5)
    return TrainingData(made.store, entries, text, held_out or set(), CPU, dtype, 4)


def place_of(data: TrainingData, key: str) -> tuple[int, int]:
    """Shard and row of a sample."""
    return next((number, list(entry.keys).index(key)) for number, entry in enumerate(data.entries) if key in entry.keys)


@pytest.mark.parametrize("stored", [T5, 2])
def test_a_batch_is_what_was_stored(make: Any, stored: int) -> None:
    """T5 features that were stored short (their padding is zero) get it back; CLIP's are padded to T5's width."""
    made = make({(64, 48): 5, (48, 48): 2}, t5_stored=stored)
    data = data_of(made)
    places = [place_of(data, "64x48_3-0123456789"), place_of(data, "64x48_2-0123456789")]
    batch = data.read(places, lambda key: key.startswith("64x48_2"))
    assert batch.keys == ["64x48_3-0123456789", "64x48_2-0123456789"]
    for row, key in enumerate(batch.keys):
        tokens, pooled = made.texts["" if row == 1 else made.captions[key]]
        assert torch.equal(batch.latents_BCHW[row], made.latents[key])
        assert torch.equal(batch.text_BLD[row], tokens)
        assert torch.equal(batch.pooled_BD[row], pooled)
    half = data_of(made, dtype=torch.bfloat16).read(places[:1])
    assert half.text_BLD.dtype == torch.bfloat16
    assert half.latents_BCHW.dtype == torch.float32, "noise is added in fp32"


def test_a_caption_that_was_never_encoded(make: Any) -> None:
    made = make({(64, 48): 2})
    made.inputs.one("embeds").shards.clear()
    with pytest.raises(InputError, match=r"no text embedding for 64x48_0-0123456789 of data set one.*embeds --force"):
        data_of(made)


def test_a_latent_that_the_download_does_not_know(make: Any) -> None:
    made = make({(64, 48): 2})
    shard = made.inputs.one("download").shards[0]
    shard.sidecars["captions"] = made.store.put_bytes(b"", ".jsonl")
    with pytest.raises(InputError, match=r"latents\[one\] has 64x48_0-0123456789, which download\[one\] does not know"):
        data_of(made)


def test_the_shelf_puts_back_what_was_used_longest_ago(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make({(64, 48): 12})
    entries = read_entries(made.store, made.inputs.all("download"), made.inputs.all("latents"))
    fetched = fetches(made, monkeypatch)
    shelf = Shelf(made.store, [entry.shard for entry in entries], 2)
    for number in (0, 1, 0, 2, 0, 1):
        assert shelf.take(number).keys == entries[number].keys
    shelf.close()
    assert fetched == [entries[number].shard.name for number in (0, 1, 2, 1)]


def fetches(made: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are fetched from now on, in order; sidecars do not count."""
    fetched: list[str] = []
    real = made.store.fetch

    def noted(blob: Any) -> Any:
        if blob.suffix == ".tar":
            fetched.append(blob.name)
        return real(blob)

    monkeypatch.setattr(made.store, "fetch", noted)
    return fetched


def test_no_shard_is_fetched_before_it_is_needed(made_in_parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_in_parts
    fetched = fetches(made, monkeypatch)
    data = data_of(made)
    assert data.samples == 12
    assert fetched == [], "who is in which shard is told by the shards' lists"
    entry = data.entries[2]
    batch = data.read([(2, 1)])
    assert fetched == [entry.shard.name, f"embeds-{entry.captions[1][:6]}"]
    tokens, pooled = made.texts[made.captions[entry.keys[1]]]
    assert torch.equal(batch.text_BLD[0], tokens)
    assert torch.equal(batch.pooled_BD[0], pooled)
    data.want([(0, 0)])
    data.want_texts([(0, 0), (0, 1)])
    data.read([(0, 0)])
    data.close()
    wanted = {data.entries[0].shard.name, *(f"embeds-{data.entries[0].captions[row][:6]}" for row in (0, 1))}
    assert wanted <= set(fetched[2:])
    assert len(fetched) <= 2 + len(wanted)


@pytest.fixture
def made_in_parts(make: Any, tmp_path: Path) -> Any:
    """Twelve samples, and a shard of text embeddings for each caption."""
    made = make({(64, 48): 12})
    whole = made.inputs.one("embeds").shards[0]
    shards = []
    for key, members in read_shard(made.store.fetch(whole)):
        path = tmp_path / "part.tar"
        with ShardWriter(path) as writer:
            writer.write(key, members)
        blob = made.store.put_file(path, ".tar")
        sidecars = {KEYS: listed(made.store, writer)}
        shards.append(Shard(**blob.model_dump(), name=f"embeds-{key[:6]}", samples=1, sidecars=sidecars))
    made.inputs.one("embeds").shards[:] = shards
    return made


def test_a_shard_without_a_list_is_read_itself(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make({(64, 48): 5})
    listed_ = data_of(made)
    for stage in ("latents", "embeds"):
        for shard in made.inputs.one(stage).shards:
            shard.sidecars.clear()
    fetched = fetches(made, monkeypatch)
    read = data_of(made)
    assert [entry.keys for entry in read.entries] == [entry.keys for entry in listed_.entries]
    assert len(fetched) == 3
    assert torch.equal(read.read([(1, 0)]).latents_BCHW, listed_.read([(1, 0)]).latents_BCHW)


def test_training_wants_its_first_batch_first(made_in_parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_in_parts
    fetched = fetches(made, monkeypatch)
    order: list[list[tuple[int, int]]] = []
    real = Order.batch
    monkeypatch.setattr(Order, "batch", lambda self, number: (order.append(real(self, number)), order[-1])[1])
    made.run(validation__prompts=[], train__evaluation__share=0.0, train__train_batch_size=1)
    names = [shard.name for shard in made.inputs.one("latents").shards]
    # Two threads fetch: the first batch's shards are among the first that each queue took.
    assert names[order[0][0][0]] in [name for name in fetched if name in names][:2]
    assert len({name for name in fetched if name in names}) == len(names)


def test_reading_ahead_is_in_order_and_bounded() -> None:
    made: list[int] = []
    taken: list[int] = []

    def make_one(number: int) -> Batch:
        made.append(number)
        return Batch([str(number)], torch.zeros(0), torch.zeros(0), torch.zeros(0))

    with ReadAhead(make_one, 3, 9) as ahead:
        for batch in ahead:
            taken.append(int(batch.keys[0]))
            assert len(made) <= len(taken) + READ_AHEAD + 1
    assert taken == made == [3, 4, 5, 6, 7, 8]


def test_an_error_while_reading_ahead_arrives() -> None:
    def fails(number: int) -> Batch:
        raise InputError(f"batch {number}")

    with ReadAhead(fails, 0, 5) as ahead, pytest.raises(InputError, match="batch 0"):
        next(ahead)


def test_chance_is_even_and_repeats() -> None:
    hits = [draws.chance(0.25, 0, "caption", step, "key") for step in range(4000)]
    assert sum(hits) == pytest.approx(1000, abs=4 * (4000 * 0.25 * 0.75) ** 0.5)
    assert hits == [draws.chance(0.25, 0, "caption", step, "key") for step in range(4000)]
    assert not draws.chance(0.0, "x")
    assert draws.chance(1.0, "x")


def test_the_order_of_training_does_not_depend_on_the_manifests(make: Any) -> None:
    """The fingerprint knows digests, not their order: two stores that list the same shards differently train alike."""
    made = make({(64, 48): 5, (48, 48): 4})
    before = [entry.keys for entry in data_of(made).entries]
    made.inputs.one("latents").shards.reverse()
    assert [entry.keys for entry in data_of(made).entries] == before
