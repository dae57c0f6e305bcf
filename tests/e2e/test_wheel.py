"""The wheel, built and installed in an environment of its own: it has what it needs, and nothing of the repository."""

import json
import re
import shutil
import subprocess
import urllib.request
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SHAPE = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv, to build and to install"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(["uv", "build", "--quiet", "--wheel", "--out-dir", folder, ROOT], check=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def programs(wheel) -> Path:
    """The folder of the programs of an environment that has the wheel and what it asks for."""
    environment = wheel.parent / "environment"
    subprocess.run(["uv", "venv", "--quiet", "--python", "3.12", environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run(["uv", "pip", "install", "--quiet", "--python", python, wheel], check=True)
    return environment / "bin"


def test_what_is_in_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if "/results/" in name or name.startswith("tests")]
    for needed in ("configs/shapes/llama-7b.yaml", "serve.py", "py.typed", "demo/adapters/pirate/adapter_config.json"):
        assert f"slora_jax/{needed}" in names
    assert {f"slora_jax/api/page/{name}" for name in ("index.html", "page.js", "page.css")} <= set(names)
    assert any(name.startswith("pallas_kernels/tuned/") for name in names)
    assert sum(info.file_size for info in zipfile.ZipFile(wheel).infolist()) < 20 * 2**20


def test_it_finds_its_shapes(programs, tmp_path):
    command = [programs / "python", "-m", "slora_jax.bench", "plan", "--model", "llama-70b", "--tp", "8", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["tp"] == 8


def test_it_serves(programs, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(SHAPE))
    flags = ["--model", "tiny.yaml", "--dummy", "--port", "0", "--pool-pages", "50", "--no-warm-up"]
    with subprocess.Popen(
        [programs / "slora-jax", *flags, "--no-compilation-cache"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            line = process.stdout.readline()
            url = re.search(r"http://\S+", line)[0] if line else pytest.fail(process.stderr.read())
            body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 4, "return_token_ids": True}
            request = urllib.request.Request(
                f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120) as response:
                (choice,) = json.load(response)["choices"]
            assert choice["finish_reason"] == "length" and len(choice["token_ids"]) == 4
            for path, shown in (("/", b"page/page.js"), ("/page/page.js", b"v1/pool"), ("/metrics", b"slora:pages")):
                with urllib.request.urlopen(url + path, timeout=60) as response:
                    assert shown in response.read()
        finally:
            process.terminate()
        assert process.wait(timeout=60) == 0
