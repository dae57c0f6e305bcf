"""The Triton kernels of collectives over peers' memory; ``triton`` launches them and says what a workspace is.

A workspace, the same on every device: ``N * PROGRAMS`` flags, one for each program of each device, that device writing
it; ``PROGRAMS`` counters, of this device's own; from byte ``HEAD`` on, two times N slots of ``SLOT`` bytes, one for
each device to write into. Flags and counters are int32 and count on, past 2**31 to the negative ones.

One program moves one share of the elements, and waits for the programs of its number on the other devices only. Every
call has ``PROGRAMS`` programs and adds ``PHASES`` to every counter, whether there is work for all or not: so all
programs know the number of the call by themselves. Calls take the two sets of slots in turn. When a device begins a
call, it has seen in the one before that every other device had begun that: so nobody reads any more what was written
two calls ago, and its slots are free.

*Mail* is a message in two halves, with other work between them: a kernel *posts*, and a later one *awaits* what the
others posted. Behind the slots come those for mail, N for each channel, and at the end of the head its flags, one for
each device in each channel, and a counter for each channel. A flag holds the number of calls, plus 1, before which its
mail was posted. There is at most one piece of mail in a channel between two calls. So its slots are free when it is
posted: all devices have begun the last call, and had read all earlier mail by then.
"""

import triton
import triton.language as tl

from pallas_kernels.collectives.workspace import MAIL_HEAD_BYTES, mail_slot_bytes

PHASES = tl.constexpr(2)
_MOST_POLLS = tl.constexpr(1 << 24)  # more than ten seconds
_MAIL_HEAD = tl.constexpr(MAIL_HEAD_BYTES)
mail_bytes = triton.constexpr_function(mail_slot_bytes)


@triton.jit
def _address(peers, device):
    """Returns where a device's workspace is; the entry behind the last is this device's place among them."""
    return tl.load(peers.to(tl.pointer_type(tl.int64), bitcast=True) + device)


@triton.jit
def _slot(workspace, call, device, HEAD: tl.constexpr, SLOT: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr):
    """Returns where a device's slot begins in a workspace, in a call of this number."""
    at = workspace + HEAD + ((call & 1) * N + device).to(tl.int64) * SLOT
    return at.to(tl.pointer_type(DTYPE))


@triton.jit
def mail_slot(
    peers, device, source, CHANNEL: tl.constexpr, HEAD: tl.constexpr, SLOT: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Returns where, in a device's workspace, the mail of a source is, as float32."""
    first = _address(peers, device) + HEAD + 2 * N * tl.cast(SLOT, tl.int64)
    at = first + (CHANNEL * N + source) * tl.cast(mail_bytes(SLOT), tl.int64)
    return at.to(tl.pointer_type(tl.float32))


@triton.jit
def _mail_flags(peers, device, CHANNEL: tl.constexpr, HEAD: tl.constexpr, N: tl.constexpr):
    at = _address(peers, device) + HEAD - _MAIL_HEAD
    return at.to(tl.pointer_type(tl.int32)) + CHANNEL * N


@triton.jit
def mail_tag(peers, N: tl.constexpr, PROGRAMS: tl.constexpr):
    """Returns what flags of mail hold that is posted now: never 0, as counters are even."""
    workspace = _address(peers, place(peers, N))
    return tl.load(workspace.to(tl.pointer_type(tl.int32)) + N * PROGRAMS) + 1


@triton.jit
def place(peers, N: tl.constexpr):
    """Returns this device's place among the others."""
    return _address(peers, N).to(tl.int32)


@triton.jit
def post_mail(peers, tag, CHANNEL: tl.constexpr, HEAD: tl.constexpr, N: tl.constexpr, SENDERS: tl.constexpr):
    """Tells the others that mail is complete: every program calls this when it has written, and the last one tells."""
    rank = place(peers, N)
    counter = _mail_flags(peers, rank, 0, HEAD, N) + _MAIL_HEAD // 4 - 1 - CHANNEL
    tl.debug_barrier()
    before = tl.atomic_add(counter, 1, sem="acq_rel", scope="sys")
    if before == SENDERS - 1:
        tl.atomic_xchg(counter, 0, sem="relaxed", scope="gpu")
        for ahead in tl.static_range(1, N):
            flags = _mail_flags(peers, (rank + ahead) % N, CHANNEL, HEAD, N)
            tl.atomic_xchg(flags + rank, tag, sem="release", scope="sys")


@triton.jit
def await_mail(peers, tag, CHANNEL: tl.constexpr, HEAD: tl.constexpr, N: tl.constexpr):
    """Waits until all others have posted. Returns whether they did, as ``_meet`` does."""
    rank = place(peers, N)
    flags = _mail_flags(peers, rank, CHANNEL, HEAD, N)
    polls = 0
    for ahead in tl.static_range(1, N):
        flag = flags + (rank + ahead) % N
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        while (seen != tag) & (polls < _MOST_POLLS):
            seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            polls += 1
    tl.debug_barrier()
    return polls < _MOST_POLLS


@triton.jit
def _copy(source, target, begin, end, BLOCK: tl.constexpr):
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < end), mask=at < end)


@triton.jit
def _push(
    x, part, peers, call, rank, begin, end,
    N: tl.constexpr, HEAD: tl.constexpr, SLOT: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Writes a share of each other device's part of x into this device's slot there; parts of 0 are all of x."""
    for ahead in tl.static_range(1, N):
        device = (rank + ahead) % N
        theirs = _slot(_address(peers, device), call, rank, HEAD, SLOT, N, DTYPE)
        _copy(x + device.to(tl.int64) * part, theirs, begin, end, BLOCK)


@triton.jit
def _sum(
    own, workspace, call, rank, at, here,
    N: tl.constexpr, HEAD: tl.constexpr, SLOT: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Returns a block of what this device has and all others wrote, added up in float32.

    In the same order everywhere: all devices get the same bits.
    """
    total = tl.zeros([BLOCK], tl.float32)
    for device in tl.static_range(N):
        if device == rank:
            total += tl.load(own + at, mask=here).to(tl.float32)
        else:
            slot = _slot(workspace, call, device, HEAD, SLOT, N, DTYPE)
            total += tl.load(slot + at, mask=here, cache_modifier=".cg").to(tl.float32)
    return total


@triton.jit
def _meet(peers, rank, value, N: tl.constexpr, PROGRAMS: tl.constexpr):
    """Tells the others that this program has written, and waits until theirs have.

    Returns whether all came. That one does not, for seconds, means that its device runs something else.
    """
    tl.debug_barrier()
    program = tl.program_id(0)
    for ahead in tl.static_range(1, N):
        flags = _address(peers, (rank + ahead) % N).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(flags + rank * PROGRAMS + program, value, sem="release", scope="sys")
    own = _address(peers, rank).to(tl.pointer_type(tl.int32))
    polls = 0
    for ahead in tl.static_range(1, N):
        flag = own + (rank + ahead) % N * PROGRAMS + program
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        # By their difference, as counts go on past the largest number.
        while (seen - value < 0) & (polls < _MOST_POLLS):
            seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            polls += 1
    tl.debug_barrier()
    return polls < _MOST_POLLS


@triton.jit
def _begin(peers, N: tl.constexpr, PROGRAMS: tl.constexpr):
    """Returns this device's place, its workspace, this program's counter and what that says."""
    rank = place(peers, N)
    workspace = _address(peers, rank)
    counter = workspace.to(tl.pointer_type(tl.int32)) + N * PROGRAMS + tl.program_id(0)
    return rank, workspace, counter, tl.load(counter)


@triton.jit
def _all_reduce_kernel(
    x,  # [size]
    peers,
    size,
    share,
    out,  # [size]
    N: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HEAD: tl.constexpr,
    SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Sums in one exchange: every device writes all of its x to every other."""
    rank, workspace, counter, count = _begin(peers, N, PROGRAMS)
    begin = tl.program_id(0) * share
    end = tl.minimum(begin + share, size)
    if begin < end:
        call = count // PHASES
        _push(x, 0, peers, call, rank, begin, end, N, HEAD, SLOT, BLOCK, DTYPE)
        all_came = _meet(peers, rank, count + PHASES, N, PROGRAMS)
        for first in range(begin, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            here = at < end
            total = _sum(x, workspace, call, rank, at, here, N, HEAD, SLOT, BLOCK, DTYPE)
            tl.store(out + at, tl.where(all_came, total, float("nan")).to(DTYPE), mask=here)
    tl.store(counter, count + PHASES)


@triton.jit
def _all_reduce_in_two_kernel(
    x,  # [N * part]
    peers,
    part,
    share,
    out,  # [N * part]
    N: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HEAD: tl.constexpr,
    SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Sums in two exchanges, of 2 / N of the bytes: each device sums one part of x, and writes that to every other."""
    rank, workspace, counter, count = _begin(peers, N, PROGRAMS)
    begin = tl.program_id(0) * share
    end = tl.minimum(begin + share, part)
    if begin < end:
        call = count // PHASES
        _push(x, part, peers, call, rank, begin, end, N, HEAD, SLOT, BLOCK, DTYPE)
        all_came = _meet(peers, rank, count + 1, N, PROGRAMS)
        own = rank.to(tl.int64) * part
        for first in range(begin, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            here = at < end
            total = _sum(x + own, workspace, call, rank, at, here, N, HEAD, SLOT, BLOCK, DTYPE)
            result = tl.where(all_came, total, float("nan")).to(DTYPE)
            tl.store(out + own + at, result, mask=here)
            for ahead in tl.static_range(1, N):
                # The second half of a slot is for the second exchange.
                theirs = _slot(_address(peers, (rank + ahead) % N), call, rank, HEAD, SLOT, N, DTYPE)
                tl.store(theirs + part + at, result, mask=here)
        all_came = _meet(peers, rank, count + PHASES, N, PROGRAMS)
        for ahead in tl.static_range(1, N):
            device = (rank + ahead) % N
            slot = _slot(workspace, call, device, HEAD, SLOT, N, DTYPE)
            for first in range(begin, end, BLOCK):
                at = first + tl.arange(0, BLOCK)
                summed = tl.load(slot + part + at, mask=at < end, cache_modifier=".cg")
                summed = tl.where(all_came, summed, float("nan")).to(DTYPE)
                tl.store(out + device.to(tl.int64) * part + at, summed, mask=at < end)
    tl.store(counter, count + PHASES)


@triton.jit
def _add_and_norm(
    total, x, scale, at, here, out, normed, COLUMNS: tl.constexpr, EPSILON: tl.constexpr, DTYPE: tl.constexpr
):
    """Adds a row's sum to x, and stores that and its norm; each is rounded once, as if they were done apart."""
    column = tl.arange(0, at.shape[0])
    values = tl.load(x + at, mask=here, other=0.0).to(tl.float32) + tl.where(here, total, 0.0).to(DTYPE).to(tl.float32)
    added = values.to(DTYPE)
    tl.store(out + at, added, mask=here)
    values = added.to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, 0) / COLUMNS + EPSILON)
    values *= tl.load(scale + column, mask=here, other=0.0).to(tl.float32)
    tl.store(normed + at, values.to(DTYPE), mask=here)


@triton.jit
def _all_reduce_norm_kernel(
    term,  # [rows, COLUMNS]
    x,  # [rows, COLUMNS]
    scale,  # [COLUMNS]
    peers,
    rows,
    share,  # rows of a program
    out,  # [rows, COLUMNS]: x + the sum of terms
    normed,  # [rows, COLUMNS]
    N: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HEAD: tl.constexpr,
    SLOT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,  # COLUMNS or more
    EPSILON: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """As ``_all_reduce_kernel``, by rows, each of which the program that has summed it adds to x and norms."""
    rank, workspace, counter, count = _begin(peers, N, PROGRAMS)
    begin = tl.program_id(0) * share
    end = tl.minimum(begin + share, rows)
    if begin < end:
        call = count // PHASES
        _push(term, 0, peers, call, rank, begin * COLUMNS, end * COLUMNS, N, HEAD, SLOT, BLOCK, DTYPE)
        all_came = _meet(peers, rank, count + PHASES, N, PROGRAMS)
        column = tl.arange(0, BLOCK)
        here = column < COLUMNS
        for row in range(begin, end):
            at = row * COLUMNS + column
            total = _sum(term, workspace, call, rank, at, here, N, HEAD, SLOT, BLOCK, DTYPE)
            total = tl.where(all_came, total, float("nan"))
            _add_and_norm(total, x, scale, at, here, out, normed, COLUMNS, EPSILON, DTYPE)
    tl.store(counter, count + PHASES)


@triton.jit
def _all_reduce_norm_in_two_kernel(
    term,  # [N * part, COLUMNS]
    x,  # [N * part, COLUMNS]
    scale,  # [COLUMNS]
    peers,
    part,  # rows that a device sums
    share,  # of them, of a program
    out,  # [N * part, COLUMNS]: x + the sum of terms
    normed,  # [N * part, COLUMNS]
    N: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HEAD: tl.constexpr,
    SLOT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,  # COLUMNS or more
    EPSILON: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """As ``_all_reduce_in_two_kernel``, by rows; what is exchanged is the sums, which every device adds to its x."""
    rank, workspace, counter, count = _begin(peers, N, PROGRAMS)
    begin = tl.program_id(0) * share
    end = tl.minimum(begin + share, part)
    if begin < end:
        call = count // PHASES
        column = tl.arange(0, BLOCK)
        here = column < COLUMNS
        size = part * COLUMNS
        _push(term, size, peers, call, rank, begin * COLUMNS, end * COLUMNS, N, HEAD, SLOT, BLOCK, DTYPE)
        all_came = _meet(peers, rank, count + 1, N, PROGRAMS)
        own = rank.to(tl.int64) * size
        for row in range(begin, end):
            at = row * COLUMNS + column
            total = _sum(term + own, workspace, call, rank, at, here, N, HEAD, SLOT, BLOCK, DTYPE)
            total = tl.where(all_came, total, float("nan"))
            for ahead in tl.static_range(1, N):
                # The second half of a slot is for the second exchange.
                theirs = _slot(_address(peers, (rank + ahead) % N), call, rank, HEAD, SLOT, N, DTYPE)
                tl.store(theirs + size + at, total.to(DTYPE), mask=here)
            _add_and_norm(total, x, scale, own + at, here, out, normed, COLUMNS, EPSILON, DTYPE)
        all_came = _meet(peers, rank, count + PHASES, N, PROGRAMS)
        for ahead in tl.static_range(1, N):
            device = (rank + ahead) % N
            slot = _slot(workspace, call, device, HEAD, SLOT, N, DTYPE)
            for row in range(begin, end):
                at = row * COLUMNS + column
                total = tl.load(slot + size + at, mask=here, cache_modifier=".cg").to(tl.float32)
                total = tl.where(all_came, total, float("nan"))
                in_all = device.to(tl.int64) * size + at
                _add_and_norm(total, x, scale, in_all, here, out, normed, COLUMNS, EPSILON, DTYPE)
    tl.store(counter, count + PHASES)


@triton.jit
def _all_gather_kernel(
    x,  # [size]: rows of COLUMNS
    peers,
    size,
    share,
    columns,
    out,  # [size / columns, N, columns]
    N: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HEAD: tl.constexpr,
    SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Writes every device's x to every other, and puts what came side by side."""
    rank, workspace, counter, count = _begin(peers, N, PROGRAMS)
    begin = tl.program_id(0) * share
    end = tl.minimum(begin + share, size)
    if begin < end:
        call = count // PHASES
        _push(x, 0, peers, call, rank, begin, end, N, HEAD, SLOT, BLOCK, DTYPE)
        all_came = _meet(peers, rank, count + PHASES, N, PROGRAMS)
        for first in range(begin, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            here = at < end
            row = (at // columns).to(tl.int64)
            place = row * columns * N + at % columns
            for device in tl.static_range(N):
                if device == rank:
                    values = tl.load(x + at, mask=here)
                else:
                    slot = _slot(workspace, call, device, HEAD, SLOT, N, DTYPE)
                    values = tl.load(slot + at, mask=here, cache_modifier=".cg")
                tl.store(out + place + device * columns, tl.where(all_came, values, float("nan")).to(DTYPE), mask=here)
    tl.store(counter, count + PHASES)
