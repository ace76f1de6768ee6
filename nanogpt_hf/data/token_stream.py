"""Token ids and the order in which training sees them.

The batch of a step is a pure function of (seed, step, rows), and of how many steps have short windows: nothing has to
be stored to resume, and any number of processes that share a global batch see the same data in the same order.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..common.errors import UserError

ON_DEVICE_BYTES = 2**30  # a corpus up to this size is kept on the device, where batches cost nothing


def mix(numbers: np.ndarray | np.uint64) -> np.ndarray:
    """Hash of unsigned 64-bit integers: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    x: np.ndarray = np.asarray(numbers, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def permute(index: np.ndarray, size: int, key: np.ndarray, rounds: int = 6) -> np.ndarray:
    """Where `index` goes in the pseudo-random permutation of range(size) that `key` names.

    A Feistel network with cycle walking (Black and Rogaway 2002): every value is computed on its own, so an
    epoch of billions of windows needs no table.

    Raises:
        ValueError: an index is not below size, and so has no place.
    """
    if np.any(np.asarray(index) >= size):
        raise ValueError(f"no place in range({size}) for all of {index}")
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = np.array(index, dtype=np.uint64)
    key = np.broadcast_to(np.asarray(key, dtype=np.uint64), result.shape)
    walking = np.ones(result.shape, dtype=bool)
    while walking.any():
        left, right = result[walking] >> half, result[walking] & mask
        for number in range(rounds):
            left, right = right, left ^ (mix(right ^ mix(key[walking] + np.uint64(number))) & mask)
        result[walking] = left << half | right
        walking = result >= size
    return result


class MappedIds:
    """Token ids in memory-mapped parts that follow one another; a window may begin in one and end in another.

    Args:
        parts: one dimension each. Nothing of them is read before a window asks for it.
    """

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = [np.asarray(part) for part in parts]
        self.bounds = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` ids from each start, B length; 0 stands for what is past the end."""
        block = np.zeros((len(starts), length), dtype=np.int64)
        first_parts = np.searchsorted(self.bounds, starts, side="right") - 1
        for row, start, number in zip(block, starts, first_parts, strict=True):
            filled = 0
            for part, bound in zip(self.parts[number:], self.bounds[number:], strict=False):
                piece = part[start + filled - bound :][: length - filled]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
                if filled == length:
                    break
        return block


class TokenStream:
    """A sequence of N token ids, cut into windows of T = block_size tokens and their T successors.

    Args:
        ids: the ids, one dimension; what is memory-mapped is read window by window.
        block_size: T.
        device: where batches go.
        name: what the text is called, for the message of the error.

    Raises:
        UserError: fewer than T + 1 tokens.
    """

    def __init__(
        self,
        ids: np.ndarray | MappedIds,
        block_size: int,
        device: torch.device | str = "cpu",
        name: str = "the text",
    ):
        if len(ids) < block_size + 1:
            raise UserError(
                f"{name} has {len(ids)} tokens to train on, but one block takes {block_size + 1} (the context length and one "
                "more): give a longer text or a smaller --n_positions."
            )
        self.block_size = block_size
        self.device = torch.device(device)
        # One epoch: windows side by side from a random offset, in a random order.
        self.windows_per_epoch = max(1, (len(ids) - block_size) // block_size)
        self.offsets = min(block_size, len(ids) - self.windows_per_epoch * block_size)
        self.ids: torch.Tensor | MappedIds
        if isinstance(ids, MappedIds):
            self.ids = ids
        elif isinstance(ids, np.memmap) or 4 * len(ids) > ON_DEVICE_BYTES:
            self.ids = MappedIds([ids])
        else:
            self.ids = torch.from_numpy(ids.astype(np.int32, copy=False)).to(self.device)

    def __len__(self) -> int:
        return len(self.ids)

    def _pairs(self, starts: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids from each start and their next ones, each B length."""
        block = self._blocks(starts, length + 1)
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()

    def _blocks(self, starts: np.ndarray, length: int) -> torch.Tensor:
        """The ids from each start, B length, on the device; any id stands for what is past the end."""
        if isinstance(self.ids, torch.Tensor):
            # Starts alone travel: so few bytes are copied without waiting for what the device has yet to do.
            index = torch.from_numpy(starts).to(self.device, non_blocking=True)[:, None]
            index = index + torch.arange(length, device=self.device)
            return self.ids[index.clamp_(max=len(self.ids) - 1)].long()
        block = torch.from_numpy(self.ids.windows(starts, length))
        if self.device.type == "cuda":
            block = block.pin_memory()  # or the copy would wait for all that the GPU has yet to do
        return block.to(self.device, non_blocking=True)

    def starts(self, seed: int, rows: np.ndarray) -> np.ndarray:
        """First token of the windows that are the `rows`-th of the whole training."""
        epoch, place = np.divmod(np.asarray(rows, dtype=np.uint64), np.uint64(self.windows_per_epoch))
        key = mix(epoch ^ mix(np.uint64(seed)))
        offset = mix(key) % np.uint64(self.offsets)
        return (offset + permute(place, self.windows_per_epoch, key) * np.uint64(self.block_size)).astype(
            np.int64
        )

    def batch(self, seed: int, step: int, batch_size: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and their next tokens, each B T, for some rows of the global batch of a step.

        Args:
            step: counted from 0.
            batch_size: sequences in the whole global batch.
            rows: which of them.
        """
        numbers = step * batch_size + np.arange(batch_size)[rows]
        return self._pairs(self.starts(seed, numbers), self.block_size)

    def pieces(
        self, seed: int, step: int, batch_size: int, rows: slice, length: int, steps: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `batch`, of the first `steps` steps, whose windows are cut into pieces that are shuffled together.

        So these steps read what they would read whole, each token as often. Inputs and their next tokens, each B*T/length
        length.

        Args:
            length: of a piece; divides T.
            steps: more than `step`.
        """
        each = self.block_size // length
        numbers = (step * batch_size + np.arange(batch_size)[rows])[:, None] * each + np.arange(each)
        places = permute(numbers.ravel(), steps * batch_size * each, mix(~mix(np.uint64(seed))))
        windows, parts = np.divmod(places, np.uint64(each))
        return self._pairs(self.starts(seed, windows) + parts.astype(np.int64) * length, length)

    def windows(self, stride: int | None = None) -> int:
        """How many windows cover the stream once: side by side, or each `stride` tokens after the one before."""
        after_the_first = max(0, len(self.ids) - 1 - self.block_size)
        return 1 + -(-after_the_first // (stride or self.block_size))

    def window_batch(
        self, numbers: np.ndarray, stride: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and next tokens, each B T, of these windows.

        A next token is -100 past the end of the stream, and where an earlier window has it already. With a stride the
        last window ends where the stream does, so that it is as long as the others, as in EleutherAI's lm-eval.
        """
        step = stride or self.block_size
        starts, had = numbers * step, (numbers - 1) * step + self.block_size
        if stride:
            starts = np.minimum(starts, len(self.ids) - 1 - self.block_size)
        index = starts[:, None] + np.arange(self.block_size + 1)
        elsewhere = (index >= len(self.ids)) | ((numbers > 0)[:, None] & (index <= had[:, None]))
        block = self._blocks(starts, self.block_size + 1)
        y = block[:, 1:].masked_fill(torch.from_numpy(elsewhere[:, 1:]).to(self.device), -100)
        return block[:, :-1].contiguous(), y
