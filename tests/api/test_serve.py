"""serve.py and configs/: flags, files, and what a launch says."""

import importlib.util
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import click.testing
import pydantic
import pytest
import yaml

import slora_jax
from slora_jax.api.folders import NoSuchFolder
from slora_jax.api.server import ServerConfig, listen, rules
from slora_jax.config import POLICIES, EngineConfig, build_config
from slora_jax.errors import InvalidRequest
from slora_jax.model.config import ModelConfig
from tests.helpers.fake_engine import FakeEngine

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SHAPES = sorted((ROOT / "configs" / "shapes").glob("*.yaml"))


def load_serve():
    spec = importlib.util.spec_from_file_location("serve", ROOT / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


serve = load_serve()


def fields(model: type[pydantic.BaseModel], prefix: str = "") -> dict[str, object]:
    """Every field with its default, nested ones by their path."""
    found = {}
    for name, field in model.model_fields.items():
        if isinstance(field.default, pydantic.BaseModel):
            found |= fields(type(field.default), f"{prefix}{name}.")
        else:
            found[prefix + name] = field.default
    return found


ALL_FIELDS = fields(EngineConfig) | fields(ServerConfig, "server.")


def run(*args: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(serve.main, args)


def config_of(*args: str) -> tuple[EngineConfig, ServerConfig]:
    """What a command line comes to."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "serve", lambda *configs: seen.append(configs))
        result = run(*args)
    assert result.exit_code == 0, result.output
    return seen[0]


# ---- flags


def test_a_flag_for_every_field_with_its_default():
    flags = {option.name.replace("__", "."): option for group in serve.FLAGS.values() for option in group}
    assert set(flags) == {*ALL_FIELDS, "config", "no_checkpoint_cache", "no_compilation_cache"}
    for name, default in ALL_FIELDS.items():
        shown = re.search(r"\[default: (.*)\]", flags[name].help)
        if default is None or default == {} or default == ():
            assert shown is None, name
        elif isinstance(default, bool):
            assert shown[1] == ("" if default else "no-") + name.split(".")[-1].replace("_", "-")
        else:
            assert shown[1] == str(default), name


def test_without_arguments_it_is_the_demo_on_port_8000():
    engine, server = config_of()
    assert engine == EngineConfig() and engine.model == "demo"
    assert server == ServerConfig()
    assert (server.host, server.port) == ("127.0.0.1", 8000)


def test_flags_reach_their_fields():
    engine, server = config_of(
        *shlex.split(
            "--model folder --served-name m --dtype float32 --max-model-len 99 --checkpoint-cache c --seed 3 "
            "--compilation-cache k "
            "--adapter a=x --adapter b=y=z --adapter-dir d --adapter-dir e --allow-adapter-loading --pool-pages 77 "
            "--no-prefix-cache --max-batch-tokens 300 --max-sequences 30 --max-waiting 5 --host 127.0.0.2 --port 1 "
            "--max-streams 9 --max-body-bytes 5000 --log-level info --tp 8 --coordinator here:1 --num-hosts 2"
        )
    )
    assert engine == build_config(
        {
            "model": "folder",
            "served_name": "m",
            "dtype": "float32",
            "max_model_len": 99,
            "checkpoint_cache": "c",
            "compilation_cache": "k",
            "seed": 3,
            "adapters": {"a": "x", "b": "y=z"},
            "adapter_dirs": ["d", "e"],
            "pool": {"pages": 77},
            "mesh": {"tp": 8, "coordinator": "here:1", "num_hosts": 2},
            "scheduler": {"max_batch_tokens": 300, "max_sequences": 30, "max_waiting": 5, "prefix_cache": False},
        }
    )
    assert server == ServerConfig(
        host="127.0.0.2", port=1, max_streams=9, max_body_bytes=5000, allow_adapter_loading=True, log_level="info"
    )


def test_flags_win_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        textwrap.dedent("""
        model: theirs
        dummy: true
        adapters: {a: old, b: kept}
        adapter_dirs: [one]
        checkpoint_cache: somewhere
        pool: {gigabytes: 5}
        scheduler: {max_sequences: 8}
        server: {port: 1234, host: "::1"}
    """)
    )
    engine, server = config_of("--config", str(file))
    assert (engine.model, engine.dummy, engine.pool.gigabytes, engine.scheduler.max_sequences) == ("theirs", True, 5, 8)
    assert (server.port, server.host) == (1234, "::1")
    engine, server = config_of(
        *("--config", str(file), "--model", "mine", "--no-dummy", "--adapter", "a=new", "--adapter-dir", "two"),
        *("--pool-pages", "64", "--no-checkpoint-cache", "--port", "5", "--no-compilation-cache"),
    )
    assert (engine.model, engine.dummy) == ("mine", False)
    assert engine.checkpoint_cache is engine.compilation_cache is None
    assert engine.adapters == {"a": "new", "b": "kept"}
    assert engine.adapter_dirs == ("one", "two")
    assert (engine.pool.pages, engine.pool.gigabytes) == (64, None)  # the flag's size, not the file's
    assert (server.port, server.host) == (5, "::1")
    assert engine.scheduler.max_sequences == 8


def test_another_host_follows_instead_of_serving():
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "serve", lambda *_: pytest.fail("it serves"))
        patch.setattr(serve, "follow", lambda engine, _: seen.append(engine.mesh.host_id))
        result = run("--tp", "4", "--num-hosts", "2", "--coordinator", "here:1", "--host-id", "1")
    assert result.exit_code == 0, result.output
    assert seen == [1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-hosts 2", "num_hosts above 1 and coordinator go together"),
        ("--coordinator here:1", "num_hosts above 1 and coordinator go together"),
        ("--num-hosts 2 --coordinator here:1 --host-id 2", r"host_id (2) must be below num_hosts (2)"),
        ("--tp 0", "mesh.tp"),
    ],
)
def test_hosts_that_cannot_meet_are_refused(flags, message):
    result = run(*flags.split())
    assert result.exit_code == 2
    assert message in result.output


def test_empty_sections_of_a_file_are_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\nserver:\npool:\nadapters:\n")
    assert config_of("--config", str(file)) == (EngineConfig(model="m"), ServerConfig())


def test_help_reads_well_and_answers_at_once():
    result = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "serve.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "100"},
    )
    sections = re.findall(r"^(\w+):$", result.stdout, re.MULTILINE)
    assert sections == ["Examples", *serve.FLAGS, "Help"] or sections == [*serve.FLAGS, "Help"]
    assert result.stdout.count("serve.py --") == 2  # the examples
    assert max(map(len, result.stdout.splitlines())) <= 100
    for slow in ("jax", "flask", "pydantic", "numpy", "tokenizers"):
        assert not re.search(rf"\| +{slow}$", result.stderr, re.MULTILINE), slow


# ---- errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--adapter", "nopath"], "nopath"),
        (["--dtype", "int4"], "int4"),
        (["--bogus"], "--bogus"),
        (["--port", "70000"], "server.port"),
        (["--pool-pages", "1"], "pool.pages"),
        (["--max-batch-tokens", "100"], "max_batch_tokens"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_arguments(args, message):
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.output.splitlines()[-1]
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        ("--max_model_len 5", "--max-model-len"),
        ("--adapters a=b", "--adapter"),
        ("--lora-module a=b", "--lora-modules"),
        ("--max-sequence 5", "--max-sequences"),
        ("--api-kye x", "--api-key"),
        ("--no-prefix-caching", "--no-prefix-cache"),
        ("--something-else", None),
    ],
)
def test_misspelt_flags(args, hint):
    result = run(*args.split())
    assert result.exit_code == 2
    said = result.output.splitlines()[-1]
    assert said.endswith(f"Did you mean '{hint}'?" if hint else "No such option '--something-else'."), said


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("modle: x", "model"),
        ("max-model-len: 5", "max_model_len"),
        ("server: {prot: 1}", "server.port"),
        ("server: {api-keys: [sk-12345678]}", "server.api_keys"),
        ("port: 5", "server.port"),
        ("max_sequences: 5", "scheduler.max_sequences"),
        ("scheduler: {max-num-seqs: 5}", "scheduler.max_sequences"),
        ("tensor_parallel_size: 2", "mesh.tp"),
        ("served_model_name: x", "served_name"),
        ("adapter_dir: [x]", "adapter_dirs"),
        ("something_else: x", None),
    ],
)
def test_misspelt_fields(tmp_path, text, hint):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    said = run("--config", str(file)).output
    assert f"; did you mean {hint}? (" in said or f"; did you mean {hint}?\n" in said if hint else "mean" not in said, (
        said
    )
    assert "sk-12345678" not in said


def test_all_problems_of_a_file_are_told_at_once(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("modle: x\nserver: {port: 70000, grace_s: -1}\nscheduler: {policy: none}\n")
    said = run("--config", str(file)).output
    for path in ("modle", "server.port", "server.grace_s", "scheduler.policy"):
        assert f"{path} (in {file})" in said


def test_flags_under_the_names_that_other_servers_have(tmp_path):
    theirs = config_of(
        *shlex.split(
            "--served-model-name m --tensor-parallel-size 2 --max-num-seqs 8 --max-num-batched-tokens 64 "
            '--gpu-memory-utilization 0.5 --lora-modules a=x b=y=z \'{"name": "c", "path": "p/q"}\' --port 9'
        )
    )
    ours = config_of(
        *shlex.split(
            "--served-name m --tp 2 --max-sequences 8 --max-batch-tokens 64 --gpu-memory-fraction 0.5 "
            "--adapter a=x --adapter b=y=z --adapter c=p/q --port 9"
        )
    )
    assert theirs == ours
    assert config_of("--lora-modules=a=x", "b=y")[0].adapters == {"a": "x", "b": "y"}
    for bad in ("a", '{"name": "c"}', "{"):
        assert "NAME=PATH" in run("--lora-modules", bad).output


def test_version():
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"slora-jax {slora_jax.__version__}\n")


def test_keys_from_flags_environment_and_file(tmp_path, monkeypatch):
    file = tmp_path / "c.yaml"
    file.write_text("server: {api_keys: [key-of-file], admin_key: admin-of-file}")

    def keys(*args) -> tuple[list[str], str | None]:
        server = config_of(*args)[1]
        admin = server.admin_key
        return [key.get_secret_value() for key in server.api_keys], admin and admin.get_secret_value()

    assert keys() == ([], None)
    assert keys("--api-key", "12345678", "--api-key", "abcdefgh", "--admin-key", "87654321") == (
        ["12345678", "abcdefgh"],
        "87654321",
    )
    assert keys("--config", str(file)) == (["key-of-file"], "admin-of-file")
    monkeypatch.setenv("SLORA_API_KEY", "key-of-env-1 key-of-env-2")
    monkeypatch.setenv("SLORA_ADMIN_KEY", "admin-of-env")
    assert keys("--config", str(file)) == (["key-of-env-1", "key-of-env-2"], "admin-of-env")
    assert keys("--api-key", "12345678")[0] == ["12345678"]


@pytest.mark.parametrize(
    "args",
    [
        ["--api-key", "secret"],
        ["--api-key", "secret secret secret"],
        ["--admin-key", "secret\xe9secret"],
        ["--api-key", "secretsecret", "--allow-adapter-loading"],
        ["--admin-key", "secretsecret", "--port", "70000"],
        ["--api-key", "secretsecret", "--allowed-origins", "nowhere"],
    ],
)
def test_refusals_hold_no_key(args):
    result = run(*args)
    assert result.exit_code == 2 and "invalid configuration" in result.output
    assert "secret" not in result.output


def test_a_bad_keys_file_is_told_before_the_model_is_loaded(tmp_path):
    (tmp_path / "keys").write_text("keys: [{name: x}]")
    result = run("--api-keys-file", str(tmp_path / "keys"), "--model", "/no/such/model")
    assert result.exit_code == 2
    assert "keys.0.sha256" in result.output and "Loading" not in result.output


@pytest.mark.parametrize(
    ("args", "loads"),
    [
        ("", True),
        ("--adapter-root {root}", True),
        ("--adapter-root {other}", False),
        ("--host 0.0.0.0 --admin-key 12345678", False),
        ("--host 0.0.0.0 --admin-key 12345678 --adapter-root {other} --adapter-root {root}", True),
    ],
)
def test_where_adapters_may_be(tmp_path, args, loads):
    (tmp_path / "root").mkdir()
    server = config_of(*args.format(root=tmp_path, other=tmp_path / "other").split())[1]
    _, folders = rules(server)
    if loads:
        assert folders.checked(str(tmp_path / "root")) == str(tmp_path / "root")
    else:
        with pytest.raises(NoSuchFolder):
            folders.checked(str(tmp_path / "root"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: x", "modle"),
        ("server: {prot: 1}", "server.prot"),
        ("server: 5", "must be a mapping, got int"),
        ("scheduler: {max_seqs: 1}", "scheduler.max_seqs"),
        ("adapters: [a]", "must be a mapping, got list"),
        ("- a\n- b", "mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    result = run("--config", str(file))
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1


def test_a_taken_port_is_told_before_the_model_is_loaded():
    with listen("127.0.0.1", 0) as taken:
        result = run("--port", str(taken.getsockname()[1]), "--model", "/no/such/model")
    assert result.exit_code == 2
    assert "in use" in result.output
    assert "Loading" not in result.output


# ---- configs/


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_config_parses(path):
    engine, _ = serve.read_config(str(path), {})
    if engine.dummy:
        assert (ROOT / engine.model).is_file()


def test_server_yaml_shows_every_field_with_its_default_and_a_comment():
    text = (ROOT / "configs" / "server.yaml").read_text()
    written = yaml.safe_load(text)
    sections = {name: value for name, value in written.items() if name in ("pool", "scheduler", "mesh", "server")}
    flat = {name: value for name, value in written.items() if name not in sections}
    flat |= {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    assert {name: tuple(v) if isinstance(v, list) else v for name, v in flat.items()} == ALL_FIELDS
    lines = text.splitlines()
    for before, line in itertools.pairwise(lines):
        if re.match(r" *\w+: .", line):
            assert before.lstrip().startswith("#"), line


@pytest.mark.parametrize("path", SHAPES, ids=lambda p: p.name)
def test_every_shape_is_a_model(path):
    ModelConfig.from_hf(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-7b", 6.738), ("llama-13b", 13.016), ("llama-30b", 32.529), ("llama-70b", 68.977), ("llama-3.1-8b", 8.030)],
)
def test_shapes_have_the_published_sizes(name, billions):
    config = ModelConfig.from_hf(yaml.safe_load((ROOT / "configs" / "shapes" / f"{name}.yaml").read_text()))
    assert config.num_params() / 1e9 == pytest.approx(billions, abs=0.0006)
    assert config.head_dim == 128
    assert (config.rope_scaling is not None) == (name == "llama-3.1-8b")


# ---- a launch


def test_greeting(tmp_path):
    engine = FakeEngine(tmp_path)
    first, second = serve.greeting(engine, "http://h:1").splitlines()
    assert first == "Serving base at http://h:1 (adapters: pirate, json, org/haiku)"
    command = shlex.split(second.removeprefix("Try: "))
    assert command[:2] == ["curl", "http://h:1/v1/chat/completions"]
    assert json.loads(command[-1])["model"] == "pirate"
    assert '-H "Authorization: Bearer $KEY"' in serve.greeting(engine, "http://h:1", needs_key=True)
    without = FakeEngine(tmp_path, with_tokenizer=False)
    assert '"prompt": [1, 2, 3]' in serve.greeting(without, "http://h:1")


def test_greeting_names_a_few_of_many_adapters(tmp_path):
    engine = FakeEngine(tmp_path)
    for i in range(1000):
        engine.register_adapter(f"a{i}", str(ROOT / "slora_jax" / "demo" / "adapters" / "pirate"))
    assert "a4 and 995 more" in serve.greeting(engine, "http://h:1")


FAKE_LAUNCH = """
    import importlib.util, os, signal, sys, threading, time, types
    from pathlib import Path
    root, folder, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    sys.path.insert(0, str(root))
    import slora_jax.demo
    from tests.helpers.fake_engine import FakeEngine
    slora_jax.demo.demo_model_path = lambda: folder
    class Engine(FakeEngine):
        @classmethod
        def create(cls, config, meeting=None):
            assert config.model == str(folder) and "pirate" in config.adapters, "the demo and its adapters"
            if what == "crash":
                raise ValueError("nobody\\nforesaw \\x1b[31mthis")
            if what == "out of memory":
                raise MemoryError("RESOURCE_EXHAUSTED: 5 GiB")
            if what == "stopped":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(30)
            return cls(folder)
        def start(self, on_failure):
            super().start(on_failure)
            if what == "fails":
                threading.Timer(0.5, self.fail, ["the device is gone"]).start()
        def close(self):
            if what == "fails":
                time.sleep(30)  # a device that is gone may never answer
            super().close()
    sys.modules["slora_jax.engine.engine"] = types.SimpleNamespace(Engine=Engine, leave_alone_what_exists=list)
    spec = importlib.util.spec_from_file_location("serve", root / "serve.py")
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    serve.SECONDS_TO_END = 1.0
    serve.main(["--port", "0", *sys.argv[4:]])
"""


def launch(folder: Path, what: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """A launch that ends by itself."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(FAKE_LAUNCH), str(ROOT), str(folder), what]
    return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=25)


def test_sigterm_while_loading_ends_with_code_0(tmp_path):
    run = launch(tmp_path, "stopped")
    assert (run.returncode, run.stderr.splitlines()) == (0, ["Loading demo ...", "Stopped."])


def test_an_error_that_nobody_foresaw_is_one_line(tmp_path):
    run = launch(tmp_path, "crash")
    said = r"Error: ValueError: nobody foresaw \x1b[31mthis (--log-level debug shows where)"
    assert (run.returncode, run.stderr.splitlines()) == (70, ["Loading demo ...", said])
    assert "Traceback" in launch(tmp_path, "crash", "--log-level", "debug").stderr


def test_too_little_memory_says_what_to_lower(tmp_path):
    run = launch(tmp_path, "out of memory")
    assert run.returncode == 70
    assert "lower --pool-memory-fraction, --max-batch-tokens or --max-sequences" in run.stderr.splitlines()[-1]


def test_an_engine_that_failed_ends_the_process_with_70(tmp_path):
    run = launch(tmp_path, "fails")
    assert (run.returncode, run.stderr.splitlines()) == (70, ["Loading demo ...", "engine failed: the device is gone"])


def test_a_launch_from_start_to_ctrl_c(tmp_path):
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(FAKE_LAUNCH)]
    with subprocess.Popen(
        [*command, str(ROOT), str(tmp_path), "serves"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        first, second = process.stdout.readline(), process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=20)
    assert re.fullmatch(r"Serving base at http://127\.0\.0\.1:\d+ \(adapters: .*\)\n", first), errors
    assert second.startswith("Try: curl http://127.0.0.1:")
    assert (process.returncode, out) == (0, "")
    assert errors.splitlines() == ["Loading demo ...", "Stopped."]


def test_read_config_raises_for_callers_without_a_command_line(tmp_path):
    with pytest.raises(InvalidRequest):
        serve.read_config(str(tmp_path / "none.yaml"), {})


def test_the_flag_offers_every_policy_that_there_is():
    (option,) = [parameter for parameter in serve.main.params if parameter.name == "scheduler__policy"]
    assert tuple(option.type.choices) == POLICIES
