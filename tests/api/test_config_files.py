"""Whatever stands in a file of settings, or comes by flags, is taken or refused in one sentence."""

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slora_jax.config import read_yaml
from slora_jax.errors import InvalidRequest
from tests.api.test_serve import ALL_FIELDS, run, serve

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "configs" / "server.yaml").read_text().splitlines()
TEXT = "\n".join(line for line in LINES if line and not line.lstrip().startswith("#"))
FIELDS = yaml.safe_load(TEXT)

many = settings(
    max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
numbers = st.integers() | st.sampled_from([2**31, 2**63, 2**64, 10**12, 10**400, -1, 0, 65536]) | st.floats()
scalars = st.none() | st.booleans() | numbers | st.text(max_size=20) | st.binary(max_size=5) | st.dates()
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | numbers, inner, max_size=3),
    max_leaves=6,
)


def places(fields: dict, before: tuple = ()) -> list[tuple]:
    found = []
    for name, value in fields.items():
        found.append((*before, name))
        if isinstance(value, dict):
            found += places(value, (*before, name))
    return found


def taken_or_refused(file: Path, flags: dict | None = None) -> str | None:
    """What a file is refused for; None if it is taken. Anything but a refusal in one line fails."""
    try:
        serve.read_config(str(file), flags or {})
    except InvalidRequest as error:
        line = serve.one_line(error)
        assert line.isprintable()
        assert len(line) <= serve.MAX_MESSAGE + 10
        return line
    return None


@many
@given(changes=st.lists(st.tuples(st.sampled_from(places(FIELDS)), anything), min_size=1, max_size=4))
def test_any_value_in_any_field(tmp_path, changes):
    fields = copy.deepcopy(FIELDS)
    for (*sections, name), value in changes:
        within = fields
        for section in sections:
            within = within.get(section) if isinstance(within, dict) else None
        if isinstance(within, dict):
            within[name] = value
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(fields, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    taken_or_refused(file)


@many
@given(place=st.integers(0, len(TEXT)), length=st.integers(0, 60), inserted=st.binary(max_size=12))
def test_any_bytes_at_any_place(tmp_path, place, length, inserted):
    file = tmp_path / "c.yaml"
    file.write_bytes(TEXT[:place].encode() + inserted + TEXT[place + length :].encode())
    taken_or_refused(file)


SNIPPETS = [
    *("!!python/object:os.system x", "!!int x", "!!bool maybe", "!!timestamp x", "!!float x", "!!binary ä", "!x y"),
    *(
        "2026-99-99",
        "*a",
        "&a [*a]",
        "<<: {a: 1}",
        "? [a]\n: b",
        "yes: 1",
        "1: 2",
        "\t",
        "%YAML 9.9\n---",
        "--- a\n---",
    ),
    *("'", '"\\ud800"', '"\\0"', "|\n", "[" * 3000, "{a: " * 500, "190:20:30:15", "0x", "1" * 5000, "~", "!!set {a}"),
]


@settings(many, max_examples=500)
@given(
    place=st.integers(0, len(TEXT.splitlines())),
    name=st.sampled_from(["", *ALL_FIELDS]),
    text=st.sampled_from(SNIPPETS),
)
def test_whatever_yaml_has_besides_values(tmp_path, place, name, text):
    lines = TEXT.splitlines()
    lines.insert(place, f"{name}: {text}" if name else text)
    file = tmp_path / "c.yaml"
    file.write_text("\n".join(lines))
    taken_or_refused(file)


@settings(many, max_examples=500)
@given(
    flags=st.dictionaries(
        st.sampled_from([option for group in serve.FLAGS.values() for option in group]),
        numbers.map(str) | st.text(st.characters(codec=None), max_size=20),
        min_size=1,
        max_size=3,
    )
)
def test_any_text_behind_any_flag(flags):
    arguments = []
    for option, value in flags.items():
        arguments += [option.opts[0]] if option.is_flag else [f"{option.opts[0]}={value}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "serve", lambda *_: None)
        patch.setattr(serve, "follow", lambda *_: None)
        result = run(*arguments)
    assert result.exit_code in (0, 2), (arguments, result.output, result.exception)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [1]\nb: *a", "aliases (*name) are not taken"),
        ("a: &a {x: &b [*a]}", "aliases (*name) are not taken"),
        ("model: a\nmodel: b", "'model' is there twice"),
        ("pool: {pages: 5, pages: 6}", "'pages' is there twice"),
        ("yes: 1", "the name of a field must be text"),
        ("pool: {5: 6}", "the name of a field must be text"),
        ("model: !!python/object:os.system x", "could not determine a constructor"),
        ("seed: !!int x", "not what it is tagged as"),
        ("seed: !!bool maybe", "not what it is tagged as"),
        ("a: 2026-99-99", "not what it is tagged as"),
        ("[" * 3000, "nested too deeply"),
        ("a: " + "x" * 2**20, "larger than 1 MiB"),
    ],
)
def test_yaml_that_is_not_taken(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(InvalidRequest) as refused:
        read_yaml(file)
    assert message.replace("'", "") in str(refused.value).replace("'", "")
    assert "c.yaml" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_model_len: yes", "max_model_len (in FILE): must not be true or false"),
        ("scheduler: {fair_weights: {a: true}}", "scheduler.fair_weights.a (in FILE): must not be true or false"),
        ("server: {port: on}", "server.port (in FILE): must not be true or false"),
        ('model: ""', "model (in FILE): must not be empty"),
        ('adapters: {"a\\nb": c}', "adapters.\"a\\nb\" (in FILE): must hold printable characters only, has '\\n'"),
        ('adapter_dirs: ["\\e[31m"]', "adapter_dirs.0 (in FILE): must hold printable characters only"),
        ("pool: {gigabytes: .inf}", "pool.gigabytes (in FILE): Input should be a finite number"),
        ("mesh: {num_hosts: 2, coordinator: 'a:99999'}", "mesh.coordinator (in FILE): must be ADDRESS:PORT"),
    ],
)
def test_values_that_are_not_taken(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert message.replace("FILE", str(file)) in taken_or_refused(file)


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("modle: x\nseed: -1\nserver: {prot: 1}\npool: 5\nadapters: [a]\nmesh: {tp: 0}\n")
    line = taken_or_refused(file, {"scheduler__max_sequences": 0, "server__port": 70000})
    for message in (
        f"modle (in {file}): there is no such field",
        f"seed (in {file}): Input should be greater",
        f"server.prot (in {file}): there is no such field",
        f"pool (in {file}): must be a mapping, got int",
        f"adapters (in {file}): must be a mapping, got list",
        f"mesh.tp (in {file}): Input should be greater",
        "scheduler.max_sequences (--max-sequences): Input should be greater",
        "server.port (--port): Input should be less",
    ):
        assert message in line
