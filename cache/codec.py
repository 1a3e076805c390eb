"""How rows become stored columns and back: packed ids (`packed_ids.py`), logits in the fewest bytes.

Values (`value_dtype`): `float16` and `float32` are the logits themselves. `linear16` stores, per position, the largest logit
`top` and a `step`, and uint16 numbers n with logit = top - n*step: error about step/2, step = (largest - smallest)/65535.

Shapes: R rows, S tokens, N positions, K kept ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from duet.cache.errors import UserError
from duet.cache.packed_ids import join_ids, split_ids
from duet.cache.record import Rows, counts_of, cut, join_offsets, offsets_of

MAX_VOCAB_SIZE = 2**20
ZSTD_LEVEL = 3
ALIGNMENT = 64  # bytes, of arrays that share memory
VALUE_DTYPES = ("float16", "float32", "linear16")


@dataclass(frozen=True)
class Layout:
    """What fixes the stored columns of a store's rows."""

    top_k: int
    vocab_size: int
    drawn: bool = False  # whether ids come with the number of their draws

    @property
    def high_bits(self) -> int:
        """h: bits of an id above the low 16."""
        return max(0, (self.vocab_size - 1).bit_length() - 16)

    @property
    def high_bytes(self) -> int:
        """Bytes of the high bits of one position's K ids."""
        return -(-self.top_k * self.high_bits // 8)


Columns = dict[str, tuple[np.dtype, tuple[int, ...]]]  # name -> dtype and what follows N in the shape


def position_columns(layout: Layout, value_dtype: str, logsumexp: bool) -> Columns:
    """The stored columns over positions."""
    k = layout.top_k
    columns: dict[str, tuple[str, tuple[int, ...]]] = {"topk_low": ("uint16", (k,))}
    if layout.high_bits:
        columns["topk_high"] = ("uint8", (layout.high_bytes,))
    columns["topk_logits"] = ("uint16" if value_dtype == "linear16" else value_dtype, (k,))
    if layout.drawn:
        columns["draws"] = (draws_dtype(k), (k,))
    if value_dtype == "linear16":
        columns |= {"top": ("float32", ()), "step": ("float32", ())}
    if logsumexp:
        columns["logsumexp"] = ("float32", ())
    return {name: (np.dtype(dtype), shape) for name, (dtype, shape) in columns.items()}


def draws_dtype(top_k: int) -> str:
    """The smallest unsigned integers that hold the number of a position's draws."""
    return str(np.min_scalar_type(top_k - 1))


@dataclass(frozen=True)
class Block:
    """R rows as they are stored, but for their tokens, which are few and come decoded.

    `columns` are arrays over the N positions, as `position_columns` names them.
    """

    layout: Layout
    row_ids: pa.StringArray  # R
    subsets: np.ndarray  # uint8 [R], index into SUBSETS
    token_offsets: np.ndarray  # int64 [R+1]
    tokens_S: np.ndarray  # int32
    position_offsets: np.ndarray  # int64 [R+1]
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.subsets)

    def __getitem__(self, rows: slice) -> Block:
        """Consecutive rows, as views."""
        first, end, _ = rows.indices(len(self))
        if (first, end) == (0, len(self)):
            return self
        token_offsets, tokens = cut(self.token_offsets, first, end)
        position_offsets, positions = cut(self.position_offsets, first, end)
        return Block(
            layout=self.layout,
            row_ids=self.row_ids[first:end],
            subsets=self.subsets[first:end],
            token_offsets=token_offsets,
            tokens_S=self.tokens_S[tokens],
            position_offsets=position_offsets,
            columns={name: column[positions] for name, column in self.columns.items()},
        )

    @property
    def num_positions(self) -> int:
        return int(self.position_offsets[-1])

    @property
    def num_bytes(self) -> int:
        """Of all arrays over tokens and positions."""
        return self.tokens_S.nbytes + sum(column.nbytes for column in self.columns.values())

    @property
    def value_dtype(self) -> str:
        return "linear16" if "step" in self.columns else str(self.columns["topk_logits"].dtype)

    def topk_ids(self) -> np.ndarray:
        """int32 [N, K]."""
        return join_ids(self.columns["topk_low"], self.columns.get("topk_high"), self.layout.high_bits)

    def topk_logits(self) -> np.ndarray:
        """float32 [N, K]."""
        stored = self.columns["topk_logits"]
        if "step" not in self.columns:
            return widened(stored) if stored.dtype == np.float16 else stored.astype(np.float32)
        return self.columns["top"][:, None] - stored.astype(np.float32) * self.columns["step"][:, None]

    def decoded(self) -> Rows:
        """The rows that were encoded; float16 values come as float32."""
        return Rows(
            row_ids=self.row_ids.to_pylist(),
            subsets=self.subsets,
            token_offsets=self.token_offsets,
            tokens_S=self.tokens_S,
            position_offsets=self.position_offsets,
            topk_ids_NK=self.topk_ids(),
            topk_logits_NK=self.topk_logits(),
            logsumexp_N=self.columns.get("logsumexp"),
            draws_NK=self.columns.get("draws"),
        )

    def padded(self) -> dict[str, np.ndarray]:
        """Ids int32 and logits float32 [R, P, K], 0 where padded, and a mask bool [R, P]; P is the most positions of a row."""
        counts = counts_of(self.position_offsets)
        ids_NK, logits_NK = self.topk_ids(), self.topk_logits()
        longest = int(counts.max())
        mask_RP = np.arange(longest) < counts[:, None]
        shape = (len(self), longest, self.layout.top_k)
        if mask_RP.all():
            return {"topk_ids": ids_NK.reshape(shape), "topk_logits": logits_NK.reshape(shape), "mask": mask_RP}
        ids_RPK, logits_RPK = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        ids_RPK[mask_RP], logits_RPK[mask_RP] = ids_NK, logits_NK
        return {"topk_ids": ids_RPK, "topk_logits": logits_RPK, "mask": mask_RP}


def common_dtype(value_dtypes: Iterable[str]) -> str:
    """That of rows which have these: float32 where some of a lossless store's needed it."""
    found = set(value_dtypes)
    return found.pop() if len(found) == 1 else "float32"


def of_one_dtype(blocks: Sequence[Block]) -> Sequence[Block]:
    """The blocks, all as float32 where some of a lossless store's needed it."""
    if len({block.value_dtype for block in blocks}) == 1:
        return blocks
    return [replace(block, columns={**block.columns, "topk_logits": block.topk_logits()}) for block in blocks]


def empty_columns(
    columns: Columns, num_positions: int, memory: np.ndarray | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Arrays for the columns of so many positions and the memory they share: `memory` where that is large enough.

    Several pieces would each be given back to the system and come again as zeroed pages: that costs more than the copy.
    """
    shapes = {name: (num_positions, *shape) for name, (_, shape) in columns.items()}
    sizes = {name: math.prod(shape) * columns[name][0].itemsize for name, shape in shapes.items()}
    starts = offsets_of([-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()])
    if memory is None or len(memory) < starts[-1]:
        memory = np.empty(int(starts[-1]), np.uint8)
    arrays: dict[str, np.ndarray] = {
        name: memory[start : start + sizes[name]].view(columns[name][0]).reshape(shapes[name])
        for name, start in zip(shapes, starts.tolist(), strict=False)
    }
    return arrays, memory


def concat_blocks(blocks: Sequence[Block]) -> Block:
    """The rows of all blocks, of one value dtype, in order."""
    return Block(
        layout=blocks[0].layout,
        row_ids=pa.concat_arrays([block.row_ids for block in blocks]),
        subsets=np.concatenate([block.subsets for block in blocks]),
        token_offsets=join_offsets([block.token_offsets for block in blocks]),
        tokens_S=np.concatenate([block.tokens_S for block in blocks]),
        position_offsets=join_offsets([block.position_offsets for block in blocks]),
        columns={name: np.concatenate([block.columns[name] for block in blocks]) for name in blocks[0].columns},
    )


def encode(rows: Rows, layout: Layout, values: str) -> tuple[Block, float]:
    """Stored columns, and the largest absolute error of a logit.

    `values`: `lossless` takes float16 where every logit is exact in it, else float32; or one of VALUE_DTYPES.
    """
    low, high = split_ids(rows.topk_ids_NK, layout.high_bits)
    columns, error = _encode_values(rows.topk_logits_NK, values)
    columns["topk_low"] = low
    if high is not None:
        columns["topk_high"] = high
    if rows.logsumexp_N is not None:
        columns["logsumexp"] = rows.logsumexp_N
    if rows.draws_NK is not None:
        columns["draws"] = rows.draws_NK.astype(draws_dtype(layout.top_k))
    ids = pa.array(rows.row_ids, pa.string())
    block = Block(layout, ids, rows.subsets, rows.token_offsets, rows.tokens_S, rows.position_offsets, columns)
    return block, error


def _encode_values(logits_NK: np.ndarray, values: str) -> tuple[dict[str, np.ndarray], float]:
    if values == "linear16":
        exact = logits_NK.astype(np.float64)
        top, step = exact[:, 0].astype(np.float32), ((exact[:, 0] - exact[:, -1]) / 65535).astype(np.float32)
        divisor = np.where(step > 0, step, 1).astype(np.float64)[:, None]
        numbers = np.clip(np.rint((top.astype(np.float64)[:, None] - exact) / divisor), 0, 65535)
        columns = {"topk_logits": numbers.astype(np.uint16), "top": top, "step": step}
        decoded = top[:, None] - numbers.astype(np.float32) * step[:, None]
        return columns, float(np.abs(decoded - exact).max())
    if logits_NK.dtype == np.float16:
        return {"topk_logits": logits_NK if values != "float32" else logits_NK.astype(np.float32)}, 0.0
    if values == "float32":
        return {"topk_logits": logits_NK}, 0.0
    with np.errstate(over="ignore"):
        half = logits_NK.astype(np.float16)
    error = float(np.abs(half.astype(np.float32) - logits_NK).max())
    if values == "lossless" and error > 0:
        return {"topk_logits": logits_NK}, 0.0
    if not np.isfinite(error):
        raise UserError(
            f"a logit of {np.abs(logits_NK).max():.4g} is beyond float16", "set store.values to lossless or linear16"
        )
    return {"topk_logits": half}, error


def widened(half: np.ndarray) -> np.ndarray:
    """Finite float16 as float32, bit for bit what `astype` gives, in a sixth of its time.

    Both formats have sign, exponent and fraction in this order: moved to their places in float32, the exponent is 112 too
    small, which a product puts right, for subnormal numbers too. (The sign was extended over the bits that are cleared.)
    """
    bits = half.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= np.int32(~0x70000000)
    wide = bits.view(np.float32)
    wide *= np.float32(2.0**112)
    return wide
