"""The config of a checkpoint for engines that know the architecture `DeciLMForCausalLM`, vLLM above all.

Self-contained: this file is copied next to the weights. It holds numbers only; the engine has the model.
"""

from types import SimpleNamespace
from typing import Any

from transformers import PretrainedConfig


class DeciLMConfig(PretrainedConfig):
    """LLaMA's fields, and `block_configs` with the sizes of every layer.

    Args:
        block_configs: for each layer `attention` (`n_heads_in_group`, `no_op`) and `ffn`
            (`intermediate_size`, `no_op`), which engines read as attributes.
        kwargs: the fields of a `LlamaConfig`.
    """

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [
            SimpleNamespace(**{part: SimpleNamespace(**sizes) for part, sizes in block.items()})
            for block in block_configs
        ]

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        fields: dict[str, Any] = super().to_dict()
        fields["block_configs"] = [
            {part: vars(sizes) for part, sizes in vars(block).items()} for block in self.block_configs
        ]
        return fields


DeciLMConfig.register_for_auto_class()
