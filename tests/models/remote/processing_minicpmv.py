"""Stand-in for the processor that MiniCPM-V 4.5's checkpoint brings: a picture, then its slices in rows.

Its outputs have the names, shapes and tokens that SGLang expects of the original. How a picture is cut is simpler: two
slices along its longer side, none if it is square.
"""

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin, Qwen2Tokenizer

PATCH, SIDE, QUERIES = 14, 112, 16
PLACEHOLDER = "(<image>./</image>)"


def by_patches(image, width, height):
    """[3, PATCH, patches * PATCH]: the patches of a resized picture side by side."""
    pixels = np.asarray(image.resize((width, height)), np.float32).transpose(2, 0, 1) / 127.5 - 1
    rows = torch.from_numpy(pixels).reshape(3, height // PATCH, PATCH, width // PATCH, PATCH)
    return rows.permute(0, 2, 1, 3, 4).reshape(3, PATCH, -1)


class MiniCPMVProcessor(ProcessorMixin):
    attributes = ["tokenizer"]
    tokenizer_class = "Qwen2Tokenizer"

    def __init__(self, tokenizer=None, **kwargs):
        ids = tokenizer.convert_tokens_to_ids
        tokenizer.im_start_id, tokenizer.im_end_id = ids("<image>"), ids("</image>")
        tokenizer.slice_start_id, tokenizer.slice_end_id = ids("<slice>"), ids("</slice>")
        tokenizer.unk_id = ids("<unk>")
        super().__init__(tokenizer)

    @classmethod
    def from_pretrained(cls, directory, **kwargs):
        return cls(Qwen2Tokenizer.from_pretrained(directory))

    def __call__(self, text=None, images=None, return_tensors=None, **kwargs):
        prompt, pixels, sizes = text[0], [], []
        for image in images or []:
            columns, rows = (2, 1) if image.width > image.height else (1, 2) if image.height > image.width else (0, 0)
            width, height = image.width // max(columns, 1), image.height // max(rows, 1)
            parts = [image] + [
                image.crop((x * width, y * height, (x + 1) * width, (y + 1) * height))
                for y in range(rows) for x in range(columns)
            ]  # fmt: skip
            pixels += [by_patches(part, SIDE, SIDE) for part in parts]
            sizes += [torch.tensor([SIDE // PATCH, SIDE // PATCH], dtype=torch.int32)] * len(parts)
            one = "<unk>" * QUERIES
            slices = "\n".join(("<slice>" + one + "</slice>") * columns for _ in range(rows))
            prompt = prompt.replace(PLACEHOLDER, "<image>" + one + "</image>" + slices, 1)
        ids = torch.tensor([self.tokenizer.encode(prompt)])
        sizes = [torch.stack(sizes)] if sizes else [[]]
        return BatchFeature({"input_ids": ids, "pixel_values": [pixels], "tgt_sizes": sizes})
