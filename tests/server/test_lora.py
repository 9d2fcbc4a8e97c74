"""LoRA adapters share no KV and no view of a picture: each is a namespace of the radix tree.

No live server: SGLang's LoRA layers pin memory, which needs CUDA.
"""

from __future__ import annotations

from array import array

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from tgvkv_sglang.config import TgvConfig
from tgvkv_sglang.sglang_seam.requests import facts_of


def request(lora_id: str | None, extra_key: str | None = None) -> Req:
    return Req("r", "", array("q", [1, 2]), SamplingParams(max_new_tokens=1), lora_id=lora_id, extra_key=extra_key)


def test_an_adapter_is_a_namespace_of_its_own():
    """SGLang writes the adapter's id behind the client's key, where a client could have written it too."""
    one, other, base, posing = request("one"), request("other"), request(None), request(None, "one")
    assert [one.extra_key, other.extra_key, base.extra_key, posing.extra_key] == ["one", "other", None, "one"]
    assert request("b", "a").extra_key == request(None, "ab").extra_key == request("ab").extra_key
    requests = (one, other, base, posing, request("b", "a"), request(None, "ab"), request("ab"))
    namespaces = [facts_of(req, TgvConfig()).namespace for req in requests]
    assert len(set(namespaces)) == len(namespaces)
    assert facts_of(request("one"), TgvConfig()).namespace == namespaces[0]
