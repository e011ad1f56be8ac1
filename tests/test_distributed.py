"""Two processes on a CPU learn from the mean of their gradients, and end with the same weights."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import data as datasets
import tagsdc
from model import Config, TagsDC

ROOT = Path(__file__).parents[1]
OPTIONS = "--pool 6 --batch-size 3 --hard 3 --maskings 2 --refills 3 --dtype float32"
WEIGHTS = {"hard": 1.0, "tags": 0.5, "mlm": 0.3, "wod": 0.2}  # nothing for the correction head


def backward(folder, seed):
    """A model, other than that of another seed, with the gradient of a batch drawn by the seed."""
    data = datasets.load_scenes(0, (20, 2, 2), folder)
    args = tagsdc.parse_arguments(OPTIONS.split())
    sizes = {"vocab_size": len(data.tokenizer.tokens), "feature_size": data.regions.feature_size}
    torch.manual_seed(seed)
    model = TagsDC(Config(**sizes, hidden=16, layers=2, heads=2, intermediate=32, dropout=0.0))
    tagsdc.broadcast_parameters(model)
    rng = torch.Generator().manual_seed(seed)
    captions = tagsdc.draw_pairs(data.splits["train"], args.pool, rng)
    shape = (args.batch_size, args.maskings, 0.15, args.writer_sees)
    batch = tagsdc.make_batch(data, "train", captions, *shape, rng)
    settings = tagsdc.settings_of(args, data.tokenizer, "cpu", torch.float32)
    loss, _ = tagsdc.tailored_step(model, model, batch, WEIGHTS, settings)
    loss.backward()
    return model


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worker(rank, folder):
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    torch.set_num_threads(1)
    tagsdc.RANK = rank
    tagsdc.WORLD_SIZE = 2
    model = backward(Path(folder), seed=rank)
    alone = gradients_of(model)
    tagsdc.average_gradients(model)
    torch.save((model.state_dict(), alone, gradients_of(model)), f"{folder}/{rank}.pt")
    dist.barrier()  # neither ends while the other still talks to it
    dist.destroy_process_group()


def test_two_processes_go_on_with_the_mean_of_their_gradients(tmp_path):
    expected = backward(tmp_path, seed=0)  # makes the scenes, too
    multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    weights, alone, averaged = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)))
    for name, value in expected.state_dict().items():
        assert torch.equal(weights[0][name], value) and torch.equal(weights[1][name], value), name
    assert alone[0].keys() == alone[1].keys() == averaged[0].keys() == averaged[1].keys()
    assert not any(name.startswith("correction") for name in averaged[0])
    different = 0
    for name in alone[0]:
        mean = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(averaged[0][name], mean, atol=0, rtol=0, msg=name)
        assert torch.equal(averaged[0][name], averaged[1][name]), name
        different += not torch.equal(alone[0][name], alone[1][name])
    assert different > 20, "both drew the same batch"
    for name, gradient in gradients_of(expected).items():  # the first one alone, without the other
        assert torch.equal(alone[0][name], gradient), name


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
    assert "learn from 2 x 4 anchor pairs a step" in printed
    evaluation = ["--eval", str(out / "best.pt"), "--save-scores", "--dtype", "float32"]
    assert tagsdc.main(evaluation) == 0
    alone = np.load(out / "eval" / "scores.npy")
    np.testing.assert_allclose(alone, shared, atol=1e-5 * np.abs(shared).max())
