"""Adapter folders that somebody else wrote: whatever is in them, they are served or refused with a sentence."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slora_jax.adapters.lora_config import parse_lora_config
from slora_jax.adapters.peft import CONFIG_FILE, WEIGHTS_FILE, load_adapter, read_header
from slora_jax.adapters.store import AdapterStore
from slora_jax.adapters.tensor_file import parse_table
from slora_jax.errors import BadAdapter
from slora_jax.memory.layout import PoolLayout
from slora_jax.model.config import ModelConfig
from tests.helpers.hostile import hostile_bytes, mutated
from tests.helpers.peft_folders import MODEL, POOL, make_config, make_tensors, write_adapter

ORACLE = Path(__file__).parents[1] / "oracle" / "fixtures"
DEMO = Path(__file__).parents[2] / "slora_jax" / "demo" / "adapters"
FOLDERS = [*sorted(ORACLE.glob("*/adapters/*")), *sorted(path.parent for path in DEMO.glob("*/adapter_config.json"))]
CONFIGS = [json.loads((folder / CONFIG_FILE).read_text()) for folder in FOLDERS]
MANY = settings(
    max_examples=1000, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

# Every field that a config may have, set to something.
FULL = make_config(
    target_modules=["q_proj", "v_proj"], exclude_modules=["lm_head"], layers_to_transform=[0, 1, 2],
    layers_pattern=["layers"], rank_pattern={"model.layers.0.self_attn.q_proj": 4, r"layers\.[12]\..*q_proj": 4},
    alpha_pattern={"^model.layers.1.self_attn.v_proj$": 16, ".*v_proj": 8.5}, auto_mapping={"a": "b"}, revision=None,
    loftq_config={}, eva_config=None, corda_config=None, megatron_config=None, trainable_token_indices=None,
    layer_replication=None, lora_bias=False, target_parameters=None, alora_invocation_tokens=None, use_qalora=False,
    arrow_config=None, use_bdlora=None, kasa_config=None, velora_config=None, monteclora_config=None,
    ensure_weight_tying=False, lora_ga_config=None,
)  # fmt: skip


def check(folder: Path, model=MODEL, pool=POOL) -> None:
    """Served, or refused in a sentence that can be shown and names the folder."""
    try:
        load_adapter(read_header(folder, model, pool), np.float32)
    except BadAdapter as e:
        check_sentence(e, str(folder))


def check_sentence(error: BadAdapter, names: str) -> None:
    message = str(error)
    message.encode()
    assert len(message) < 1500 and "\n" not in message
    assert names in message


def table_and_rest(folder: Path) -> tuple[bytes, int]:
    raw = (folder / WEIGHTS_FILE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length], len(raw)


TABLES = [table_and_rest(folder) for folder in FOLDERS]


def test_there_are_folders_to_start_from():
    assert len(FOLDERS) >= 10


@MANY
@given(st.sampled_from([*CONFIGS, *[FULL] * len(CONFIGS)]).flatmap(mutated))
def test_any_value_in_any_place_of_a_config(document):
    raw = json.dumps(document).encode()
    try:
        config = parse_lora_config(raw)
    except BadAdapter as e:
        check_sentence(e, CONFIG_FILE)
        return
    assert len(config.digest()) == 32
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.31.mlp.down_proj", "lm_head"):
        assert config.is_target(name) in (True, False)
        assert 1 <= config.rank_of(name) < 2**31
        assert isinstance(config.scale_of(name), float)


@MANY
@given(st.sampled_from([*CONFIGS, FULL]).flatmap(lambda config: hostile_bytes(json.dumps(config).encode())))
def test_any_bytes_as_a_config(raw):
    try:
        parse_lora_config(raw)
    except BadAdapter as e:
        check_sentence(e, CONFIG_FILE)


def check_table(raw: bytes, file_bytes: int) -> None:
    try:
        entries = parse_table(raw, file_bytes)
    except BadAdapter as e:
        check_sentence(e, "tensor")
        return
    # They fill the rest of the file, one after the other.
    end = 8 + len(raw)
    for entry in entries:
        assert entry.start == end
        end += entry.num_bytes
    assert end == file_bytes


@MANY
@given(
    st.sampled_from(TABLES).flatmap(lambda table: st.tuples(mutated(json.loads(table[0])), st.just(table))),
    st.booleans(),
)
def test_any_value_in_any_place_of_a_table(changed, keeps_size):
    document, (original, file_bytes) = changed
    raw = json.dumps(document).encode()
    check_table(raw, file_bytes + (0 if keeps_size else len(raw) - len(original)))


@MANY
@given(st.sampled_from(TABLES).flatmap(lambda table: st.tuples(hostile_bytes(table[0]), st.just(table[1]))))
def test_any_bytes_as_a_table(changed):
    check_table(*changed)


def rewrite(folder: Path, config: bytes, weights: bytes) -> None:
    (folder / CONFIG_FILE).write_bytes(config)
    (folder / WEIGHTS_FILE).write_bytes(weights)


SMALL = json.dumps(FULL).encode()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a small adapter's weights, and a folder to put changed ones in."""
    folder = write_adapter(tmp_path_factory.mktemp("small") / "adapter", make_tensors(), **FULL)
    load_adapter(read_header(folder, MODEL, POOL), np.float32)
    return folder, (folder / WEIGHTS_FILE).read_bytes()


@MANY
@given(config=mutated(FULL), data=st.data())
def test_a_folder_with_anything_in_its_config(small, config, data):
    folder, weights = small
    rewrite(folder, json.dumps(config).encode(), weights)
    check(folder)


@MANY
@given(data=st.data())
def test_a_folder_with_anything_in_its_weight_file(small, data):
    folder, weights = small
    length = int.from_bytes(weights[:8], "little")
    if data.draw(st.booleans()):
        table = json.dumps(data.draw(mutated(json.loads(weights[8 : 8 + length])))).encode()
        # As often as not the length lies.
        stated = data.draw(st.sampled_from([len(table), len(table), 0, 1, len(table) + 1, 2**31, 2**63, 2**64 - 1]))
        changed = stated.to_bytes(8, "little") + table + weights[8 + length :]
    else:
        changed = data.draw(hostile_bytes(weights))
    rewrite(folder, SMALL, changed)
    check(folder)


@pytest.mark.parametrize("original", FOLDERS, ids=lambda path: f"{path.parts[-3]}-{path.name}")
def test_real_folders_with_real_weights_cut_or_changed(tmp_path, original):
    is_demo = original.parent == DEMO
    model = MODEL if is_demo else ModelConfig.from_folder(original.parents[1] / "model")
    folder = Path(shutil.copytree(original, tmp_path / "adapter"))
    raw = (folder / WEIGHTS_FILE).read_bytes()
    for cut in (0, 7, 8, 9, len(raw) // 3, len(raw) - 1):
        (folder / WEIGHTS_FILE).write_bytes(raw[:cut])
        check(folder, model, PoolLayout.for_model(model))
        with pytest.raises(BadAdapter):
            read_header(folder, model, PoolLayout.for_model(model))


def test_a_list_as_an_element_type_costs_its_folder_only(tmp_path):
    table = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": {
        "dtype": ["F32"], "shape": [8, 576], "data_offsets": [0, 18432]}}  # fmt: skip
    raw = json.dumps(table).encode()
    bad = write_adapter(tmp_path / "bad")
    (bad / WEIGHTS_FILE).write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(18432))
    write_adapter(tmp_path / "good")
    store = AdapterStore(MODEL, POOL, np.float32)
    infos, refused = store.register_dir(tmp_path)
    assert list(infos) == ["good"]
    assert (
        "adapter_model.safetensors: corrupt: the table's entry" in refused["bad"] and 'dtype=["F32"]' in refused["bad"]
    )
