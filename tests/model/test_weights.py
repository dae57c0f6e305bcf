"""Safetensors to parameters: what lands where, what is refused, and what it costs."""

import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import save_file

from slora_jax.errors import InvalidRequest, UnsupportedModel
from slora_jax.model.config import ModelConfig
from slora_jax.model.llama import abstract_params
from slora_jax.model.weights import dummy_params, load_params, resolve_model, untied_where_different, weight_files
from tests.helpers import hostile
from tests.helpers.model_folders import random_tensors

MULTI_HEAD = ModelConfig(
    vocab_size=48, hidden_size=32, intermediate_size=40, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8
)
GROUPED_SHAPE = (48, 40, 56, 2, 8, 4, 6)  # 8 query heads over 4 KV heads
GROUPED = ModelConfig(*GROUPED_SHAPE)
TIED = ModelConfig(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=32,
    num_layers=1,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    tie_word_embeddings=True,
)
SQUARE = ModelConfig(32, 32, 32, 2, 4, 2, 8)  # few different shapes, so little to compile


def write_model(folder: Path, config: ModelConfig, dtype: type = ml_dtypes.bfloat16, seed: int = 0) -> dict:
    """Writes ``model.safetensors`` and returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(config, dtype, seed)
    save_file(tensors, folder / "model.safetensors")
    return tensors


def load(folder, config, dtype=jnp.float32, **options):
    return load_params(folder, config, dtype, progress=False, **options)


def same_structure(params, config, dtype):
    expected = abstract_params(config, dtype)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    return shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), expected)


# What is loaded.


@pytest.mark.parametrize("config", [MULTI_HEAD, GROUPED, TIED])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_element_lands_where_the_model_reads_it(tmp_path, config, dtype):
    tensors = {name: tensor.astype(dtype).astype(np.float32) for name, tensor in write_model(tmp_path, config).items()}
    params = load(tmp_path, config, dtype)

    assert same_structure(params, config, dtype)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    np.testing.assert_array_equal(params["embed"]["embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["norm"]["scale"], tensors["model.norm.weight"])
    assert ("lm_head" in params) == (not config.tie_word_embeddings)
    if not config.tie_word_embeddings:
        np.testing.assert_array_equal(params["lm_head"]["kernel"], tensors["lm_head.weight"].T)

    for i in range(config.num_layers):
        layer, prefix = params[f"layers_{i}"], f"model.layers.{i}"
        q, k, v = np.split(layer["qkv"]["kernel"], [config.q_size, config.q_size + config.kv_size], axis=1)
        gate, up = np.split(layer["gate_up"]["kernel"], 2, axis=1)
        for actual, name in (
            (q, "self_attn.q_proj"),
            (k, "self_attn.k_proj"),
            (v, "self_attn.v_proj"),
            (layer["o"]["kernel"], "self_attn.o_proj"),
            (gate, "mlp.gate_proj"),
            (up, "mlp.up_proj"),
            (layer["down"]["kernel"], "mlp.down_proj"),
            (layer["attention_norm"]["scale"], "input_layernorm"),
            (layer["mlp_norm"]["scale"], "post_attention_layernorm"),
        ):
            np.testing.assert_array_equal(actual, tensors[f"{prefix}.{name}.weight"].T)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_any_float_dtype_is_cast(tmp_path, dtype):
    tensors = write_model(tmp_path, TIED, dtype)
    params = load(tmp_path, TIED, jnp.bfloat16)
    expected = tensors["model.layers.0.mlp.down_proj.weight"].astype(ml_dtypes.bfloat16).T
    np.testing.assert_array_equal(params["layers_0"]["down"]["kernel"], expected)


def split_in_two(folder: Path, config: ModelConfig) -> dict[str, str]:
    tensors = random_tensors(config)
    names = sorted(tensors)
    parts = {"b.safetensors": names[::2], "a.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    return {name: file for file, part in parts.items() for name in part}


def test_files_with_an_index(tmp_path):
    weight_map = split_in_two(tmp_path, GROUPED)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({"other": np.zeros(1)}, tmp_path / "unrelated.safetensors")
    write_model(tmp_path / "one", GROUPED)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path, GROUPED), load(tmp_path / "one", GROUPED))


def test_files_without_an_index(tmp_path):
    split_in_two(tmp_path, GROUPED)
    write_model(tmp_path / "one", GROUPED)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path, GROUPED), load(tmp_path / "one", GROUPED))


def test_redundant_tensors_are_ignored(tmp_path):
    tensors = random_tensors(TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    assert untied_where_different(tmp_path, TIED) is TIED
    assert same_structure(load(tmp_path, TIED), TIED, jnp.float32)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_embedding_is_not_tied_to_another_lm_head(tmp_path, caplog, dtype):
    tensors = random_tensors(TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].astype(dtype)
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    config = untied_where_different(tmp_path, TIED)
    assert config == dataclasses.replace(TIED, tie_word_embeddings=False)
    assert "tie_word_embeddings is true, but lm_head.weight is not the embedding" in caplog.text
    params = load(tmp_path, config)
    np.testing.assert_array_equal(params["lm_head"]["kernel"], tensors["lm_head.weight"].T.astype(np.float32))
    embedding = tensors["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["embed"]["embedding"], embedding)


def test_one_file_is_taken_before_the_files_of_an_index(tmp_path):
    weight_map = split_in_two(tmp_path, TIED)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert [file.name for file in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    write_model(tmp_path, TIED)
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_tied_embedding_may_be_stored_under_either_name(tmp_path):
    tensors = random_tensors(TIED)
    embedding = tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(load(tmp_path, TIED, jnp.bfloat16)["embed"]["embedding"], embedding)


def test_parameters_do_not_alias_the_file(tmp_path):
    tensors = write_model(tmp_path, TIED, np.float32)
    params = load(tmp_path, TIED)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    np.testing.assert_array_equal(params["embed"]["embedding"], tensors["model.embed_tokens.weight"])


def test_progress_bar_counts_bytes(tmp_path, capfd):
    write_model(tmp_path, TIED)
    load_params(tmp_path, TIED, jnp.float32)
    assert "Loading weights: 100%" in capfd.readouterr().err
    load(tmp_path, TIED)
    assert capfd.readouterr().err == ""


# What is refused.

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({Q_PROJ: None}, f'tensor "{Q_PROJ}" is missing'),
        ({"model.norm.weight": None}, 'tensor "model.norm.weight" is missing'),
        (
            {Q_PROJ: np.zeros((24, 23), np.float32)},
            rf'"{Q_PROJ}" has shape \(24, 23\), config.json asks for \(24, 24\)',
        ),
        ({Q_PROJ: np.zeros((24, 24), np.int8)}, f'"{Q_PROJ}" has dtype "I8", supported are F32, F16, BF16'),
        ({Q_PROJ: np.zeros((24, 24), ml_dtypes.float8_e4m3fn)}, f'"{Q_PROJ}" has dtype "F8_E4M3"'),
        ({Q_PROJ: np.zeros((24, 24), np.float64)}, f'"{Q_PROJ}" has dtype "F64"'),
        ({Q_PROJ: np.zeros((24, 24), np.float32)}, f'k_proj.weight" has dtype BF16 but "{Q_PROJ}" has F32'),
        (
            {"model.layers.0.self_attn.q_proj.bias": np.zeros(24, np.float32)},
            '"model.layers.0.self_attn.q_proj.bias" belongs to no layer',
        ),
        (
            {"model.layers.1.mlp.up_proj.weight": np.zeros(1), "z": np.zeros(1)},
            '"model.layers.1.mlp.up_proj.weight" and 1 more belongs to no layer',
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, message):
    tensors = random_tensors(TIED) | change
    save_file({name: t for name, t in tensors.items() if t is not None}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=message):
        load(tmp_path, TIED)


def test_untied_model_needs_its_lm_head(tmp_path):
    tensors = random_tensors(MULTI_HEAD)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r'tensor "lm_head\.weight" is missing'):
        load(tmp_path, MULTI_HEAD)


def test_tensor_in_two_files(tmp_path):
    split_in_two(tmp_path, TIED)
    save_file({"model.norm.weight": np.zeros(24, np.float32)}, tmp_path / "c.safetensors")
    with pytest.raises(UnsupportedModel, match=r'"model.norm.weight" is both in .\.safetensors and in c.safetensors'):
        load(tmp_path, TIED)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "header"])
def test_damaged_file(tmp_path, damage):
    write_model(tmp_path, TIED)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        {
            "empty": b"",
            "cut": content[:-100],
            "text": b"version https://example.org/spec\noid sha256:0\n",
            "header": content[:8] + b"[" + content[9:],
        }[damage]
    )
    with pytest.raises(UnsupportedModel, match="is not a whole safetensors file"):
        load(tmp_path, TIED)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"x": "model-00002-of-00002.safetensors"}}', r"model-00002-of-00002\.safetensors is missing"),
        ("[]", r"index\.json must hold a JSON object, got \[\]"),
        ("{", r"index\.json is not valid JSON"),
        ("{}", "weight_map must be an object, got null"),
        ('{"weight_map": {"x": 1}}', 'weight_map has 1 for "x", not the name'),
        ('{"weight_map": {"x": "../a.safetensors"}}', r'weight_map has "\.\./a\.safetensors" for "x", not the name'),
        ('{"weight_map": {"x": "\\ud800.safetensors"}}', 'for "x", not the name'),
        ('{"weight_map": {}}', r"found none"),
    ],
)
def test_index_that_is_none(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UnsupportedModel, match=message):
        weight_files(tmp_path)


def with_header(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": ["F32"]}, r'dtype of tensor "model.norm.weight" is \["F32"\]'),
        ({"shape": [2.0]}, r'shape of tensor "model.norm.weight" is \[2.0\]'),
        ({"shape": [-24]}, r'shape of tensor "model.norm.weight" is \[-24\]'),
        ({"shape": [2**63]}, 'shape of tensor "model.norm.weight" is'),
        ({"shape": [1] * 100000 + [24]}, 'shape of tensor "model.norm.weight" is'),
        ({"data_offsets": [0]}, r'data_offsets of tensor "model.norm.weight" is \[0\]'),
        ({"data_offsets": [96, 0]}, r'data_offsets of tensor "model.norm.weight" is \[96, 0\]'),
        ({"data_offsets": [0, 96]}, "the bytes of tensor .* do not begin where those before it end"),
        ({"data_offsets": [10**18, 10**18 + 96]}, "do not begin where those before it end"),
        ({"shape": [23]}, 'tensor "model.norm.weight" has 96 bytes, not those of its shape'),
    ],
)
def test_table_of_contents_that_is_none(tmp_path, entry, message):
    before = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    norm = {"dtype": "F32", "shape": [24], "data_offsets": [4, 100]} | entry
    header = json.dumps({"model.norm.weight": norm, "before": before}).encode()
    (tmp_path / "model.safetensors").write_bytes(with_header(header, bytes(100)))
    with pytest.raises(UnsupportedModel, match=f"model.safetensors is not a whole safetensors file: .*{message}"):
        load(tmp_path, TIED)


@pytest.mark.parametrize("length", [0, 2**63, 2**64 - 1, 10**8 + 1])
def test_header_of_an_absurd_length(tmp_path, length):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(length.to_bytes(8, "little") + b"{}")
        file.truncate(2 * 10**8)  # sparse: takes no room
    with pytest.raises(UnsupportedModel, match="is not a whole safetensors file: no header"):
        load(tmp_path, TIED)


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "lm_head.weight": {"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]},
    "model.embed_tokens.weight": {"dtype": "BF16", "shape": [2], "data_offsets": [28, 32]},
}


@hypothesis.settings(max_examples=1000)
@hypothesis.given(
    hostile.mutated(HEADER).map(lambda header: with_header(json.dumps(header).encode(), bytes(32)))
    | hostile.hostile_bytes(with_header(json.dumps(HEADER).encode(), bytes(32)))
)
def test_any_weight_file_is_taken_or_refused_by_name(tmp_path, raw):
    (tmp_path / "model.safetensors").write_bytes(raw)
    for read in (lambda: untied_where_different(tmp_path, TIED), lambda: load(tmp_path, TIED)):
        try:
            read()
        except UnsupportedModel as e:
            told = str(e)
            assert str(tmp_path) in told and len(told) < 1000


@hypothesis.settings(max_examples=500)
@hypothesis.given(
    hostile.mutated({"metadata": {"total_size": 3}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}})
)
def test_any_index_is_taken_or_refused_by_name(tmp_path, index):
    (tmp_path / "x.safetensors").touch()
    (tmp_path / "y.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    try:
        weight_files(tmp_path)
    except UnsupportedModel as e:
        told = str(e)
        assert str(tmp_path) in told and len(told) < 1000


# Where a model is found.


def test_local_folder(tmp_path):
    write_model(tmp_path, TIED)
    with pytest.raises(UnsupportedModel, match=r"has no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="holds a model and an adapter"):
        resolve_model(str(tmp_path))


def test_folder_of_pickles(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match=r"must be in \*\.safetensors, found none"):
        resolve_model(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match=r"found only pickles \(pytorch_model.bin\)"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("spec", ["/no/such/folder", "./here", "~/model", "a/b/c", "two words", ""])
def test_neither_folder_nor_id(spec):
    with pytest.raises(InvalidRequest, match="neither a folder nor a Hugging Face id") as caught:
        resolve_model(spec)
    assert caught.value.param == "model"


def test_hugging_face_id_fetches_only_what_is_read(monkeypatch, tmp_path):
    write_model(tmp_path, TIED)
    (tmp_path / "config.json").write_text("{}")
    repository = {
        "README.md": False,
        "chat_template.jinja": True,
        "config.json": True,
        "consolidated.safetensors": False,
        "generation_config.json": True,
        "model-00001-of-00002.safetensors": True,
        "model.safetensors.index.json": True,
        "onnx/model.safetensors": False,
        "original/tokenizer.json": False,
        "pytorch_model.bin": False,
        "special_tokens_map.json": True,
        "tokenizer.json": True,
        "tokenizer_config.json": True,
    }

    def download(repo_id, *, allow_patterns, ignore_patterns):
        assert repo_id == "organization/some-model"
        chosen = huggingface_hub.utils.filter_repo_objects(
            repository, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        assert list(chosen) == [name for name, wanted in repository.items() if wanted]
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("organization/some-model") == tmp_path


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("offline"), "the hub cannot be reached"),
        (errors.OfflineModeIsEnabled("offline"), "the hub cannot be reached"),
        (errors.HFValidationError("bad"), "is not a Hugging Face id"),
        (ConnectionResetError("reset"), "could not be downloaded"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_id_that_cannot_be_fetched(monkeypatch, error, message):
    def download(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InvalidRequest, match=message) as caught:
        resolve_model("organization/some-model")
    assert caught.value.param == "model"


# Random weights.


def test_dummy_params():
    params = dummy_params(SQUARE, jnp.bfloat16, seed=3)
    assert same_structure(params, SQUARE, jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, params, dummy_params(SQUARE, jnp.bfloat16, seed=3))

    assert (params["norm"]["scale"] == 1).all()
    kernels = [params["layers_0"]["down"]["kernel"], params["layers_1"]["down"]["kernel"]]
    kernels.append(dummy_params(SQUARE, jnp.bfloat16, seed=4)["layers_0"]["down"]["kernel"])
    for kernel in kernels:
        assert 0.015 < np.std(np.asarray(kernel, np.float32)) < 0.025
    assert not (kernels[0] == kernels[1]).all()
    assert not (kernels[0] == kernels[2]).all()


def test_dummy_params_round_the_same_float32_draw():
    exact, rounded = (dummy_params(SQUARE, dtype, seed=0) for dtype in (jnp.float32, jnp.bfloat16))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b), exact, rounded)


# What only a process of its own shows.

MEASURE_PEAK = """
import sys
from pathlib import Path
import jax.numpy as jnp
from slora_jax.model.config import ModelConfig
from slora_jax.model.mesh import ModelMesh
from slora_jax.model.weights import load_params

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

folder, small, tp = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
tiny = ModelConfig(48, 40, 56, 2, 8, 4, 6)
load_params(small, tiny, jnp.float32, ModelMesh.create(tiny, tp), progress=False)
config = ModelConfig(*map(int, sys.argv[4:]))
mesh = ModelMesh.create(config, tp)
Path("/proc/self/clear_refs").write_text("5")  # peak := now
before = status("VmRSS")
params = load_params(folder, config, jnp.float32, mesh, progress=False)
print((status("VmHWM") - before) / (4 * config.num_params()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's peak memory")
@pytest.mark.parametrize("tp", [1, 4])
def test_peak_host_memory_is_far_from_twice_the_model(tmp_path, tp):
    # On a CPU the devices' memory is the host's: all above 1 is on its way.
    shape = (4096, 1024, 2816, 2, 16, 4, 64)
    config = ModelConfig(*shape)
    assert 110e6 < 4 * config.num_params() < 150e6
    write_model(tmp_path / "model", config, np.float32)
    write_model(tmp_path / "small", GROUPED)
    arguments = (tmp_path / "model", tmp_path / "small", tp, *shape)
    assert float(run_python(MEASURE_PEAK, *arguments, num_devices=tp)) < 1.5


MEASURE_HOST = """
import sys
from slora_jax.config import MeshConfig
from slora_jax.engine.meeting import Meeting

coordinator, host = sys.argv.pop(1), int(sys.argv.pop(1))
meeting = Meeting(host)
meeting.join(MeshConfig(tp=2, coordinator=coordinator, num_hosts=2, host_id=host))
"""

LEAVE = """
sys.stdout.flush()
meeting.exchange("measured", None)  # who ends before the others is lost to them
meeting.leave()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's peak memory")
def test_no_host_of_two_holds_the_whole_model(tmp_path):
    shape = (4096, 1024, 2816, 2, 16, 4, 64)
    write_model(tmp_path / "model", ModelConfig(*shape), np.float32)
    write_model(tmp_path / "small", GROUPED)
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{sock.getsockname()[1]}"
    arguments = (tmp_path / "model", tmp_path / "small", 2, *shape)
    program = MEASURE_HOST + MEASURE_PEAK + LEAVE
    with ThreadPoolExecutor(2) as hosts:
        peaks = hosts.map(lambda host: run_python(program, coordinator, host, *arguments), range(2))
    for peak in peaks:
        assert 0.5 < float(peak) < 0.85, "its half, and a parameter on its way"


LOAD_SHARDED = """
import sys
from functools import partial
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from slora_jax.model.config import ModelConfig
from slora_jax.model.checkpoint import load_or_restore
from slora_jax.model.mesh import ModelMesh
from slora_jax.model.weights import dummy_params, load_params

folder, cache = Path(sys.argv[1]), Path(sys.argv[2])
config = ModelConfig(*map(int, sys.argv[3:]))
mesh = ModelMesh.create(config, 4)

def part(array, axis, shard):
    size = array.shape[axis] // 4
    return np.take(array, range(shard * size, shard * size + size), axis)

def check(params, whole, rtol=0):
    assert_equal = partial(np.testing.assert_allclose, rtol=rtol, atol=0)
    for shard in range(4):
        mine = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_shards[shard].data), params)
        for i in range(config.num_layers):
            got, want = mine[f"layers_{i}"], jax.tree.map(np.asarray, whole[f"layers_{i}"])
            q, k, v = np.split(want["qkv"]["kernel"], [config.q_size, config.q_size + config.kv_size], axis=1)
            gate, up = np.split(want["gate_up"]["kernel"], 2, axis=1)
            for found, pieces in ((got["qkv"], (q, k, v)), (got["gate_up"], (gate, up))):
                expected = np.concatenate([part(piece, 1, shard) for piece in pieces], axis=1)
                assert_equal(found["kernel"], expected)
            for name in ("o", "down"):
                assert_equal(got[name]["kernel"], part(want[name]["kernel"], 0, shard))
            assert_equal(got["mlp_norm"]["scale"], want["mlp_norm"]["scale"])
        for name, leaf, axis in (("embed", "embedding", 0), ("lm_head", "kernel", 1)):
            assert_equal(mine[name][leaf], part(np.asarray(whole[name][leaf]), axis, shard))

expected = load_params(folder, config, jnp.float32, progress=False)
check(load_params(folder, config, jnp.float32, mesh, progress=False), expected)
# Equal but for how the compiler orders a few operations of the normal draw.
check(dummy_params(config, jnp.float32, 5, mesh), dummy_params(config, jnp.float32, 5), rtol=1e-6)
for source in ("safetensors", "orbax"):
    params, provenance = load_or_restore(folder, config, jnp.float32, cache, mesh, progress=False)
    assert provenance.source == source
    check(params, expected)
params, provenance = load_or_restore(folder, config, jnp.float32, cache, None, progress=False)
assert provenance.source == "safetensors", "another layout is another entry"
"""


def test_sharded_over_four_devices(tmp_path):
    write_model(tmp_path / "model", GROUPED)
    run_python(LOAD_SHARDED, tmp_path / "model", tmp_path / "cache", *GROUPED_SHAPE, num_devices=4)


LOAD_PADDED = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from slora_jax.model.config import ModelConfig
from slora_jax.model.mesh import ModelMesh
from slora_jax.model.weights import dummy_params, load_params

# Three KV heads of two columns, two query heads each, on two devices: the second has one of its two places empty.
config = ModelConfig(50, 24, 32, 1, 6, 3, 2)
mesh = ModelMesh.create(config, 2)
places = {
    "q": ([0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, None, None, None, None]), "k": ([0, 1, 2, 3], [4, 5, None, None])
}
for load in (lambda mesh: load_params(Path(sys.argv[1]), config, jnp.float32, mesh, progress=False),
             lambda mesh: dummy_params(config, jnp.float32, 7, mesh)):
    whole = jax.tree.map(np.asarray, load(None)["layers_0"])
    qkv, o = whole["qkv"]["kernel"], whole["o"]["kernel"]
    for shard in range(2):
        got = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_shards[shard].data), load(mesh)["layers_0"])
        columns = [*places["q"][shard]]
        columns += [None if i is None else first + i for first in (12, 18) for i in places["k"][shard]]
        expected = np.stack([np.zeros(24) if i is None else qkv[:, i] for i in columns], axis=1)
        np.testing.assert_allclose(got["qkv"]["kernel"], expected, rtol=1e-6)
        rows = [np.zeros(24) if i is None else o[i] for i in places["q"][shard]]
        np.testing.assert_allclose(got["o"]["kernel"], np.stack(rows), rtol=1e-6)
"""


def test_empty_places_hold_zeros(tmp_path):
    write_model(tmp_path, ModelConfig(50, 24, 32, 1, 6, 3, 2))
    run_python(LOAD_PADDED, tmp_path, num_devices=2)


def run_python(program: str, *arguments, num_devices: int = 1) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
        env={
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices} --xla_backend_optimization_level=0",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
