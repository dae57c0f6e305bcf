"""Writes small quantised checkpoints with compressed-tensors and transformers, and what PyTorch answers for them.

For each format of ``FORMATS`` a folder with a model, and in ``expected.safetensors`` the ``tokens`` ``[n, 3]`` of
prompts, and logits of each: ``loaded``, of the model as transformers loads that folder; ``dequantized``, of the plain
model with the weights that compressed-tensors makes of it, whose activations nothing rounds; and ``unquantized``. Needs
torch, transformers and compressed-tensors; imports nothing of slora_jax.

    python tests/oracle/make_quantized.py --out FOLDER --seed 0
"""

import argparse
import json
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
FORMATS = {
    "fp8-channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, TOKENS),
    "fp8-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, TOKENS),
    "int8-channel": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, TOKENS | {"type": "int"}),
    "packed-group": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}, None),
    "packed-channel": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}, None),
    "packed-zeros": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": False},
        None,
    ),
    "packed-eight": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 128}, None),
    "block-fp8": None,
}


def create_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.08,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def is_quantized(name: str) -> bool:
    return name.endswith("_proj.weight")


def quantized(weight: torch.Tensor, scheme: QuantizationScheme, form: str) -> dict[str, torch.Tensor]:
    """A map's tensors, by what follows its name: scales by the largest values, the rest by compressed-tensors."""
    args = scheme.weights
    groups = {
        "tensor": weight.reshape(1, 1, -1),
        "channel": weight[:, None],
        "group": weight.reshape(len(weight), -1, args.group_size or 1),
    }[args.strategy]
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    if args.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    compressor = BaseCompressor.get_value_from_registry(form)
    return compressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, scheme)


def in_blocks(weight: torch.Tensor, size: int = 128) -> dict[str, torch.Tensor]:
    blocks = weight.float().reshape(len(weight) // size, size, -1, size)
    scale = blocks.abs().amax(dim=(1, 3)) / 448
    values = (blocks / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale_inv": scale}


def dequantized(parts: dict[str, torch.Tensor], scheme: QuantizationScheme | None, form: str) -> torch.Tensor:
    if scheme is not None:
        parts = {name: part.float() if name == "weight_scale" else part for name, part in parts.items()}
        return BaseCompressor.get_value_from_registry(form).decompress(parts, scheme)["weight"]
    scale = parts["weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    return parts["weight"].float() * scale


def write(model: LlamaForCausalLM, name: str, folder: Path) -> LlamaForCausalLM:
    """Writes the folder; returns the plain model with its weights."""
    model.save_pretrained(folder)
    scheme, form = None, ""
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    if FORMATS[name] is not None:
        form, weights, activations = FORMATS[name]
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(**weights),
            input_activations=activations and QuantizationArgs(**activations),
            format=form,
        )
        quantization = QuantizationConfig(
            config_groups={"group_0": scheme}, format=form, ignore=["lm_head"], quantization_status="compressed"
        ).to_dict()
    tensors, plain = {}, {}
    for tensor, value in model.state_dict().items():
        if not is_quantized(tensor):
            tensors[tensor] = plain[tensor] = value.contiguous()
            continue
        parts = in_blocks(value) if scheme is None else quantized(value, scheme, form)
        tensors |= {f"{tensor.removesuffix('weight')}{part}": array.contiguous() for part, array in parts.items()}
        plain[tensor] = dequantized(parts, scheme, form).float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}, default=str))
    return in_float32(model.config, plain)


def in_float32(config: LlamaConfig, tensors: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    model = LlamaForCausalLM(config).float()
    model.load_state_dict({name: value.float() for name, value in tensors.items()})
    return model


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = create_model(arguments.seed)
    exact = in_float32(model.config, model.state_dict())
    tokens = torch.randint(0, 256, (16, 3), generator=torch.Generator().manual_seed(arguments.seed))
    for name in FORMATS:
        folder = arguments.out / name
        plain = write(model, name, folder)
        expected = {"tokens": tokens.to(torch.int32), "unquantized": exact(tokens).logits}
        expected["dequantized"] = plain(tokens).logits
        if name != "packed-zeros":  # transformers 5.23 expects zero points that are not packed, unlike the library
            options = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if FORMATS[name] is None else {}
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
            if options:  # some of its tensors are in bf16, whatever dtype is asked for
                loaded = in_float32(model.config, loaded.state_dict())
            expected["loaded"] = loaded(tokens).logits.float()
        save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
