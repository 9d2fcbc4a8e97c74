"""Stand-in for the configuration that MiniCPM-V 4.5's checkpoint brings: Qwen3's, with a SigLIP tower beside it."""

from transformers import Qwen3Config, SiglipVisionConfig


class MiniCPMVConfig(Qwen3Config):
    model_type = "minicpmv"

    def __init__(self, vision_config=None, query_num=16, version="4.5", drop_vision_last_layer=False, **kwargs):
        super().__init__(**kwargs)
        self.vision_config = SiglipVisionConfig(**(vision_config or {}))
        self.query_num, self.version = query_num, version
        self.drop_vision_last_layer = drop_vision_last_layer
