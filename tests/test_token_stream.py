"""The data order: a pure function that covers the text once an epoch."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanogpt_hf.data import token_stream
from nanogpt_hf.data.token_stream import MappedIds, TokenStream, mix, permute


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(np.arange(size), size, np.uint64(key))) == list(range(size))
    with pytest.raises(ValueError, match="no place"):
        permute(np.arange(size + 1), size, np.uint64(key))


def test_numbers_are_mixed_as_splitmix64_mixes_them():
    """The first three outputs of its generator with the seed 0, as its author publishes them."""
    found = mix(np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    assert found.tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert mix(np.arange(1)) == found[0]


def test_the_order_of_a_seed_is_that_of_earlier_versions():
    """Or a run that goes on would see other batches than those it has left to see."""
    starts = TokenStream(np.arange(1000), 16).starts(1337, np.arange(0, 250, 31))
    assert starts.tolist() == [147, 499, 261, 661, 433, 17, 800, 704, 106]
    starts = TokenStream(np.arange(1000), 7).starts(2**40 + 3, np.arange(1000, 1004))
    assert starts.tolist() == [643, 748, 125, 503]
    starts = TokenStream(np.arange(1032), 4).starts(
        1, np.arange(0, 257, 64)
    )  # 257: one more than 8 bits hold
    assert starts.tolist() == [731, 727, 1019, 963, 291]
    pieces = TokenStream(np.arange(1000), 16).pieces(1337, 3, 4, slice(None), 4, 9)[0][:, 0]
    assert pieces.tolist() == [59, 623, 187, 519, 423, 835, 919, 83, 215, 27, 39, 839, 847, 735, 191, 503]
    assert TokenStream(np.arange(13), 3).starts(2, np.arange(9)).tolist() == [5, 2, 8, 1, 4, 7, 2, 5, 8]


def test_permutations_look_random():
    places = permute(np.arange(100)[None].repeat(2000, axis=0), 100, np.arange(2000)[:, None])
    counts = np.array([np.bincount(column.astype(int), minlength=100) for column in places.T])
    assert counts.min() > 1 and counts.max() < 60  # mean 20: every place goes everywhere, nowhere often
    assert abs(np.corrcoef(places[:, 0], places[:, 1])[0, 1]) < 0.1


@given(length=st.integers(9, 400), block=st.integers(1, 8), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_an_epoch_reads_windows_side_by_side_without_replacement(length, block, seed):
    stream = TokenStream(np.arange(length), block)
    windows = stream.windows_per_epoch
    for epoch in range(2):
        starts = np.sort(stream.starts(seed, np.arange(windows) + epoch * windows))
        assert starts[0] >= 0 and starts[-1] + block < length
        assert (np.diff(starts) == block).all()
    assert length - 1 - windows * block <= 2 * block  # little is left out, and another part each epoch


def test_the_windows_of_an_epoch_begin_at_an_offset_of_its_own():
    """Or the same T tokens would stand in one window for ever, and no prediction would cross its border."""
    stream = TokenStream(np.arange(1000), 16)
    per_epoch = stream.windows_per_epoch
    offsets = [stream.starts(1, np.arange(per_epoch) + epoch * per_epoch).min() for epoch in range(200)]
    assert set(offsets) == set(range(16))


@given(
    length=st.integers(40, 400),
    block=st.sampled_from([4, 6, 8]),
    each=st.integers(1, 4),
    steps=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_the_pieces_of_the_first_steps_are_what_they_would_read_whole(length, block, each, steps, seed):
    block, piece, batch = block * each, block, 5
    stream = TokenStream(np.arange(length), block)
    whole = [stream.batch(seed, step, batch, slice(None)) for step in range(steps)]
    parts = [stream.pieces(seed, step, batch, slice(None), piece, steps) for step in range(steps)]
    for (x, y), (inputs, targets) in zip(parts, whole, strict=True):
        assert x.shape == y.shape == (batch * each, piece) and x.numel() == inputs.numel()
        assert torch.equal(y, x + 1) and torch.equal(targets, inputs + 1)
    read = [torch.cat([x.flatten() for x, _ in batches]).sort().values for batches in (parts, whole)]
    assert torch.equal(*read)
    step = steps - 1
    ranks = [stream.pieces(seed, step, batch, np.arange(rank, batch, 2), piece, steps)[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(ranks).sort(dim=0).values, parts[step][0].sort(dim=0).values)


def test_pieces_are_shuffled_over_all_of_their_steps():
    stream = TokenStream(np.arange(3000), 32)
    starts = stream.pieces(1, 0, 8, slice(None), 8, 10)[0][:, 0]
    windows = {int(start) // 32 for start in starts}
    assert len(windows) > 16  # 32 pieces of 8 windows, had they stayed together
    assert not torch.equal(starts, stream.pieces(2, 0, 8, slice(None), 8, 10)[0][:, 0])


def test_batch_is_pure_and_rows_agree_with_any_partition():
    stream = TokenStream(np.arange(1000), 8)
    x, y = stream.batch(seed=1, step=5, batch_size=12, rows=slice(None))
    assert torch.equal(y, x + 1)
    again = TokenStream(np.arange(1000), 8)
    for parts in (2, 3, 12):
        rows = [again.batch(1, 5, 12, np.arange(rank, 12, parts))[0] for rank in range(parts)]
        assert torch.equal(torch.cat(rows).sort(dim=0).values, x.sort(dim=0).values)
    assert torch.equal(
        x, stream.batch(1, 0, 72, slice(60, 72))[0]
    )  # the rows of all steps follow one another
    assert not torch.equal(x, stream.batch(2, 5, 12, slice(None))[0])
    assert not torch.equal(x, stream.batch(1, 6, 12, slice(None))[0])


@given(length=st.integers(10, 300), block=st.integers(1, 9), batch=st.integers(1, 7))
@settings(max_examples=50, deadline=None)
@example(length=10, block=9, batch=1)  # one window is all of it
def test_evaluation_windows_predict_every_token_once(length, block, batch):
    stream = TokenStream(np.arange(length), block)
    seen = []
    for start in range(0, stream.windows(), batch):
        x, y = stream.window_batch(np.arange(start, min(start + batch, stream.windows())))
        real = y != -100
        assert torch.equal(y[real], x[real] + 1) and real.any(dim=1).all()
        seen += y[real].tolist()
    assert seen == list(range(1, length))


@pytest.mark.parametrize("cuts", [[], [0, 1, 1, 17, 4990]])
def test_mapped_parts_give_the_same_batches(cuts, tmp_path):
    ids = np.random.default_rng(0).integers(0, 50_000, 5000).astype(np.uint16)
    ids.tofile(tmp_path / "ids.bin")
    mapped = np.memmap(tmp_path / "ids.bin", dtype=np.uint16, mode="r")
    whole = TokenStream(ids, 16)
    other = TokenStream(MappedIds(np.split(mapped, cuts)) if cuts else mapped, 16)
    assert isinstance(whole.ids, torch.Tensor) and isinstance(other.ids, MappedIds)
    for stride in (None, 5):
        numbers = np.arange(whole.windows(stride))
        assert other.windows(stride) == len(numbers)
        (x, y), (other_x, other_y) = (stream.window_batch(numbers, stride) for stream in (whole, other))
        assert torch.equal(y, other_y) and torch.equal(x[y != -100], other_x[y != -100])
    assert all(map(torch.equal, whole.batch(0, 3, 400, slice(None)), other.batch(0, 3, 400, slice(None))))


def test_a_corpus_up_to_a_size_is_kept_on_the_device(monkeypatch):
    monkeypatch.setattr(token_stream, "ON_DEVICE_BYTES", 400)
    small, large = (TokenStream(np.arange(tokens), 8) for tokens in (100, 101))
    assert isinstance(small.ids, torch.Tensor) and isinstance(large.ids, MappedIds)


def test_too_short_a_text_says_what_to_do():
    with pytest.raises(
        ValueError, match="my.txt has 10 tokens to train on, but one block takes 11.*smaller --n_positions"
    ):
        TokenStream(np.arange(10), 10, name="my.txt")
