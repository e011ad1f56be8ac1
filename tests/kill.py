"""Kills real runs at random moments and resumes them: `python tests/kill.py [how many] [seed]`.

Each run ends, after one to three kills (SIGKILL, SIGTERM or SIGINT), with the same weights, log and
metrics as a run that nobody disturbed, to the last bit. By hand: it takes about 20 seconds a run.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_tagsdc import COMMAND, assert_same_run

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # the same number gives the same bits


def start(out, resume):
    options = ["--resume"] if resume else COMMAND[2:]
    with open(out.with_suffix(".txt"), "a") as output:
        return subprocess.Popen(
            [*COMMAND[:2], *options, "--out", str(out)],
            stdout=output,
            stderr=output,
            env=ENVIRONMENT,
        )


def finish(out, resume, deadline=120):
    code = start(out, resume).wait(deadline)
    assert code == 0, f"exit {code}: {out.with_suffix('.txt').read_text()[-500:]}"


def main(count=20, seed=0):
    rng = random.Random(seed)
    place = Path(tempfile.mkdtemp())
    begin = time.time()
    finish(place / "whole", resume=False)
    seconds = time.time() - begin
    print(f"an undisturbed run takes {seconds:.1f} s")
    for n in range(count):
        out = place / f"killed{n}"
        moments = []
        for _ in range(rng.randint(1, 3)):
            process = start(out, resume=(out / "run.json").exists())
            moment = rng.uniform(1, seconds)
            time.sleep(moment)
            number = rng.choice(SIGNALS)
            process.send_signal(number)
            code = process.wait(60)
            allowed = (0, -number, 128 + number)  # 0: it was done already
            assert code in allowed, f"exit {code} after {signal.Signals(number).name}"
            moments.append(f"{signal.Signals(number).name} at {moment:.1f} s (exit {code})")
        finish(out, resume=(out / "run.json").exists())
        assert_same_run(out, place / "whole")
        assert not list(out.glob("*.part")) or "SIGKILL" in " ".join(moments)
        print(f"{n + 1}: {', '.join(moments)}: the same to the last bit", flush=True)
    shutil.rmtree(place)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
