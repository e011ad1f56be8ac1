"""Two processes on a CPU do what one does on the joint batch."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel

import tagsdc
from losses import Objective, masked_lm_loss
from model import Config, TagsDC

ROOT = Path(__file__).parents[1]
WEIGHTS = {"hard": 1.0, "tags": 0.5, "mlm": 0.3, "wod": 0.2, "woc": 0.2}


def setting(seed=0, B=4, H=3, T=7, V=20):
    """A model and a batch of B pairs with all its negatives; valid entries lie unevenly."""
    rng = torch.Generator().manual_seed(seed)
    model = TagsDC(Config(V, 6, 16, 2, 2, 32, 16, 0.0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.2)
    ids = torch.randint(5, V, (B, T), generator=rng)
    share = torch.tensor([0.1, 0.2, 0.6, 0.9])[:, None, None]
    labels = torch.where(torch.rand(B, 2, T, generator=rng) < share, ids[:, None], -1)
    batch = {
        "input_ids": ids,
        "features": torch.randn(B, 4, 6, generator=rng),
        "boxes": torch.rand(B, 4, 7, generator=rng),
        "region_mask": torch.ones(B, 4, dtype=torch.bool),
        "masked": torch.where(labels >= 0, 4, ids[:, None]),
        "labels": labels,
    }
    sentences = torch.randint(5, V, (B, H, T), generator=rng)
    valid = [[True, True, True], [True, False, False], [False] * 3, [True, True, False]]
    valid = torch.tensor(valid)
    replaced = valid[..., None] & (torch.rand(B, H, T, generator=rng) < 0.3)
    return model, batch, (sentences, valid, torch.where(replaced, ids[:, None], -1))


def gradient(objective, batch, negatives, rows, partner):
    """The loss on some rows of the batch, with its gradients; `partner`: for each row the pool
    index of a false image and a false caption."""
    part = {name: tensor[rows] for name, tensor in batch.items()}
    labels = part.pop("labels").flatten()
    part["places"] = (labels >= 0).nonzero()[:, 0]
    part["targets"] = labels[part["places"]]
    retrieved = (partner[:, None], torch.ones(len(rows), 1, dtype=torch.bool))
    negatives = tuple(tensor[rows] for tensor in negatives)
    terms, _ = objective(part, WEIGHTS, (retrieved, retrieved), negatives)
    loss = sum(WEIGHTS[name] * term for name, term in terms.items())
    loss.backward()
    return loss.detach()


def worker(rank, folder):
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    torch.set_num_threads(1)
    if rank == 0:  # a loss by itself talks to nobody: this would wait for ever
        masked_lm_loss(torch.randn(3, 5), torch.tensor([1, -1, 2]))
    model, batch, negatives = setting()
    objective = DistributedDataParallel(Objective(model, 0, 0.2), find_unused_parameters=True)
    rows = torch.tensor([0, 1]) if rank == 0 else torch.tensor([2, 3])
    loss = gradient(objective, batch, negatives, rows, torch.tensor([1, 0]))
    dist.all_reduce(loss)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.save((loss / 2, grads), f"{folder}/{rank}.pt")
    dist.barrier()  # neither ends while the other still talks to it
    dist.destroy_process_group()


def test_loss_and_gradient_of_two_processes_equal_those_of_the_joint_batch(tmp_path):
    multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    model, batch, negatives = setting()
    partner = torch.tensor([1, 0, 3, 2])
    loss = gradient(Objective(model, 0, 0.2), batch, negatives, torch.arange(4), partner)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    largest = max(grad.abs().max().item() for grad in grads.values())
    for rank in (0, 1):
        joint_loss, joint = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(joint_loss, loss, atol=1e-6, rtol=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(joint[name], grad, atol=1e-5 * largest, rtol=1e-4, msg=name)


def run(command, timeout=100):
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_torchrun_trains_and_its_score_matrix_is_that_of_one_process(tmp_path):
    small = (
        "--scenes 20 2 4 --steps 6 --phases warmup=1 tags=1 dc=1 --batch-size 4"
        " --warmup-batch-size 4 --pool 6 --hard 2 --maskings 2 --refills 2 --val-images 5"
        " --analyse-images 4 --log-every 2 --validations 2 --dtype float32 --device cpu"
        " --save-scores"
    ).split()
    out = tmp_path / "two"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", "tagsdc.py", *small, "--out", str(out)]
    printed = run(command)
    assert printed.count("RSum") > 0 and printed.count("dc 6/6") == 1, "one writer"
    shared = np.load(out / "scores.npy")
    evaluation = ["--eval", str(out / "best.pt"), "--save-scores", "--dtype", "float32"]
    assert tagsdc.main(evaluation) == 0
    alone = np.load(out / "scores.npy")
    np.testing.assert_allclose(alone, shared, atol=1e-5 * np.abs(shared).max())
