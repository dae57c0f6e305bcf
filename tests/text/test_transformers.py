"""Random tokenizer folders mean here what they mean in transformers."""

import json
import os
import random
from pathlib import Path

import pytest

from slora_jax.text.tokenizer import Tokenizer
from tests.helpers.chat_templates import CHATS, TEMPLATES
from tests.helpers.seeds import drawn_seed
from tests.helpers.small_tokenizers import byte_level_folder
from tests.helpers.tokenizer_folders import random_folder, texts

pytestmark = [pytest.mark.torch, pytest.mark.timeout(600)]


def test_random_folders(ask_transformers, tmp_path):
    seed = drawn_seed()
    rng = random.Random(seed)
    template = "{{ bos_token }}|{{ eos_token }}|{{ image_token }}|{{ pad_token }}|{{ messages[0].content }}"
    questions = []
    for i in range(400):
        folder = random_folder(rng, tmp_path / str(i), chat_template=template)
        questions.append(
            {
                "folder": str(folder),
                "texts": texts(rng),
                "ids": [[rng.randrange(20) for _ in range(6)] for _ in range(3)],
                "chats": [{"messages": [{"role": "user", "content": "Hi"}], "arguments": {}}],
            }
        )
    answers = ask_transformers(questions)
    compared = 0
    for question, answer in zip(questions, answers, strict=True):
        if "error" in answer:
            continue
        compared += 1
        tokenizer = Tokenizer.from_folder(question["folder"])
        where = (seed, question["folder"])
        assert tokenizer.special_tokens == answer["names"], where
        assert [tokenizer.encode(text) for text in question["texts"]] == answer["ids"], where
        assert [tokenizer.encode(text, False) for text in question["texts"]] == answer["plain_ids"], where
        ours = [[tokenizer.decode(ids, skip) for skip in (True, False)] for ids in question["ids"]]
        assert ours == answer["texts"], where
        assert [tokenizer.apply_chat_template(c["messages"]) for c in question["chats"]] == answer["chats"], where
    assert compared > 200


def test_the_answers_that_are_kept_are_those_of_transformers(ask_transformers, tmp_path):
    """tests/text/chats.json, which test_template.py compares with. SLORA_WRITE_ANSWERS=1 writes it."""
    names = {"image_token": "<image>", "pad_token": "<|end|>", "add_bos_token": True}
    chats = [{"messages": messages, "arguments": arguments} for messages, arguments in CHATS]
    parts = [
        {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages], "arguments": a}
        for messages, a in CHATS
    ]
    questions = [
        {
            "folder": str(
                byte_level_folder(tmp_path / str(i), chat_template=template, eos_token="<|im_end|>", **names)
            ),
            "texts": [],
            "ids": [],
            "chats": parts if name.startswith("parts") else chats,
        }
        for i, (name, template) in enumerate(TEMPLATES.items())
    ]
    answers = ask_transformers(questions)
    texts = {name: answer["chats"] for name, answer in zip(TEMPLATES, answers, strict=True)}
    file = Path(__file__).parent / "chats.json"
    if os.environ.get("SLORA_WRITE_ANSWERS"):
        file.write_text(json.dumps(texts, indent=1, ensure_ascii=False) + "\n")
    assert json.loads(file.read_text()) == texts
