"""The chat template in an adapter's folder is used for its requests, as long as the name stands for that adapter."""

import json
import shutil

import pytest

from slora_jax.adapters.peft import load_adapter
from slora_jax.errors import BadAdapter, InvalidRequest, UnknownAdapter
from tests.helpers.engine_cases import greedy, make_engine, run

MESSAGES = [{"role": "user", "content": "ab"}]


@pytest.fixture
def folder(tiny_case, tmp_path):
    return shutil.copytree(tiny_case.adapters / "qv-r8", tmp_path / "own")


def test_a_template_goes_with_its_adapter(tiny_case, folder):
    engine = tiny_case.engine()
    engine.register_adapter("mine", str(folder))
    assert engine.tokenizer_of("mine") is engine.tokenizer is engine.tokenizer_of(None)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}ba{{ m.content }}{% endfor %}")
    engine.register_adapter("mine", str(folder))
    own = engine.tokenizer_of("mine")
    assert own.encode_chat(MESSAGES) == engine.tokenizer.encode("baab", add_special_tokens=False)
    # Other weights under the name bring no template along, and none stays behind.
    header = engine.parts.store.get("mine").header
    engine.register_loaded_adapter("mine", header.ranks, load_adapter(header, engine.dtype).packed)
    assert engine.tokenizer_of("mine") is engine.tokenizer
    engine.unregister_adapter("mine")
    with pytest.raises(UnknownAdapter):
        engine.tokenizer_of("mine")


def test_an_adapter_trained_with_tokens_that_the_base_lacks_is_refused(tiny_case, folder):
    engine = tiny_case.engine()
    (folder / "added_tokens.json").write_text(json.dumps({"<|new|>": engine.model_config.vocab_size + 5}))
    with pytest.raises(BadAdapter, match="new"):
        engine.register_adapter("mine", str(folder))
    engine.register_adapter_dir(str(folder.parent))
    assert not {"mine", "own"} & set(engine.adapters())


def test_without_a_tokenizer_tokens_that_the_base_lacks_are_refused_in_requests(tiny_case, folder, tmp_path):
    model = shutil.copytree(tiny_case.model, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    engine = make_engine(model)
    new = engine.model_config.vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"<|new|>": new}))
    engine.register_adapter("mine", str(folder))
    assert engine.tokenizer_of("mine") is None
    run(engine, engine.submit(greedy((1, 2, 3), "mine", 2)))
    with pytest.raises(InvalidRequest, match=str(new)):
        engine.submit(greedy((1, new, 3), "mine", 2))
