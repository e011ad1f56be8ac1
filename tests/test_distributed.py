"""Two processes on a CPU do what one does on the joint batch."""
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from model import Config, TagsDC
from tagsdc import Objective, parse_arguments

ROOT = Path(__file__).parents[1]
WEIGHTS = {"hard": 1.0, "tags": 0.5, "mlm": 0.3, "wod": 0.2, "woc": 0.2}


class Tokenizer:
    pad_id = 0


def setting(seed=0, b=4, h=3, t=7, v=20):
    """A model and a batch of b pairs with all its negatives; valid entries lie unevenly over the rows."""
    g = torch.Generator().manual_seed(seed)
    model = TagsDC(Config(v, 6, 16, 2, 2, 32, 16, 0.0)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    ids = torch.randint(5, v, (b, t), generator=g)
    labels = torch.where(torch.rand(b, 2, t, generator=g) < torch.tensor([0.1, 0.2, 0.6, 0.9])[:, None, None], ids[:, None], -1)
    batch = dict(input_ids=ids, features=torch.randn(b, 4, 6, generator=g), boxes=torch.rand(b, 4, 7, generator=g),
                 region_mask=torch.ones(b, 4, dtype=torch.bool), masked=torch.where(labels >= 0, 4, ids[:, None]), labels=labels)
    sentences = torch.randint(5, v, (b, h, t), generator=g)
    valid = torch.tensor([[True, True, True], [True, False, False], [False] * 3, [True, True, False]])
    negatives = sentences, valid, torch.where(valid[..., None] & (torch.rand(b, h, t, generator=g) < 0.3), ids[:, None], -1)
    return model, batch, negatives


def gradient(objective, batch, negatives, rows, own):
    """Loss and gradients on some rows of the batch; `own`: for each row the pool index of a false partner."""
    part = {name: tensor[rows] for name, tensor in batch.items()}
    retrieved = (own[:, None], torch.ones(len(rows), 1, dtype=torch.bool))
    terms, _ = objective(part, WEIGHTS, (retrieved, retrieved), tuple(tensor[rows] for tensor in negatives))
    loss = sum(WEIGHTS[name] * term for name, term in terms.items())
    loss.backward()
    return loss.detach()


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model, batch, negatives = setting()
    objective = torch.nn.parallel.DistributedDataParallel(Objective(model, Tokenizer, parse_arguments([])), find_unused_parameters=True)
    rows = torch.tensor([0, 1]) if rank == 0 else torch.tensor([2, 3])
    loss = gradient(objective, batch, negatives, rows, torch.tensor([1, 0]))
    dist.all_reduce(loss)
    torch.save((loss / 2, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), f"{folder}/{rank}.pt")
    dist.barrier()  # neither ends while the other still talks to it
    dist.destroy_process_group()


def test_loss_and_gradient_of_two_processes_equal_those_of_the_joint_batch(tmp_path):
    multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    model, batch, negatives = setting()
    loss = gradient(Objective(model, Tokenizer, parse_arguments([])), batch, negatives, torch.arange(4), torch.tensor([1, 0, 3, 2]))
    for rank in (0, 1):
        joint_loss, joint = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(joint_loss, loss, atol=1e-6, rtol=1e-5)
        for name, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(joint[name], p.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_torchrun_trains_and_its_score_matrix_is_that_of_one_process(tmp_path):
    small = ("--scenes 30 5 8 --steps 6 --phases warmup=1 tags=1 dc=1 --batch-size 4 --warmup-batch-size 4 --pool 6 --hard 2 --maskings 2 --refills 2 --val-images 5 --analyse-images 4 "
             "--log-every 2 --validations 2 --dtype float32 --device cpu --save-scores").split()
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "tagsdc.py", *small, "--out", str(tmp_path / "two")]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("RSum") > 0 and done.stdout.count("dc 6/6") == 1, "one writer"
    one = [sys.executable, "tagsdc.py", "--eval", str(tmp_path / "two" / "best.pt"), "--save-scores", "--out", str(tmp_path / "two"), "--dtype", "float32"]
    import numpy as np
    shared = np.load(tmp_path / "two" / "scores.npy")
    subprocess.run(one, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=100)
    np.testing.assert_allclose(np.load(tmp_path / "two" / "scores.npy"), shared, atol=1e-6)
