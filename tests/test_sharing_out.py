"""Work on whole weights shared out over processes: what they make of them is what one process makes."""

from pathlib import Path

import torch
from processes import start
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from nanogpt_hf.training.muon import Layout, Muon
from nanogpt_hf.training.sharding import AdamW, clip_sharded_grad_norm_, local

PROCESSES = 3
# Rows that three processes do not divide, fewer rows than processes, and fewer weights of a shape than processes.
SHAPES = [(10, 6)] * 4 + [(2, 6)] * 2 + [(6, 12)]
LAYOUTS = [Layout()] * 6 + [Layout(fan_in_fan_out=True, outputs=(4, 4, 4))]


def three_steps(place) -> list[torch.Tensor]:
    """Muon, AdamW and clipping on weights that `place` lays out."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(place(torch.randn(shape, generator=generator))) for shape in SHAPES]
    muon = Muon(weights, lr=0.1, weight_decay=0.2, dtype=torch.float32, layouts=LAYOUTS)
    adamw = AdamW(weights, lr=0.01, weight_decay=0.1, fused=True)
    norms = []
    for _ in range(3):
        for weight in weights:
            weight.grad = place(torch.randn(weight.shape, generator=generator))
        clip = (
            clip_sharded_grad_norm_ if hasattr(weights[0], "full_tensor") else torch.nn.utils.clip_grad_norm_
        )
        norms.append(clip(weights, 2.0))
        muon.step()
        adamw.step()
    for weight in weights:  # as its optimisers' states are saved
        for tensor in (adamw.state[weight]["exp_avg"], muon.state[weight]["momentum_buffer"]):
            assert type(tensor) is type(weight.data) and local(tensor).shape == local(weight).shape
    whole = [getattr(weight, "full_tensor", lambda weight=weight: weight)() for weight in weights]
    return [tensor.detach() for tensor in [*whole, *norms]]


def work(rank: int, meeting: str, results: Path) -> None:
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    whole = three_steps(torch.clone)
    sharded = three_steps(lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]))
    torch.save((whole, sharded), results / f"{rank}.pt")
    dist.destroy_process_group()


def test_three_processes_make_of_weights_what_one_makes(tmp_path):
    meeting = (tmp_path / "meeting").as_uri()
    processes = [start(work, rank, meeting, tmp_path) for rank in range(PROCESSES)]
    for process in processes:
        process.join(60)
        process.kill()  # one that waits for ever would be waited for
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    alone = three_steps(torch.clone)
    first, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES))
    for tensors in first:
        torch.testing.assert_close(tensors, alone, rtol=1e-5, atol=1e-6)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)
