"""What transformers says about tokenizer folders: a program for a Python that has it, given a file of questions.

    python ask_transformers.py QUESTIONS ANSWERS

QUESTIONS is a JSON list of {"folder", "texts", "ids", "chats"}, a chat being {"messages", "arguments"}. ANSWERS is a
list of {"names", "ids", "plain_ids", "texts", "chats"}, or {"error"} where transformers fails on the folder.
"""

import json
import sys

from transformers import AutoTokenizer


def answer(question: dict) -> dict:
    try:
        return answers(AutoTokenizer.from_pretrained(question["folder"]), question)
    except Exception as e:
        return {"error": f"{type(e).__name__}: {e}"}


def answers(tokenizer, question: dict) -> dict:
    return {
        "names": tokenizer.special_tokens_map,
        "ids": [tokenizer.encode(text) for text in question["texts"]],
        "plain_ids": [tokenizer.encode(text, add_special_tokens=False) for text in question["texts"]],
        "texts": [
            [tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, False)] for ids in question["ids"]
        ],
        "chats": [chat_answer(tokenizer, chat) for chat in question["chats"]],
    }


def chat_answer(tokenizer, chat: dict) -> str | None:
    try:
        return tokenizer.apply_chat_template(chat["messages"], tokenize=False, **chat["arguments"])
    except Exception:
        return None


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        questions = json.load(file)
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump([answer(question) for question in questions], file)
