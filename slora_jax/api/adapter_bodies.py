"""Bodies of the routes that change which adapters are served: vLLM's, with pins beside them."""

from typing import Annotated, Any

import pydantic

from slora_jax.api.openai import Body

type _NotEmpty = Annotated[str, pydantic.Field(min_length=1)]


class PinAdapter(Body):
    """Of the routes that pin and unpin an adapter."""

    lora_name: _NotEmpty


class UnloadAdapter(PinAdapter):
    """Of ``/v1/unload_lora_adapter``. vLLM's ``lora_int_id`` means nothing here."""

    lora_int_id: Any = None


class LoadAdapter(PinAdapter):
    """Of ``/v1/load_lora_adapter``. vLLM's ``lora_int_id`` and ``base_model_name`` mean nothing here."""

    lora_path: _NotEmpty
    pinned: bool = False
    load_inplace: bool = False
    lora_int_id: Any = None
    base_model_name: Any = None
    is_3d_lora_weight: bool = False
