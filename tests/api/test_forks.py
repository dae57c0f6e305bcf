"""An engine in a forked child: a sentence, where JAX would abort or hang."""

import os
import subprocess
import sys
import textwrap

import pytest

FORKED = """
    import multiprocessing, os, sys, warnings
    warnings.simplefilter("ignore")  # JAX and Python warn of the fork itself
    import slora_jax
    from slora_jax.config import build_config
    from slora_jax.errors import EngineStopped

    options = {
        "model": SHAPE, "dummy": True, "compilation_cache": None, "pool": {"pages": 20},
        "scheduler": {"max_sequences": 4, "max_batch_tokens": 16},
    }
    sampling = {"max_tokens": 2, "temperature": 0}

    engine = slora_jax.Engine.create(build_config(options))

    def child():
        said = set()
        for way in (
            lambda: slora_jax.generate([1, 2, 3], sampling=sampling, **options),
            lambda: engine.submit(slora_jax.Request((1, 2, 3))),
            lambda: engine.register_adapter("name", "folder"),
            lambda: engine.register_loaded_adapter("name", {"q": 8}, None),
            lambda: engine.register_adapter_dir("folder"),
            lambda: engine.unregister_adapter("name"),
            engine.step,
            engine.warm_up,
            engine.start,
        ):
            try:
                way()
            except EngineStopped as error:
                said.add(str(error))
            else:
                sys.exit(f"{way} went on")
        print(*said, sep="\\n", flush=True)
        sys.exit(7)

    first = slora_jax.generate([1, 2, 3], sampling=sampling, **options)
    forked = multiprocessing.get_context("fork").Process(target=child)
    forked.start()
    forked.join()
    print(forked.exitcode, flush=True)

    pid = os.fork()
    if pid == 0:
        slora_jax.shutdown()  # closes the parent's engines in the parent only
        os._exit(3)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    again = slora_jax.generate([1, 2, 3], sampling=sampling, **options)
    assert again.token_ids == first.token_ids
"""

SHAPE = """
hidden_size: 32
intermediate_size: 64
num_hidden_layers: 1
num_attention_heads: 2
num_key_value_heads: 2
vocab_size: 64
max_position_embeddings: 64
rms_norm_eps: 1.0e-5
model_type: llama
hidden_act: silu
tie_word_embeddings: false
rope_theta: 10000.0
"""


@pytest.mark.slow
def test_an_engine_in_a_forked_child_says_spawn_and_the_parent_goes_on(tmp_path):
    shape = tmp_path / "shape.yaml"
    shape.write_text(SHAPE)
    code = textwrap.dedent(FORKED).replace("SHAPE", repr(str(shape)))
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    if run.returncode:
        pytest.fail(run.stderr)
    said, code_of_generate, code_of_exit = run.stdout.splitlines()
    assert "multiprocessing.get_context('spawn')" in said
    assert (code_of_generate, code_of_exit) == ("7", "3")
