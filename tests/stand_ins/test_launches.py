"""The counter of launches, copies and waits: it notices each kind of them, and nothing else."""

import doctest
import inspect

import pytest
import torch
from tgvkv_kernels.pack_units.api import pack_units

from tests.fakes import launches
from tests.fakes.fake_cuda import CudaTensor
from tests.fakes.launches import Launches, entries, on_gpu, values
from tgvkv_sglang.device import HostCopy, to_device, upload

CUDA = torch.device("cuda", 0)
HERE = "stand_ins/test_launches.py"


def table():
    return on_gpu(torch.arange(6.0).view(2, 3))


WAITS = {
    "item": lambda: table()[1, 2].item(),
    "int": lambda: int(table()[0, 1]),
    "bool": lambda: bool((table() > 0).all()),
    "if": lambda: 1 if table().sum() > 2 else 0,
    "tolist": lambda: table().tolist(),
    "cpu": lambda: table().cpu(),
    "to cpu": lambda: table().to("cpu"),
    "to pageable memory": lambda: torch.empty(2, 3).copy_(table(), non_blocking=True),
    "nonzero": lambda: table().nonzero(),
    "one-armed where": lambda: torch.where(table() > 2),
    "a mask": lambda: table()[table() > 2],
    "writing through a mask": lambda: table().__setitem__(table() > 2, on_gpu(torch.zeros(3))),
    "masked_select": lambda: table().masked_select(table() > 2),
    "unique": lambda: table().unique(),
    "equal": lambda: torch.equal(table(), table()),
    "repeat_interleave": lambda: table()[0].repeat_interleave(on_gpu(torch.tensor([1, 0, 2]))),
    "a list": lambda: torch.tensor([1, 2], device=CUDA),
    "from pageable memory": lambda: torch.ones(2).to(CUDA, non_blocking=True),
    "pinned but blocking": lambda: torch.ones(2).pin_memory().to(CUDA),
    "into a slice": lambda: table()[0].copy_(torch.ones(3)),
    "an index of the host": lambda: table()[torch.tensor([1])],
    "a list as index": lambda: table()[[1, 0]],
    "one number into a place": lambda: table().__setitem__((0, 1), 7),
    "synchronize": lambda: torch.cuda.synchronize(),
}
COPIES_UP = {"a list", "from pageable memory", "pinned but blocking", "into a slice", "an index of the host",
             "a list as index", "one number into a place"}  # fmt: skip
COPIES_DOWN = {"item", "int", "bool", "if", "tolist", "cpu", "to cpu", "to pageable memory"}


@pytest.mark.parametrize("kind", WAITS)
def test_each_wait_is_noticed_once_and_where_it_is(kind):
    with Launches() as seen:
        WAITS[kind]()
    (wait,) = seen.waits
    assert f" at {HERE}:" in wait
    assert (seen.to_device, seen.to_host) == (int(kind in COPIES_UP), int(kind in COPIES_DOWN))


@pytest.mark.parametrize("kind", WAITS)
def test_none_of_them_can_be_captured(kind):
    with Launches() as seen, seen.capture(), pytest.raises(RuntimeError, match="CUDA graph cannot be captured"):
        WAITS[kind]()


@pytest.mark.parametrize("forbidden", [lambda: torch.ones(2).pin_memory(), lambda: HostCopy(table()).tensors(),
                                       lambda: upload(torch.ones(2), CUDA)])  # fmt: skip
def test_nor_can_pinning_copies_and_events(forbidden):
    with Launches() as seen:
        forbidden()
        assert seen.waits == []
        with seen.capture(), pytest.raises(RuntimeError, match="CUDA graph cannot be captured"):
            forbidden()


def test_uploads_and_copies_back_that_do_not_wait():
    """The project's own ways between the memories, on the path that they take on a GPU."""
    with Launches() as seen:
        up = upload(torch.arange(3), CUDA)
        to_device([4, 5], CUDA)
        pinned = torch.empty(3, dtype=torch.int64, pin_memory=True).copy_(up, non_blocking=True)
        down = HostCopy(up)
        assert (seen.to_device, seen.to_host, seen.kernels) == (2, 2, 0)
        assert down.tensors()[0].tolist() == pinned.tolist() == [0, 1, 2]
    assert seen.waits == [] and len(seen.event_waits) == 1


FREE = {
    "views": lambda x: (x[0], x[:, 1:], x.T, x.view(6), x.split([1, 1]), x.unbind(), x[None], x.detach(), x.flatten()),
    "allocation": lambda x: (torch.empty(3, device=CUDA), x.new_empty(2), torch.empty_like(x)),
    "the host's own work": lambda x: (torch.arange(5).nonzero().tolist(), torch.tensor([1, 2]).sum().item()),
    "nothing to do": lambda x: (x[:0] + 1, x.contiguous(), x.to(CUDA), x.float()),
    "shapes": lambda x: (x.shape, x.stride(), x.device.type == "cuda", x.numel(), x.is_contiguous()),
}


@pytest.mark.parametrize("kind", FREE)
def test_what_costs_nothing(kind):
    with Launches() as seen:
        FREE[kind](table())
    assert (seen.kernels, seen.to_device, seen.to_host, seen.waits) == (0, 0, 0, [])


def test_launches_by_name():
    with Launches() as seen:
        x = table()
        y = (x * 2 + 1).cumsum(1)
        y[x > 2] = 0  # one number: no wait
        x[0].copy_(y[1])
        x.to(torch.float16)
        z = torch.zeros(3, device=CUDA)
        z += 1
        torch.cat([z, y[0]])
    assert seen.launches == {"mul": 1, "add": 1, "cumsum": 1, "gt": 1, "index_put_": 1, "copy_": 1, "_to_copy": 1,
                             "zeros": 1, "add_": 1, "cat": 1}  # fmt: skip
    assert seen.waits == [] and values(z).tolist() == [1, 1, 1] and values(x)[0].tolist() == [0, 0, 0]


def test_memories_do_not_mix():
    with Launches():
        for mixed in (lambda: table() + torch.ones(3), lambda: torch.cat([table()[0], torch.ones(3)])):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
                mixed()
        assert values(table() + torch.tensor(1.0)).tolist() == [[1, 2, 3], [4, 5, 6]]
        with pytest.raises(TypeError, match="can't convert cuda"):
            table().numpy()
    with pytest.raises(RuntimeError, match="outside"):
        table() + 1


def test_operations_of_ours_count_as_their_launches_and_compute():
    with Launches() as seen:
        flats = [on_gpu(torch.arange(16.0).view(4, 2, 2)) for _ in range(2)]
        with seen.capture():
            pack_units(*flats, on_gpu(torch.tensor([3, 0])), on_gpu(torch.tensor([0, 1])))
    assert seen.launches == {"move_rows_kernel": 2} and seen.waits == []
    assert values(flats[0])[:2].flatten().tolist() == [12, 13, 14, 15, 0, 1, 2, 3]
    host = [torch.zeros(4, 2, 2)] * 2
    with Launches() as seen:  # tensors of the host are none of its business
        pack_units(*host, torch.tensor([3]), torch.tensor([0]))
    assert seen.kernels == 0


def test_copies_that_a_launch_makes_of_its_arguments_count():
    """`pack_units` wants its lists contiguous."""
    with Launches() as seen:
        flats = [on_gpu(torch.zeros(4, 2, 2)) for _ in range(2)]
        pack_units(*flats, on_gpu(torch.tensor([3, 9, 0, 9]))[::2], on_gpu(torch.tensor([0, 1])))
    assert seen.launches == {"move_rows_kernel": 2, "clone": 1}


def test_every_entry_is_known_and_none_stays_patched():
    assert {one.__name__ for one in entries()} >= {"stash_rows", "select_batch", "view_attention", "dense_rows"}
    with Launches():
        assert pack_units not in entries()
    assert pack_units in entries() and not hasattr(pack_units, "__wrapped__")
    assert all("backend" in inspect.signature(one).parameters for one in entries())
    assert isinstance(table(), CudaTensor) and not isinstance(torch.zeros(1), CudaTensor)


def test_the_example():
    assert doctest.testmod(launches) == (0, 2)
