"""Low-rank updates of several devices whose kernels write into each other's memory, interpreted one by one."""

import os

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Collectives, LoraSegments, tuning
from pallas_kernels.collectives.workspace import HEAD_BYTES, MAIL_CHANNELS, mail_slot_bytes
from pallas_kernels.lora import triton as lora
from pallas_kernels.pool import PAGE_SIZE
from tests.helpers.triton_on_cpu import assert_interpreted, compiled, interpreted

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
SLOT, ROW, LAYER = 2**16, 32, 1
HIDDEN, INNER = 48, 24  # of one device: q's and k's outputs, and o's input, for each device INNER
RANKS = ((5, 3, 4), (0, 2, 1), (1, 0, 0), (12, 12, 9))
TOKENS = (1, 3, 1, 20)
BEFORE, AFTER = 2, 3
TOTAL = BEFORE + sum(TOKENS) + AFTER


@pytest.mark.skipif(INTERPRET, reason="is the outer process")
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_interpreted(count):
    assert_interpreted(__file__, f"every_device and {count}", 1)


def pool_of(matrices) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One device's pool with ``matrices[g][m]``, A ``[., d_in]`` and B^T ``[., d_out]``; and where they begin."""
    pages, page_start, chunks = [], [0], []
    starts = {name: np.zeros((len(matrices), len(matrices[0])), np.int32) for name in ("start_a", "start_b")}
    for g, of_segment in enumerate(matrices):
        rows = []
        for m, pair in enumerate(of_segment):
            for name, matrix in zip(starts, pair, strict=True):
                starts[name][g, m] = len(rows)
                for c in range(0, matrix.shape[1], ROW):
                    part = matrix[:, c : c + ROW]
                    rows += list(np.pad(part, ((0, 0), (0, ROW - part.shape[1]))))
        count = -(-len(rows) // (2 * PAGE_SIZE))
        pages += [len(pages) + 1 + i for i in range(count)]
        page_start.append(len(pages))
        chunks.append(rows)
    pool = np.full((2, 2, (len(pages) + 1) * PAGE_SIZE, ROW), np.nan, np.float32)
    for g, rows in enumerate(chunks):
        own = pages[page_start[g] : page_start[g + 1]]
        for entry, row in enumerate(rows):
            plane, place = divmod(entry, PAGE_SIZE * len(own))
            pool[LAYER, plane, own[place // PAGE_SIZE] * PAGE_SIZE + place % PAGE_SIZE] = row
    return starts | {"pages": np.array(pages, np.int32), "page_start": np.array(page_start, np.int32)}, pool


def share_of_ranks(a: np.ndarray, device: int, count: int) -> np.ndarray:
    padded = np.pad(a, ((0, -len(a) % count), (0, 0)))
    return padded[device::count]


@pytest.mark.skipif(not INTERPRET, reason="run by test_interpreted")
@pytest.mark.parametrize("count", [2, 3])
def test_every_device_gets_its_columns_of_the_whole_update(count, monkeypatch):
    rng = np.random.default_rng(count)
    scale = rng.uniform(0.2, 2.0, (len(RANKS), 3)).astype(np.float32)
    widths = ((HIDDEN, INNER * count), (HIDDEN, INNER * count), (INNER * count, HIDDEN * count))
    whole = [
        [(rng.normal(size=(r, i)), rng.normal(size=(r, o))) for r, (i, o) in zip(ranks, widths, strict=True)]
        for ranks in RANKS
    ]
    x = rng.normal(size=(TOTAL, HIDDEN)).astype(np.float32)
    attended = rng.normal(size=(TOTAL, INNER * count)).astype(np.float32)
    base = rng.normal(size=(TOTAL, 2 * INNER * count)).astype(np.float32)
    terms = rng.normal(size=(count, TOTAL, HIDDEN * count)).astype(np.float32)
    token_start = np.cumsum([BEFORE, *TOKENS]).astype(np.int32)

    def plans(arrays, device):
        ranks = np.array(RANKS, np.int32)
        shares = ranks.copy()
        shares[:, :2] = -(-ranks[:, :2] // count)
        shares[:, 2] = 0
        local = ((HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN))
        both = []
        for rank, most in ((shares, 6), (ranks, 6 * count)):
            segments = LoraSegments(
                token_start=token_start,
                rank=rank,
                scale=scale,
                active=(0, 1, 2),
                max_rank=most,
                total_rank=40,
                **{k: jnp.asarray(v) for k, v in arrays.items()},
            )
            both.append(lora.plan(segments, num_tokens=TOTAL, row_width=ROW, widths=local))
        return both

    sizes = tuning.block_sizes

    def few_programs(op, device, key):
        found = sizes(op, device, key)
        # They are interpreted one by one. With many, a tile's input is shared out among several.
        return found | {"programs": 24 if count == 2 else 5, "ranks": 4} if op == "lora_shrink" else found

    monkeypatch.setattr(lora, "block_sizes", few_programs)
    nbytes = HEAD_BYTES + (2 + MAIL_CHANNELS) * count * SLOT
    assert mail_slot_bytes(SLOT) <= SLOT
    workspaces = [np.full(nbytes // 4, np.nan, np.float32).view(np.int32) for _ in range(count)]
    for workspace in workspaces:
        workspace[: HEAD_BYTES // 4] = 0
    addresses = [workspace.ctypes.data for workspace in workspaces]
    devices = []
    for device in range(count):
        columns = slice(device * INNER, (device + 1) * INNER)
        own = slice(device * HIDDEN, (device + 1) * HIDDEN)
        matrices = [
            [
                *((share_of_ranks(a, device, count), b[:, columns]) for a, b in of_segment[:2]),
                (of_segment[2][0][:, columns], of_segment[2][1][:, own]),
            ]
            for of_segment in whole
        ]
        arrays, pool = pool_of(matrices)
        table = np.array([*addresses, device], np.int64).view(np.int32)[None]
        devices.append((*plans(arrays, device), pool, Collectives(table, "tp", count, SLOT), columns, own))

    wanted = np.zeros((TOTAL, 2 * INNER * count)), np.zeros((TOTAL, HIDDEN * count))
    for g, of_segment in enumerate(whole):
        tokens = slice(token_start[g], token_start[g + 1])
        for m, (a, b) in enumerate(of_segment[:2]):
            update = scale[g, m] * x[tokens].astype(np.float64) @ a.T @ b
            wanted[0][tokens, m * INNER * count : (m + 1) * INNER * count] = update
        a, b = of_segment[2]
        wanted[1][tokens] = scale[g, 2] * attended[tokens].astype(np.float64) @ a.T @ b

    # Twice, with a call of the base model's between: what was sent before must not be taken for what is sent now.
    for call in range(2):
        for workspace in workspaces:
            workspace[count * 64 : (count + 1) * 64] = 2 * call
        factor = np.float32(call + 1)
        with interpreted(lora):
            sent = [
                (
                    lora.lora_send(x * factor, pool, LAYER, split, (0, 1), group, True),
                    lora.lora_send(attended[:, columns] * factor, pool, LAYER, plan, (2,), group, False),
                )
                for split, plan, pool, group, columns, _ in devices
            ]
            for (split, plan, pool, group, columns, own), (by_rank, by_input) in zip(devices, sent, strict=True):
                mine = np.concatenate([base[:, : INNER * count][:, columns], base[:, INNER * count :][:, columns]], 1)
                updates = wanted[0][:, : INNER * count][:, columns], wanted[0][:, INNER * count :][:, columns]
                got = lora.lora_receive(mine, by_rank, pool, LAYER, plan, (0, 1), split.max_rank, group, True)
                np.testing.assert_allclose(got, mine + factor * np.concatenate(updates, 1), rtol=1e-5, atol=1e-4)
                device = own.start // HIDDEN
                got = lora.lora_receive(terms[device], by_input, pool, LAYER, plan, (2,), plan.max_rank, group, False)
                expected = terms[device].astype(np.float64)
                expected[:, own] += factor * wanted[1][:, own]
                np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
                outside = np.r_[:BEFORE, TOTAL - AFTER : TOTAL]
                np.testing.assert_array_equal(np.asarray(got)[outside], terms[device][outside])


@pytest.mark.skipif(INTERPRET, reason="kernels that interpret cannot be compiled")
@pytest.mark.parametrize("tokens", [128, pytest.param(4096, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_the_kernels_compile_for_a_gpu(tokens):
    pool = jnp.zeros((2, 2, 64, 2048), jnp.bfloat16)
    segments = LoraSegments(
        *(jnp.zeros(5, jnp.int32),) * 2,
        jnp.zeros(40, jnp.int32),
        *(jnp.zeros((4, 4), jnp.int32),) * 3,
        jnp.zeros((4, 4)),
        active=(0, 1, 2, 3),
        max_rank=64,
        total_rank=256,
    )
    plan = lora.plan(segments, num_tokens=tokens, row_width=2048, widths=((4096, 2048),) * 3 + ((2048, 2048),))
    group = Collectives(jnp.zeros((1, 6), jnp.int32), "tp", 2, 2**24)
    with compiled(lora, 90) as kernels:
        x, y = jnp.zeros((tokens, 4096), jnp.bfloat16), jnp.zeros((tokens, 6144), jnp.bfloat16)
        for by_rank, modules, arrays in ((True, (0, 1, 2), (x, y)), (False, (3,), (x[:, :2048], x))):
            sent = lora.lora_send(arrays[0], pool, 0, plan, modules, group, by_rank)
            lora.lora_receive(arrays[1], sent, pool, 0, plan, modules, 64, group, by_rank)
    assert [name for name, _ in kernels] == ["_shrink_kernel", "_expand_kernel"] * 2
    assert all(code.metadata.shared <= 227 * 1024 for _, code in kernels)
