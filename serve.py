"""Starts the server: reads flags and a config file, takes the port, loads the engine, serves until told to stop.

Exit codes: 0 after Ctrl-C or SIGTERM, 2 for what the user can mend, 70 where the engine or this program failed, after
which a supervisor may start it again.
"""

import _thread
import contextlib
import gc
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from slora_jax.api.server import ServerConfig
    from slora_jax.config import EngineConfig
    from slora_jax.engine.engine import Engine

# Everything else is imported where it is used, so that --help and a mistyped flag answer at once.

POOL_SIZES = ("memory_fraction", "gigabytes", "pages")
SHOWN_ADAPTERS = 8
FAILED = 70
"""Exit code of a failure that is not the user's; EX_SOFTWARE of sysexits.h."""
SECONDS_TO_ANSWER = 1.0
"""How long clients may take to hear that their requests failed, before a process that lost another host ends."""
SECONDS_TO_END = 45.0
"""How long a failed server may take to tell its clients before the process is ended from within."""
MAX_MESSAGE = 4000
NO_SUCH_FIELD = "there is no such field"
GIVEN = (click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.ENVIRONMENT)


def _adapter(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    adapters = {}
    for value in values:
        if value.startswith("{"):  # vLLM's other form
            name, equals, path = _adapter_object(value)
        else:
            name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise click.BadParameter(f"{value!r} is not NAME=PATH, for example pirate=adapters/pirate")
        adapters[name] = path
    return adapters


def _adapter_object(value: str) -> tuple[str, str, str]:
    try:
        fields = json.loads(value)
        return str(fields["name"]), "=", str(fields["path"])
    except (ValueError, KeyError, TypeError):
        raise click.BadParameter(f'{value[:80]!r} is not {{"name": NAME, "path": PATH}}, nor NAME=PATH') from None


def _weight(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    weights = {}
    for value in values:
        name, equals, weight = value.rpartition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            equals = ""
        if not (name and equals):
            raise click.BadParameter(f"{value!r} is not NAME=WEIGHT, for example pirate=2")
    return weights


def _flag(
    name: str,
    help: str,
    *,
    field: str | None = None,
    default: str | None = None,
    also: tuple[str, ...] = (),
    **kwargs,
) -> click.Option:
    """A flag for one config field; the parameter's name is the field's path with ``__`` between its parts.

    Its value is None if it was not given. ``default``, the field's own default, is only shown. ``also`` are names that
    other servers have for it.
    """
    field = field or name.split("/")[0].removeprefix("--").replace("-", "_")
    names = [name, *also, field.replace(".", "__")]
    shown = help if default is None else f"{help} [default: {default}]"
    return click.Option(names, help=shown, default=None, **kwargs)


FLAGS = {
    "Configuration": [
        click.Option(["--config"], metavar="FILE", help="YAML file with any of the fields below; flags win over it."),
    ],
    "Model": [
        _flag(
            "--model",
            "Hugging Face folder or id; 'demo' is the embedded SmolLM2-135M-Instruct; with --dummy, a file of "
            "configs/shapes.",
            default="demo",
            metavar="MODEL",
        ),
        _flag(
            "--served-name",
            "The base model's name in the API; the folder's if left out.",
            also=("--served-model-name",),
            metavar="NAME",
        ),
        _flag("--dummy/--no-dummy", "Draw random weights; load none.", default="no-dummy"),
        _flag(
            "--tokenizer", "With --dummy: a folder whose tokenizer.json is used; none if left out.", metavar="FOLDER"
        ),
        _flag(
            "--dtype",
            "Of weights, activations and pool; auto is bfloat16 on a GPU, float32 on a CPU.",
            default="auto",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            metavar="DTYPE",
        ),
        _flag(
            "--quantization",
            "Hold the layers' weights in 8 bits, by output channel, and round activations to 8 bits by token; adapters "
            "see them unrounded. Left out: as the files have them.",
            type=click.Choice(["fp8"]),
            metavar="fp8",
        ),
        _flag(
            "--kv-cache-dtype",
            "Of the KV cache; fp8 holds twice as many tokens as bfloat16. auto is --dtype.",
            default="auto",
            type=click.Choice(["auto", "fp8"]),
            metavar="DTYPE",
        ),
        _flag(
            "--max-model-len",
            "Longest prompt plus output; the model's own limit if left out.",
            type=int,
            metavar="TOKENS",
        ),
        _flag(
            "--generation-config/--no-generation-config",
            "What a request leaves out of its sampling is as the model's generation_config.json says.",
            default="generation-config",
        ),
        _flag(
            "--checkpoint-cache",
            "Where ready-to-serve weights are kept for the next start.",
            default="~/.cache/slora-jax/checkpoints",
            metavar="FOLDER",
        ),
        _flag("--no-checkpoint-cache", "Keep none.", is_flag=True),
        _flag(
            "--compilation-cache",
            "Where compiled steps are kept for the next start.",
            default="~/.cache/slora-jax/compiled",
            metavar="FOLDER",
        ),
        _flag("--no-compilation-cache", "Keep none.", is_flag=True),
        _flag(
            "--warm-up/--no-warm-up",
            "Compile every shape of step before saying ready, or none; if left out, on a CPU a few.",
        ),
        _flag("--seed", "Of dummy weights, and of requests without a seed.", default="0", type=int),
    ],
    "Adapters": [
        _flag(
            "--adapter",
            "A PEFT folder or Hugging Face id to serve as NAME; may be repeated.",
            field="adapters",
            also=("--lora-modules",),
            metavar="NAME=PATH",
            multiple=True,
            callback=_adapter,
        ),
        _flag(
            "--adapter-dir",
            "Serve every PEFT folder in it under its own name; may be repeated.",
            field="adapter_dirs",
            metavar="FOLDER",
            multiple=True,
        ),
        _flag(
            "--max-lora-rank",
            "Adapters of a larger rank are refused, before their weights are read or downloaded.",
            default="256",
            type=int,
            metavar="RANK",
        ),
        _flag(
            "--pin",
            "An adapter that is brought to the pool at the start and stays there; may be repeated.",
            field="pinned",
            metavar="NAME",
            multiple=True,
        ),
        _flag(
            "--allow-adapter-loading/--no-allow-adapter-loading",
            "Let this machine's programs register adapters without an admin key (/v1/load_lora_adapter).",
            field="server.allow_adapter_loading",
            default="no-allow-adapter-loading",
        ),
        _flag(
            "--adapter-root",
            "Folder within which adapters must be to be registered so; may be repeated.",
            field="server.adapter_roots",
            metavar="FOLDER",
            multiple=True,
        ),
        _flag(
            "--adapter-hub",
            "Organisation of the Hugging Face hub whose adapters may be registered so; may be repeated.",
            field="server.adapter_hubs",
            metavar="ORG",
            multiple=True,
        ),
        _flag(
            "--resolve-adapters/--no-resolve-adapters",
            "Register an adapter when a request names a folder within a root, or a repository of such an organisation.",
            field="server.resolve_adapters",
            default="no-resolve-adapters",
        ),
    ],
    "Memory": [
        _flag(
            "--gpu-memory-fraction",
            "Share of each GPU that JAX takes; 0.92 if left out, and 0.88 if several share the model.",
            field="gpu_memory_fraction",
            also=("--gpu-memory-utilization",),
            type=float,
            metavar="SHARE",
        ),
        _flag(
            "--pool-memory-fraction",
            "The pool's share of what the weights leave of it (on a CPU at most 2 GiB).",
            field="pool.memory_fraction",
            default="0.9",
            type=float,
            metavar="SHARE",
        ),
        _flag(
            "--pool-gigabytes",
            "The pool's size in GiB on each device.",
            field="pool.gigabytes",
            type=float,
            metavar="GIB",
        ),
        _flag("--pool-pages", "The pool's size in pages of 16 tokens.", field="pool.pages", type=int, metavar="PAGES"),
        _flag(
            "--host-adapter-memory",
            "Host memory for adapters that are not in the pool, in GiB; half of what is free if left out.",
            field="host_adapter_gigabytes",
            type=float,
            metavar="GIB",
        ),
        _flag(
            "--prefix-cache/--no-prefix-cache",
            "Keep the pages of finished prompts for prompts that begin alike.",
            field="scheduler.prefix_cache",
            default="prefix-cache",
        ),
    ],
    "Devices": [
        _flag(
            "--tp",
            "Devices that share the model and the pool, over all hosts: tensor parallelism.",
            field="mesh.tp",
            also=("--tensor-parallel-size",),
            default="1",
            type=int,
            metavar="N",
        ),
        _flag(
            "--coordinator",
            "Several hosts: where the first one's process waits for the others.",
            field="mesh.coordinator",
            metavar="ADDRESS:PORT",
        ),
        _flag(
            "--num-hosts",
            "Processes, one a host; start each with the same flags.",
            field="mesh.num_hosts",
            default="1",
            type=int,
            metavar="COUNT",
        ),
        _flag(
            "--host-id",
            "Which of them this is; 0 answers requests.",
            field="mesh.host_id",
            default="0",
            type=int,
            metavar="NUMBER",
        ),
    ],
    "Scheduling": [
        _flag(
            "--max-batch-tokens",
            "Most tokens of one step, prefill and decode together.",
            field="scheduler.max_batch_tokens",
            also=("--max-num-batched-tokens",),
            default="512",
            type=int,
            metavar="TOKENS",
        ),
        _flag(
            "--max-sequences",
            "Most sequences of one step.",
            field="scheduler.max_sequences",
            also=("--max-num-seqs",),
            default="256",
            type=int,
            metavar="COUNT",
        ),
        _flag(
            "--max-waiting",
            "Most sequences waiting; one more is answered 429.",
            field="scheduler.max_waiting",
            default="100000",
            type=int,
            metavar="COUNT",
        ),
        _flag(
            "--policy",
            "Who goes next: fcfs (first come), lcfs (last come), vtc (fair shares for adapters), cluster (adapters "
            "of the batch first), abort (give up early what would miss its first-token objective), priority.",
            field="scheduler.policy",
            default="fcfs",
            type=click.Choice(["fcfs", "lcfs", "vtc", "cluster", "abort", "priority"]),
            metavar="POLICY",
        ),
        _flag(
            "--max-wait-s",
            "Whoever waited for longer gets one start in eight, under every policy.",
            field="scheduler.max_wait_s",
            default="60.0",
            type=float,
            metavar="SECONDS",
        ),
        _flag(
            "--fair-weight",
            "vtc: an adapter's (or the base model's) share relative to others', which is 1; may be repeated.",
            field="scheduler.fair_weights",
            metavar="NAME=WEIGHT",
            multiple=True,
            callback=_weight,
        ),
        _flag(
            "--input-price",
            "vtc: what a token of a prompt counts.",
            field="scheduler.input_price",
            default="1.0",
            type=float,
            metavar="PRICE",
        ),
        _flag(
            "--output-price",
            "vtc: what a token of an output counts.",
            field="scheduler.output_price",
            default="2.0",
            type=float,
            metavar="PRICE",
        ),
        _flag(
            "--batch-adapters",
            "cluster: adapters in the batch from which on their requests go first.",
            field="scheduler.batch_adapters",
            default="32",
            type=int,
            metavar="COUNT",
        ),
        _flag(
            "--slo-ms",
            "abort: within how many milliseconds a first token is due, unless the request says so itself (slo_ms).",
            field="scheduler.slo_ms",
            default="6000.0",
            type=float,
            metavar="MS",
        ),
    ],
    "Server": [
        _flag(
            "--host",
            "Address to listen on; 0.0.0.0 for every interface.",
            field="server.host",
            default="127.0.0.1",
            metavar="ADDRESS",
        ),
        _flag("--port", "Port to listen on; 0 takes a free one.", field="server.port", default="8000", type=int),
        _flag(
            "--max-streams",
            "Most requests answered at a time, streamed or not; one more is answered 429.",
            field="server.max_streams",
            default="512",
            type=int,
            metavar="COUNT",
        ),
        _flag(
            "--max-body-bytes",
            "Larger request bodies are answered 413; 1 MiB, or 16 bytes for each token of the context, if left out.",
            field="server.max_body_bytes",
            type=int,
            metavar="BYTES",
        ),
        _flag(
            "--grace-s",
            "How long running requests may take to end after SIGTERM, while new ones are answered 503.",
            field="server.grace_s",
            default="30.0",
            type=float,
            metavar="SECONDS",
        ),
        _flag(
            "--log-level",
            "How much to log on stderr: debug, info (a line for each request), warning or error.",
            field="server.log_level",
            default="warning",
            type=click.Choice(["debug", "info", "warning", "error"]),
            metavar="LEVEL",
        ),
        _flag(
            "--log-json/--no-log-json",
            "Log one JSON object a line.",
            field="server.log_json",
            default="no-log-json",
        ),
        _flag(
            "--otlp-traces-endpoint",
            "OpenTelemetry collector that gets a span of each request, such as http://localhost:4318/v1/traces (OTLP "
            "over HTTP); needs the extra otel.",
            field="server.otlp_traces_endpoint",
            metavar="URL",
        ),
        _flag(
            "--slow-step-s",
            "Steps that take longer than that many seconds are logged.",
            default="5.0",
            type=float,
            metavar="SECONDS",
        ),
    ],
    "Access": [
        _flag(
            "--api-key",
            "A key that requests must bring (Authorization: Bearer KEY); may be repeated. Other users of this machine "
            "see flags, but not SLORA_API_KEY in the environment: one key, or several with spaces between.",
            field="server.api_keys",
            envvar="SLORA_API_KEY",
            metavar="KEY",
            multiple=True,
        ),
        _flag(
            "--api-keys-file",
            "YAML or JSON file of hashed keys, each with its adapters, rates and priority; read again on SIGHUP.",
            field="server.api_keys_file",
            metavar="FILE",
        ),
        _flag(
            "--admin-key",
            "The key for registering, forgetting and pinning adapters; or SLORA_ADMIN_KEY in the environment.",
            field="server.admin_key",
            envvar="SLORA_ADMIN_KEY",
            metavar="KEY",
        ),
        _flag(
            "--allowed-hosts",
            "Without an admin key: a name that the server is called by, beside the address; may be repeated.",
            field="server.allowed_hosts",
            metavar="NAME",
            multiple=True,
        ),
        _flag(
            "--allowed-origins",
            "Origin of pages that may use the server from a browser (CORS), or *; may be repeated.",
            field="server.allowed_origins",
            metavar="ORIGIN",
            multiple=True,
        ),
    ],
}


def _print_version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted:
        from slora_jax import __version__

        click.echo(f"slora-jax {__version__}")
        ctx.exit()


VERSION = click.Option(
    ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show it and exit."
)
SEVERAL_VALUES = {"--lora-modules", "--allowed-origins", "--allowed-hosts"}
"""Flags that elsewhere take several values at once, as in ``--lora-modules a=x b=y``."""


def closest(name: str, known: Iterable[str]) -> list[str]:
    """The one of these that was most likely meant, if there is any."""
    import difflib

    alike = {other.lower().replace("_", "-"): other for other in known}
    found = difflib.get_close_matches(name.lower().replace("_", "-"), alike, n=1, cutoff=0.7)
    return [alike[other] for other in found]


def one_value_each(args: list[str]) -> list[str]:
    """The same command line, with such a flag repeated before each of its values."""
    spread: list[str] = []
    flag, values = None, 0
    for arg in args:
        name = arg.partition("=")[0]
        if arg.startswith("-"):
            flag, values = (name, int(name != arg)) if name in SEVERAL_VALUES else (None, 0)
        elif flag is not None:
            spread += [flag] if values else []
            values += 1
        spread.append(arg)
    return spread


class GroupedCommand(click.Command):
    """Lists its options group by group."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, one_value_each(args))
        except click.NoSuchOption as e:
            known = [name for param in self.params for name in (*param.opts, *param.secondary_opts)]
            raise click.NoSuchOption(e.option_name, possibilities=closest(e.option_name, known), ctx=ctx) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for name, flags in FLAGS.items():
            with formatter.section(name):
                formatter.write_dl([flag.get_help_record(ctx) for flag in flags])
        with formatter.section("Help"):
            formatter.write_dl([option.get_help_record(ctx) for option in (VERSION, self.get_help_option(ctx))])


class Failure(click.ClickException):
    """The end of this process, in one line."""

    def __init__(self, error: BaseException, exit_code: int = 2):
        super().__init__(one_line(error))
        self.exit_code = exit_code


def one_line(error: BaseException) -> str:
    """What the error says, with nothing that a terminal would act on."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + " ..."


class Stopped(BaseException):
    """SIGTERM came before the server could stop by itself. No Exception, so that nothing takes it for a failure."""


@click.command(
    cls=GroupedCommand,
    params=[*(flag for flags in FLAGS.values() for flag in flags), VERSION],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.pass_context
def main(ctx: click.Context, config: str | None, **flags: Any) -> None:
    """Serve one base model and its LoRA adapters through OpenAI's API.

    Without arguments: the embedded demo model and its adapters, on http://127.0.0.1:8000.

    \b
    Examples:
      serve.py --model meta-llama/Llama-2-7b-hf --adapter-dir adapters --port 8080
      serve.py --config configs/server.yaml --adapter pirate=adapters/pirate
    """
    from slora_jax.api.logs import set_up_logging
    from slora_jax.errors import SLoRAError

    given = {name: value for name, value in flags.items() if ctx.get_parameter_source(name) in GIVEN}

    try:
        with stopped_by_sigterm():
            engine_config, server_config = read_config(config, given)
            set_up_logging(server_config.log_level, server_config.log_json)
            if engine_config.mesh.host_id:
                follow(engine_config, server_config)
            else:
                serve(engine_config, server_config)
    except (Stopped, KeyboardInterrupt):
        click.echo("Stopped.", err=True)
    except click.ClickException:
        raise
    except (SLoRAError, OSError, ModuleNotFoundError) as error:
        logging.getLogger("slora_jax").debug("failed to start", exc_info=True)
        raise Failure(error) from None
    except Exception as error:
        logging.getLogger("slora_jax").debug("failed", exc_info=True)
        raise Failure(_unexpected(error), FAILED) from None


def _unexpected(error: Exception) -> Exception:
    """An error that nobody foresaw, with what to do about it."""
    kind, text = type(error).__name__, one_line(error)
    if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
        return RuntimeError(
            f"out of memory ({kind}: {text}); lower --pool-memory-fraction, --max-batch-tokens or --max-sequences, or "
            "end what else uses the device"
        )
    return RuntimeError(f"{kind}: {text} (--log-level debug shows where)")


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM while loading ends this process as Ctrl-C does; a server that runs has its own way (``run_server``)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers may send it twice, and once is enough
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def read_config(file: str | None, flags: Mapping[str, Any]) -> "tuple[EngineConfig, ServerConfig]":
    """Lays the flags that were given over the config file.

    Adapters and pins are added to the file's; every other flag replaces the file's value.

    Raises:
      InvalidRequest: unknown keys or bad values; the message names each by its path, and its flag where it has one.
    """
    from pathlib import Path

    from slora_jax.api.server import ServerConfig
    from slora_jax.config import EngineConfig, checked, read_yaml
    from slora_jax.errors import InvalidRequest

    fields = read_yaml(Path(file)) if file else {}
    problems = []
    for names, kind, called in (
        (("server", "pool", "scheduler", "mesh", "adapters"), dict, "mapping"),
        (("adapter_dirs", "pinned"), list, "list"),
    ):
        for name in names:
            if fields.get(name) is None:
                fields[name] = kind()
            elif not isinstance(fields[name], kind):
                problems.append((name, f"must be a {called}, got {type(fields[name]).__name__}"))
                fields[name] = kind()
    weights = fields["scheduler"].get("fair_weights")
    if "scheduler__fair_weights" in flags and not isinstance(weights, dict | None):
        problems.append(("scheduler.fair_weights", f"must be a mapping, got {type(weights).__name__}"))
        fields["scheduler"]["fair_weights"] = {}
    _lay_over(fields, flags)
    server, more = checked(ServerConfig, fields.pop("server"), section="server")
    engine, still_more = checked(EngineConfig, fields)
    problems += more + still_more
    if problems:
        flag_names = {option.name: option.opts[0] for group in FLAGS.values() for option in group}
        said = []
        for path, text in problems:
            text = text.replace(NO_SUCH_FIELD, f"{NO_SUCH_FIELD}{_meant(path)}", 1)
            # A field may be a container: the problem is then in one of its values, such as adapters.pirate.
            name = next((name for name in flags if f"{path}.".startswith(f"{name.replace('__', '.')}.")), None)
            place = f" ({flag_names[name]})" if name else f" (in {file})" if file else ""
            said.append(f"{path}{place}: {text}")
        raise InvalidRequest(f"invalid configuration: {'; '.join(said)}")
    return engine, server


def _meant(path: str) -> str:
    """A hint for a field that there is not: it is in another section, called otherwise, or misspelt."""
    paths = [(option.name or "").replace("__", ".") for group in FLAGS.values() for option in group]
    by_name = {path.rpartition(".")[2]: path for path in paths}
    for group in FLAGS.values():
        for option in group:
            for flag in option.opts:
                by_name.setdefault(flag.removeprefix("--").replace("-", "_"), (option.name or "").replace("__", "."))
    section, _, name = path.rpartition(".")
    # In its own section first, then anywhere.
    here = [other for other in paths if other.rpartition(".")[0] == section]
    meant = closest(path, here) or [by_name[other] for other in closest(name, by_name)]
    return f"; did you mean {meant[0]}?" if meant else ""


def _lay_over(fields: dict[str, Any], flags: Mapping[str, Any]) -> None:
    for name, value in flags.items():
        *section, key = name.split("__")
        if name == "adapters":
            fields["adapters"] |= value
        elif name in ("adapter_dirs", "pinned"):
            fields[name] = [*fields[name], *value]
        elif name == "scheduler__fair_weights":
            fields["scheduler"]["fair_weights"] = (fields["scheduler"].get("fair_weights") or {}) | value
        elif name.startswith("no_"):
            fields[name.removeprefix("no_")] = None
        else:
            target = fields[section[0]] if section else fields
            if section == ["pool"]:
                for other in POOL_SIZES:  # one size only; the flag's
                    if f"pool__{other}" not in flags:
                        target.pop(other, None)
            target[key] = value


class EngineFailure:
    """What ends this process when the engine cannot go on: one line, and a code on which a supervisor starts it again.

    No living process is to answer 503 for ever.
    """

    def __init__(self, seconds_to_end: float):
        self.reason: str | None = None
        self._seconds_to_end = seconds_to_end

    def report(self, reason: str) -> None:
        """The engine's word, from any thread; returns at once. The first one counts.

        The server stops as on Ctrl-C, so that clients hear why their requests end. If it does not come to an end, as
        where a device hangs, the process is ended from here.
        """
        if self.reason is not None:
            return
        self.reason = reason
        click.echo(f"engine failed: {one_line(RuntimeError(reason))}", err=True)
        watchdog = threading.Timer(self._seconds_to_end, os._exit, [FAILED])
        watchdog.daemon = True
        watchdog.start()
        _thread.interrupt_main()

    def end(self) -> None:
        """Ends the process if there was a failure: not by way of the interpreter, whose libraries may hang as well."""
        if self.reason is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(FAILED)


def listen_on(server_config: "ServerConfig"):
    """The listening socket.

    Raises:
      InvalidRequest: the address cannot be had.
    """
    from slora_jax.api.server import listen
    from slora_jax.errors import InvalidRequest

    host, port = server_config.host, server_config.port
    try:
        return listen(host, port, server_config.max_streams)
    except (OSError, ValueError) as error:  # ValueError: no name of a host, such as one with an empty part
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequest(f"cannot listen on {host!r}, port {port} (--host, --port): {reason}") from None


def serve(engine_config: "EngineConfig", server_config: "ServerConfig") -> None:
    """Loads and serves until Ctrl-C or SIGTERM."""
    from slora_jax.api.app import create_app
    from slora_jax.api.bounds import useful_body_bytes
    from slora_jax.api.drain import Drain
    from slora_jax.api.server import rules, run_server
    from slora_jax.api.tracing import tracing_to
    from slora_jax.demo import with_demo
    from slora_jax.engine.meeting import together

    failure = EngineFailure(SECONDS_TO_END)
    access, folders = rules(server_config)
    drain = Drain()
    # First the port: if it is taken, say so before the slow part.
    with (
        together(engine_config.mesh) as meeting,
        contextlib.closing(listen_on(server_config)) as sock,
        access.reloaded_by_sighup(),
        tracing_to(server_config.otlp_traces_endpoint) as tracing,
    ):
        click.echo(f"Loading {engine_config.model} ...", err=True)
        from slora_jax.engine.engine import Engine, leave_alone_what_exists

        engine = Engine.create(with_demo(engine_config), meeting=meeting)
        try:
            engine.warm_up()
            leave_alone_what_exists()
            engine.start(on_failure=failure.report)

            def ready(url: str) -> None:
                if meeting is not None:
                    # A signal to another host is as if Ctrl-C were for this process.
                    meeting.serve(_thread.interrupt_main, lambda reason: _give_up(engine, reason))
                click.echo(greeting(engine, url, access.needs_key))

            max_body_bytes = server_config.max_body_bytes or useful_body_bytes(engine.max_model_len)
            app = create_app(
                engine,
                max_streams=server_config.max_streams,
                max_body_bytes=max_body_bytes,
                access=access,
                folders=folders,
                resolve_adapters=server_config.resolve_adapters,
                drain=drain,
                tracing=tracing,
            )
            run_server(
                app,
                max_streams=server_config.max_streams,
                max_body_bytes=max_body_bytes,
                sock=sock,
                on_stop=engine.close,
                on_ready=ready,
                drain=drain,
                grace_s=server_config.grace_s,
            )
        finally:
            if meeting is not None and failure.reason is not None:
                meeting.end(f"host 0: {failure.reason}", FAILED)
            failure.end()
            engine.close()
            gc.unfreeze()  # or libraries complain at exit of what is left
    click.echo("Stopped.", err=True)


def _give_up(engine: "Engine", reason: str) -> None:
    """Lets clients hear of it before this process ends."""
    engine.abandon(reason)
    time.sleep(SECONDS_TO_ANSWER)


def follow(engine_config: "EngineConfig", server_config: "ServerConfig") -> None:
    """Lends this host's devices to the first host's server until that stops, which Ctrl-C or SIGTERM asks it to do."""
    from slora_jax.demo import with_demo
    from slora_jax.engine.meeting import together

    mesh = engine_config.mesh
    click.echo(f"Host {mesh.host_id} of {mesh.num_hosts}, for the server at {mesh.coordinator} ...", err=True)
    with together(mesh) as meeting:
        from slora_jax.engine.build import follow

        follow(with_demo(engine_config), meeting)


def greeting(engine: "Engine", url: str, needs_key: bool = False) -> str:
    """What is served where, and a command to try it."""
    names = list(engine.adapters())
    shown = ", ".join(names[:SHOWN_ADAPTERS]) or "none"
    if len(names) > SHOWN_ADAPTERS:
        shown += f" and {len(names) - SHOWN_ADAPTERS} more"
    body: dict[str, Any] = {"model": names[0] if names else engine.model_name}
    if engine.tokenizer is None:
        route, body["prompt"] = "completions", [1, 2, 3]
    elif engine.tokenizer.has_chat_template:
        route, body["messages"] = "chat/completions", [{"role": "user", "content": "What is the moon?"}]
    else:
        route, body["prompt"] = "completions", "The moon is"
    body["max_tokens"] = 64
    key = '-H "Authorization: Bearer $KEY" ' if needs_key else ""
    return (
        f"Serving {engine.model_name} at {url} (adapters: {shown})\n"
        f"Try: curl {url}/v1/{route} {key}-H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    )


if __name__ == "__main__":
    try:
        main()
    finally:
        # A signal that comes twice (see api.server) must not interrupt the interpreter's own clean-up.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
