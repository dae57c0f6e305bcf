"""``slora_jax.generate``: the engine from a notebook cell or a script."""

import atexit
import contextlib
import hashlib
import json
import numbers
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from slora_jax.api.deltas import raise_failure, watch
from slora_jax.api.keywords import check_options, check_sampling_fields
from slora_jax.api.openai import read_messages
from slora_jax.config import EngineConfig, build_config
from slora_jax.errors import EngineStopped, InvalidRequest, Overloaded, SLoRAError, UnknownAdapter
from slora_jax.request import Completion, FinishReason, Request, RequestOutput, SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from slora_jax.engine.engine import Engine, Generation

type Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
type AdapterChoice = str | Path | None
type SamplingChoice = SamplingParams | Mapping[str, Any] | None

_LOOK_SECONDS = 0.3
"""How often the progress bar looks what the engine is doing."""

_engines: dict[str, "Engine"] = {}
_engines_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """The answer to one prompt.

    ``text``, ``token_ids``, ``finish_reason``, ``logprobs`` and ``error`` are those of the first completion;
    with ``n > 1`` all are in ``completions``. ``error`` says why when ``finish_reason`` is "error" or "late".
    ``prompt_logprobs`` are there if ``SamplingParams.prompt_logprobs`` asked for them: see ``RequestOutput``.
    """

    prompt: Prompt
    adapter: str | None
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    def __repr__(self) -> str:
        tokens = f"{len(self.token_ids)} tokens, {self.finish_reason}"
        shown = [f"{self.adapter or 'base model'}: {self.text!r} ({tokens})"]
        shown += [
            f"[{c.index}] {c.text!r} ({len(c.token_ids)} tokens, {c.finish_reason})" for c in self.completions[1:]
        ]
        if self.error:
            shown.append(f"error: {self.error}")
        return f"<{'; '.join(shown)}>"

    def __str__(self) -> str:
        return self.text


class TextStream:
    """Pieces of text as they are generated: ``str`` for one prompt, ``(index, str)`` for several.

    Leaving a ``with`` block, ``close``, an interrupt, or dropping the stream cancels what still runs.
    ``results`` holds what ``generate`` would have returned, once the stream has ended.
    """

    def __init__(self, work: "_Work", generations: Sequence["Generation"]):
        self.results: GenerationResult | list[GenerationResult] | None = None
        self._work = work
        self._generations = generations
        self._pieces = _pieces(generations, work)

    def __iter__(self) -> Iterator[str | tuple[int, str]]:
        return self

    def __next__(self) -> str | tuple[int, str]:
        with _cancelled_on_error(self._generations, but=(StopIteration,)):
            for index, text in self._pieces:
                return text if self._work.single else (index, text)
            if self.results is None and all(g.finished for g in self._generations):
                self.results = self._work.results([g.result() for g in self._generations])
            raise StopIteration

    def __enter__(self) -> "TextStream":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        self._pieces.close()
        for generation in self._generations:
            generation.cancel()


def _pieces(generations: Sequence["Generation"], work: "_Work") -> Generator[tuple[int, str], None, None]:
    for index, deltas in watch(generations, gone=lambda: False):
        if text := "".join(delta.text for delta in deltas):
            yield index, text
        with work.naming(index):
            for delta in deltas:
                raise_failure(delta)


def generate(
    prompts: Prompt | Sequence[Prompt],
    adapters: AdapterChoice | Sequence[AdapterChoice] = None,
    *,
    model: "str | Path | Engine | None" = None,
    sampling: SamplingChoice | Sequence[SamplingChoice] = None,
    priority: int = 0,
    slo_ms: float | None = None,
    chat: bool = False,
    stream: bool = False,
    progress: bool | None = None,
    **engine_options: Any,
) -> GenerationResult | list[GenerationResult] | TextStream:
    """Generates text for one prompt or many, each with its own adapter, all in one batch.

    A single prompt, adapter or sampling stands for all; lists go in parallel and must be of one length.

    Args:
      prompts: a text, token ids, or chat messages (``[{"role": "user", "content": ...}]``); or a list of these.
      adapters: a registered adapter's name, the path of a PEFT folder, or None for the base model; or a list.
      model: a folder, a Hugging Face id, a running ``Engine``, or None for the embedded demo model with its
        demo adapters.
      sampling: ``SamplingParams``, or a mapping of its fields, of which those left out are as the model's
        ``generation_config.json`` says (unless ``generation_config=False``); or a list.
      priority: of all these prompts; higher goes first, with ``scheduler={"policy": "priority"}``.
      slo_ms: milliseconds within which each first token is due, with ``scheduler={"policy": "abort"}``. A prompt that
        cannot meet it has ``finish_reason`` "late" and no text; a stream raises ``ObjectiveMissed``.
      chat: put each text into the model's chat template, as what the user says.
      stream: return a ``TextStream`` at once.
      progress: show a progress bar; None shows one for several prompts that are not streamed.
      **engine_options: fields of ``EngineConfig`` (``dtype``, ``max_model_len``, ``pool={"pages": ...}``, ...).
        The engine is kept: a call with the same model and options does not load it again.

    Returns:
      One ``GenerationResult``, or a list of them if any of the arguments was a list of several.

    Raises:
      InvalidRequest: a bad parameter, or lists of different lengths.
      UnknownAdapter: no adapter or folder of that name.
      BadAdapter: a folder that cannot be served.
    """
    check_options(engine_options)
    work = _Work.of(prompts, adapters, sampling)
    for i, choice in enumerate(work.choices):  # refused, if so, before a model is loaded
        with work.naming(i, "sampling"):
            if _sampling_params(choice, {}).n > 1 and stream:
                raise InvalidRequest("stream=True gives one text per prompt; n must be 1", "n")
    engine = _engine(model, engine_options)
    choices = [_sampling_params(choice, engine.default_sampling) for choice in work.choices]
    names = []
    for i, adapter in enumerate(work.adapters):
        with work.naming(i, "adapters"):
            names.append(_adapter_name(adapter, engine))
    requests = []
    for i, (prompt, name, chosen) in enumerate(zip(work.prompts, names, choices, strict=True)):
        with work.naming(i):
            ids = _token_ids(prompt, engine, chat, name)
            requests.append(Request(ids, name, chosen, f"generate-{i}", priority=priority, slo_ms=slo_ms))
    generations: list[Generation] = []
    with _cancelled_on_error(generations):
        if stream:
            for i, request in enumerate(requests):
                with work.naming(i):
                    generations.append(engine.submit(request))
            return TextStream(work, generations)
        show = len(requests) > 1 if progress is None else progress
        outputs = _run(engine, requests, generations, work, show)
    return work.results(outputs)


def shutdown() -> None:
    """Closes every engine that ``generate`` keeps, and frees its memory."""
    with _engines_lock:
        engines = list(_engines.values())
        _engines.clear()
    for engine in engines:
        engine.close()


@dataclass(frozen=True, slots=True)
class _Work:
    """The arguments of ``generate`` as lists of one length."""

    prompts: Sequence[Prompt]
    adapters: Sequence[AdapterChoice]
    choices: Sequence[SamplingChoice]
    lists: Sequence[str]

    @property
    def single(self) -> bool:
        return not self.lists

    @classmethod
    def of(cls, prompts, adapters, sampling) -> "_Work":
        lists = {}
        if isinstance(prompts, Iterable) and not isinstance(prompts, (str, Mapping)):
            prompts = list(prompts)
        if not _is_prompt(prompts):
            lists["prompts"] = prompts
        if isinstance(adapters, Sequence) and not isinstance(adapters, str):
            lists["adapters"] = list(adapters)
        if isinstance(sampling, Sequence):
            lists["sampling"] = list(sampling)
        lengths = {name: len(values) for name, values in lists.items()}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{length} {name}" for name, length in lengths.items())
            raise InvalidRequest(f"lists must be of one length to go in parallel, got {said}")
        count = next(iter(lengths.values()), 1)
        return cls(
            prompts=lists.get("prompts", [prompts] * count),
            adapters=lists.get("adapters", [adapters] * count),
            choices=lists.get("sampling", [sampling] * count),
            lists=tuple(lists),
        )

    @contextlib.contextmanager
    def naming(self, place: int, argument: str | None = None) -> Iterator[None]:
        """Errors within say to which item of a list they belong.

        Args:
          argument: whose list; nothing is said if it is none. None takes the first that is a list.
        """
        try:
            yield
        except SLoRAError as error:
            named = argument or next(iter(self.lists), None)
            if named in self.lists:
                error.args = (f"{named}[{place}]: {error}",)
            raise

    def results(self, outputs: Sequence[RequestOutput]) -> GenerationResult | list[GenerationResult]:
        results = [_result(prompt, output) for prompt, output in zip(self.prompts, outputs, strict=True)]
        return results[0] if self.single else results


def _is_prompt(value: Any) -> bool:
    """Whether this is one prompt and not a list of them.

    Raises:
      InvalidRequest: neither.
    """
    if isinstance(value, str):
        return True
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise InvalidRequest(
            f"a prompt is a text, a list of token ids or a list of chat messages, got {type(value).__name__}", "prompts"
        )
    kinds = {"message" if isinstance(item, Mapping) else "id" if _is_int(item) else "prompt" for item in value}
    if len(kinds) > 1:
        raise InvalidRequest("a list of prompts cannot be mixed with token ids or chat messages", "prompts")
    return bool(kinds & {"message", "id"})


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _are_ids(prompt: Prompt) -> TypeGuard[Sequence[int]]:
    """Of one prompt, whose items are of one kind."""
    return not isinstance(prompt, str) and _is_int(prompt[0])


def _sampling_params(value: SamplingChoice, defaults: Mapping[str, Any]) -> SamplingParams:
    """What the caller chose; ``defaults`` stand for the fields that a mapping leaves out."""
    if value is None:
        return SamplingParams(**defaults)
    if isinstance(value, SamplingParams):
        return value
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"sampling must be SamplingParams or a mapping, got {type(value).__name__}", "sampling")
    check_sampling_fields(value)
    return SamplingParams(**{**defaults, **value})


def _token_ids(prompt: Prompt, engine: "Engine", chat: bool, adapter: str | None) -> tuple[int, ...]:
    if not _is_prompt(prompt):
        raise InvalidRequest("a prompt is empty, or a list within a list", "prompts")
    if _are_ids(prompt):
        return tuple(int(token) for token in prompt)
    tokenizer = engine.tokenizer_of(adapter)
    if tokenizer is None:
        raise InvalidRequest("this model has no tokenizer (dummy weights); give token ids", "prompts")
    if isinstance(prompt, str) and not chat:
        ids = tokenizer.encode(prompt, max_tokens=engine.max_model_len)
        return tuple(ids) or tuple(i for i in [tokenizer.bos_token_id] if i is not None)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return tuple(tokenizer.encode_chat(read_messages(messages), max_tokens=engine.max_model_len))


def _adapter_name(adapter: AdapterChoice, engine: "Engine") -> str | None:
    """The registered name; a folder is registered under a name of its own first."""
    registered = engine.adapters()
    if adapter is None or (isinstance(adapter, str) and adapter in registered):
        return adapter
    if not isinstance(adapter, (str, Path)):
        raise InvalidRequest(f"an adapter is a name, a folder or None, got {type(adapter).__name__}", "adapters")
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        names = ", ".join(list(registered)[:10]) + (", ..." if len(registered) > 10 else "")
        raise UnknownAdapter(f"no adapter and no folder is named {str(adapter)!r}; registered are: {names or 'none'}")
    name = _folder_name(folder.resolve())
    if name not in registered:
        engine.register_adapter(name, str(folder.resolve()))
    return name


def _folder_name(folder: Path) -> str:
    """A name that changes when the folder's files do, so that a newly trained adapter is not taken for the old."""
    stamp = [(p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.glob("adapter_*"))]
    digest = hashlib.sha256(json.dumps([str(folder), stamp]).encode()).hexdigest()
    return f"{folder.name}-{digest[:8]}"


def _run(
    engine: "Engine", requests: Sequence[Request], generations: list["Generation"], work: _Work, show: bool
) -> list[RequestOutput]:
    """Submits all, as fast as the engine takes them, and waits for all."""
    outputs: list[RequestOutput] = []
    with _bar(len(requests), show) as bar:
        for i, request in enumerate(requests):
            while True:
                try:
                    with work.naming(i):
                        generations.append(engine.submit(request))
                    break
                except Overloaded:
                    if len(outputs) == len(generations):  # others fill the queue, not this call
                        raise
                    outputs.append(_result_of(generations[len(outputs)], engine, bar))
        outputs.extend(_result_of(generation, engine, bar) for generation in generations[len(outputs) :])
    return outputs


def _result_of(generation: "Generation", engine: "Engine", bar) -> RequestOutput:
    """Waits for one request, and says in the bar why where that is a compiler."""
    while True:
        try:
            output = generation.result(timeout=_LOOK_SECONDS)
            break
        except TimeoutError:
            words = engine.compiling
            bar.set_postfix_str(f"compiling {words}, this first time" if words else "")
    bar.set_postfix_str("", refresh=False)
    bar.update()
    for completion in output.completions:
        if completion.finish_reason == "abort":
            raise EngineStopped(completion.error or "the engine was closed while generating")
    return output


def _bar(total: int, show: bool):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm warns where notebook widgets are missing
        from tqdm.auto import tqdm
    return tqdm(total=total, disable=not show, desc="Generating", unit="prompt")


def _result(prompt: Prompt, output: RequestOutput) -> GenerationResult:
    first = output.completions[0]
    return GenerationResult(
        prompt=prompt,
        adapter=output.adapter,
        text=first.text,
        token_ids=first.token_ids,
        finish_reason=first.finish_reason,
        logprobs=first.logprobs,
        prompt_token_ids=output.prompt_token_ids,
        completions=output.completions,
        error=next((c.error for c in output.completions if c.error), None),
        prompt_logprobs=output.prompt_logprobs,
    )


@contextlib.contextmanager
def _cancelled_on_error(generations: Sequence["Generation"], but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Whatever ends the block early, an interrupt too, ends what it submitted."""
    try:
        yield
    except but:
        raise
    except BaseException:
        for generation in generations:
            generation.cancel()
        raise


def _engine(model: "str | Path | Engine | None", options: Mapping[str, Any]) -> "Engine":
    if model is not None and not isinstance(model, (str, Path)):
        if options:
            raise InvalidRequest(f"{', '.join(options)}: a running engine takes no options")
        return model
    for kept in list(_engines.values()):
        kept.check_process()  # ahead of the lock, which a fork may have copied while it was held
    fields = dict(options, model="demo" if model is None else str(model))
    config = build_config(fields)
    key = config.model_dump_json()
    with _engines_lock:
        engine = _engines.get(key)
        if engine is None or not engine.is_running:
            engine = _engines[key] = _start_engine(config)
            # Registered after all that the engine imports, so that it is closed before any of that is.
            atexit.unregister(shutdown)
            atexit.register(shutdown)
    return engine


def _start_engine(config: EngineConfig) -> "Engine":
    from slora_jax.demo import with_demo
    from slora_jax.engine.engine import Engine

    engine = Engine.create(with_demo(config))
    engine.start()
    return engine
