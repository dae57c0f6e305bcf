"""Runs plans on the device: the one place that knows which functions are compiled and what stays on the device."""

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import pallas_kernels
from slora_jax.adapters.peft import MAX_RANK
from slora_jax.config import PAGE_SIZE
from slora_jax.engine.batch import AdapterRoom, AdapterSlice, BatchShape, Buckets, HostBatch, build_batch, padded_rank
from slora_jax.engine.core import StepResult
from slora_jax.engine.forward import Part, ProgramKey, choose_forward, on_each_device, table_of
from slora_jax.engine.programs import Programs, source_digest
from slora_jax.engine.sampling import Sampled, SamplerInputs, SamplerShape, build_sampler_inputs, sample
from slora_jax.engine.scoring import Piece, ScorerArguments, ScorerShape, Scores, plan_scores, read_scores, score
from slora_jax.engine.transfer import Transfer
from slora_jax.engine.tuning import head_bytes, layers_bytes
from slora_jax.memory.layout import cdiv
from slora_jax.memory.pool import UnifiedPool
from slora_jax.model.llama import Llama
from slora_jax.model.mesh import ModelMesh
from slora_jax.request import TokenLogprob
from slora_jax.scheduler.sequence import ScheduledSequence

_PACKAGE = Path(__file__).parents[1]
_CODE = (Path(pallas_kernels.__file__).parent, *(_PACKAGE / name for name in ("engine", "model", "memory")))
_FEW_ROWS = 16


_WHOLE = PartitionSpec()


type _Key = ProgramKey | SamplerShape | ScorerShape
"""Of a program of the forward, of a sampler, or of a scorer of prompts."""


def code_digest() -> str:
    """Of the code that decides what devices run: hosts that share a model need the same."""
    return source_digest(_CODE)


def _num_rows(shape: _Key) -> int:
    if isinstance(shape, Part):
        shape = shape.shape
    if isinstance(shape, ScorerShape):
        return shape.rows
    return shape.tokens if isinstance(shape, BatchShape) else shape.sequences


def compiler_options(num_rows: int) -> dict[str, str | bool]:
    """What XLA is told for a program whose products have this many rows."""
    return {
        # XLA allows a program 80 % of the GPU less its inputs and outputs: nothing, beside a pool that fills the GPU.
        # So it would compute what all layers share (tiles, chunks, places) anew in every layer, to save kilobytes.
        "xla_disable_hlo_passes": "rematerialization",
        # Up to so many rows XLA's own kernels beat cuBLAS by 7 %, on an H200; beyond, the search for the best of them
        # costs most of the compile time and at 64 and 128 rows ends with slower ones.
        "xla_gpu_enable_triton_gemm": num_rows <= _FEW_ROWS,
    }


class LaunchArguments(NamedTuple):
    """What starts the programs of a step, on every host alike. ``scorer`` is None where no prompt is scored."""

    shape: BatchShape
    packed: np.ndarray
    sampler: SamplerShape
    inputs: SamplerInputs
    scorer: ScorerArguments | None = None


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A step ready to be started.

    Attributes:
      entries: the plan's, in its order.
      batch: the same as arrays.
      arguments: of the launch.
      pieces: of prompts that are scored.
    """

    entries: tuple[ScheduledSequence, ...]
    batch: HostBatch
    arguments: LaunchArguments
    pieces: tuple[Piece, ...]


class Started(NamedTuple):
    """What a step's layers gave.

    Attributes:
      hidden: ``[H, h]``, of which the first T rows are its tokens' states; until the next step's layers are started.
      scores: of prompts.
    """

    hidden: jax.Array
    scores: list[Scores]


@dataclass(slots=True)
class StepInFlight:
    """A step that the device is working on.

    Attributes:
      step: as it was laid out.
      started: what its layers gave.
      sampled: the tokens, when they are read; None until they are drawn.
    """

    step: LaidOut
    started: Started
    sampled: Sampled | None = None

    def read(self) -> StepResult:
        """Waits for the step."""
        assert self.sampled is not None, "a step is read when its tokens are drawn"
        entries, order = self.step.entries, self.step.batch.entry_of_row
        sampled = jax.tree.map(Transfer.read, self.sampled)
        tokens = np.empty(len(order), np.int32)
        tokens[order] = sampled.tokens[: len(order)]
        logprobs: dict[int, TokenLogprob] = {}
        if sampled.logprob is not None:
            chosen, top_ids, top_values = sampled.logprob, sampled.top_tokens, sampled.top_logprobs
            for row, place in enumerate(order.tolist()):
                count = entries[place].sequence.sampling.logprobs
                if count is not None:
                    top = zip(top_ids[row, :count].tolist(), top_values[row, :count].tolist(), strict=True)
                    logprobs[place] = TokenLogprob(int(tokens[place]), float(chosen[row]), tuple(top))
        scorer = self.step.arguments.scorer
        scores = {} if scorer is None else read_scores(scorer, self.step.pieces, self.started.scores)
        return StepResult(tokens.tolist(), logprobs, scores)


class Runner:
    """Runs batches of one model over one pool.

    The forward and the sampler are compiled apart: a new combination of sampling rules then compiles a sampler, not
    the layers again.

    Attributes:
      model, params: the base model.
      programs: the compiled ones.
    """

    def __init__(
        self,
        model: Llama,
        params: dict,
        pool: UnifiedPool,
        buckets: Buckets,
        max_len: int,
        mesh: ModelMesh | None = None,
        program_folder: Path | None = None,
        free: float = math.inf,
    ):
        """
        Args:
          model: what steps compute.
          params: its weights, on the mesh's devices.
          pool: on the same.
          buckets: shapes that batches are padded to.
          max_len: longest sequence, in tokens.
          mesh: the devices that share the model; None for one.
          program_folder: see ``Programs``.
          free: bytes of each device's memory that are left for compiling, see ``Programs``.
        """
        self.model = model
        self.params = params
        self._mesh = mesh
        self._transfer = Transfer(mesh)
        self._forward = choose_forward(model, mesh, self._transfer)
        self._everywhere = mesh.replicated if mesh else None
        # What makes logits of hidden states.
        self._head = {name: params[name] for name in ("embed", "lm_head") if name in params}
        self._pool = pool
        self._buckets = buckets
        self._vocab_size = model.config.vocab_size
        self._page_tokens = PAGE_SIZE * model.tokens_per_row
        self._table_width = cdiv(max_len, self._page_tokens)
        self._rows: dict[int, int] = {}
        self.reset()
        # One device has no reason to count ranks: its kernels work on real ones.
        self._room = AdapterRoom(max_rank=padded_rank(1) if mesh else MAX_RANK)
        self.programs: Programs[_Key] = Programs(
            self._lower,
            lambda shape: compiler_options(_num_rows(shape)),
            program_folder,
            (
                model.config,
                model.backend,
                model.tokens_per_row,
                mesh and mesh.collectives(None),
                pool.array.aval,
                self._tokens.aval,
                self._hidden.aval,
            ),
            _CODE,
            list(mesh.mesh.devices.flat) if mesh else jax.devices()[:1],
            self._tuning_bytes,
            free,
        )

    def expect(self, active: Collection[int], max_rank: int = 1, pages: int = 1) -> None:
        """Has steps with adapters make room for these from now on, so that their shapes need not change when they come.

        Args:
          active: the modules that adapters change; none without adapters.
          max_rank: their largest rank.
          pages: the most that one of them takes.
        """
        self._room = self._room.including(active, max_rank, pages)

    def all_shapes(self, active: Collection[int], max_rank: int = 1, pages: int = 1) -> list[BatchShape]:
        """The shapes to compile ahead, by ``Buckets.shapes_ahead``, for the adapters that are given as to ``expect``.

        They serve until adapters come that need more room.
        """
        self.expect(active, max_rank, pages)
        return self._buckets.shapes_ahead(self._table_width, self._room, max_rank)

    def is_compiled(self, arguments: LaunchArguments) -> bool:
        """Whether all programs of a step are in memory."""
        return all(key in self.programs for key in self._keys(arguments))

    def prepare(self, arguments: LaunchArguments) -> None:
        """Gets the programs of a step into memory, from disk or by compiling them."""
        # All at once: what is missing is compiled side by side.
        self.programs.prepare(self._keys(arguments), arguments.shape.words)

    def _keys(self, arguments: LaunchArguments) -> list[_Key]:
        scorer = [arguments.scorer.shape] if arguments.scorer is not None else []
        return [*self._forward.keys(arguments.shape), arguments.sampler, *scorer]

    def warm_up(self, shapes: Sequence[BatchShape], when_compiled: Callable[[], object] = lambda: None) -> None:
        """Compiles what steps of these shapes run, with greedy and with plain random sampling, to stay in memory.

        On a GPU it runs, too, on padding, for the CUDA graph of a program is built when that first runs: 25 to 50 ms
        (7B, H200) that all of a step's requests would wait. Other ways of sampling, and shapes not given here, are
        compiled when a step first needs them.

        Args:
          shapes: as of ``all_shapes``.
          when_compiled: called between compiling and running, to wait for other hosts.
        """
        samplers = {
            n: [SamplerShape(n, random=random, filtered=False, history=0, logprobs=False) for random in (False, True)]
            for n in dict.fromkeys(shape.sequences for shape in shapes)
        }
        forwards = itertools.chain(*map(self._forward.keys, shapes))
        self.programs.prepare(
            (*itertools.chain(*samplers.values()), *forwards), f"{len(shapes)} shapes of steps", lasting=True
        )
        when_compiled()
        if jax.default_backend() == "cpu":
            return
        for shape in shapes:
            its_samplers = samplers[shape.sequences]
            for sampler in its_samplers:
                packed, _ = shape.zeros()
                _, inputs = build_sampler_inputs((), {}, shape.sequences, self._vocab_size)
                self.launch(LaunchArguments(shape, packed, sampler, inputs))
                # One at a time: many at once, on several hosts, can wait for each other's collectives for ever.
                self._tokens.block_until_ready()
            # Both have run: other shapes of as many sequences need only one to go with.
            del its_samplers[1:]

    def _tuning_bytes(self, shape: _Key) -> int:
        """Of each device's memory, while a program is compiled for a GPU."""
        local = self._mesh.shards.local if self._mesh else self.model.config
        is_head = isinstance(shape, SamplerShape | ScorerShape)
        return (head_bytes if is_head else layers_bytes)(local, _num_rows(shape), self.model.dtype.itemsize)

    def _lower(self, shape: _Key) -> jax.stages.Lowered:
        hidden = self._struct((self._buckets.max_tokens, self.model.config.hidden_size), self.model.dtype)
        if isinstance(shape, ScorerShape):
            rows = self._struct((shape.rows,), np.int32)
            return _scorer(shape, self.model, self._mesh).lower(table_of(self._mesh), self._head, hidden, rows, rows)
        if not isinstance(shape, SamplerShape):
            return self._forward.lower(shape, self.params, self._tokens, self._pool.array, hidden)
        inputs = self._transfer.struct(shape.packed_size(self._vocab_size))
        sampler = self._sampler(shape)
        return sampler.lower(table_of(self._mesh), self._head, hidden, inputs, self._tokens)

    def _struct(self, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._everywhere)

    def lay_out(self, entries: tuple[ScheduledSequence, ...], adapters: Mapping[object, AdapterSlice]) -> LaidOut:
        """Lays a plan's entries out as arrays. Changes nothing.

        Args:
          entries: at least one; each of another sequence. Pending tokens are those of the step started last.
          adapters: by ``sequence.adapter_key``: every adapter of the entries.
        """
        batch = build_batch(
            entries, dict(adapters), self._rows, self._buckets, self._table_width, self._page_tokens, self._room
        )
        sampler, inputs = build_sampler_inputs(batch.entries, self._rows, batch.shape.sequences, self._vocab_size)
        scorer, pieces = plan_scores(batch.entries, batch.entry_of_row, batch.shape.tokens)
        return LaidOut(entries, batch, LaunchArguments(batch.shape, batch.packed, sampler, inputs, scorer), pieces)

    def start(self, step: LaidOut) -> StepInFlight:
        """Starts a step's layers and returns at once. It must be the one that was laid out last."""
        batch = step.batch
        started = self.launch_layers(step.arguments)
        self._room = batch.room
        self._rows = {e.sequence.sequence_id: row for row, e in enumerate(batch.entries) if e.samples}
        return StepInFlight(step, started)

    def draw(self, running: StepInFlight) -> None:
        """Starts the drawing of a step's tokens, ahead of the next step's start, and returns at once."""
        running.sampled = self.launch_sampler(running.started, running.step.arguments)
        for array in jax.tree.leaves(running.started.scores):
            array.copy_to_host_async()

    def reset(self) -> None:
        """Forgets the tokens of the step started last: the next step's sequences have none pending."""
        # Written anew by every step where they are: what comes and goes would move other memory about.
        self._tokens = jnp.zeros(self._buckets.max_sequences, jnp.int32, device=self._everywhere)
        hidden = (self._buckets.max_tokens, self.model.config.hidden_size)
        self._hidden = jnp.zeros(hidden, self.model.dtype, device=self._everywhere)
        self._rows = {}

    def launch(self, arguments: LaunchArguments) -> Sampled:
        """Starts the programs of a step that is laid out."""
        return self.launch_sampler(self.launch_layers(arguments), arguments)

    def launch_layers(self, arguments: LaunchArguments) -> Started:
        """Starts those for which the step's ``inputs`` need not be known."""
        # All now: nobody should find out between two of them that one has to be compiled.
        self.prepare(arguments)
        self._hidden, self._pool.array = self._forward.start(
            self.programs.get,
            arguments.shape,
            self.params,
            arguments.packed,
            self._tokens,
            self._pool.array,
            self._hidden,
        )
        return Started(self._hidden, self._start_scorer(self._hidden, arguments.scorer))

    def _start_scorer(self, hidden: jax.Array, scorer: ScorerArguments | None) -> list[Scores]:
        if scorer is None:
            return []
        program = self.programs.get(scorer.shape)
        runs = zip(scorer.rows, scorer.targets, strict=True)
        return [program(table_of(self._mesh), self._head, hidden, rows, targets) for rows, targets in runs]

    def launch_sampler(self, started: Started, arguments: LaunchArguments) -> Sampled:
        """Starts the one that draws the step's tokens."""
        program = self.programs.get(arguments.sampler)
        inputs = self._transfer.put(arguments.sampler.pack(arguments.inputs, self._vocab_size))
        table = table_of(self._mesh)
        self._tokens, sampled = program(table, self._head, started.hidden, inputs, self._tokens)
        self._transfer.keep_until(sampled.tokens)
        return sampled

    def _sampler(self, shape: SamplerShape):
        """The function that is compiled for a sampler, of ``(table, head, hidden, inputs, tokens)``.

        Returns:
          The tokens for the next step, in place of those of the previous one, and what the host reads.
        """
        vocab_size, most = self._vocab_size, self._buckets.max_sequences

        def step(group, params, hidden, packed, previous_tokens):
            inputs = shape.unpack(packed, vocab_size)
            logits = self.model.apply({"params": params}, hidden[inputs.row], group, method=Llama.logits)
            assert isinstance(logits, jax.Array)  # and no changed variables beside it, of which there are none
            return sample(logits, inputs, previous_tokens, shape, most)

        def sampled(table, params, hidden, packed, previous_tokens) -> tuple[jax.Array, Sampled]:
            arguments = (hidden, self._transfer.take(packed), previous_tokens)
            drawn = on_each_device(step, self._mesh, table, params, arguments, (_WHOLE, _WHOLE, _WHOLE), _WHOLE)
            return drawn.tokens, self._transfer.give(drawn)

        # A function of its own each time: what JAX remembers of it goes with it.
        return jax.jit(sampled, donate_argnums=4)


def _scorer(shape: ScorerShape, model: Llama, mesh: ModelMesh | None):
    """The function that is compiled for a scorer, of ``(table, head, hidden, rows, targets)``."""

    def step(group, params, hidden, rows, targets):
        logits = model.apply({"params": params}, hidden[rows], group, method=Llama.logits)
        assert isinstance(logits, jax.Array)  # and no changed variables beside it, of which there are none
        return score(logits, targets, shape.top)

    def scored(table, params, *arguments) -> Scores:
        return on_each_device(step, mesh, table, params, arguments, (_WHOLE, _WHOLE, _WHOLE), _WHOLE)

    return jax.jit(scored)
